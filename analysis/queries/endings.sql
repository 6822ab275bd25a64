-- reads: published
-- Recaptions that stopped at the token limit, end without a full stop, or were cut by the scoring model's
-- context.
select count(*) as captions,
       count(*) filter (re_finish_reason = 'length') as stopped_at_limit,
       count(*) filter (not regexp_matches(re_caption, '[.!?…。！？]["''”’)\]]*\s*$')) as without_full_stop,
       count(*) filter (re_clip_cut) as recaptions_cut_in_scoring,
       count(*) filter (org_clip_cut) as originals_cut_in_scoring
from published
