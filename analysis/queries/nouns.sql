-- Distinct nouns (lemmas, by the installed spaCy pipeline) against subset size.
-- sample: 10000 rows
with sizes as (select unnest([100, 1000, 10000]) as subset), firsts as (select caption, noun, min(position) as first from nouns group by all)
select caption, subset as captions, count(*) filter (first <= subset) as distinct_nouns
from firsts, sizes where subset <= (select max(position) from captions) group by all order by all
