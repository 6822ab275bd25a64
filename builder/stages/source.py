"""source: metadata tables -> numbered shards of fixed size, in one schema.

Reads   parquet, CSV or TSV files in DataComp's layout or another one with a URL and a caption column.
Writes  `<shard>.parquet` with the columns of `SCHEMA`.
Index   finds the files, checks their columns and cuts what is new in them into slices of `rows_per_shard`,
        across file borders: a batch (`builder/index.py`).
"""

from __future__ import annotations

import codecs
import difflib
import hashlib
import json
import re
import shlex
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from builder.commit import commit, working
from builder.core import RUN, Count, Json, Record, Stage, Status, Task, Work, task_key
from builder.errors import InputError, RecipeError, ShardError
from builder.files import is_amazons, matching, sha256_file, sha256_known, write_parquet
from builder.index import SLICES, Index, Slice, batch_records, load
from builder.stages.texttable import TextTable
from builder.store import Store
from builder.typed import from_json
from builder.urls import as_fetched

SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("url", pa.string()),  # as it is fetched
        ("url_found", pa.string()),  # as it stood in the metadata, where that differs
        ("url_error", pa.string()),  # why it cannot be fetched
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
OPTIONAL = (
    "sha256", "original_width", "original_height",
    "clip_b32_similarity_score", "clip_l14_similarity_score", "face_bboxes",
)  # fmt: skip

NEEDED = ("uid", "url", "org_caption")
SETTING = {"uid": "uid_column", "url": "url_column", "org_caption": "caption_column"}

LAYOUTS: Mapping[
    str, Mapping[str, str]
] = {  # our column -> theirs; without uid, one is derived from URL and caption
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

    `files` is a folder, a glob or one file, local or any fsspec URL. `layout` is found by the columns unless
    it is named. `url_column`, `caption_column` and `uid_column` name columns in tables of any other layout;
    those of a table without a header are column0, column1 and so on. `encoding` is that of CSV and TSV files.
    `subset` is a file of uids in DataComp's format (.npy, dtype u8,u8, sorted), as `recap select` writes it:
    other rows are left out.
    """

    version: ClassVar[int] = 3
    effort: ClassVar[tuple[str, ...]] = ("files", "rows_per_shard", "limit")  # they shape the index
    libraries: ClassVar[tuple[str, ...]] = ("pyarrow", "yarl")
    paths: ClassVar[tuple[str, ...]] = ("files", "subset")

    name: str = "source"
    files: str
    layout: str = "auto"
    url_column: str | None = None
    caption_column: str | None = None
    uid_column: str | None = None
    encoding: str = "utf-8"
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None  # of a CSV; found unless given
    rows_per_shard: Count = 10_000
    limit: Count | None = None
    subset: str | None = None

    def __post_init__(self) -> None:
        if "\0" in self.files:
            raise RecipeError("source.files holds a NUL character", "name a folder, a glob or a file")

    def settings(self) -> dict[str, Json]:
        settings = super().settings()
        if self.subset and not Path(self.subset).is_file():
            hint = "make one: recap select PLACE STRATEGY --out FOLDER"
            raise InputError(f"there is no subset {self.subset}", hint)
        return settings | ({"subset": sha256_known(Path(self.subset))} if self.subset else {})

    def index_settings(self) -> dict[str, Json]:
        """What shapes the slices."""
        slicing = {name: value for name, value in self.settings().items() if name != "subset"}
        return slicing | {"rows_per_shard": self.rows_per_shard}

    def check(self) -> None:
        try:
            if not codecs.lookup(self.encoding)._is_text_encoding:
                raise LookupError(f"{self.encoding} is no encoding of text")
        except LookupError as error:
            raise InputError(f"source.encoding: {error}", "for example source.encoding=cp1252") from error
        if self.layout not in ("auto", *LAYOUTS):
            raise InputError(f"there is no layout '{self.layout}'", f"there are: auto, {', '.join(LAYOUTS)}")
        self.find()
        self.settings()  # a subset that is no file is told there
        if self.subset:
            read_subset(self.subset)

    def extend(self, store: Store, *, restart: Callable[[str, int], None]) -> Index:
        """The index, with what is new in the metadata as another batch.

        Batches from the first one on that no longer fits the metadata or the settings are made anew; before
        that `restart` is called with the reason and their first shard, and may raise.
        """
        try:
            files = self.find()
        except InputError:
            if batch_records(store, self.name):
                # The metadata is gone; what is built can still be looked at.
                return load(store, self.name, self.limit)
            raise
        hashes = _Hashes(store, f"{self.name}/{RUN}/files")
        found = {name: hashes.of(fs, path) for name, fs, path in files}
        hashes.save()
        batches = batch_records(store, self.name)
        for number, reason in enumerate(self._no_longer(batch, found) for batch in batches):
            if reason:
                restart(reason, load(store, self.name, None).first_shard(number))
                for later in reversed(range(number, len(batches))):  # a crash in between leaves no gap
                    store.delete(f"{self.name}/{RUN}/{later:05d}.json")
                break
        self._convert_again(store, files)
        index = load(store, self.name, None)
        covered, left = index.covered(), None if self.limit is None else self.limit - index.num_rows()
        more = [(n, fs, path) for n, fs, path in files if n not in covered or covered[n][0] < covered[n][1]]
        if more and (left is None or left > 0):
            outside = {name: found[name] for name, _, _ in more}
            name, settings = f"{len(index.batches):05d}", self.index_settings()
            key = task_key(self, name, {}, outside | {"first": str(len(index)), "limit": str(left)}, settings)
            task = Task(self.name, RUN, name, key, outside=outside, settings=settings)
            with working(store, task) as here:
                begin = {name: covered.get(name, (0, 0))[0] for name in outside}
                if slices := self.cut(here, more, begin, len(index), left):
                    write_parquet(pa.Table.from_pylist(slices, SLICES), here.output())
                    used = {one["file"]: outside[one["file"]] for one in slices}
                    rows = {"rows": sum(one["stop"] - one["start"] for one in slices)}
                    commit(store, self, replace(here, outside=used), rows, 0.0)
        index = load(store, self.name, self.limit)
        if not len(index):
            raise InputError(f"{self.files} has no rows", "name other files: metadata='path/*.parquet'")
        return index

    def _convert_again(self, store: Store, files: list[tuple[str, fsspec.AbstractFileSystem, str]]) -> None:
        """Tables that were converted and are not there any more."""
        there, found = set(store.names(f"{self.name}/{RUN}")), {name: (fs, path) for name, fs, path in files}
        batches = batch_records(store, self.name)
        lost = {o for batch in batches for o in batch.outputs if o.rpartition("/")[2] not in there}
        if not lost:
            return
        for table in load(store, self.name, None).batches:
            pairs = zip(table["stored"].to_pylist(), table["file"].to_pylist(), strict=True)
            for stored, file in sorted({(stored, file) for stored, file in pairs if stored in lost}):
                scratch = store.scratch()
                self.text_table(file, *found[file]).to_parquet(str(scratch / "converted.parquet"))
                store.put(scratch / "converted.parquet", stored)
                shutil.rmtree(scratch)

    def _no_longer(self, batch: Record, found: Mapping[str, str]) -> str:
        """Why a batch does not fit any more; empty where it does."""
        for name in sorted(batch.settings.keys() | self.index_settings().keys()):
            before, now = batch.settings.get(name), self.index_settings().get(name)
            if before != now:
                default = "its default"
                return f"source.{name} was {before or default} and is {now or default}"
        for name, sha256 in batch.outside.items():
            if found.get(name) != sha256:
                return f"metadata file {name} {'is another' if name in found else 'is not there any more'}"
        return ""

    def cut(
        self,
        task: Task,
        files: list[tuple[str, fsspec.AbstractFileSystem, str]],
        begin: Mapping[str, int],
        shard: int,
        left: int | None,
    ) -> list[dict[str, Any]]:
        """The slices of a batch: of each file the rows from `begin` on, `left` of them in all, from `shard`
        on.
        """
        slices, room = [], self.rows_per_shard
        for number, (name, fs, path) in enumerate(files):
            if left == 0:
                break
            local, stored = path, None
            if _ending(path) != "parquet":
                local, stored = str(task.output(f".{number}.parquet")), task.object(f".{number}.parquet")
                self.text_table(name, fs, path).to_parquet(local)
            with _open_parquet(name, fs if stored is None else fsspec.filesystem("file"), local) as file:
                num_rows = file.metadata.num_rows
                self.columns(name, file.schema_arrow.names)
            sha256 = task.outside[name] if stored is None else sha256_file(Path(local))
            start = begin[name]
            while start < num_rows and left != 0:
                take = min(num_rows - start, room, num_rows if left is None else left)
                slices.append(
                    {
                        "shard": shard, "file": name, "sha256": sha256, "stored": stored,
                        "start": start, "stop": start + take, "file_rows": num_rows,
                    }
                )  # fmt: skip
                start, room, left = start + take, room - take, None if left is None else left - take
                if room == 0:
                    shard, room = shard + 1, self.rows_per_shard
        return slices

    def task_inputs(self, slices: list[Slice]) -> tuple[dict[str, str], dict[str, str]]:
        """Of a shard: objects of the run, and slices of files, -> sha256."""
        objects = {one.stored: one.sha256 for one in slices if one.stored}
        return objects, {f"{one.stored or one.file}[{one.start}:{one.stop}]": one.sha256 for one in slices}

    def num_rows(self, known: Mapping[str, int]) -> int | None:
        """Rows of all files by their footers, where they are not `known`, at most `limit`; None where a file
        is no parquet and would have to be read.

        Raises:
            InputError: a file is no table, or has no columns of URL and caption.
        """
        total, countable = 0, True
        for name, fs, path in self.find():
            if name in known:
                total += known[name]
                continue
            if _ending(path) != "parquet":
                with self.text_table(name, fs, path).open() as (names, _):
                    self.columns(name, names)
                countable = False
                continue
            with _open_parquet(name, fs, path) as file:
                self.columns(name, file.schema_arrow.names)
                total += file.metadata.num_rows
        if not countable:
            return None
        if not total:
            raise InputError(f"{self.files} has no rows", "name other files: metadata='path/*.parquet'")
        return total if self.limit is None else min(total, self.limit)

    def text_table(self, name: str, fs: fsspec.AbstractFileSystem, path: str) -> TextTable:
        known = {theirs for layout in LAYOUTS.values() for theirs in layout.values()}
        given = {*filter(None, (self.url_column, self.caption_column, self.uid_column))}
        numbered = bool(self.url_column) or self.layout == "cc3m"
        asked = given or ({*LAYOUTS["cc3m"].values()} if numbered else set())
        headless = asked if all(re.fullmatch(r"column\d+", column) for column in asked) else set()
        return TextTable(
            name,
            fs,
            path,
            self.encoding,
            self.delimiter,
            frozenset(known | given),
            numbered,
            frozenset(headless),
        )

    def find(self) -> list[tuple[str, fsspec.AbstractFileSystem, str]]:
        """Name below the folder, file system and path of each file, in the order of the names."""
        where = "name a folder, a glob in quotes or a file: metadata='path/*.parquet'"
        if not self.files:
            raise InputError("source.files, the metadata, names no file", where)
        try:
            fs, path = fsspec.core.url_to_fs(self.files)
            found = [p for p in matching(fs, path) if _ending(p)]
        except Exception as error:
            if not isinstance(error, ImportError | ValueError | OSError) and not is_amazons(error):
                raise
            raise InputError(f"{self.files} cannot be looked at: {_line(error)}", where) from error
        if not found:
            raise InputError(f"no parquet, csv or tsv file at {self.files}", where)
        root = _literal(fs, path)
        return [(p[len(root) :].lstrip("/"), fs, p) for p in sorted(found)]

    @contextmanager
    def open(self) -> Iterator[Work]:
        files = {name: (fs, path) for name, fs, path in self.find()}
        subset = read_subset(self.subset) if self.subset else None

        def work(task: Task) -> Mapping[str, int]:
            parts = []
            for spec in task.outside:
                name, _, span = spec.rpartition("[")
                start, stop = (int(x) for x in span.rstrip("]").split(":"))
                local = task.files.get(name)  # what was no parquet
                fs, path = (fsspec.filesystem("file"), str(local)) if local else files[name]
                parts.append(self.read(name, fs, path, start, stop))
            table = pa.concat_tables(parts)
            if subset is not None:
                table = table.filter(_in_subset(name, table["uid"], subset))
            number = len(table)
            table = table.append_column("shard", pa.array([int(task.name)] * number, pa.int32()))
            table = table.append_column("row", pa.array(range(number), pa.int32()))
            write_parquet(table.select(SCHEMA.names).cast(SCHEMA), task.output())
            return {Status.OK: number}

        yield work

    def columns(self, name: str, found: list[str]) -> dict[str, str]:
        """Our column -> the file's column.

        Raises:
            InputError: a needed column is missing; says which, and which are nearest to it.
        """
        named = {"uid": self.uid_column, "url": self.url_column, "org_caption": self.caption_column}
        given = {ours: theirs for ours, theirs in named.items() if theirs}
        layouts = (
            {k: {**v, **given} for k, v in LAYOUTS.items()}
            if self.layout == "auto"
            else {self.layout: {**LAYOUTS[self.layout], **given}}
        )
        if "url" in given and "org_caption" in given:
            layouts = {"given": given}
        optional = {column: column for column in OPTIONAL if column in found}
        for layout in layouts.values():
            if all(layout[needed] in found for needed in NEEDED if needed in layout):
                return optional | {ours: theirs for ours, theirs in layout.items() if theirs in found}
        lower = {column.lower(): column for column in found}
        closest = min(
            layouts.values(),
            key=lambda layout: len({theirs.lower() for theirs in layout.values()} - set(lower)),
        )
        missing = {ours: theirs for ours, theirs in closest.items() if theirs not in found and ours in NEEDED}
        near = {ours: difflib.get_close_matches(theirs.lower(), lower, 1) for ours, theirs in missing.items()}
        lines = ((SETTING[ours], lower[names[0]]) for ours, names in near.items() if names)
        meant = [f"source.{setting}={shlex.quote(name)}" for setting, name in lines]
        shown = ", ".join(found[:20]) + (f" and {len(found) - 20} more" if found[20:] else "")
        names = " and no column ".join(repr(theirs) for theirs in missing.values())
        own = "source.url_column=... source.caption_column=... (and source.uid_column=... if there is one)"
        hint = f"did you mean {' '.join(meant)}?" if meant else f"name yours: {own}"
        raise InputError(f"{name}: no column {names}; found: {shown}", hint)

    def read(self, name: str, fs: fsspec.AbstractFileSystem, path: str, start: int, stop: int) -> pa.Table:
        """Rows [start, stop) of one file, with our columns; touches only the row groups that hold them.

        Raises:
            ShardError: these rows cannot be read; names the file and the column.
        """
        with _open_parquet(name, fs, path) as file:
            columns = self.columns(name, file.schema_arrow.names)
            for theirs in columns.values():
                kind = file.schema_arrow.field(file.schema_arrow.names.index(theirs)).type
                if theirs == columns["url"] and (pa.types.is_primitive(kind) or pa.types.is_nested(kind)):
                    raise ShardError(f"{name}: column '{theirs}' is {kind}, not URLs")
                if file.schema_arrow.names.count(theirs) > 1:
                    raise ShardError(f"{name}: there are several columns '{theirs}'")
            parts, first = [], 0
            for group in range(file.num_row_groups):
                last = first + file.metadata.row_group(group).num_rows
                if first < stop and last > start:
                    part = _read_row_group(name, file, group, sorted(set(columns.values())))
                    parts.append(part.slice(max(start - first, 0), min(stop, last) - max(start, first)))
                first = last
        table = pa.concat_tables(parts)
        arrays: dict[str, pa.Array] = {}
        for ours, theirs in columns.items():
            try:
                column = table[theirs].combine_chunks()
                if ours in ("url", "org_caption"):
                    arrays[ours], repaired = _utf8(column)
                else:
                    arrays[ours] = _cast(column, SCHEMA.field(ours).type)
                    arrays[ours].validate(full=True)  # text in it may be no UTF-8
            except (pa.ArrowException, OverflowError) as error:
                kinds = f"{table[theirs].type}, not {SCHEMA.field(ours).type}"
                raise ShardError(f"{name}: column '{theirs}' is {kinds}: {_line(error)}") from error
            if ours == "org_caption":
                arrays["org_caption_repaired"] = repaired
        found = arrays["url"].to_pylist()
        if "uid" not in arrays:  # of the URL as it was found: another spelling of it is another row
            pairs = zip(found, arrays["org_caption"].to_pylist(), strict=True)
            texts = (f"{url}\n{caption}".encode() for url, caption in pairs)
            arrays["uid"] = pa.array(hashlib.sha256(text).hexdigest()[:32] for text in texts)
        if arrays["uid"].null_count:
            reason = f"{name}: {arrays['uid'].null_count} rows have no {columns['uid']}"
            raise ShardError(f"{reason}; without source.uid_column uids are derived from URL and caption")
        urls = [as_fetched(url) for url in found]
        arrays["url"] = pa.array([url for url, _ in urls], pa.string())
        arrays["url_error"] = pa.array([error for _, error in urls], pa.string())
        other = [was if was != url else None for was, (url, _) in zip(found, urls, strict=True)]
        arrays["url_found"] = pa.array(other, pa.string())
        for field in SCHEMA:
            if field.name not in arrays and field.name not in ("shard", "row"):
                arrays[field.name] = pa.nulls(len(table), field.type)
        return pa.table({name: arrays[name] for name in SCHEMA.names if name in arrays})


def _read_row_group(name: str, file: pq.ParquetFile, group: int, columns: list[str]) -> pa.Table:
    try:
        return file.read_row_group(group, columns=columns)
    except (OSError, pa.ArrowException) as error:
        for column in columns:
            try:
                file.read_row_group(group, columns=[column])
            except (OSError, pa.ArrowException) as of_column:
                reason = f"{name}: column '{column}' of row group {group} cannot be read"
                raise ShardError(f"{reason}: {_line(of_column)}") from error
        raise ShardError(f"{name}: row group {group} cannot be read: {_line(error)}") from error


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _utf8(strings: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Valid strings, no nulls, and which of them had to be repaired. Parquet readers do not check this."""
    if pa.types.is_large_binary(strings.type):
        strings = strings.cast(pa.binary())
    if not (
        pa.types.is_string(strings.type)
        or pa.types.is_large_string(strings.type)
        or pa.types.is_binary(strings.type)
    ):
        strings = strings.cast(pa.string())  # of a dictionary, say; of a list it fails
    strings = pc.fill_null(strings, pa.scalar("", strings.type))
    try:
        strings.cast(pa.binary()).cast(pa.string()).validate(full=True)
        return strings.cast(pa.string()), pa.array([False] * len(strings))
    except pa.ArrowInvalid:
        raw = strings.cast(pa.binary()).to_pylist()
        text = [value.decode("utf-8", "replace") for value in raw]
        repaired = [t.encode() != r for t, r in zip(text, raw, strict=True)]
        return pa.array(text, pa.string()), pa.array(repaired)


def _cast(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """Whole numbers may come as floats or as their text, missing ones as NaN: pandas does that to a column
    with a gap.
    """
    if pa.types.is_integer(kind) and (pa.types.is_string(values.type) or pa.types.is_floating(values.type)):
        values = values.cast(pa.float64())
        values = pc.if_else(pc.is_nan(values), None, values)
    return values.cast(kind)


def _ending(path: str) -> str | None:
    lower = path.lower().removesuffix(".gz")
    return next((kind for kind in ("parquet", "csv", "tsv") if lower.endswith(f".{kind}")), None)


def _literal(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """The folder that a path or a pattern begins with: files that come later have names below it too."""
    while path and not fs.isdir(path):
        path = path.rpartition("/")[0]
    return path.rstrip("/")


@contextmanager
def _open_parquet(name: str, fs: fsspec.AbstractFileSystem, path: str) -> Iterator[pq.ParquetFile]:
    with fs.open(path, "rb") as handle:
        if handle.read(4) != b"PAR1":
            raise InputError(
                f"{name} is not a parquet file: it does not begin as one",
                "get the file again, or leave it out of the glob",
            )
        handle.seek(0)
        try:
            file = pq.ParquetFile(handle)
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(
                f"{name} is not a parquet file: {str(error).splitlines()[0]}",
                "get the file again, or leave it out of the glob",
            ) from error
        yield file


class _Hashes:
    """sha256 of input files, remembered by size and modification time as git's index does.

    A remote file counts by what its store says of it.
    """

    def __init__(self, store: Store, cache: str) -> None:
        self.store, self.cache = store, cache
        self.known: dict[str, list[Json]] = {}
        if data := store.read(cache):
            with suppress(InputError):  # cut off by a crash of the machine: they are computed again
                self.known = from_json(dict[str, list[Any]], data, what=cache)
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
        if self.seen != self.known:
            self.store.write(self.cache, json.dumps(self.seen).encode())


def read_subset(path: str) -> np.ndarray[Any, Any]:
    """The uids of a subset.

    Raises:
        InputError: it is none in DataComp's format.
    """
    hint = "make one: recap select PLACE STRATEGY --out FOLDER"
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)  # it may be of 20 GB
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no subset: {_line(error)}", hint) from error
    if not isinstance(found, np.ndarray) or found.dtype != np.dtype("u8,u8") or found.ndim != 1:
        raise InputError(f"{path} is no subset: not an array of u8,u8", hint)
    for start in range(0, len(found), 1 << 20):
        high, low = (found[start : start + (1 << 20) + 1][half] for half in ("f0", "f1"))
        if ((high[1:] < high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] < low[:-1]))).any():
            raise InputError(f"{path} is no subset: its uids are not sorted", hint)
    return found


def _in_subset(name: str, uids: pa.ChunkedArray, subset: np.ndarray[Any, Any]) -> pa.Array:
    """Which uids are in a sorted subset.

    Raises:
        ShardError: a uid is none of DataComp's.
    """
    strange = pc.invert(pc.fill_null(pc.match_substring_regex(uids, "^[0-9a-fA-F]{32}$"), False))
    if (found := uids.filter(strange)) and len(found):
        strange_one = f"{name}: uid {found[0].as_py()!r:.60}"
        raise ShardError(f"{strange_one} is not 32 hexadecimal digits, as those that a subset names")
    keys = np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids.to_pylist()], subset.dtype)
    places = np.searchsorted(subset, keys)
    pairs = zip(places, keys, strict=True)
    return pa.array([at < len(subset) and subset[at] == key for at, key in pairs], pa.bool_())
