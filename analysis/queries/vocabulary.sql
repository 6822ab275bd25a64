-- Distinct words (lower case, letters and digits), and the share of the joint vocabulary that each caption covers. Exact.
with texts as (
    unpivot (select org_caption, re_caption from published) on org_caption, re_caption into name caption value text
), words as (
    select distinct caption, unnest(regexp_extract_all(lower(text), '[\pL\pN]+')) as word from texts
)
select caption, count(*) as distinct_words,
       round(100.0 * count(*) / (select count(distinct word) from words), 2) as joint_vocabulary_percent
from words group by caption order by caption
