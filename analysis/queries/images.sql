-- Distinct images among the published rows, and the largest number of rows that share one.
select count(*) as rows, count(distinct sha256) as distinct_images,
       (select max(n) from (select count(*) as n from published group by sha256)) as rows_of_most_frequent_image
from published
