-- reads: captions
-- What does not belong into a caption: escapes and mojibake, HTML entities and tags, e-mail addresses,
-- telephone numbers, URLs. Percent of captions.
select caption, count(*) as captions,
       round(100.0 * count(*) filter (contains(text, '\')
           and regexp_matches(text, '\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\n')) / count(*), 4)
           as escapes_percent,
       round(100.0 * count(*) filter (strlen(text) > length(text)
           and regexp_matches(text, 'Ã[\x{80}-\x{BF}]|â€|Â[\x{A0}-\x{BF}]|\x{FFFD}')) / count(*), 4)
           as mojibake_percent,
       round(100.0 * count(*) filter ((contains(text, '&') or contains(text, '<'))
           and regexp_matches(text,
               '&([a-zA-Z]{2,8}[0-9]{0,2}|#[0-9]+|#[xX][0-9a-fA-F]+);|</?[a-zA-Z][^<>]*>')) / count(*), 4)
           as html_percent,
       round(100.0 * count(*) filter (contains(text, '@')
           and regexp_matches(text, '[\w.+-]+@[\w-]+\.[a-zA-Z]{2,}')) / count(*), 4) as email_percent,
       round(100.0 * count(*) filter (regexp_matches(text,
           '(\+\d{1,3}[ .-]?)?(\(\d{2,4}\)[ .-]?|\b\d{3}[ .-])\d{3}[ .-]\d{4}\b')) / count(*), 4)
           as phone_percent,
       round(100.0 * count(*) filter ((contains(text, '://') or contains(lower(text), 'www.'))
           and regexp_matches(text, '(?i)\bhttps?://\S|\bwww\.\w')) / count(*), 4) as url_percent
from captions group by caption order by caption
