-- needs: fraction
-- Original and recaption, concatenated, for the top `fraction` by the original's cosine; recaptions for the
-- rest that reach the threshold. (Nguyen et al.)
select uid,
       if(org_cosine >= threshold('org_cosine', getvariable('fraction')),
          'org_caption+re_caption', 're_caption') as caption
from pool
where greatest(org_cosine, re_cosine) >= threshold('org_cosine', getvariable('fraction'))
