-- needs: english
-- Cosine by OpenAI's ViT-B/32 at least 0.28, and English. (DataComp's laion2b filter, with fastText instead
-- of CLD3)
select uid, 'org_caption' as caption from pool where b32_cosine >= 0.28::float and english(org_caption)
