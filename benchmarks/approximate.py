"""The error of approx_count_distinct, by which `trigrams` counts beyond 100,000 captions, over 24 seeds.

    python benchmarks/approximate.py

1,000,000 distinct 64-bit hashes, and 13,858,960, the trigrams of 300,000 recaptions of 50 words; each seed
draws others. Different integers have different hashes, so that the exact count is known; it is counted once
to be sure. One draw says little of an error that has a spread: `sigma_percent`.
"""

from __future__ import annotations

import statistics
import time

import duckdb
from common import keep

SEEDS, SIZES = 24, (1_000_000, 13_858_960)
HASHES = "(select hash(range) as gram from range($seed::bigint << 32, ($seed::bigint << 32) + $size))"


def count(con: duckdb.DuckDBPyConnection, what: str, seed: int, size: int) -> int:
    ((number,),) = con.execute(f"select {what} from {HASHES}", {"seed": seed, "size": size}).fetchall()
    return int(number)


def main() -> None:
    start, result = time.monotonic(), {}
    with duckdb.connect() as con:
        for size in SIZES:
            assert count(con, "count(distinct gram)", 0, size) == size
            estimates = [count(con, "approx_count_distinct(gram)", seed, size) for seed in range(SEEDS)]
            errors = [100 * (estimate / size - 1) for estimate in estimates]
            result[f"{size}"] = {
                "mean_error_percent": round(statistics.mean(errors), 2),
                "sigma_percent": round(statistics.stdev(errors), 2),
                "largest_error_percent": round(max(errors, key=abs), 2),
                "errors_percent": [round(error, 2) for error in errors],
            }
    about = {"seeds": SEEDS, "duckdb": duckdb.__version__, "seconds": round(time.monotonic() - start, 1)}
    keep("approximate", {"distinct": result, **about})


if __name__ == "__main__":
    main()
