-- Links that still gave an image, by top-level domain (the 20 most frequent) and by host (the 20 most frequent).
with hosts as (
    select rtrim(lower(regexp_extract(url, '^[a-zA-Z]+://(?:[^/?#]*@)?(\[[^\]]*\]|[^/:?#]+)', 1)), '.') as host,
           status not in ('dead_link', 'unavailable', 'timeout', 'invalid_url', 'blocked', 'undecodable') as alive
    from ledger where url is not null
), counted as (
    select 'tld' as what, if(regexp_matches(host, '^[\d.]+$|^\['), 'an IP address', regexp_extract(host, '([^.]+)$', 1)) as name, alive from hosts union all select 'host', host, alive from hosts
)
select what, name, links, alive_percent from (
    select what, name, count(*) as links, round(100.0 * count(*) filter (alive) / count(*), 2) as alive_percent from counted where name <> '' group by what, name
) qualify row_number() over (partition by what order by links desc, name) <= 20
order by what desc, links desc, name
