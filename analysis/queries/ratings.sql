-- reads: ratings
-- A judge's 1-5 of each caption that it judged, by column: `re_gpt4v_score`, say.
select judge, count(rating) as captions, round(avg(rating), 3) as mean,
       count(*) filter (rating = 1) as ones, count(*) filter (rating = 2) as twos,
       count(*) filter (rating = 3) as threes, count(*) filter (rating = 4) as fours,
       count(*) filter (rating = 5) as fives, count(*) - count(rating) as without
from ratings group by judge having count(rating) > 0 order by judge
