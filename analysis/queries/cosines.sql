-- reads: scores
-- Cosine of image and caption by the recipe's scoring model, and CLIP-S = 2.5 * max(cosine, 0).
with rounded as (
    select caption, round(cosine, 4) as cosine, count(*) as times, fsum(cosine) as total,
           fsum(greatest(cosine, 0)) as positive
    from scores group by all
), ranked as (
    select *, sum(times) over (partition by caption order by cosine) as upto,
           sum(times) over (partition by caption) as number
    from rounded
)
select caption, any_value(number)::bigint as scored, round(fsum(total) / any_value(number), 4) as cosine_mean,
       min(cosine) filter (upto >= 0.05 * number) as cosine_p05,
       min(cosine) filter (upto >= 0.5 * number) as cosine_median,
       min(cosine) filter (upto >= 0.95 * number) as cosine_p95,
       round(2.5 * fsum(positive) / any_value(number), 4) as clip_s_mean
from ranked group by caption order by caption
