-- reads: words
-- Distinct words (lower case, letters and digits), and the share of the joint vocabulary that each caption
-- covers. Exact.
select caption, count(*) as distinct_words, sum(times)::bigint as words,
       round(100.0 * count(*) / (select count(distinct word) from words), 2) as joint_vocabulary_percent
from words group by caption order by caption
