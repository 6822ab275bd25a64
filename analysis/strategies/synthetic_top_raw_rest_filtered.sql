-- needs: fraction
-- Recaptions of the top `fraction` by their cosine, originals for the rest whose cosine reaches the same
-- threshold. (Nguyen et al.)
select uid,
       if(re_cosine >= threshold('re_cosine', getvariable('fraction')), 're_caption', 'org_caption')
           as caption
from pool
where greatest(org_cosine, re_cosine) >= threshold('re_cosine', getvariable('fraction'))
