-- needs: fraction
-- Originals of the top `fraction` by their cosine, recaptions for the rest whose cosine reaches the same
-- threshold. (Nguyen et al.)
select uid,
       if(org_cosine >= threshold('org_cosine', getvariable('fraction')), 'org_caption', 're_caption')
           as caption
from pool
where greatest(org_cosine, re_cosine) >= threshold('org_cosine', getvariable('fraction'))
