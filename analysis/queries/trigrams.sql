-- reads: captions, first_captions
-- Distinct word trigrams against subset size, the first captions of each column. Exact up to 100,000; beyond,
-- `approximate`: HyperLogLog, whose error has a sigma of 3.2 % however many there are, see
-- benchmarks/approximate.py.
with totals as (
    select caption, count(*) as number from captions group by caption
), texts as not materialized (
    select 'first' as part, nth, caption, text from first_captions(100000)
    union all select 'million', nth, caption, text from first_captions(1000000)
    union all select 'all', 0, caption, text from captions
), grams as not materialized (
    select part, caption, nth, unnest([hash(w[k], w[k + 1], w[k + 2]) for k in range(1, len(w) - 1)]) as gram
    from (select part, caption, nth, regexp_extract_all(lower(text), '[\pL\pN]+') as w from texts)
), firsts as (
    select caption, gram, min(nth) as first from grams where part = 'first' group by caption, gram
), exact as (
    select caption, subset as captions, count(gram) filter (first <= subset) as distinct_trigrams,
           false as approximate
    from totals cross join (select unnest([1000, 10000, 100000]) as subset) as sizes
         left join firsts using (caption) group by caption, subset
)
select exact.* from exact join totals using (caption) where captions <= number
union all
select caption, number, distinct_trigrams, false from exact join totals using (caption)
where captions = 100000 and number < 100000 and number not in (1000, 10000)
union all
select caption, 1000000, approx_count_distinct(gram), true from grams join totals using (caption)
where part = 'million' and number > 1000000 group by caption
union all
select caption, any_value(number), approx_count_distinct(gram), true from grams join totals using (caption)
where part = 'all' and number > 100000 group by caption
order by caption, captions
