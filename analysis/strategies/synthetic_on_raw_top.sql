-- needs: fraction
-- Recaptions on the images of the top `fraction` by the original's cosine. (Nguyen et al.)
select uid, 're_caption' as caption from pool
where org_cosine >= threshold('org_cosine', getvariable('fraction'))
