-- needs: nothing
-- Every row with its original caption. (DataComp)
select uid, 'org_caption' as caption from pool
