"""What was taken down stays down: hashes of uids, images, URLs and domains that no later version may hold.

A version carries them in `tombstones.parquet`, columns `kind` and `mark`, the sha256 of `kind:value`; what was removed
cannot be read from it. A domain covers its subdomains.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from builder.core import write_parquet
from builder.target import Target

FILE = "tombstones.parquet"
SCHEMA = pa.schema([("kind", pa.string()), ("mark", pa.string())])

MARKS = """
with hosts as (
    select *, string_split(rtrim(lower(regexp_extract(coalesce(url, ''), '^[a-zA-Z]+://(?:[^/?#]*@)?([^/:?#]+)', 1)), '.'), '.') as host from {rows}
), marked as (
    select row, unnest(
        [sha256('uid:' || lower(uid)), sha256('sha256:' || lower(image)), sha256('url:' || url)]
        || [sha256('domain:' || array_to_string(host[k:], '.')) for k in range(1, len(host) + 1)]
    ) as mark from hosts
)
select distinct row from marked semi join {tombstones} as tombstones on marked.mark = tombstones.mark
"""
"""Rows, of a table of row, uid, image (sha256) and url, that a table of tombstones names. Also for a bare DuckDB shell."""


def table(values: Mapping[str, Iterable[str]]) -> pa.Table:
    """Tombstones of values by kind, sorted."""
    marks = sorted({(kind, mark(kind, value)) for kind, named in values.items() for value in named})
    return pa.table([[kind for kind, _ in marks], [hashed for _, hashed in marks]], SCHEMA)


def mark(kind: str, value: str) -> str:
    if kind != "url":
        value = value.lower()
    if kind == "domain":
        value = value.strip(".")
    return hashlib.sha256(f"{kind}:{value}".encode()).hexdigest()


def merged(*tables: pa.Table) -> pa.Table:
    rows = {(row["kind"], row["mark"]) for each in tables for row in each.to_pylist()}
    return pa.Table.from_pylist([{"kind": kind, "mark": hashed} for kind, hashed in sorted(rows)], SCHEMA)


def read(path: Path) -> pa.Table:
    return pq.read_table(path, schema=SCHEMA)


def write(tombstones: pa.Table, path: Path) -> None:
    write_parquet(tombstones, path)


def named(view: str, image: str = "sha256") -> str:
    """SQL of the uids of a version's view that the table `tombstones` names."""
    return MARKS.format(rows=f"(select uid as row, uid, url, {image} as image from {view})", tombstones="tombstones")


def of_target(target: Target, version: str) -> pa.Table:
    """What `version` of a target may not hold: what any of its versions removed; of one that is there already, what it removed."""
    versions = target.versions()
    found = [table({})]
    for known in [version] if version in versions else versions:
        fs, root = target.files(known)
        if fs.exists(f"{root}/{FILE}"):  # versions of before there were any have none
            with fs.open(f"{root}/{FILE}", "rb") as file:
                found.append(pq.read_table(file, schema=SCHEMA))
    return merged(*found)
