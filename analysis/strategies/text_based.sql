-- needs: english, wordlist
-- English, and a word of the caption is in the given word list. (DataComp's text_based filter takes the words
-- whose first WordNet synset is in ImageNet-21k)
select uid, 'org_caption' as caption from pool
where english(org_caption)
      and list_has_any(regexp_extract_all(lower(org_caption), '[\pL\pN]+'), (select list(word) from wordlist))
