-- Distinct nouns (lemmas, by the installed spaCy pipeline) against subset size.
-- sample: the first 10000 captions
with sizes as (select unnest([100, 1000, 10000]) as subset), firsts as (select caption, noun, min(nth) as first from nouns group by all)
select caption, subset as captions, count(*) filter (first <= subset) as distinct_nouns
from firsts, sizes where subset <= (select max(nth) from first_captions(10000)) group by all order by all
