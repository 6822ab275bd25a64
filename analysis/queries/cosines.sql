-- Cosine of image and caption by the recipe's scoring model, and how often the recaption is nearer to the image.
with scores as (
    unpivot (select org_clip_score as org_caption, re_clip_score as re_caption from published)
    on org_caption, re_caption into name caption value cosine
)
select caption, count(*) as scored, round(fsum(cosine) / count(*), 4) as cosine_mean,
       round(quantile_disc(cosine, 0.05), 4) as cosine_p05, round(quantile_disc(cosine, 0.5), 4) as cosine_median,
       round(quantile_disc(cosine, 0.95), 4) as cosine_p95,
       (select round(100.0 * count(*) filter (if(caption = 're_caption', re_clip_score > org_clip_score, org_clip_score > re_clip_score))
               / count(*), 2) from published where re_clip_score is not null and org_clip_score is not null) as nearer_percent
from scores group by caption order by caption
