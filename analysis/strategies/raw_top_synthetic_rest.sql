-- needs: fraction
-- Originals of the top `fraction` by their cosine, recaptions for all the rest. (Nguyen et al.)
select uid,
       if(org_cosine >= threshold('org_cosine', getvariable('fraction')), 'org_caption', 're_caption')
           as caption
from pool
