-- Links that still gave an image, by top-level domain (the 20 most frequent) and by host (the 20 most frequent).
with hosts as (
    select rtrim(lower(regexp_extract(url, '^[a-zA-Z]+://(?:[^/?#]*@)?(\[[^\]]*\]|[^/:?#]+)', 1)), '.') as host, count(*) as links,
           count(*) filter (status not in ('dead_link', 'unavailable', 'timeout', 'invalid_url', 'blocked', 'undecodable')) as alive
    from ledger where url is not null group by host
), named as (
    select 'tld' as what, if(regexp_matches(host, '^[\d.]+$|^\['), 'an IP address', regexp_extract(host, '([^.]+)$', 1)) as name, links, alive from hosts
    union all select 'host', host, links, alive from hosts
)
select what, name, sum(links)::bigint as links, round(100.0 * sum(alive) / sum(links), 2) as alive_percent
from named where name <> '' group by what, name
qualify row_number() over (partition by what order by sum(links) desc, name) <= 20
order by what desc, links desc, name
