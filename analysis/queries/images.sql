-- Images of the published rows: distinct ones, the largest number of rows that share one, sizes in pixels, aspect (long side over short side).
select count(*) as rows, count(distinct sha256) as distinct_images,
       (select max(n) from (select count(*) as n from published where sha256 is not null group by sha256)) as rows_of_most_frequent_image,
       quantile_disc(width, 0.5) as width_px_median, quantile_disc(height, 0.5) as height_px_median,
       quantile_disc(least(width, height), 0.05) as short_side_px_p05, quantile_disc(greatest(width, height), 0.95) as long_side_px_p95,
       round(avg(greatest(width, height) / nullif(least(width, height), 0)), 4) as aspect_mean,
       round(100.0 * count(*) filter (greatest(width, height) > 3 * least(width, height)) / nullif(count(*), 0), 2) as aspect_over_3_percent
from published
