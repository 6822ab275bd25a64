-- needs: fraction
-- The top `fraction` of originals and the top `fraction` of recaptions, each by its cosine; an image may come
-- twice. (Nguyen et al.)
select uid, 'org_caption' as caption from pool
where org_cosine >= threshold('org_cosine', getvariable('fraction'))
union all
select uid, 're_caption' from pool where re_cosine >= threshold('re_cosine', getvariable('fraction'))
