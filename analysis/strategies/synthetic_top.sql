-- needs: fraction
-- Recaptions of the top `fraction` by their own cosine. (Nguyen et al.)
select uid, 're_caption' as caption from pool
where re_cosine >= threshold('re_cosine', getvariable('fraction'))
