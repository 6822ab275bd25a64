-- reads: first_captions
-- Sameness: distinct-3 (distinct trigrams over trigrams), rep-4 (share of a caption's 4-grams that it has
-- said before, mean), the share that opens with "the image shows" and its kin, and the share of captions that
-- begin with one of the 100 most frequent 4-word prefixes.
-- sample: the first 100000 captions
with words as (
    select caption, regexp_extract_all(lower(text), '[\pL\pN]+') as w, text from first_captions(100000)
), grams as (
    select caption, w, text, [hash(w[k], w[k + 1], w[k + 2]) for k in range(1, len(w) - 1)] as three,
           [hash(w[k], w[k + 1], w[k + 2], w[k + 3]) for k in range(1, len(w) - 2)] as four
    from words
), threes as (
    select caption, count(distinct gram) / count(*) as distinct_3
    from (select caption, unnest(three) as gram from grams) group by caption
), prefixes as (
    select caption, array_to_string(w[:4], ' ') as prefix, count(*) as times from words group by all
), mass as (
    select caption, sum(times) as top
    from (from prefixes qualify row_number() over (partition by caption order by times desc, prefix) <= 100)
    group by caption
)
select caption, round(any_value(distinct_3), 4) as distinct_3,
       round(avg(if(len(four) > 0, 1 - len(list_distinct(four)) / len(four), null)), 4) as rep_4_mean,
       round(100.0 * count(*) filter (regexp_matches(text,
           '(?i)^\W*(the|this|an|a)?\s*(image|picture|photo|photograph|scene)\s+'
           '(is|shows|showcases|depicts|features|displays|captures|presents|contains|portrays)\b'))
             / count(*), 2) as opener_percent,
       round(100.0 * any_value(top) / count(*), 2) as top_100_prefixes_percent
from grams left join threes using (caption) join mass using (caption) group by caption order by caption
