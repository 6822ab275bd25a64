-- Length of the captions, original against recaption, in words (between white space) and in characters.
with texts as (
    unpivot (select org_caption, re_caption from published) on org_caption, re_caption into name caption value text
), counted as (
    select caption, len(regexp_extract_all(text, '\S+')) as words, length(text) as characters from texts
)
select caption, count(*) as captions,
       round(fsum(words) / count(*), 4) as words_mean, quantile_disc(words, 0.5) as words_median,
       quantile_disc(words, 0.05) as words_p05, quantile_disc(words, 0.95) as words_p95, max(words) as words_max,
       round(fsum(characters) / count(*), 4) as characters_mean, quantile_disc(characters, 0.5) as characters_median,
       max(characters) as characters_max
from counted group by caption order by caption
