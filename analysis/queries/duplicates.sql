-- reads: captions, near_duplicates
-- Captions that another row has too, letter for letter (by a 64-bit hash and the length); and near duplicates
-- (MinHash of word trigrams, Jaccard similarity at least 0.8) on a sample.
with texts as (
    select caption, hash(text) as text, length(text)::integer as characters, count(*) as times
    from captions group by all
), summed as (
    select caption, sum(times)::bigint as captions, count(*) as distinct_captions,
           round(100.0 * coalesce(sum(times) filter (times > 1), 0) / sum(times), 2) as repeated_percent,
           max(times) as most_repeated
    from texts group by caption
)
select caption, captions, distinct_captions, repeated_percent, most_repeated,
       near_percent as near_duplicate_percent, near_captions as near_duplicate_sample
from summed left join near_duplicates using (caption) order by caption
