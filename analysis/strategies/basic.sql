-- needs: english
-- English by fastText, more than 2 words, more than 5 characters, shorter side at least 200 pixels, aspect at
-- most 3. (DataComp's basic_filter)
select uid, 'org_caption' as caption from pool
where english(org_caption) and count_words(org_caption) > 2 and length(org_caption) > 5
      and least(width, height) >= 200 and greatest(width, height) <= 3 * least(width, height)
