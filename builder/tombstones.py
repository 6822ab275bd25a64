"""What was taken down stays down: hashes of uids, images, URLs and domains that no later version may hold.

A version carries them in `tombstones.parquet`, columns `kind` and `mark`, the sha256 of `kind:value`; what
was removed cannot be read from it. A domain covers its subdomains.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from builder.errors import InputError
from builder.files import table_of, write_parquet
from builder.urls import as_fetched, domain

FILE = "tombstones.parquet"
_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
SCHEMA = pa.schema([("kind", pa.string()), ("mark", pa.string())])

MARKS = r"""
with hosts as (
    select *, string_split(rtrim(lower(regexp_extract(
        coalesce(url, ''), '^[a-zA-Z]+://(?:[^/?#]*@)?(\[[^\]]*\]|[^/:?#]+)', 1)), '.'), '.') as host
    from {rows}
), marked as (
    select row, unnest(
        [sha256('uid:' || translate(uid, 'ABCDEFGHIJKLMNOPQRSTUVWXYZ', 'abcdefghijklmnopqrstuvwxyz')),
         sha256('sha256:' || lower(image)), sha256('url:' || url)]
        || [sha256('domain:' || array_to_string(host[k:], '.')) for k in range(1, len(host) + 1)]
    ) as mark from hosts
)
select row, mark from marked where mark in (select mark from {tombstones})
"""
"""(row, mark) of a table of row, uid, image (sha256) and url, where a table of tombstones has the mark.

Also for a bare DuckDB shell. The host that it sees is the one that is connected to, for URLs are published as
they are fetched (`urls.as_fetched`).
"""


def table(values: Mapping[str, Iterable[str]]) -> pa.Table:
    """Tombstones of values by kind, sorted.

    Raises:
        InputError: a value names nothing.
    """
    found = sorted(
        {(kind, mark) for kind, named in values.items() for value in named for mark in marks(kind, value)}
    )
    return pa.table([[kind for kind, _ in found], [mark for _, mark in found]], SCHEMA)


def marks(kind: str, value: str) -> set[str]:
    """What stands for a value: uids and hashes in lower case, domains as fetched, URLs so and as given.

    The latter for versions of before 2026-11-24, whose URLs are as they were found.
    """
    forms = (
        {as_fetched(value)[0], value}
        if kind == "url"
        else {domain(value)}
        if kind == "domain"
        else {_lower(value)}
    )
    if "" in forms:
        raise InputError(f"{value!r} is no {kind}", "take it out of the file")
    return {hashlib.sha256(f"{kind}:{form}".encode("utf-8", "replace")).hexdigest() for form in forms}


def _lower(text: str) -> str:
    """ASCII letters only: what is lower case beyond them is not the same everywhere."""
    return text.translate(_LOWER)


def merged(*tables: pa.Table) -> pa.Table:
    rows = {(row["kind"], row["mark"]) for each in tables for row in each.to_pylist()}
    return pa.Table.from_pylist([{"kind": kind, "mark": hashed} for kind, hashed in sorted(rows)], SCHEMA)


def read(data: bytes, name: object) -> pa.Table:
    """Raises:
    InputError: it is no table of tombstones.
    """
    try:
        found = table_of(data)
        found = found.select(SCHEMA.names).cast(SCHEMA)
        found.validate(full=True)
        if (
            not pc.all(
                pc.fill_null(pc.match_substring_regex(found["mark"], "^[0-9a-f]{64}$"), False), min_count=0
            ).as_py()
            or found["kind"].null_count
        ):
            raise ValueError("a mark is no hash")
        return found
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise InputError(
            f"{name} holds no tombstones: {str(error).splitlines()[0][:200]}",
            f"name the {FILE} of a published version",
        ) from error


def write(tombstones: pa.Table, path: Path) -> None:
    write_parquet(tombstones, path)


def named(view: str, image: str = "sha256") -> str:
    """SQL of (row, mark): the uids of a version's view that the table `tombstones` names."""
    return MARKS.format(
        rows=f"(select uid as row, uid, url, {image} as image from {view})", tombstones="tombstones"
    )
