-- reads: caption_columns, words
-- Words that one caption has and the first does not, the 30 most frequent, and the other way round: what
-- recaptioning gains and loses.
with first as (select caption as name from caption_columns order by place limit 1), sides as (
    select a.caption, 'gained' as change, a.word, a.times
    from words a anti join (from words, first where caption = name) b using (word)
    union all
    select others.caption, 'lost', a.word, a.times
    from (from words, first where caption = name) a,
         (select distinct caption from words, first where caption <> name) others
    where not exists (from words b where b.caption = others.caption and b.word = a.word)
)
select caption, change, word, times, count(*) over (partition by caption, change) as distinct_words
from sides qualify row_number() over (partition by caption, change order by times desc, word) <= 30
order by caption, change, times desc, word
