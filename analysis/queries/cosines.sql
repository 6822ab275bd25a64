-- Cosine of image and caption by the recipe's scoring model, and CLIP-S = 2.5 * max(cosine, 0).
select caption, count(*) as scored, round(fsum(cosine) / count(*), 4) as cosine_mean, round(quantile_disc(cosine, 0.05), 4) as cosine_p05,
       round(quantile_disc(cosine, 0.5), 4) as cosine_median, round(quantile_disc(cosine, 0.95), 4) as cosine_p95,
       round(2.5 * fsum(greatest(cosine, 0)) / count(*), 4) as clip_s_mean
from scores group by caption order by caption
