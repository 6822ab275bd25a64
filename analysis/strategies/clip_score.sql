-- needs: fraction or threshold
-- The `fraction` of the pool with the highest cosine of image and original, or all from `threshold` up.
-- (DataComp)
select uid, 'org_caption' as caption from pool
where org_cosine >= coalesce(getvariable('threshold'), threshold('org_cosine', getvariable('fraction')))
