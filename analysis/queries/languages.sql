-- reads: languages
-- Languages of the captions by fastText lid.176 (its compressed form), on the first 100,000 captions.
-- `languages` is made in Python.
select caption, language, count(*) as captions,
       round(100.0 * count(*) / sum(count(*)) over (partition by caption), 2) as percent
from languages group by caption, language order by caption, captions desc, language
