"""Runs the questions in `queries/` over captions -> stats.json.

    {query: {"sha256": of its SQL, "rows": [...]}}     or, instead of rows, "absent": why there is no answer

The first line of a query declares what it reads, `-- reads: captions, nouns`: views and tables of `views.py`;
tables that are made in Python, on a stated sample, where a query reads them: `languages`, `tokens`,
`near_duplicates`, `nouns`, `selections` (which comes with `pool`); or what the user may give: `visual_words`,
`concreteness`. Without `ledger`, `scores`, `defects` or `ratings` there is no answer for those who read them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from analysis import select, tokens, views
from analysis.views import Parts
from builder.errors import InputError
from builder.files import finite, read_lines

QUERIES = Path(__file__).parent / "queries"
VISUAL_WORDS = Path(__file__).parent / "visual_words.txt"
LANGUAGE_ROWS, TOKEN_ROWS, NEAR_ROWS, NOUN_ROWS, SELECTION_ROWS = 100_000, 20_000, 20_000, 10_000, 20_000
FRACTIONS = (0.1, 0.2, 0.3, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Options:
    """What a user may give.

    Words a line, `word<TAB>score` a line, and a `tokenizer.json` (of library tokenizers) instead of CLIP's.
    """

    vocabulary: Path | None = None
    concreteness: Path | None = None
    tokenizer: Path | None = None


def stats(parts: Parts, options: Options | None = None) -> dict[str, Any]:
    """Every query's rows, each with the hash of its SQL."""
    options = options or Options()
    report: dict[str, Any] = {}
    # What a user gives is read first: a mistake in it is told at once.
    given = {"visual_words": _visual_words(options), "concreteness": _concreteness(options)}
    counter = tokens.counter(options.tokenizer)
    known = {*views.NAMES, *given, *_MADE, "tokens", "pool"}
    queries = {path: views.declared(path, "reads", known) for path in sorted(QUERIES.glob("*.sql"))}
    with views.connect(parts) as con:
        for name, table in given.items():
            con.register(name, table)
        made = _MADE | {"tokens": partial(_tokens, counter=counter)}
        prepare(con)
        there = _views(con)
        for path, (sql, reads) in queries.items():
            answer: dict[str, Any] = {"sha256": hashlib.sha256(sql.encode()).hexdigest()}
            absent = next(
                (
                    f"no {name} here"
                    for name in ("defects", "ratings", "ledger", "scores")
                    if name in reads and name not in there
                ),
                None,
            )
            for name in sorted((reads & set(made)) - there):
                try:
                    con.register(name, made[name](con))
                    there.add(name)
                except _Absent as reason:
                    absent = str(reason)
            try:
                if absent:
                    answer["absent"] = absent
                else:
                    with views.telling_what_is_undeclared(path, "reads"):
                        answer["rows"] = finite(con.sql(sql).to_arrow_table().to_pylist())
            except duckdb.BinderException as error:
                if "ledger" in there:  # ours
                    raise
                # In somebody else's table.
                column = re.search(r'Referenced column "(\w+)" not found', str(error))
                answer["absent"] = (
                    f"no column {column[1]} here"
                    if column
                    else f"columns of other types here: {str(error).splitlines()[0]}"
                )
            report[path.stem] = answer
    return report


def defects(con: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
    """Rows of the query of that name; none where the rows do not say how their captions were found."""
    if not {"defects", "ledger"} <= _views(con):
        return []
    query, _ = views.declared(QUERIES / "defects.sql", "reads", views.NAMES)
    found: list[dict[str, Any]] = con.sql(query).to_arrow_table().to_pylist()
    return found


def prepare(con: duckdb.DuckDBPyConnection) -> None:
    """The tables `counted` and `words`, which several queries read."""
    con.execute(
        """create temp table counted as
           select caption, count_words(text)::integer as words, length(text)::integer as characters,
               count(*) as times
           from captions group by all"""
    )
    # Parts between spaces first: there are few distinct ones.
    con.execute(
        r"""create temp table words as select caption, word, sum(times)::bigint as times from (
                select caption, unnest(regexp_extract_all(lower(part), '[\pL\pN]+')) as word, times from (
                    select caption, part, count(*) as times
                    from (select caption, unnest(string_split(text, ' ')) as part from captions)
                    group by all
                )) group by all"""
    )


def to_json(report: Mapping[str, Any]) -> str:
    return json.dumps(report, indent=1, ensure_ascii=False, default=float) + "\n"


def rows(report: Mapping[str, Any], query: str) -> list[dict[str, Any]]:
    """Rows of a query; none where there was no answer."""
    found: list[dict[str, Any]] = report[query].get("rows", [])
    return found


def _views(con: duckdb.DuckDBPyConnection) -> set[str]:
    return {name for (name,) in con.sql("show tables").fetchall()}


# --- tables made in Python ----------------------------------------------------------------------------------


class _Absent(Exception):
    """There is no such table here, and what would change that."""


def _texts(con: duckdb.DuckDBPyConnection, number: int) -> pa.Table:
    """(nth, caption, text) of the first captions of each column."""
    return con.sql(f"select nth, caption, text from first_captions({number})").to_arrow_table()


def _languages(con: duckdb.DuckDBPyConnection) -> pa.Table:
    """(caption, language) of the first rows."""
    found = _texts(con, LANGUAGE_ROWS)
    return pa.table(
        {
            "caption": found["caption"],
            "language": pa.array(map(select.language, found["text"].to_pylist()), pa.string()),
        }
    )


def _tokens(con: duckdb.DuckDBPyConnection, counter: tuple[str, tokens.Counter]) -> pa.Table:
    """(caption, tokenizer, tokens) of the first captions."""
    found, (name, count) = _texts(con, TOKEN_ROWS), counter
    numbers = count(text[:20_000] for text in found["text"].to_pylist())
    return pa.table({"caption": found["caption"], "tokenizer": [name] * len(numbers), "tokens": numbers})


def _near_duplicates(con: duckdb.DuckDBPyConnection) -> pa.Table:
    """(caption, near_captions, near_percent): captions of the first rows that are near another row's.

    By MinHash over word trigrams.
    """
    from datasketch import MinHash, MinHashLSH

    found = _texts(con, NEAR_ROWS)
    result = []
    for caption in sorted(set(found["caption"].to_pylist())):
        texts = [
            text
            for name, text in zip(found["caption"].to_pylist(), found["text"].to_pylist(), strict=True)
            if name == caption
        ]
        index, near = MinHashLSH(threshold=0.8, num_perm=64), set()
        trigrams = [
            [" ".join(words[k : k + 3]).encode() for k in range(max(1, len(words) - 2))]
            for words in (re.findall(r"\w+", text[:20_000].lower()) for text in texts)
        ]
        hashes = MinHash.bulk(trigrams, num_perm=64)
        for number, each in enumerate(hashes):
            others = [other for other in index.query(each) if each.jaccard(hashes[other]) >= 0.8]
            near |= {number, *others} if others else set()
            index.insert(number, each)
        result.append(
            {
                "caption": caption,
                "near_captions": len(texts),
                "near_percent": round(100 * len(near) / len(texts), 2),
            }
        )
    return pa.Table.from_pylist(
        result, pa.schema({"caption": pa.string(), "near_captions": pa.int64(), "near_percent": pa.float64()})
    )


def _nouns(con: duckdb.DuckDBPyConnection) -> pa.Table:
    """(caption, nth, noun) of the first captions, by whichever spaCy pipeline is installed."""
    import spacy

    installed = spacy.util.get_installed_models()
    if not installed:
        raise _Absent("no spaCy pipeline is installed; add one: python -m spacy download en_core_web_sm")
    pipeline = spacy.load(installed[0], disable=["parser", "ner"])
    found = _texts(con, NOUN_ROWS)
    table: dict[str, list[Any]] = {"caption": [], "nth": [], "noun": []}
    documents = pipeline.pipe(text[:20_000] for text in found["text"].to_pylist())
    for caption, nth, document in zip(
        found["caption"].to_pylist(), found["nth"].to_pylist(), documents, strict=True
    ):
        for token in document:
            if token.pos_ in ("NOUN", "PROPN"):
                for column, value in zip(
                    table.values(), (caption, nth, token.lemma_.lower() or token.lower_), strict=True
                ):
                    column.append(value)
    return pa.table(table)


def _selections(con: duckdb.DuckDBPyConnection) -> pa.Table:
    """(strategy, fraction, position, caption) that strategies on cosines alone select from the first rows."""
    if not {"org_cosine", "re_cosine"} <= select.define_pool(con, SELECTION_ROWS):
        raise _Absent("no cosines of both captions here")
    parts = []
    for strategy in select.names():
        path, sql, needs = select.strategy_of(strategy)
        if needs <= {"fraction", "fraction or threshold"}:
            for fraction in FRACTIONS if needs else (1.0,):
                con.execute(f"set variable fraction = {fraction}; set variable threshold = null")
                with views.telling_what_is_undeclared(path, "needs"):
                    parts.append(
                        con.sql(
                            f"select '{strategy}' as strategy, {fraction}::double as fraction, "
                            f"uid as position, caption from ({sql})"
                        ).to_arrow_table()
                    )
    return pa.concat_tables(parts)


def _visual_words(options: Options) -> pa.Table:
    lines = read_lines(options.vocabulary or VISUAL_WORDS)
    return pa.table(
        {
            "word": sorted(
                {line.strip().lower() for line in lines if line.strip() and not line.startswith("#")}
            )
        }
    )


def _concreteness(options: Options) -> pa.Table:
    """(word, score) of the table that was given; without one, empty."""
    pairs = {}
    for number, line in enumerate(read_lines(options.concreteness) if options.concreteness else []):
        word, _, score = line.rstrip("\n").partition("\t")
        try:
            value = float(score)
        except ValueError:
            value = math.nan
        if math.isfinite(value):
            pairs[word.lower()] = value
        elif number:  # the first may be a header
            raise InputError(
                f"{options.concreteness}, line {number + 1}: '{line.strip()[:40]}' is no word, tab, number",
                "write a line as: banana<TAB>5.0",
            )
    return pa.table({"word": list(pairs), "score": pa.array(list(pairs.values()), pa.float64())})


_MADE: dict[str, Callable[[duckdb.DuckDBPyConnection], pa.Table]] = {
    "languages": _languages, "near_duplicates": _near_duplicates, "nouns": _nouns, "selections": _selections,
}  # fmt: skip


# --- for the terminal and the card --------------------------------------------------------------------------

_LINES = (
    ("lengths", "captions", "captions"), ("lengths", "words_mean", "words, mean"),
    ("lengths", "words_median", "words, median"), ("lengths", "characters_mean", "characters, mean"),
    ("tokens", "tokens_mean", "tokens, mean"), ("tokens", "cut_at_77_percent", "cut at 77 tokens, %"),
    ("vocabulary", "distinct_words", "distinct words"),
    ("vocabulary", "joint_vocabulary_percent", "share of the joint vocabulary, %"),
    ("repetition", "distinct_3", "distinct trigrams / trigrams"),
    ("repetition", "opener_percent", "open with 'the image shows' etc., %"),
    ("repetition", "top_100_prefixes_percent", "begin with one of 100 prefixes, %"),
    ("grounding", "grounding_ratio_mean", "visual words, share"),
    ("duplicates", "repeated_percent", "said of another row too, %"),
    ("duplicates", "near_duplicate_percent", "near duplicates in a sample, %"),
    ("cosines", "cosine_mean", "cosine with the image, mean"),
    ("cosines", "cosine_median", "cosine with the image, median"),
)  # fmt: skip


def caption_names(report: Mapping[str, Any]) -> list[str]:
    """Caption columns in the order of the table: the original first."""
    names = [row["caption"] for row in rows(report, "lengths")]
    return sorted(names, key=lambda name: (name != "org_caption", name != "re_caption", name))


def table(report: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Head and lines (statistic, one value a caption) for the terminal and the card."""
    names = caption_names(report)
    lines = []
    for query, column, label in _LINES:
        found = {row["caption"]: row for row in rows(report, query)}
        if found:
            lines.append((label, *(_shown(found.get(name, {}).get(column)) for name in names)))
    for row in rows(report, "preference"):
        by_name = {
            "org_caption": row["original_nearer_percent"],
            "re_caption": row["recaption_nearer_percent"],
        }
        lines.append(("nearer to the image, % of rows", *(_shown(by_name.get(name)) for name in names)))
    english = {row["caption"]: row["percent"] for row in rows(report, "languages") if row["language"] == "en"}
    measured = {row["caption"] for row in rows(report, "languages")}
    lines.append(
        (
            "in English (lid.176), %",
            *(_shown(english.get(name, 0.0 if name in measured else None)) for name in names),
        )
    )
    shown = {"org_caption": "original", "re_caption": "recaption"}
    return ["statistic", *(shown.get(name, name) for name in names)], lines


def _shown(value: float | int | None) -> str:
    return (
        "-"
        if value is None
        else f"{value:,}"
        if isinstance(value, int)
        else f"{value:,.2f}"
        if abs(value) >= 1
        else f"{value:.3f}"
    )
