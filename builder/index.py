"""Which rows a run has, in which order: batches of metadata, cut into shards, counted off into blocks.

    source/run/00000.json, 00000.<digits>.parquet     the first batch's slices: shard, file, start, stop
    source/run/00001...                               what came to the metadata after it

Metadata may grow: new files make a new batch, whose shards, blocks and published files begin where the last
one's ended, whatever the files' names sort to. So what was built and published before keeps its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from builder.commit import records
from builder.core import RUN, Record
from builder.errors import InputError
from builder.files import table_of
from builder.store import Store

BLOCK = 1000  # shards

SLICES = pa.schema(
    [
        ("shard", pa.int32()),
        ("file", pa.string()),  # name below the metadata's folder
        ("sha256", pa.string()),  # of the file
        ("stored", pa.string()),  # the object with its rows, where it is no parquet
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("file_rows", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Block:
    """At most a thousand shards of one batch. `last` is the shard after its last one."""

    name: str
    batch: int
    first: int
    last: int

    def groups(self, size: int) -> Iterator[range]:
        """Its shards, `size` at a time."""
        for start in range(self.first, self.last, size):
            yield range(start, min(start + size, self.last))

    def __len__(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class Slice:
    """Rows [start, stop) of a metadata file."""

    file: str
    sha256: str
    stored: str | None
    start: int
    stop: int


class Index:
    """The batches of a run, at most `limit` rows of them."""

    def __init__(self, batches: list[pa.Table], limit: int | None = None) -> None:
        self.batches = batches
        table = pa.concat_tables([SLICES.empty_table(), *batches]).combine_chunks()
        self._table = table
        self._first: list[int] = []  # of a shard: its first slice
        self._rows: list[int] = []
        self._used = 0  # slices that `limit` lets in
        left = limit
        columns = (table[name].to_numpy() for name in ("shard", "start", "stop"))
        for at, (shard, start, stop) in enumerate(zip(*columns, strict=True)):
            rows = int(stop - start) if left is None else min(int(stop - start), left)
            if rows <= 0:
                break
            self._used = at + 1
            if shard == len(self._first):
                self._first.append(at)
                self._rows.append(0)
            self._rows[shard] += rows
            left = None if left is None else left - rows
        self.blocks = list(self._blocks())

    def __len__(self) -> int:
        return len(self._first)

    def rows(self, shard: int) -> int:
        """Rows of the metadata in it; a subset may keep fewer."""
        return self._rows[shard]

    def num_rows(self) -> int:
        return sum(self._rows)

    def slices(self, shard: int) -> list[Slice]:
        """Where a shard's rows are."""
        first, left, found = self._first[shard], self._rows[shard], []
        while left > 0:
            names = ("file", "sha256", "stored", "start", "stop")
            row = {name: self._table[name][first].as_py() for name in names}
            row["stop"] = min(row["stop"], row["start"] + left)
            left -= row["stop"] - row["start"]
            found.append(Slice(**row))
            first += 1
        return found

    def covered(self) -> dict[str, tuple[int, int]]:
        """File -> rows of it that all batches hold, and rows that it has."""
        found: dict[str, tuple[int, int]] = {}
        columns = (self._table[name].to_pylist() for name in ("file", "stop", "file_rows"))
        for file, stop, rows in zip(*columns, strict=True):
            found[file] = max(found.get(file, (0, 0)), (stop, rows))
        return found

    def first_shard(self, batch: int) -> int:
        """Of a batch."""
        return int(self.batches[batch]["shard"][0].as_py())

    def of_batches(self) -> list[dict[str, Any]]:
        """What a manifest says of each: files and rows, as far as `limit` lets them in."""
        found, left = [], self._used
        for number, table in enumerate(self.batches):
            blocks = [block for block in self.blocks if block.batch == number]
            if blocks:
                rows = sum(sum(self._rows[block.first : block.last]) for block in blocks)
                files = table["file"].slice(0, left).unique()
                found.append({"files": len(files), "rows": rows})
            left = max(0, left - len(table))
        return found

    def _blocks(self) -> Iterator[Block]:
        first, number = 0, 0
        for batch, table in enumerate(self.batches):
            last = int(table["shard"][-1].as_py()) + 1
            while first < last:
                stop = min(first + BLOCK, last)
                if first < len(self):
                    yield Block(f"{number:05d}", batch, first, min(stop, len(self)))
                first, number = stop, number + 1


def batch_records(store: Store, source: str) -> list[Record]:
    """Of the batches that are there, in order.

    Raises:
        InputError: one cannot be read. Passed over, its rows would come again as others.
    """
    folder = f"{source}/{RUN}"
    found = records(store, folder)
    there = {name.removesuffix(".json") for name in store.names(folder) if name.endswith(".json")}
    for name in sorted({f"{number:05d}" for number in range(len(there))} - found.keys()):
        hint = "get it from a copy, or build into another directory: --run"
        raise InputError(f"{store.place}/{folder}/{name}.json is missing or damaged", hint)
    return [found[name] for name in sorted(found)]


def load(store: Store, source: str, limit: int | None) -> Index:
    """The index as it stands in the run."""
    tables = []
    for record in batch_records(store, source):
        name = record.output(".parquet")
        data = store.read(name)
        try:
            tables.append(table_of(data or b"").select(SLICES.names).cast(SLICES))
        except (pa.ArrowException, OSError, KeyError) as error:
            hint = "get it from a copy, or build into another directory: --run"
            raise InputError(f"{store.place}/{name} is missing or damaged", hint) from error
    return Index(tables, limit)
