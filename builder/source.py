"""source: metadata tables -> numbered shards of fixed size, in one schema.

Reads   parquet, CSV or TSV files in DataComp's layout or another one with a URL and a caption column.
Writes  `<shard>.parquet` with the columns of `SCHEMA`.
Survey  finds the files, checks their columns and cuts them into slices of `rows_per_shard`, across file borders.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import duckdb
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from builder.core import Json, Record, Stage, Status, Task, Work, sha256_file, write_parquet
from builder.errors import InputError

SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("url", pa.string()),
        ("org_caption", pa.string()),
        ("sha256", pa.string()),  # as claimed by the metadata
        ("original_width", pa.int64()),
        ("original_height", pa.int64()),
        ("clip_b32_similarity_score", pa.float32()),
        ("clip_l14_similarity_score", pa.float32()),
        ("face_bboxes", pa.list_(pa.list_(pa.float64()))),  # [x0, y0, x1, y1] in 0..1
        ("org_caption_repaired", pa.bool_()),  # had bytes that are not UTF-8; each became U+FFFD
        ("shard", pa.int32()),
        ("row", pa.int32()),
    ]
)
OPTIONAL = ("sha256", "original_width", "original_height", "clip_b32_similarity_score", "clip_l14_similarity_score", "face_bboxes")

LAYOUTS: Mapping[str, Mapping[str, str]] = {  # our column -> theirs; without uid, one is derived from URL and caption
    "datacomp": {"uid": "uid", "url": "url", "org_caption": "text"},
    "pixelprose": {"uid": "uid", "url": "url", "org_caption": "original_caption"},
    "capsfusion": {"url": "image_url", "org_caption": "laion_2b"},
    "laion": {"url": "URL", "org_caption": "TEXT", "original_width": "WIDTH", "original_height": "HEIGHT"},
    "img2dataset": {"url": "url", "org_caption": "caption"},
    "cc3m": {"url": "column1", "org_caption": "column0"},  # TSV without a header: caption, URL
}


@dataclass(frozen=True, kw_only=True)
class Source(Stage):
    """Where the rows come from.

    `files` is a folder, a glob or one file, local or any fsspec URL. `layout` is found by the columns unless it is named.
    `url_column`, `caption_column` and `uid_column` name columns in tables of any other layout. `subset` is a file of uids in
    DataComp's format (.npy, dtype u8,u8, sorted), as `recap select` writes it: other rows are left out.
    """

    name: ClassVar[str] = "source"
    libraries: ClassVar[tuple[str, ...]] = ("pyarrow", "duckdb")
    paths: ClassVar[tuple[str, ...]] = ("files", "subset")

    files: str
    layout: str = "auto"
    url_column: str | None = None
    caption_column: str | None = None
    uid_column: str | None = None
    rows_per_shard: int = 10_000
    limit: int | None = None
    subset: str | None = None

    def settings(self) -> dict[str, Json]:
        settings: dict[str, Json] = {"layout": self.layout, "columns": [self.url_column, self.caption_column, self.uid_column]}
        if self.subset and not Path(self.subset).is_file():
            raise InputError(f"there is no subset {self.subset}", "make one: recap select PLACE STRATEGY --out FOLDER")
        return settings | ({"subset": sha256_file(Path(self.subset))} if self.subset else {})

    def has_survey(self) -> bool:
        return True

    def check(self) -> None:
        if self.rows_per_shard < 1:
            raise InputError(f"rows_per_shard is {self.rows_per_shard}; it must be at least 1", "for example rows_per_shard=10000")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit is {self.limit}; it must be at least 1", "for example --limit 1000")
        if self.layout not in ("auto", *LAYOUTS):
            raise InputError(f"there is no layout '{self.layout}'", f"there are: auto, {', '.join(LAYOUTS)}")
        self.find()

    def survey_inputs(self, run: Path) -> dict[str, str]:
        try:
            files = self.find()
        except InputError:
            if record := Record.read(run / "source" / "survey.json"):
                return dict(record.inputs)  # the metadata is gone; a run that needs it no more can still be looked at and published
            raise
        hashes = _Hashes(run / "source" / ".files.json")
        inputs = {name: hashes.of(fs, path) for name, fs, path in files}
        hashes.save()
        return inputs | {"rows_per_shard": str(self.rows_per_shard), "limit": str(self.limit)}

    def num_rows(self) -> int | None:
        """Rows of all files by their footers, at most `limit`; None where a file is no parquet and would have to be read."""
        total = 0
        for name, fs, path in self.find():
            if _ending(path) != "parquet":
                return None
            with _open_parquet(name, fs, path) as file:
                total += file.metadata.num_rows
        return total if self.limit is None else min(total, self.limit)

    def find(self) -> list[tuple[str, fsspec.AbstractFileSystem, str]]:
        """Name below the folder, file system and path of each file, in the order of the names."""
        fs, path = fsspec.core.url_to_fs(self.files)
        found = [p for p in ([path] if fs.isfile(path) else fs.find(path) if fs.isdir(path) else fs.glob(path)) if _ending(p)]
        if not found:
            raise InputError(f"no parquet, csv or tsv file at {self.files}", "name a folder, a glob in quotes or a file: metadata='path/*.parquet'")
        root = _common_folder(found)
        return [(p[len(root) :].lstrip("/"), fs, p) for p in sorted(found)]

    def survey(self, task: Task) -> Mapping[str, int]:
        slices, left = [], self.limit
        shard, room = 0, self.rows_per_shard
        for index, (name, fs, path) in enumerate(self.find()):
            local = path
            if _ending(path) != "parquet":
                local = str(task.output(f".{index}.parquet"))
                _to_parquet(path, local, fs)
            with _open_parquet(name, fs if local == path else fsspec.filesystem("file"), local) as file:
                num_rows = file.metadata.num_rows
                self.columns(name, file.schema_arrow.names)
            stored = name if local == path else f"source/survey.{index}.parquet"
            sha256 = task.inputs[name] if local == path else sha256_file(Path(local))
            start = 0
            while start < num_rows and left != 0:
                take = min(num_rows - start, room, num_rows if left is None else left)
                slices.append({"shard": shard, "file": stored, "sha256": sha256, "start": start, "stop": start + take})
                start, room, left = start + take, room - take, None if left is None else left - take
                if room == 0:
                    shard, room = shard + 1, self.rows_per_shard
        if not slices:
            raise InputError(f"{self.files} has no rows", "name other files: metadata='path/*.parquet'")
        write_parquet(pa.Table.from_pylist(slices), task.output())
        return {"shards": slices[-1]["shard"] + 1, "rows": sum(s["stop"] - s["start"] for s in slices)}

    def shard_inputs(self, run: Path, index: int) -> dict[str, str]:
        survey = run / "source" / "survey.parquet"
        return {f"{file}[{start}:{stop}]": sha for file, sha, start, stop in _slices(survey, survey.stat().st_mtime_ns)[index]}

    @contextmanager
    def open(self) -> Iterator[Work]:
        files = {name: (fs, path) for name, fs, path in self.find()}
        subset = np.load(self.subset) if self.subset else None

        def work(task: Task) -> Mapping[str, int]:
            parts = []
            for spec in task.inputs:
                name, _, span = spec.rpartition("[")
                start, stop = (int(x) for x in span.rstrip("]").split(":"))
                fs, path = files.get(name) or (fsspec.filesystem("file"), str(task.run / name))
                parts.append(self.read(name, fs, path, start, stop))
            table = pa.concat_tables(parts)
            if subset is not None:
                table = table.filter(_in_subset(table["uid"], subset))
            number = len(table)
            table = table.append_column("shard", pa.array([int(task.name)] * number, pa.int32()))
            table = table.append_column("row", pa.array(range(number), pa.int32()))
            write_parquet(table.select(SCHEMA.names).cast(SCHEMA), task.output())
            return {Status.OK: number}

        yield work

    def columns(self, name: str, found: list[str]) -> dict[str, str]:
        """Our column -> the file's column.

        Raises:
            InputError: a needed column is missing; says which, and which there are.
        """
        named = {"uid": self.uid_column, "url": self.url_column, "org_caption": self.caption_column}
        given = {ours: theirs for ours, theirs in named.items() if theirs}
        layouts = {k: {**v, **given} for k, v in LAYOUTS.items()} if self.layout == "auto" else {self.layout: {**LAYOUTS[self.layout], **given}}
        if "url" in given and "org_caption" in given:
            layouts = {"given": given}
        optional = {column: column for column in OPTIONAL if column in found}
        for layout in layouts.values():
            if all(layout[needed] in found for needed in ("uid", "url", "org_caption") if needed in layout):
                return optional | {ours: theirs for ours, theirs in layout.items() if theirs in found}
        closest = min(layouts.values(), key=lambda layout: len(set(layout.values()) - set(found)))
        missing = [theirs for ours, theirs in closest.items() if theirs not in found and ours in ("uid", "url", "org_caption")]
        raise InputError(
            f"{name}: no column {' and no column '.join(repr(c) for c in missing)}; found: {', '.join(found)}",
            "name yours: url_column=... caption_column=... (and uid_column=... if there is one)",
        )

    def read(self, name: str, fs: fsspec.AbstractFileSystem, path: str, start: int, stop: int) -> pa.Table:
        """Rows [start, stop) of one file, with our columns; touches only the row groups that hold them."""
        with _open_parquet(name, fs, path) as file:
            columns = self.columns(name, file.schema_arrow.names)
            parts, first = [], 0
            try:
                for group in range(file.num_row_groups):
                    last = first + file.metadata.row_group(group).num_rows
                    if first < stop and last > start:
                        part = file.read_row_group(group, columns=sorted(set(columns.values())))
                        parts.append(part.slice(max(start - first, 0), min(stop, last) - max(start, first)))
                    first = last
            except (OSError, pa.ArrowInvalid) as error:
                raise InputError(
                    f"{name} cannot be read: {str(error).splitlines()[0]}", "get the file again, then type the same command again"
                ) from error
        table = pa.concat_tables(parts)
        arrays: dict[str, pa.Array] = {ours: table[theirs].combine_chunks() for ours, theirs in columns.items()}
        arrays["org_caption"], repaired = _utf8(arrays["org_caption"])
        arrays["url"], _ = _utf8(arrays["url"])
        if "uid" not in arrays:
            pairs = zip(arrays["url"].to_pylist(), arrays["org_caption"].to_pylist(), strict=True)
            arrays["uid"] = pa.array(hashlib.sha256(f"{url}\n{caption}".encode()).hexdigest()[:32] for url, caption in pairs)
        if arrays["uid"].null_count:
            raise InputError(f"{name}: {arrays['uid'].null_count} rows have no uid", "leave uid_column out to derive uids from URL and caption")
        arrays["org_caption_repaired"] = repaired
        for field in SCHEMA:
            if field.name not in arrays and field.name not in ("shard", "row"):
                arrays[field.name] = pa.nulls(len(table), field.type)
        try:
            return pa.table({n: _cast(arrays[n], SCHEMA.field(n).type) for n in SCHEMA.names if n in arrays})
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InputError(f"{name}: {', '.join(columns[n] for n in OPTIONAL if n in columns)}: {error}", "leave that column out") from error


def _utf8(strings: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Valid strings, no nulls, and which of them had to be repaired. Parquet readers do not check this."""
    if pa.types.is_large_binary(strings.type):
        strings = strings.cast(pa.binary())
    if not (pa.types.is_string(strings.type) or pa.types.is_large_string(strings.type) or pa.types.is_binary(strings.type)):
        strings = strings.cast(pa.string())
    strings = pc.fill_null(strings, pa.scalar("", strings.type))
    try:
        strings.cast(pa.binary()).cast(pa.string()).validate(full=True)
        return strings.cast(pa.string()), pa.array([False] * len(strings))
    except pa.ArrowInvalid:
        raw = strings.cast(pa.binary()).to_pylist()
        text = [value.decode("utf-8", "replace") for value in raw]
        return pa.array(text, pa.string()), pa.array([t.encode() != r for t, r in zip(text, raw, strict=True)])


def _cast(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """Whole numbers may come as floats or as their text, missing ones as NaN: pandas does that to a column with a gap."""
    if pa.types.is_integer(kind) and (pa.types.is_string(values.type) or pa.types.is_floating(values.type)):
        values = values.cast(pa.float64())
        values = pc.if_else(pc.is_nan(values), None, values)
    return values.cast(kind)


def _ending(path: str) -> str | None:
    return next((kind for kind in ("parquet", "csv", "tsv") if path.lower().endswith((f".{kind}", f".{kind}.gz"))), None)


def _common_folder(paths: list[str]) -> str:
    folders = [path.rsplit("/", 1)[0] for path in paths]
    root = folders[0]
    while any(folder != root and not folder.startswith(root + "/") for folder in folders):
        root = root.rsplit("/", 1)[0]
    return root


@contextmanager
def _open_parquet(name: str, fs: fsspec.AbstractFileSystem, path: str) -> Iterator[pq.ParquetFile]:
    with fs.open(path, "rb") as handle:
        try:
            file = pq.ParquetFile(handle)
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(
                f"{name} is not a parquet file: {str(error).splitlines()[0]}", "get the file again, or leave it out of the glob"
            ) from error
        yield file


def _to_parquet(path: str, target: str, fs: fsspec.AbstractFileSystem) -> None:
    """A CSV or TSV as parquet, every column a string; quoted line breaks make slicing the text itself impossible."""
    with duckdb.connect() as con:
        if not isinstance(fs, fsspec.get_filesystem_class("file")):
            con.register_filesystem(fs)
            path = fs.unstrip_protocol(path)
        options = "all_varchar=true, comment=''" + (", delim='\\t', quote='', escape=''" if _ending(path) == "tsv" else "")
        try:
            first = con.execute(f"select * from read_csv(?, {options}, header=false) limit 1", [path]).fetchone() or ()
            header = not any("://" in (cell or "") for cell in first)  # a URL is no column's name
            quoted = target.replace("'", "''")
            con.execute(f"copy (select * from read_csv(?, {options}, header={header})) to '{quoted}' (format parquet)", [path])
        except duckdb.Error as error:
            raise InputError(f"{Path(path).name} cannot be read: {str(error).splitlines()[0]}", "give it as parquet") from error


@lru_cache(maxsize=1)
def _slices(survey: Path, mtime_ns: int) -> dict[int, list[tuple[str, str, int, int]]]:
    slices: dict[int, list[tuple[str, str, int, int]]] = {}
    for row in pq.read_table(survey).to_pylist():
        slices.setdefault(row["shard"], []).append((row["file"], row["sha256"], row["start"], row["stop"]))
    return slices


class _Hashes:
    """sha256 of input files, remembered by size and modification time as git's index does; a remote file counts by what its store says of it."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.known: dict[str, list[Json]] = json.loads(cache.read_text()) if cache.exists() else {}
        self.seen: dict[str, list[Json]] = {}

    def of(self, fs: fsspec.AbstractFileSystem, path: str) -> str:
        if not isinstance(fs, fsspec.get_filesystem_class("file")):
            return hashlib.sha256(f"{fs.size(path)} {fs.ukey(path)}".encode()).hexdigest()
        stat = Path(path).stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        known = self.known.get(path)
        self.seen[path] = known if known and known[:2] == stamp else [*stamp, sha256_file(Path(path))]
        return str(self.seen[path][2])

    def save(self) -> None:
        if self.cache.parent.exists() and self.seen != self.known:
            part = self.cache.with_suffix(".part")
            part.write_text(json.dumps(self.seen))
            part.replace(self.cache)


def _in_subset(uids: pa.ChunkedArray, subset: np.ndarray[Any, Any]) -> pa.Array:
    """Which uids are in a sorted subset."""
    keys = np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids.to_pylist()], subset.dtype)
    places = np.searchsorted(subset, keys)
    return pa.array([place < len(subset) and subset[place] == key for place, key in zip(places, keys, strict=True)], pa.bool_())
