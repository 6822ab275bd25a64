-- Captions as in `basic`, without the sizes; images whose nearest centroid is the nearest of a target image. (DataComp's image_based filter)
select uid, 'org_caption' as caption from pool semi join near_targets using (uid)
where english(org_caption) and len(regexp_extract_all(org_caption, '[^\s\p{Z}\x{0B}\x{1C}-\x{1F}\x{85}]+')) > 2 and length(org_caption) > 5
