-- reads: ledger
-- Links by top-level domain (the 20 most frequent) and by host (the 20 most frequent): alive, and changed.
-- Alive is only what proves the image: `ok`, and `caption_failed`, whose image came. Changed is
-- `hash_mismatch`: an image, but another one; without a hash in the metadata, or with verify_sha256=false, it
-- passes for alive. All else did not answer, or answered without the image: a placeholder
-- (`duplicate_image`), HTML, an opt-out, too many bytes. Removed rows have no URL and do not count.
-- A host ends at white space: none can call itself 'an IP address'.
with hosts as (
    select rtrim(lower(regexp_extract(url, '^[a-zA-Z]+://(?:[^/?#]*@)?(\[[^\]]*\]|[^/:?#\s]+)', 1)), '.')
               as host, count(*) as links, count(*) filter (status in ('ok', 'caption_failed')) as alive,
           count(*) filter (status = 'hash_mismatch') as changed
    from ledger where url is not null group by host
), named as (
    select 'tld' as what, links, alive, changed,
           if(regexp_matches(host, '^[\d.]+$|^\['), 'an IP address', regexp_extract(host, '[^.]+$')) as name
    from hosts
    union all by name select 'host' as what, host as name, links, alive, changed from hosts
)
select what, name, sum(links)::bigint as links, round(100.0 * sum(alive) / sum(links), 2) as alive_percent,
       round(100.0 * sum(changed) / sum(links), 2) as changed_percent
from named where name <> '' group by what, name
qualify row_number() over (partition by what order by sum(links) desc, name) <= 20
order by what desc, links desc, name
