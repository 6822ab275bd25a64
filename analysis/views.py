r"""DuckDB over any caption data set: a run, a version, or tables of somebody else's with caption columns.

What the queries see, and declare in their first line that they read, `-- reads: captions, scores`:

    captions(position, nth, caption, text)  every caption column under another, `caption` naming it; no row
                                            where there is none. `position` counts the rows, `nth` the
                                            captions of a column
    first_captions(number)                  the first so many of each column
    counted(caption, words, characters, times)     how many captions have that length
    words(caption, word, times)             their words, lower case
    caption_columns(caption, place)         their order: the first is what the others are compared with
    scores(caption, cosine)                 where the rows have cosines
    defects(caption, defects, rejected, blind)     where the rows say how their captions were found
    ratings(judge, rating)                  where a judge rated captions
    published, ledger                       the rows themselves, and every source row with its status

In a shell of your own (V is a version's folder):

    create view published as from 'V/data/train-*.parquet';
    create view ledger as from 'V/ledger/train-*.parquet';
    create view captions as select *, row_number() over (partition by caption order by position) as nth
        from (unpivot (select row_number() over () as position, org_caption, re_caption from published)
              on org_caption, re_caption into name caption value text);
    create macro first_captions(number) as table from captions where nth <= number;
    create table caption_columns as
        from (values ('org_caption', 1), ('re_caption', 2)) as columns(caption, place);
    create view scores as
        unpivot (select org_clip_score as org_caption, re_clip_score as re_caption from published)
        on org_caption, re_caption into name caption value cosine;
    create view defects as
        select 're_caption' as caption, re_defects as defects, re_rejected as rejected, re_blind as blind
        from published where re_caption is not null;
    create view ratings as
        unpivot (select re_gpt4v_score, org_gpt4v_score from published)
        on re_gpt4v_score, org_gpt4v_score into name judge value rating;
    create table words as select caption, word, sum(times)::bigint as times from (
        select caption, unnest(regexp_extract_all(lower(part), '[\pL\pN]+')) as word, times from (
            select caption, part, count(*) as times
            from (select caption, unnest(string_split(text, ' ')) as part from captions) group by all
        )) group by all;
    create macro count_words(text) as if(regexp_matches(text, '[^\x20-\x7E]|^ | $|  |^$'),
        len(regexp_extract_all(text, '[^\s\p{Z}\x{0B}\x{1C}-\x{1F}\x{85}]+')), len(string_split(text, ' ')));
    create table counted as
        select caption, count_words(text) as words, length(text) as characters, count(*) as times
        from captions group by all;
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from builder import sql
from builder.columns import NOT_CAPTIONS, caption_of, score_column
from builder.errors import InputError

MEMORY = "2500MB"  # DuckDB spills to disk beyond
# What the queries see, but for tables that report.py makes.
NAMES = frozenset(
    (
        "captions",
        "first_captions",
        "counted",
        "words",
        "caption_columns",
        "scores",
        "defects",
        "ratings",
        "published",
        "ledger",
    )
)
# Runs without white space. Plain text, in which it is single spaces, is counted ten times as fast without the
# regular expression.
COUNT_WORDS = r"""create macro count_words(text) as if(regexp_matches(text, '[^\x20-\x7E]|^ | $|  |^$'),
    len(regexp_extract_all(text, '[^\s\p{Z}\x{0B}\x{1C}-\x{1F}\x{85}]+')), len(string_split(text, ' ')))"""
KNOWN = (
    "org_caption", "re_caption", "text", "TEXT", "laion_2b", "laion_coco", "capsfusion", "capsfuion_official",
)  # fmt: skip


def declared(path: Path, word: str, known: Collection[str]) -> tuple[str, frozenset[str]]:
    """The SQL of a file, and the names in its first line, `-- <word>: name, name` or `-- <word>: nothing`.

    Raises:
        InputError: it begins with another line, or with a name that is not known.
    """
    query = path.read_text(encoding="utf-8")
    before, _, said = query.partition("\n")[0].partition(f"-- {word}: ")
    names = [name.strip() for name in said.split(",")] if said != "nothing" else []
    unknown = [name for name in names if name not in known]
    if before or unknown:
        raise InputError(
            f"{path} does not begin with what it {word}"
            if before or not said
            else f"{path} {word} what there is not: {', '.join(unknown)}",
            f"begin it with a line as: -- {word}: {', '.join(sorted(known)[:2])}; "
            f"there are: {', '.join(sorted(known))}, or nothing",
        )
    return query, frozenset(names)


@contextmanager
def telling_what_is_undeclared(path: Path, word: str) -> Iterator[None]:
    """Around a query of that file.

    Raises:
        InputError: the query names what is not there, as nothing declared it.
    """
    try:
        yield
    except duckdb.CatalogException as error:
        said = str(error).splitlines()[0]
        raise InputError(f"{path}: {said}", f"name it in the first line, -- {word}: ...") from error


@dataclass(frozen=True)
class Parts:
    """Files of the published rows and of the ledger, the file system they are in, and the caption columns.

    `name` is what an error calls them; `spill` is where a query puts what its memory does not hold, in a
    folder that goes with it; None: the system's place.
    """

    published: list[str]
    ledger: list[str]
    filesystem: AbstractFileSystem | None = None
    captions: tuple[str, ...] = ()  # found by their names where none are given
    spill: Path | None = None
    name: str = ""


@contextmanager
def connect(found: Parts) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB with the views of this module.

    Raises:
        InputError: the tables differ, are empty, are not UTF-8, or have no caption column.
    """
    with sql.connect(
        found.spill, preserve_insertion_order=True, memory_limit=MEMORY, python_enable_replacements=False
    ) as con:
        con.execute(COUNT_WORDS)
        if found.filesystem is not None:
            con.register_filesystem(found.filesystem)
        try:
            for name, paths in (("published", found.published), ("ledger", found.ledger)):
                if paths:
                    create(con, name, paths)
            try:
                _captions_view(con, found)
            except InputError as error:
                raise InputError(
                    f"{found.published[0]}: {error.message}" if found.published else error.message, error.hint
                ) from error
        except (duckdb.Error, UnicodeDecodeError) as error:
            if found.filesystem is not None and not _is_text_error(error):
                raise
            raise _unreadable(found, error) from error
        try:
            yield con
        except (duckdb.Error, UnicodeDecodeError) as error:
            # A bare duckdb.Error: damaged pages of a parquet file.
            if _is_text_error(error) or type(error) is duckdb.Error:
                raise _unreadable(found, error) from error
            raise


def _is_text_error(error: Exception) -> bool:
    return any(
        words in str(error).lower()
        for words in (
            "not utf-8",
            "valid utf8",
            "invalid utf-8",
            "invalid unicode",
            "surrogate",
            "can't decode",
        )
    )


def _unreadable(found: Parts, error: Exception) -> InputError:
    lines = [
        line for line in str(error).splitlines() if line.strip() and not line.startswith("Original Line")
    ]
    said = " ".join(lines[: 2 if lines[0].endswith(":") or "CSV Error" in lines[0] else 1])[:300]
    hint = (
        "write its text as UTF-8"
        if _is_text_error(error)
        else "give whole tables of one schema, as parquet if in doubt"
    )
    return InputError(
        f"{found.published[0]}{' ...' if found.published[1:] else ''} cannot be read: {said}", hint
    )


def create(con: duckdb.DuckDBPyConnection, name: str, paths: list[str]) -> None:
    """A view over tables of one schema."""
    if paths[0].lower().endswith(".parquet") and not paths[0].startswith("hf://"):
        first = schema_of(paths[0])
        for path in paths[1:]:
            schema = schema_of(path)
            if schema.names != first.names:
                differ = sorted(set(schema.names) ^ set(first.names)) or ["their order"]
                raise InputError(
                    f"{path} has other columns than {paths[0]}: {', '.join(differ)}",
                    "give tables of one schema",
                )
            for a, b in zip(first, schema, strict=True):
                if _is_text(a.type) != _is_text(b.type) and not (
                    _is_text(a.type) and pa.types.is_null(b.type)
                ):
                    raise InputError(
                        f"{a.name} is {b.type} in {path} and {a.type} in {paths[0]}",
                        "give tables of one schema",
                    )
    con.execute(f"create view {sql.identifier(name)} as from {sql.table(paths)}")


def schema_of(path: str, fs: AbstractFileSystem | None = None) -> pa.Schema:
    try:
        return pq.read_schema(sql.absolute(path), filesystem=None if isinstance(fs, LocalFileSystem) else fs)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path} is not a parquet file, or not a whole one: {error}", "take it out, or get it again"
        ) from error


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def caption_columns(con: duckdb.DuckDBPyConnection, wanted: Sequence[str]) -> list[str]:
    """Columns of `published` with captions: those asked for, or those with names that captions have."""
    columns = {name: kind for name, kind, *_ in con.sql("describe published").fetchall()}
    texts = [name for name, kind in columns.items() if kind == "VARCHAR"]
    missing = [name for name in wanted if name not in texts]
    captions = [
        name
        for name in texts
        if re.search("caption|alt_?text", name.lower()) and not name.endswith((*NOT_CAPTIONS, "_model"))
    ]
    names = list(dict.fromkeys(wanted or [*(name for name in KNOWN if name in texts), *captions]))
    if missing or not names:
        raise InputError(
            f"there is no caption column {missing[0]}"
            if missing
            else "none of the columns has a name that captions are known by",
            f"text columns: {', '.join(texts) or 'none'}; "
            f"name them: --captions {','.join(texts[:2]) or 'COLUMN'}",
        )
    counts = con.sql(
        f"select {', '.join(f'count({sql.identifier(name)})' for name in names)}, count(*) from published"
    ).fetchall()[0]
    if not counts[-1]:
        raise InputError("the tables hold no row", "give tables with rows in them")
    names = [name for name, number in zip(names, counts[:-1], strict=True) if number]
    if not names:
        raise InputError(
            f"every caption is null in {', '.join(wanted) or 'all of its columns'}",
            "name other columns: --captions COLUMN,...",
        )
    return names


def _captions_view(con: duckdb.DuckDBPyConnection, found: Parts) -> None:
    names = (
        caption_columns(con, found.captions)
        if _readable(con, found)
        else list(found.captions) or ["org_caption", "re_caption"]
    )
    columns = [  # a union of columns, unlike UNPIVOT, groups by `caption` at no cost
        f"select position, row_number() over () as nth, {sql.literal(name)} as caption, text "
        f"from (select row_number() over () as position, {sql.identifier(name)} as text from published) "
        "where text is not null"
        for name in names
    ]
    con.execute(f"create view captions as {' union all '.join(columns)}")
    # Unlike a condition on `nth`, a limit ends the reading.
    firsts = " union all ".join(f"from ({column} limit number)" for column in columns)
    con.execute(f"create macro first_captions(number) as table {firsts}")
    con.execute("create temp table caption_columns (caption varchar, place integer)")
    con.executemany(
        "insert into caption_columns values (?, ?)",
        [(name, place) for place, name in enumerate(names, start=1)],
    )
    there = {name for name, *_ in con.sql("describe published").fetchall()}
    _about_captions(con)
    scores = {name: score for name in names if (score := score_column("score", name)) in there}
    if scored := [f"{sql.identifier(score)} as {sql.identifier(name)}" for name, score in scores.items()]:
        con.execute(
            f"create view scores as unpivot (select {', '.join(scored)} from published) "
            f"on {', '.join(map(sql.identifier, scores))} into name caption value cosine"
        )


def _about_captions(con: duckdb.DuckDBPyConnection) -> None:
    """The views `defects` and `ratings`, where the rows have such columns."""
    kinds = {name: kind for name, kind, *_ in con.sql("describe published").fetchall()}
    defects = []
    for told in (name for name in kinds if name.endswith("_defects") and kinds[name] == "VARCHAR"):
        before = told.removesuffix("_defects")
        caption = caption_of(before)
        others = [f"{before}_rejected", f"{before}_blind"]
        rejected, blind = (sql.identifier(name) if name in kinds else "null" for name in others)
        if caption in kinds:
            defects.append(
                f"select {sql.literal(caption)} as caption, {sql.identifier(told)} as defects, "
                f"{rejected}::varchar as rejected, {blind}::boolean as blind from published "
                f"where {sql.identifier(caption)} is not null or {sql.identifier(told)} is not null"
            )
    judges = [name for name, kind in kinds.items() if name.endswith("_score") and kind == "BIGINT"]
    ratings = [
        f"select {sql.literal(name)} as judge, {sql.identifier(name)} as rating from published"
        for name in judges
    ]
    for view, parts in (("defects", defects), ("ratings", ratings)):
        if parts:
            con.execute(f"create view {view} as {' union all '.join(parts)}")


def _readable(con: duckdb.DuckDBPyConnection, found: Parts) -> bool:
    """A run whose rows all failed has captions of no kind; its views exist all the same."""
    return bool(not found.ledger or con.sql("select 1 from published limit 1").fetchall())
