-- Captions by number of words (between white space), in bins of 4; `words` is the lower edge.
select caption, len(regexp_extract_all(text, '\S+')) // 4 * 4 as words, count(*) as captions
from captions group by all order by caption, words
