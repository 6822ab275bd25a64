"""Measure, query, select, describe and look at what was built or published."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from builder.commands.options import (
    as_json_option,
    captions_option,
    names_of,
    path_type,
    place_argument,
)
from builder.errors import UserError, command
from builder.files import finite
from builder.resolve import pairs_of
from builder.shown import echo, print_, stats_table


@click.command()
@place_argument
@captions_option
@click.option("--vocabulary", type=path_type, help="Visual words, one a line, for the grounding ratio.")
@click.option("--concreteness", type=path_type, help="word, tab, score a line.")
@click.option("--tokenizer", type=path_type, help="A tokenizer.json, instead of CLIP's.")
@as_json_option
def stats(
    place: str,
    captions: str,
    vocabulary: Path | None,
    concreteness: Path | None,
    tokenizer: Path | None,
    as_json: bool,
) -> None:
    """Statistics of a run, a published version, or any tables with captions; a run keeps them as
    stats.json.
    """
    from analysis import report
    from builder.places import look

    found = look(place, names_of(captions))
    result = report.stats(found.parts, report.Options(vocabulary, concreteness, tokenizer))
    if found.run and ("://" in place or os.access(place, os.W_OK)):
        found.run.store.write("stats.json", report.to_json(result).encode())
    absent = [f"{name}: {answer['absent']}" for name, answer in result.items() if "absent" in answer]
    print_(result, as_json, "\n".join([stats_table(result), *absent]))


@click.command()
@place_argument
@click.argument("query", required=False)
@captions_option
@as_json_option
def sql(place: str, query: str | None, captions: str, as_json: bool) -> None:
    """Run QUERY, or standard input, in DuckDB with the views `published`, `ledger`, `captions` and
    `scores`.
    """
    import duckdb

    from analysis import views
    from builder.places import parts

    describe = command("recap", "sql", place, "describe published")
    with views.connect(parts(place, names_of(captions))) as con:
        try:
            statements = con.extract_statements(query or (sys.stdin.read() if sys.stdin else ""))
            if not statements:
                raise UserError("there is no query", f"for example: {describe}")
            if any(statement.type == duckdb.StatementType.LOAD for statement in statements):
                reason = "extensions are neither installed nor loaded here"
                raise UserError(reason, "use a DuckDB shell of your own")
            found = None
            for statement in statements:
                found = con.sql(statement)
            if found is None:
                return
            if as_json:
                echo(json.dumps(finite(found.to_arrow_table().to_pylist()), ensure_ascii=False, default=str))
            else:
                with contextlib.redirect_stdout(io.StringIO()) as shown:
                    found.show(max_width=200)
                echo(shown.getvalue().rstrip("\n"))
        except duckdb.Error as error:
            hint = f"the views are published and ledger: {describe}"
            raise UserError(str(error).strip().replace("\n\n", " "), hint) from error


@click.command()
@place_argument
@click.argument("strategy")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--out",
    required=True,
    type=path_type,
    help="Folder for subset.npy (DataComp's format) and subset.parquet.",
)
@as_json_option
def select(place: str, strategy: str, settings: tuple[str, ...], out: Path, as_json: bool) -> None:
    """Select rows and captions by STRATEGY, or by several joined by '+', which must all agree.

    Settings: fraction=0.3 or threshold=0.28; words=FILE; embeddings=FILE.npz centroids=FILE.npy
    targets=FILE.npy.
    """
    from analysis import select as selection
    from builder.places import parts
    from builder.typed import parse

    given = parse(selection.Given, pairs_of(settings), what="recap select")
    with selection.selecting(parts(place), strategy.split("+"), given) as con:
        query = "select caption, count(*) from selected group by caption order by caption"
        counts = dict(con.sql(query).fetchall())
        subset, table = selection.write(con, out)
    lines = [f"{number:>12,} {name}" for name, number in counts.items()] + [f"{subset}  {table}"]
    print_({"rows": counts, "subset": str(subset), "table": str(table)}, as_json, "\n".join(lines))


@click.command()
@place_argument
@click.option(
    "--check",
    is_flag=True,
    help="Compute a version's statistics and card again; "
    "exit status 1 where they no longer agree with the data.",
)
def card(place: str, check: bool) -> None:
    """Write the card and its plots of a run into RUN/card, as `publish` would; or check those of a
    version.
    """
    from builder.versions.publish import preview_card
    from builder.versions.verify import check_card

    if not check:
        if place.startswith("hf://datasets/"):
            hint = f"check a version's card: {command('recap', 'card', '--check', place)}"
            raise UserError(f"{place} is no run", hint)
        echo(preview_card(place))
        return
    problems = check_card(place)
    said = f"{place}: {len(problems)} numbers, counts or columns do not agree with the data"
    echo("\n".join([said, *problems]))
    sys.exit(1 if problems else 0)


@click.command()
@place_argument
@click.option("--out", required=True, type=path_type, help="Folder for the page.")
@click.option("--rows", type=click.IntRange(min=1), help="At most so many rows; 100,000 unless given.")
@captions_option
def explore(place: str, out: Path, rows: int | None, captions: str) -> None:
    """Write a static page to look at captions: search, sort and filter in the browser, no server needed."""
    from builder.places import look
    from cards.explore import explore as write_page

    page = write_page(look(place, names_of(captions)), out, rows=rows)
    serve = command("python", "-m", "http.server", "--bind", "127.0.0.1", "--directory", out)
    echo(f"{page}\nlook at it: {serve}")


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="[B]", required=False)
@click.option(
    "--columns",
    default="",
    help="Two caption columns of A to compare, comma separated, instead of two versions.",
)
@as_json_option
def diff(a: str, b: str | None, columns: str, as_json: bool) -> None:
    """What differs between two versions or runs: rows, columns, values, scores. Or between two caption
    columns of A.
    """
    from analysis.diff import diff as differences
    from analysis.diff import diff_columns
    from builder.places import parts

    if bool(b) == bool(columns) or (columns and len(names_of(columns)) != 2):
        of_one = command("recap", "diff", a, "--columns", "org_caption,re_caption")
        hint = f"{command('recap', 'diff', a)} OTHER, or: {of_one}"
        raise UserError("two versions or two columns are compared", hint)
    if columns:
        found = diff_columns(parts(a), *names_of(columns))
        print_(found, as_json, "\n".join(f"{name:<21} {_listed(value)}" for name, value in found.items()))
        return
    result = differences(parts(a), parts(str(b)))
    rows = f"{result['rows'][0]:,} -> {result['rows'][1]:,}"
    lines = [f"rows      {rows}: {result['added']:,} added, {result['removed']:,} removed"]
    lines += [f"columns   + {name}" for name in result["columns_added"]]
    lines += [f"columns   - {name}" for name in result["columns_removed"]]
    lines += [f"changed   {name}: {number:,} rows" for name, number in result["changed"].items()]
    lines += [
        f"mean      {name}: {_number(before)} -> {_number(after)}"
        for name, (before, after) in result["means"].items()
    ]
    print_(result, as_json, "\n".join(lines))


def _listed(value: Any) -> str:
    return ", ".join(map(_number, value)) if isinstance(value, tuple) else _number(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
