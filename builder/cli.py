"""The command line: every command is one library call. stdout carries data, stderr progress.

Exit status: 0 done; 1 some shards failed, each named with its reason; 2 the user must change something; 130
interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import click

from builder import run as runs
from builder import status as status_of
from builder.core import TRANSPORT, Recipe
from builder.errors import RecipeError, UserError, command
from builder.executors.local import local
from builder.files import finite
from builder.forecast import forecast
from builder.resolve import pairs_of, resolve, resolve_benchmark, resolve_training
from builder.schedule import BLOCKS_AT_WORK
from builder.scratch import Local
from builder.shown import (
    Formatter,
    columns,
    echo,
    forecast_table,
    print_,
    show_status,
    shown_progress,
    stats_table,
)

WATCH_S = 5.0


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        numbers: list[int] = []
        try:
            with _signals(numbers):
                return super().invoke(ctx)
        except UserError as error:
            _stop(error.message, error.hint)
        except (BrokenPipeError, click.ClickException):
            raise  # click knows what to do
        except OSError as error:  # a place that cannot be read or written
            names = [str(name) for name in (error.filename, error.filename2) if name]
            _stop(f"{' -> '.join(names) or type(error).__name__}: {error.strerror or error}", "")
        except KeyboardInterrupt:
            number = numbers[0] if numbers else signal.SIGINT
            said = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
            echo(f"recap: {said}; the same command goes on where this one stopped", err=True)
            sys.exit(128 + number)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of use


@contextlib.contextmanager
def _signals(come: list[int]) -> Iterator[None]:
    """SIGTERM and SIGHUP end like Ctrl-C, unless ignored, as under nohup. `come` gets those that come."""

    def end(number: int, _: FrameType | None) -> None:
        come.append(number)
        raise KeyboardInterrupt

    both = (signal.SIGTERM, signal.SIGHUP)
    numbers = [number for number in both if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(message: str, hint: str) -> None:
    """One line, however many a file's name or a library makes of it, and what to type next. Exits with 2."""
    lines = [" ".join(text.split("\n"))[:800] for text in (message, hint) if text]
    echo("\n  ".join([f"recap: {lines[0]}", *lines[1:]]), err=True)
    sys.exit(2)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="recapkit", prog_name="recap")
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
def main(verbose: bool) -> None:
    """Build, measure and publish recaptioned image-text data sets."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("builder").setLevel(logging.DEBUG if verbose else logging.INFO)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


_path = click.Path(path_type=Path)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_recipe = click.argument("recipe")
_settings = click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
_limit = click.option("--limit", type=click.IntRange(min=1), help="Only the first N source rows.")


class _Directory(click.Path):
    """Of a run; a URL stays text: a Path would make a folder of it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return str(value) if "://" in str(value) else super().convert(value, param, ctx)


_directory = _Directory(path_type=Path, file_okay=False)
_on = click.option(
    "--on",
    default="local",
    metavar="local|ray|ADDRESS",
    help="Where the work is done: processes here, a Ray that is started here, or the Ray cluster at"
    " HOST:PORT, ray://HOST:PORT or auto.",
)


def _executor(on: str) -> runs.Executor:
    if on == "local":
        return local
    try:
        from builder.executors.ray import on_ray
    except ModuleNotFoundError as error:
        raise UserError("Ray is not installed", "pip install 'recapkit[ray]'") from error
    return on_ray(on)


_run_option = click.option(
    "--run", type=_directory, help="Run directory, or a URL: s3://BUCKET/PATH; runs/<recipe> unless given."
)
_run = click.argument("run", type=_Directory(path_type=Path, exists=True, file_okay=False))
_place = click.argument("place", metavar="RUN|TARGET[@v1.2.0]")


def _inside(run: Path | str, name: str) -> Path | str:
    return run / name if isinstance(run, Path) else f"{run}/{name}"


def _local_disk(command: Any) -> Any:
    """Options of whatever builds: what it may use of a machine's disk; given as one `local_disk`."""

    @click.option(
        "--scratch",
        type=click.Path(path_type=Path, file_okay=False),
        help="Folder on every machine for files at work; in the run, or the system's, unless given.",
    )
    @click.option(
        "--scratch-gib",
        type=click.FloatRange(min=0, min_open=True),
        help="Begin no task on a machine while so much lies there.",
    )
    @click.option(
        "--single-driver", is_flag=True, help="No other build is at work in this run: you see to that."
    )
    @functools.wraps(command)
    def with_local_disk(
        *arguments: Any, scratch: Path | None, scratch_gib: float | None, single_driver: bool, **more: Any
    ) -> Any:
        local_disk = Local(scratch and scratch.absolute(), scratch_gib, single_driver)
        return command(*arguments, local_disk=local_disk, **more)

    return with_local_disk


def _resolve(recipe: str, settings: Iterable[str], limit: int | None) -> Recipe:
    resolved = resolve(recipe, [*settings, f"source.limit={limit}"] if limit else settings)
    try:
        resolved.check_order()
    except RecipeError as error:
        raise RecipeError(f"{recipe}: {error.message}", error.hint) from error
    return resolved


@main.command()
@_recipe
@_settings
@_run_option
@_limit
@click.option(
    "--accept-failures",
    is_flag=True,
    help="Take shards and blocks as they are though this machine, or the web, seems to have a bad day.",
)
@click.option(
    "--redo",
    multiple=True,
    metavar="STAGE",
    help="Finished shards of this stage may be done again with other settings.",
)
@click.option(
    "--drop-images", is_flag=True, help="Delete a block's images once its captions and scores are there."
)
@click.option(
    "--blocks",
    default=BLOCKS_AT_WORK,
    show_default=True,
    type=click.IntRange(min=1),
    help="Blocks of a thousand shards that are at work at a time; what a disk holds of images with"
    " --drop-images. About eight shards for every captioner.",
)
@_on
@_local_disk
@_as_json
def build(
    recipe: str,
    settings: tuple[str, ...],
    run: Path | str | None,
    limit: int | None,
    accept_failures: bool,
    redo: tuple[str, ...],
    drop_images: bool,
    blocks: int,
    on: str,
    local_disk: Local,
    as_json: bool,
) -> None:
    """Build RECIPE: a name, my_file.py:function or a recipe.json. The same command again goes on where it
    stopped.

    KEY=VALUE sets a parameter of the recipe, or of a stage: download.timeout_s=5.
    """
    more = ["download.accept_failures=true"] if accept_failures else []
    resolved = _resolve(recipe, [*settings, *more], limit)
    run = run or Path("runs", resolved.name)
    with shown_progress() as progress:
        result = runs.build(
            resolved,
            run,
            executor=_executor(on),
            progress=progress,
            redo=redo,
            drop_images=drop_images,
            blocks_at_work=blocks,
            local_disk=local_disk,
        )
    _say_built(run, result, as_json)


def _say_built(run: Path | str, result: runs.Result, as_json: bool) -> None:
    """What a build did. Exits with 1 where something was not done."""
    about = {"run": str(run), "done": len(result.done), "failed": result.failed, "held": result.held}
    print_(about, as_json, f"{run}: {len(result.done)} shards done, {len(result.failed)} failed")
    for warning in result.warnings:
        echo(f"warning: {warning}", err=True)
    for name, reason in result.failed.items():
        echo(f"failed: {name}: {reason}", err=True)
    for reason in result.held.values():
        echo(f"held back: {reason}", err=True)
    if result.failed:
        echo("the same command tries them again", err=True)
    if result.held:
        again = command("recap", "retry", run, "--status", ",".join(TRANSPORT))
        echo(f"download those rows again: {again}; or take them as they are: --accept-failures", err=True)
    if result.failed or result.held:
        sys.exit(1)


@main.command()
@_run
@click.option(
    "--status", "statuses", required=True, help="Statuses of the rows to download again, comma separated."
)
@_on
@_local_disk
@_as_json
def retry(run: Path | str, statuses: str, on: str, local_disk: Local, as_json: bool) -> None:
    """Download failed rows of finished shards again; the rows that are good stay as they are."""
    with shown_progress() as progress:
        result = runs.retry(
            run, _names(statuses), executor=_executor(on), progress=progress, local_disk=local_disk
        )
    _say_built(run, result, as_json)
    if not as_json:
        echo(
            f"what follows from it: {command('recap', 'build', _inside(run, runs.RECIPE), '--run', run)}",
            err=True,
        )


@main.command()
@_run
@click.option(
    "--delete", is_flag=True, help="Delete them. Earlier captions among them would be asked for again."
)
@_local_disk
@_as_json
def gc(run: Path | str, delete: bool, local_disk: Local, as_json: bool) -> None:
    """List what no record of a run names: outputs that other settings made, or that a crash left behind."""
    found = runs.garbage(run, delete=delete, local_disk=local_disk)
    lines = [f"{size:>15,} {name}" for name, size in found.items()]
    said = "deleted" if delete else f"delete them: {command('recap', 'gc', run, '--delete')}"
    total = f"{len(found):,} files, {sum(found.values()):,} bytes; {said}"
    lines.append(total if found else "there is nothing to delete")
    print_(found, as_json, "\n".join(lines))


@main.command()
@_recipe
@_settings
@_run_option
@_limit
@click.option("--rows", type=click.IntRange(min=1), help="Say what a build of so many rows would take.")
@click.option("--rate", multiple=True, metavar="STAGE=N", help="Rows a second of one worker of a stage.")
@click.option("--workers", multiple=True, metavar="STAGE=N", help="Workers of a stage, on all machines.")
@click.option("--price", type=click.FloatRange(min=0), help="Of an hour of one GPU.")
@click.option(
    "--blocks", default=BLOCKS_AT_WORK, show_default=True, type=click.IntRange(min=1), help="As of build."
)
@_as_json
def plan(
    recipe: str,
    settings: tuple[str, ...],
    run: Path | str | None,
    limit: int | None,
    rows: int | None,
    rate: tuple[str, ...],
    workers: tuple[str, ...],
    price: float | None,
    blocks: int,
    as_json: bool,
) -> None:
    """What a build would do, and what is done already. Does nothing.

    Bytes and hours are measured on shards that are done: build a few first, with --limit. With --rows it is
    told what a build of that size would take, on which machines you like.
    """
    resolved = _resolve(recipe, settings, limit)
    run = run or Path("runs", resolved.name)
    table = status_of.estimate(resolved, run)
    if rows:
        told = forecast(
            resolved, table, rows=rows, rates=_numbers(rate), blocks=blocks, price=price,
            workers={name: round(number) for name, number in _numbers(workers).items()},
        )  # fmt: skip
        print_(asdict(told), as_json, forecast_table(told))
        return
    measures = ("rows_ok", "bytes_done", "seconds_done")
    shown = [{name: value for name, value in row.items() if name not in measures} for row in table]
    print_(table, as_json, columns(shown))
    for row in (row for row in table if row["images_dropped"]):
        lost = f"{row['images_dropped']} shards of {row['stage']} need images that were dropped"
        echo(f"{lost}: --redo download downloads them again", err=True)


@main.command()
@_place
@_on
@_local_disk
def doctor(place: str, on: str, local_disk: Local) -> None:
    """Is a place fit for a long build, and are the machines? Nothing of the run is changed.

    Looks at what the storage promises, clocks, versions, GPU memory and scratch space, on every node, and
    builds one shard of the run in PLACE, if one is there. Exit status 1: something is wrong.
    """
    from builder.doctor import examine

    nodes = None
    if on != "local":
        executor = _executor(on)
        from builder.executors.ray import on_every_node

        nodes = functools.partial(on_every_node, on)
    else:
        executor = local
    wrong = 0
    for finding in examine(place, executor=executor, nodes=nodes, local=local_disk):
        told = f": {finding.told}" if finding.told else ""
        echo(f"{'ok   ' if finding.ok else 'WRONG'} {finding.what}{told}")
        wrong += not finding.ok
    sys.exit(1 if wrong else 0)


@main.command()
@_run
@click.option("--watch", is_flag=True, help="Again every few seconds, until nothing is left or Ctrl-C.")
@_as_json
def status(run: Path | str, watch: bool, as_json: bool) -> None:
    """Per stage: shards done, rows by status, rate, time left, failures with their reasons."""
    while True:
        table = status_of.status(runs.Run.open(run))
        if watch and sys.stdout.isatty():
            click.clear()
        show_status(table, as_json)
        if not watch or not any(row["shards_left"] for row in table):
            return
        time.sleep(WATCH_S)


_captions = click.option(
    "--captions", default="", help="Caption columns, comma separated; found unless given."
)


@main.command()
@_place
@_captions
@click.option("--vocabulary", type=_path, help="Visual words, one a line, for the grounding ratio.")
@click.option("--concreteness", type=_path, help="word, tab, score a line.")
@click.option("--tokenizer", type=_path, help="A tokenizer.json, instead of CLIP's.")
@_as_json
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

    found = look(place, _names(captions))
    result = report.stats(found.parts, report.Options(vocabulary, concreteness, tokenizer))
    if found.run and ("://" in place or os.access(place, os.W_OK)):
        found.run.store.write("stats.json", report.to_json(result).encode())
    absent = [f"{name}: {answer['absent']}" for name, answer in result.items() if "absent" in answer]
    print_(result, as_json, "\n".join([stats_table(result), *absent]))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@main.command()
@_place
@click.argument("query", required=False)
@_captions
@_as_json
def sql(place: str, query: str | None, captions: str, as_json: bool) -> None:
    """Run QUERY, or standard input, in DuckDB with the views `published`, `ledger`, `captions` and
    `scores`.
    """
    import duckdb

    from analysis import views
    from builder.places import parts

    describe = command("recap", "sql", place, "describe published")
    with views.connect(parts(place, _names(captions))) as con:
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


@main.command()
@_place
@click.argument("strategy")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--out", required=True, type=_path, help="Folder for subset.npy (DataComp's format) and subset.parquet."
)
@_as_json
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


@main.command()
@_place
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


@main.command()
@_place
@click.option("--out", required=True, type=_path, help="Folder for the page.")
@click.option("--rows", type=click.IntRange(min=1), help="At most so many rows; 100,000 unless given.")
@_captions
def explore(place: str, out: Path, rows: int | None, captions: str) -> None:
    """Write a static page to look at captions: search, sort and filter in the browser, no server needed."""
    from builder.places import look
    from cards.explore import explore as write_page

    page = write_page(look(place, _names(captions)), out, rows=rows)
    serve = command("python", "-m", "http.server", "--bind", "127.0.0.1", "--directory", out)
    echo(f"{page}\nlook at it: {serve}")


_version = click.option("--version", required=True, help="For example 0.1.0; a version never changes.")
_dry_run = click.option(
    "--dry-run",
    is_flag=True,
    help="Put it together, check it and say what publishing would take, but do not publish.",
)
_rebase = click.option("--rebase", is_flag=True, help="On top of what others put on main meanwhile.")


@main.command()
@_run
@click.argument("target")
@_version
@_dry_run
@_rebase
@_as_json
def publish(run: Path | str, target: str, version: str, dry_run: bool, rebase: bool, as_json: bool) -> None:
    """Publish a finished run as a version in TARGET, a folder or hf://datasets/user/name.

    The same command again, after whatever crash, finishes the job or says that it is done.
    """
    from builder.versions.publish import publish as publish_run

    result = publish_run(run, target, version, dry_run=dry_run, rebase=rebase)
    _say_published(result, target, version, as_json)


def _say_published(result: Any, target: str, version: str, as_json: bool, removal: Any = None) -> None:
    said = "published" if result.new else "is there already, byte for byte; nothing to do"
    said = "would be published" if result.plan else said
    lines = [f"{result.place}: {result.rows} rows, {said}"]
    lines += [f"  {name:<16} {value}" for name, value in result.plan.items()]
    if not result.plan:
        load = json.dumps(result.place)
        if target.startswith("hf://"):
            load = f'"{target.removeprefix("hf://datasets/")}", revision="v{version}"'
        lines += [f"  at {result.commit}"] if result.commit else []
        lines += [
            "load it:",
            f"  datasets.load_dataset({load})",
            f"  {command('recap', 'sql', f'{target}@v{version}', 'from published limit 5')}",
            f"  {command('recap', 'verify', f'{target}@v{version}')}",
        ]
    about = {}
    if removal:
        about = {
            "removed": removal.rows,
            "removed_of_ledger": removal.ledger_rows,
            "matched_nothing": removal.matched_nothing,
        }
        gone = "would be removed" if result.plan else "removed"
        went = [f"  {removal.rows} rows {gone}, and {removal.ledger_rows} that were in the ledger only"]
        later = "later versions will not have it either"
        for kind, values in removal.matched_nothing.items():
            went += [f"  no row has the {kind} {value[:200]}; {later}" for value in values[:20]]
            went += [f"  and {len(values) - 20} more of {kind}"] if values[20:] else []
        lines[1:1] = went
    print_(vars(result) | about, as_json, "\n".join(lines))


@main.command()
@click.argument("place", metavar="TARGET@v1.2.0")
@_as_json
def verify(place: str, as_json: bool) -> None:
    """Read a published version once, every byte, and hold it against its manifest. Exit status 1: it
    differs.
    """
    from builder.versions.verify import verify as verify_version

    result = verify_version(place)
    problems = result["problems"]
    said = f"{place}: {result['files']} files, {result['bytes']:,} bytes, {len(problems)} problems"
    print_(result, as_json, "\n".join([said, *problems]))
    sys.exit(1 if problems else 0)


@main.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="[B]", required=False)
@click.option(
    "--columns",
    default="",
    help="Two caption columns of A to compare, comma separated, instead of two versions.",
)
@_as_json
def diff(a: str, b: str | None, columns: str, as_json: bool) -> None:
    """What differs between two versions or runs: rows, columns, values, scores. Or between two caption
    columns of A.
    """
    from analysis.diff import diff as differences
    from analysis.diff import diff_columns
    from builder.places import parts

    if bool(b) == bool(columns) or (columns and len(_names(columns)) != 2):
        of_one = command("recap", "diff", a, "--columns", "org_caption,re_caption")
        hint = f"{command('recap', 'diff', a)} OTHER, or: {of_one}"
        raise UserError("two versions or two columns are compared", hint)
    if columns:
        found = diff_columns(parts(a), *_names(columns))
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


@main.command()
@click.argument("target", metavar="TARGET[@v1.2.0]")
@click.option("--uids", type=_path, help="File of uids, one a line.")
@click.option("--sha256", type=_path, help="File of images' sha256.")
@click.option("--urls", type=_path, help="File of URLs.")
@click.option("--domains", type=_path, help="File of domains; subdomains go with them.")
@_version
@_dry_run
@_rebase
@_as_json
def remove(
    target: str, version: str, dry_run: bool, rebase: bool, as_json: bool, **files: Path | None
) -> None:
    """Publish a new version of TARGET without the rows that the files name; later versions cannot bring them
    back.
    """
    from builder.files import read_lines
    from builder.versions.remove import remove as remove_rows
    from builder.versions.targets import split, target_of
    from builder.versions.version import by_number

    kinds = {"uids": "uid", "sha256": "sha256", "urls": "url", "domains": "domain"}
    given = {kinds[name]: path for name, path in files.items() if path}
    lines = {kind: map(str.strip, read_lines(path)) for kind, path in given.items()}
    values = {kind: [line for line in of_kind if line] for kind, of_kind in lines.items()}
    if not any(values.values()):
        named = f" in {' '.join(map(str, given.values()))}" if given else ""
        example = command("recap", "remove", target, "--uids", "FILE", "--version", version)
        raise UserError(f"nothing to remove was named{named}", f"for example: {example}")
    removal = remove_rows(target, version, values, dry_run=dry_run, rebase=rebase)
    _say_published(removal.published, split(target)[0], version, as_json, removal)
    if not as_json and not dry_run:
        where = target_of(split(target)[0])
        echo("Older versions still hold the rows; to delete those:")
        for older in where.versions():
            if by_number(older) < by_number(version):
                echo(f"  {where.how_to_delete(older)}")


@main.group()
def train() -> None:
    """Train a model on a published version."""


@train.command()
@click.argument("training")
@_settings
@click.option("--out", type=_path, help="Folder of the training; runs/clip-TRAINING unless given.")
@_as_json
def clip(training: str, settings: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """A CLIP: TRAINING is a function of recipes/clip/trainings.py, or my_file.py:function. The same command
    again goes on where it stopped.
    """
    from recipes.clip.train import Training, train

    chosen = resolve_training("clip", training, settings, Training)
    out = out or Path("runs", f"clip-{chosen.name}")
    there = train(chosen, out, say=functools.partial(echo, err=True))
    print_({"model": str(there)}, as_json, f"{there}")


@main.command("eval")
@click.argument("model")
@click.argument("benchmark")
@_settings
@click.option("--compare", is_flag=True, help="MODEL and BENCHMARK are two results.json.")
@click.option("--out", type=_path, help="Write results.json there.")
@_as_json
def evaluate(
    model: str, benchmark: str, settings: tuple[str, ...], compare: bool, out: Path | None, as_json: bool
) -> None:
    """Evaluate MODEL, a folder that open_clip loads or a Hub id@revision, on BENCHMARK: a function of
    recipes/evaluate/benchmarks.py, or my_file.py:function.
    """
    from recipes.evaluate import results

    if compare:
        ours, theirs = ({r.benchmark: r for r in results.read(Path(name))} for name in (model, benchmark))
        rows = [
            {"benchmark": name, **row}
            for name in ours
            if name in theirs
            for row in results.compare(ours[name], theirs[name])
        ]
        if not rows:
            raise UserError("they have no benchmark in common", f"{model} has: {', '.join(ours)}")
        print_(rows, as_json, columns(rows))
        return
    from builder.stages.clip import Clip
    from recipes.evaluate.benchmarks import Benchmark

    chosen = resolve_benchmark(benchmark, settings, Benchmark)
    found = chosen.run(Clip(model), model)
    if out:
        results.write(found, out)
    print_([asdict(result) for result in found], as_json, "\n".join(map(str, found)))


@main.command()
@click.option(
    "--rows", default=2000, show_default=True, type=click.IntRange(min=1), help="URLs of the small web."
)
@click.option(
    "--port",
    default=8642,
    show_default=True,
    type=click.IntRange(1, 65535),
    help="Of the small web on 127.0.0.1.",
)
@click.option(
    "--every", is_flag=True, help="Captions of every kind: five more columns, and a judge's ratings."
)
@_run_option
@_on
def demo(rows: int, port: int, every: bool, run: Path | str | None, on: str) -> None:
    """The whole line on the embedded default: serve, build, measure, publish, load back."""
    from recipes.demo.demo import demo as run_demo

    name = "demo-every" if every else "demo"
    run = run or Path("runs", name if (rows, port) == (2000, 8642) else f"{name}-{rows}-{port}")
    with shown_progress() as progress:
        code = run_demo(run, rows=rows, port=port, every=every, progress=progress, executor=_executor(on))
    sys.exit(code)


def _numbers(pairs: Iterable[str]) -> dict[str, float]:
    """STAGE=NUMBER, each."""
    found = {}
    for name, text in pairs_of(pairs).items():
        try:
            found[name] = float(text)
        except ValueError:
            raise UserError(f"{name}={text} is no number", "for example: re_caption=45") from None
        if not 0 < found[name] < math.inf:
            raise UserError(f"{name}={text} is not above 0", "for example: re_caption=45")
    return found


if __name__ == "__main__":
    main()
