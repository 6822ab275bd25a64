-- Captions by cosine, in bins of 0.02; `cosine` is the lower edge.
with scores as (
    unpivot (select org_clip_score as org_caption, re_clip_score as re_caption from published)
    on org_caption, re_caption into name caption value cosine
)
select caption, round(floor(cosine / 0.02) * 0.02, 2) as cosine, count(*) as captions
from scores group by all order by caption, cosine
