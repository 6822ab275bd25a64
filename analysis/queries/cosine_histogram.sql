-- reads: scores
-- Captions by cosine, in bins of 0.02; `cosine` is the lower edge.
select caption, floor(round(cosine * 50, 9)) / 50 as cosine, count(*) as captions
from scores group by all order by caption, cosine
