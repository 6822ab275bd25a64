-- needs: fraction, near_targets
-- Recaptions of the top `fraction` by their own cosine, on images whose nearest centroid is the nearest of a
-- target image. (Nguyen et al.)
select uid, 're_caption' as caption from pool semi join near_targets using (uid)
where re_cosine >= threshold('re_cosine', getvariable('fraction'))
