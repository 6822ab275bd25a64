-- Distinct word trigrams against subset size. Exact up to 100,000 captions; beyond, `approximate` (HyperLogLog, see benchmarks/README.md for its error).
with totals as (
    select caption, count(*) as number from captions group by caption
), grams as (
    select caption, position, unnest([hash(w[k], w[k + 1], w[k + 2]) for k in range(1, len(w) - 1)]) as gram
    from (select caption, row_number() over (partition by caption order by position) as position, regexp_extract_all(lower(text), '[\pL\pN]+') as w from captions)
), firsts as (
    select caption, gram, min(position) as first from grams where position <= 100000 group by caption, gram
), exact as (
    select caption, subset as captions, count(*) filter (first <= subset) as distinct_trigrams, false as approximate
    from firsts, (select unnest([1000, 10000, 100000]) as subset) as sizes group by caption, subset
), estimated as (
    select caption, approx_count_distinct(gram) filter (position <= 1000000) as of_a_million, approx_count_distinct(gram) as of_all from grams group by caption
)
select exact.* from exact join totals using (caption) where captions <= number
union all
select caption, number, distinct_trigrams, false from exact join totals using (caption) where captions = 100000 and number < 100000 and number not in (1000, 10000)
union all
select caption, 1000000, of_a_million, true from estimated join totals using (caption) where number > 1000000
union all
select caption, number, of_all, true from estimated join totals using (caption) where number > 100000
order by caption, captions
