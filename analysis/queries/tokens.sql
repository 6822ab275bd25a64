-- reads: tokens
-- Length in tokens of the tokenizer named in the rows, with the special tokens that it adds, and the share
-- that is cut at a context of 64, 77, 128 and 248.
-- sample: the first 20000 captions
select caption, tokenizer, count(*) as captions, round(fsum(tokens) / count(*), 4) as tokens_mean,
       quantile_disc(tokens, 0.5) as tokens_median, quantile_disc(tokens, 0.95) as tokens_p95,
       max(tokens) as tokens_max,
       round(100.0 * count(*) filter (tokens > 64) / count(*), 2) as cut_at_64_percent,
       round(100.0 * count(*) filter (tokens > 77) / count(*), 2) as cut_at_77_percent,
       round(100.0 * count(*) filter (tokens > 128) / count(*), 2) as cut_at_128_percent,
       round(100.0 * count(*) filter (tokens > 248) / count(*), 2) as cut_at_248_percent
from tokens group by all order by caption
