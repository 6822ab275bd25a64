-- Captions by number of words (between white space, Unicode's), in bins of 4; `words` is the lower edge.
select caption, len(regexp_extract_all(text, '[^\s\p{Z}\x{0B}\x{1C}-\x{1F}\x{85}]+')) // 4 * 4 as words, count(*) as captions
from captions group by all order by caption, words
