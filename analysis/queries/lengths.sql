-- Length of the captions in words (between white space, Unicode's) and in characters.
select caption, count(*) as captions,
       round(fsum(words) / count(*), 4) as words_mean, quantile_disc(words, 0.5) as words_median,
       quantile_disc(words, 0.05) as words_p05, quantile_disc(words, 0.95) as words_p95, max(words) as words_max,
       round(fsum(characters) / count(*), 4) as characters_mean, quantile_disc(characters, 0.5) as characters_median,
       quantile_disc(characters, 0.05) as characters_p05, quantile_disc(characters, 0.95) as characters_p95, max(characters) as characters_max
from counted group by caption order by caption
