-- needs: fraction
-- Original captions of the top `fraction` by their cosine. (Nguyen et al., "raw captions (filtered)")
select uid, 'org_caption' as caption from pool
where org_cosine >= threshold('org_cosine', getvariable('fraction'))
