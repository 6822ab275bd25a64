-- reads: defects, ledger
-- Defects of captions by kind: in first replies (of a row that failed: in its last), kept with the caption, and
-- those for which rows failed after all their replies. `again` counts replies that were not taken, `blind` captions, of those that were looked at,
-- that a blank picture gets too.
with replies as (
    select caption, 'first' as place,
           unnest(string_split(if(rejected is null, defects, split_part(rejected, ';', 1)), ',')) as defect
    from defects
    union all
    select caption, 'kept', unnest(string_split(defects, ',')) from defects
    union all
    select regexp_extract(error, '^(\w+): (\w+): ', 1), 'failed', regexp_extract(error, '^(\w+): (\w+): ', 2)
    from ledger where status = 'caption_failed' and regexp_matches(error, '^\w+: \w+: ')
), kinds as (
    select caption, defect,
           count(*) filter (place <> 'kept' and defect not in ('identical', 'stand_in', 'missing')) as first,
           count(*) filter (place = 'kept') as kept, count(*) filter (place = 'failed') as failed
    from replies group by all
), columns as (
    select caption, count(*) as captions, coalesce(sum(len(string_split(rejected, ';'))), 0)::bigint as again,
           count(blind) as looked_at, count(*) filter (blind) as blind
    from defects group by all
)
from columns full join kinds using (caption) order by caption, first desc, defect
