-- reads: ledger
-- Rows by status: what became of every source row.
select status, count(*) as rows, round(100.0 * count(*) / sum(count(*)) over (), 2) as percent
from ledger group by status order by rows desc, status
