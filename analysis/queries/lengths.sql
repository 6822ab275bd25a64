-- reads: counted
-- Length of the captions in words (between white space, Unicode's) and in characters. A quantile is the
-- smallest length that as large a share does not exceed.
with measured as (
    select caption, 'words' as what, words as value, sum(times) as times from counted group by all
    union all
    select caption, 'characters', characters, sum(times) from counted group by all
), ranked as (
    select *, sum(times) over (partition by caption, what order by value) as upto,
           sum(times) over (partition by caption, what) as number
    from measured
), summed as (
    select caption, what, any_value(number)::bigint as number,
           round(sum(value * times)::double / any_value(number), 4) as mean,
           min(value) filter (upto >= 0.5 * number) as median,
           min(value) filter (upto >= 0.05 * number) as p05,
           min(value) filter (upto >= 0.95 * number) as p95, max(value) as longest
    from ranked group by caption, what
)
select caption, w.number as captions, w.mean as words_mean, w.median as words_median, w.p05 as words_p05,
       w.p95 as words_p95, w.longest as words_max,
       c.mean as characters_mean, c.median as characters_median, c.p05 as characters_p05,
       c.p95 as characters_p95, c.longest as characters_max
from summed as w join summed as c using (caption) where w.what = 'words' and c.what = 'characters'
order by caption
