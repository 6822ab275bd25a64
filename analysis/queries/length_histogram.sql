-- reads: counted
-- Captions by number of words (between white space, Unicode's), in bins of 4; `words` is the lower edge.
select caption, words // 4 * 4 as words, sum(times)::bigint as captions
from counted group by all order by caption, words
