-- reads: words
-- The 30 most frequent words of each caption, per thousand words.
select caption, word, times, round(1000.0 * times / sum(times) over (partition by caption), 3) as per_thousand
from words qualify row_number() over (partition by caption order by times desc, word) <= 30
order by caption, times desc, word
