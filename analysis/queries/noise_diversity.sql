-- reads: pool, selections
-- Noise against diversity of what each selection strategy keeps (Nguyen et al., figure 5): mean cosine, and
-- distinct trigrams per 1,000 captions. A concatenation of original and recaption was never scored: it has
-- the greater cosine of its two parts, which is not its own; `concatenated` counts such captions.
-- sample: 20000 rows
with kept as (
    select strategy, fraction, caption, uid, caption not in ('org_caption', 're_caption') as concatenated,
           case caption when 'org_caption' then org_caption when 're_caption' then re_caption
                        else org_caption || ' ' || re_caption end as text,
           case caption when 'org_caption' then org_cosine when 're_caption' then re_cosine
                        else greatest(org_cosine, re_cosine) end as cosine
    from selections join pool on selections.position = pool.uid
), grams as (
    select strategy, fraction, count(distinct gram) as distinct_trigrams from (
        select strategy, fraction,
               unnest([hash(w[k], w[k + 1], w[k + 2]) for k in range(1, len(w) - 1)]) as gram
        from (select strategy, fraction, regexp_extract_all(lower(text), '[\pL\pN]+') as w from kept)
    ) group by strategy, fraction
)
select strategy, fraction, count(*) as captions, count(*) filter (concatenated) as concatenated,
       round(fsum(cosine) / count(cosine), 4) as cosine_mean,
       any_value(distinct_trigrams) as distinct_trigrams,
       round(1000.0 * any_value(distinct_trigrams) / count(*), 1) as distinct_trigrams_per_1000
from kept left join grams using (strategy, fraction) group by strategy, fraction order by strategy, fraction
