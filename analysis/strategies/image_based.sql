-- Captions as in `basic`, without the sizes; images whose nearest centroid is the nearest of a target image. (DataComp's image_based filter)
select uid, 'org_caption' as caption from pool semi join near_targets using (uid)
where english(org_caption) and len(string_split_regex(trim(org_caption), '\s+')) > 2 and length(org_caption) > 5
