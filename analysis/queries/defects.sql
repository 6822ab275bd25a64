-- reads: defects, ledger
-- Defects of captions by kind: in first replies, kept with the caption, and those for which rows failed after
-- all their replies. `again` counts replies that were not taken, `blind` captions, of those that were looked at,
-- that a blank picture gets too.
with of_first as (
    select caption, unnest(string_split(if(rejected is null, defects, split_part(rejected, ';', 1)), ','))
        as defect, count(*) as n from defects group by all
), of_kept as (
    select caption, unnest(string_split(defects, ',')) as defect, count(*) as n from defects group by all
), of_failed as (
    select regexp_extract(error, '^(\w+): (\w+): ', 1) as caption,
           regexp_extract(error, '^(\w+): (\w+): ', 2) as defect, count(*) as n
    from ledger where status = 'caption_failed' and regexp_matches(error, '^\w+: \w+: ') group by all
), rows as (
    select caption, count(*) as captions, coalesce(sum(len(string_split(rejected, ';'))), 0)::bigint as again,
           count(blind) as looked_at, count(*) filter (blind) as blind
    from defects group by all
), kinds as (
    select caption, defect from of_first union select caption, defect from of_kept
    union select caption, defect from of_failed
)
select rows.caption, rows.captions, rows.again, rows.looked_at, rows.blind, kinds.defect,
       coalesce(of_first.n, 0) + coalesce(of_failed.n, 0) as first,
       coalesce(of_kept.n, 0) as kept, coalesce(of_failed.n, 0) as failed
from rows left join kinds using (caption) left join of_first using (caption, defect)
    left join of_kept using (caption, defect) left join of_failed using (caption, defect)
order by caption, first desc, defect
