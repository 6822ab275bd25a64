-- Captions by number of words (between white space), in bins of 4; `words` is the lower edge.
with texts as (
    unpivot (select org_caption, re_caption from published) on org_caption, re_caption into name caption value text
)
select caption, len(regexp_extract_all(text, '\S+')) // 4 * 4 as words, count(*) as captions
from texts group by all order by caption, words
