-- needs: english, near_targets
-- English, more than 1 word, more than 5 characters; images whose nearest centroid is the nearest of a target
-- image. (DataComp's image_based filter)
select uid, 'org_caption' as caption from pool semi join near_targets using (uid)
where english(org_caption) and count_words(org_caption) > 1 and length(org_caption) > 5
