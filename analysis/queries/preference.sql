-- reads: published
-- Recaption against original, where both are scored: how often each is nearer to the image, and the mean of
-- softmax(100 * cosines).
select count(*) as rows,
       round(100.0 * count(*) filter (re_clip_score > org_clip_score) / nullif(count(*), 0), 2)
           as recaption_nearer_percent,
       round(100.0 * count(*) filter (org_clip_score > re_clip_score) / nullif(count(*), 0), 2)
           as original_nearer_percent,
       round(100.0 * avg(1 / (1 + exp(100 * (org_clip_score - re_clip_score)))), 2)
           as recaption_softmax_percent,
       round(avg(re_gpt4v_score), 4) as recaption_judge_mean,
       round(avg(org_gpt4v_score), 4) as original_judge_mean
from published where re_clip_score is not null and org_clip_score is not null
