-- reads: concreteness, first_captions, visual_words
-- Grounding ratio: share of a caption's words that are in the visual vocabulary, mean over captions; and the
-- mean concreteness of its words where a table was given.
-- sample: the first 100000 captions
select caption, count(*) as captions, round(avg(visual / nullif(words, 0)), 4) as grounding_ratio_mean,
       round(avg(concreteness), 4) as concreteness_mean
from (
    select caption, row, count(*) as words, count(visual_words.word) as visual, avg(score) as concreteness
    from (select caption, nth as row, unnest(regexp_extract_all(lower(text), '[\pL\pN]+')) as word
          from first_captions(100000)) as each
         left join visual_words using (word) left join concreteness using (word)
    group by all
) group by caption order by caption
