"""What only the whole run can tell: a uid that occurs twice, one image behind many URLs.

A block's part holds (high, low, value) of its rows: 128 bits of what is looked for, sorted, and where it was
seen. An answer groups the parts range by range: as they are sorted, a range is read and nothing else, so that
memory does not grow with the run, and time grows with it as fast as the rows do.

    uids       source     high, low: MD5 of the uid     value: shard and row   answer: nothing, or an error
    claimed    source     the metadata's sha256         MD5 of the URL         answer: images behind many URLs
    measured   download   sha256 of the image, if ok    MD5 of the URL         answer: images behind many URLs
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from builder import sql
from builder.core import Count, Question, Task
from builder.errors import InputError
from builder.files import write_parquet

MEMORY = "2GB"  # of DuckDB; beyond it spills into the task's scratch folder
RANGE_ROWS = 20_000_000  # rows of the parts that are grouped at a time: about 1 GB
IMAGES = pa.schema([("high", pa.uint64()), ("low", pa.uint64()), ("urls", pa.int64())])


@dataclass(frozen=True, kw_only=True)
class Uids(Question):
    """A uid names one row of the run.

    Raises:
        InputError: one occurs twice; says where.
    """

    libraries: ClassVar[tuple[str, ...]] = ("pyarrow", "duckdb")

    name: str = "uids"
    of: str = "source"

    def part(self, task: Task) -> Mapping[str, int]:
        rows = sql.table(task.all_inputs(self.of))
        columns = "md5_number_upper(uid) as high, md5_number_lower(uid) as low"
        place = "(shard::ubigint << 32) + row::ubigint as value, uid"
        return _write_part(task, f"select {columns}, {place} from {rows}")

    def answer(self, task: Task) -> Mapping[str, int]:
        parts, number = task.all_inputs(self.name), 0
        with _connected(task) as con:
            for rows in _ranges(con, parts):
                twice = con.sql(
                    f"""select min(uid), min(value), max(value) from {rows}
                        group by high, low having count(*) > 1 order by all limit 1"""
                ).fetchall()
                for uid, *both in twice:
                    at = " and ".join(f"shard {place >> 32} row {place % 2**32}" for place in both)
                    query = "copy (select distinct on (uid) * from 'in.parquet') to 'out.parquet'"
                    hint = f'remove them: duckdb -c "{query}" (no uid: URL and caption)'
                    raise InputError(f"uid {uid} occurs twice: {at}; it must identify one row", hint)
            ((number,),) = con.sql(f"select count(*) from {sql.table(parts)}").fetchall()
        # An input of all downloads: the same bytes whoever writes them.
        task.output(".txt").write_text("every uid is one row's\n")
        return {"rows": number}


@dataclass(frozen=True, kw_only=True)
class Images(Question):
    """Images behind more than `max_urls` distinct URLs: "image not available" and its kin."""

    libraries: ClassVar[tuple[str, ...]] = ("pyarrow", "duckdb")

    max_urls: Count

    def answer(self, task: Task) -> Mapping[str, int]:
        found = [IMAGES.empty_table()]
        with _connected(task) as con:
            for rows in _ranges(con, task.all_inputs(self.name)):
                table = con.sql(
                    f"""select high, low, count(distinct value) as urls from {rows}
                        group by high, low having urls > {self.max_urls} order by high, low"""
                ).to_arrow_table()
                found.append(table.cast(IMAGES))
        table = pa.concat_tables(found)
        write_parquet(table, task.output())
        return {"images": table.num_rows}


@dataclass(frozen=True, kw_only=True)
class Claimed(Images):
    """By the metadata's hashes: known before anything is downloaded, true of what passes the verification."""

    name: str = "claimed"
    of: str = "source"

    def part(self, task: Task) -> Mapping[str, int]:
        return _write_images(task, self.of, "sha256", "true")


@dataclass(frozen=True, kw_only=True)
class Measured(Images):
    """By the images that came."""

    name: str = "measured"
    of: str = "download"

    def part(self, task: Task) -> Mapping[str, int]:
        return _write_images(task, self.of, "image_sha256", "status = 'ok'")


def of_images(column: str) -> str:
    """SQL columns `high` and `low` of a sha256, as the answers have them."""
    return f"('0x' || {column}[:16])::ubigint as high, ('0x' || {column}[17:32])::ubigint as low"


def is_sha256(column: str) -> str:
    """SQL of whether a text is one: metadata come from anybody."""
    return f"regexp_full_match({column}, '[0-9a-f]{{64}}')"


def _write_images(task: Task, stage: str, column: str, which: str) -> Mapping[str, int]:
    rows = sql.table(task.all_inputs(stage))
    where = f"{which} and {is_sha256(column)}"
    columns = f"{of_images(column)}, md5_number_lower(url) as value"
    return _write_part(task, f"select distinct {columns} from {rows} where {where}")


def _write_part(task: Task, query: str) -> Mapping[str, int]:
    with _connected(task) as con:
        table = con.sql(f"{query} order by high, low, value").to_arrow_reader(100_000)
        with pq.ParquetWriter(task.output(), table.schema, compression="zstd") as writer:
            rows = 0
            for batch in table:
                writer.write_batch(batch)  # a row group each, whose range of `high` its statistics tell
                rows += len(batch)
    return {"rows": rows}


def _ranges(con: duckdb.DuckDBPyConnection, parts: Sequence[Path]) -> Iterator[str]:
    """SQL of the parts' rows, a range of `high` after the other."""
    rows = sum(pq.read_metadata(part).num_rows for part in parts)
    number = rows // RANGE_ROWS + 1
    edges = [2**64 * k // number for k in range(number)] + [2**64]
    for low, high in pairwise(edges):
        yield f"(from {sql.table(parts)} where high between {low}::ubigint and {high - 1}::ubigint)"


@contextmanager
def _connected(task: Task) -> Iterator[duckdb.DuckDBPyConnection]:
    with sql.connect(task.scratch, memory_limit=MEMORY, preserve_insertion_order=False) as con:
        yield con
