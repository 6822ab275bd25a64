-- reads: published
-- Images of the published rows: distinct ones, the largest number of rows that share one, sizes in pixels,
-- aspect (long side over short side).
with hashes as (
    select sha256, count(*) as times from published where sha256 is not null group by sha256
), sizes as (
    select width, height, if(width > height, width, height) as long,
           if(width > height, height, width) as short, count(*) as times
    from published group by all
), measured as (
    select what, value, sum(times) as times
    from (unpivot sizes on width, height, long, short into name what value value) group by all
), ranked as (
    select *, sum(times) over (partition by what order by value) as upto,
           sum(times) over (partition by what) as number
    from measured
)
select coalesce(sum(times), 0)::bigint as rows, (select count(*) from hashes) as distinct_images,
       (select max(times) from hashes) as rows_of_most_frequent_image,
       (select min(value) from ranked where what = 'width' and upto >= 0.5 * number) as width_px_median,
       (select min(value) from ranked where what = 'height' and upto >= 0.5 * number) as height_px_median,
       (select min(value) from ranked where what = 'short' and upto >= 0.05 * number) as short_side_px_p05,
       (select min(value) from ranked where what = 'long' and upto >= 0.95 * number) as long_side_px_p95,
       round(sum(times * long / nullif(short, 0))
             / sum(times) filter (long / nullif(short, 0) is not null), 4) as aspect_mean,
       round(100.0 * coalesce(sum(times) filter (long > 3 * short), 0) / nullif(sum(times), 0), 2)
           as aspect_over_3_percent
from sizes
