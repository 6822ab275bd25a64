-- Captions by cosine, in bins of 0.02; `cosine` is the lower edge.
select caption, round(floor(cosine / 0.02) * 0.02, 2) as cosine, count(*) as captions
from scores group by all order by caption, cosine
