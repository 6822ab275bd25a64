-- reads: first_captions, nouns
-- Distinct nouns (lemmas, by the installed spaCy pipeline) against subset size, up to as many captions as the
-- column has.
-- sample: the first 10000 captions
with totals as (
    select caption, count(*) as number from first_captions(10000) group by caption
), firsts as (
    select caption, noun, min(nth) as first from nouns group by caption, noun
)
select caption, subset as captions, count(noun) filter (first <= subset) as distinct_nouns
from totals cross join (select unnest([100, 1000, 10000]) as subset) as sizes left join firsts using (caption)
where subset <= number group by caption, subset order by caption, subset
