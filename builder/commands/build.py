"""Build, go on, look at and clean up a run."""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import click

from builder import run as runs
from builder import status as status_of
from builder.commands.models import plan_training
from builder.commands.options import (
    as_json_option,
    executor_of,
    limit_option,
    local_disk_options,
    names_of,
    on_option,
    place_argument,
    recipe_argument,
    run_argument,
    run_option,
    settings_argument,
)
from builder.core import TRANSPORT, Recipe
from builder.errors import RecipeError, UserError, command
from builder.executors.local import local
from builder.forecast import forecast
from builder.resolve import pairs_of, resolve
from builder.schedule import BLOCKS_AT_WORK
from builder.scratch import Local
from builder.shown import columns, echo, forecast_table, print_, show_status, shown_progress

WATCH_S = 5.0


def _inside(run: Path | str, name: str) -> Path | str:
    return run / name if isinstance(run, Path) else f"{run}/{name}"


def _resolve(recipe: str, settings: Iterable[str], limit: int | None) -> Recipe:
    resolved = resolve(recipe, [*settings, f"source.limit={limit}"] if limit else settings)
    try:
        resolved.check_order()
    except RecipeError as error:
        raise RecipeError(f"{recipe}: {error.message}", error.hint) from error
    return resolved


@click.command()
@recipe_argument
@settings_argument
@run_option
@limit_option
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
@on_option
@local_disk_options
@as_json_option
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
            executor=executor_of(on),
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


@click.command()
@run_argument
@click.option(
    "--status", "statuses", required=True, help="Statuses of the rows to download again, comma separated."
)
@on_option
@local_disk_options
@as_json_option
def retry(run: Path | str, statuses: str, on: str, local_disk: Local, as_json: bool) -> None:
    """Download failed rows of finished shards again; the rows that are good stay as they are."""
    with shown_progress() as progress:
        result = runs.retry(
            run, names_of(statuses), executor=executor_of(on), progress=progress, local_disk=local_disk
        )
    _say_built(run, result, as_json)
    if not as_json:
        echo(
            f"what follows from it: {command('recap', 'build', _inside(run, runs.RECIPE), '--run', run)}",
            err=True,
        )


@click.command()
@run_argument
@click.option(
    "--delete", is_flag=True, help="Delete them. Earlier captions among them would be asked for again."
)
@local_disk_options
@as_json_option
def gc(run: Path | str, delete: bool, local_disk: Local, as_json: bool) -> None:
    """List what no record of a run names: outputs that other settings made, or that a crash left behind."""
    found = runs.garbage(run, delete=delete, local_disk=local_disk)
    lines = [f"{size:>15,} {name}" for name, size in found.items()]
    said = "deleted" if delete else f"delete them: {command('recap', 'gc', run, '--delete')}"
    total = f"{len(found):,} files, {sum(found.values()):,} bytes; {said}"
    lines.append(total if found else "there is nothing to delete")
    print_(found, as_json, "\n".join(lines))


@click.command()
@recipe_argument
@settings_argument
@run_option
@limit_option
@click.option("--rows", type=click.IntRange(min=1), help="Say what a build of so many rows would take.")
@click.option("--rate", multiple=True, metavar="STAGE=N", help="Rows a second of one worker of a stage.")
@click.option("--workers", multiple=True, metavar="STAGE=N", help="Workers of a stage, on all machines.")
@click.option("--price", type=click.FloatRange(min=0), help="Of an hour of one GPU.")
@click.option(
    "--blocks", default=BLOCKS_AT_WORK, show_default=True, type=click.IntRange(min=1), help="As of build."
)
@click.option(
    "--tflops",
    default=989.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Of a GPU, for a training: an H100's at bf16.",
)
@click.option("--utilisation", default=0.35, show_default=True, help="The share of them that is reached.")
@as_json_option
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
    tflops: float,
    utilisation: float,
    as_json: bool,
) -> None:
    """What a build would do, and what is done already. Does nothing. clip:TRAINING and dit:TRAINING are a
    training's.

    Bytes and hours are measured on shards that are done: build a few first, with --limit. With --rows it is
    told what a build of that size would take, on which machines you like.
    """
    what, _, training = recipe.partition(":")
    if what in ("clip", "dit"):
        plan_training(what, training, settings, tflops, utilisation, price, as_json)
        return
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


@click.command()
@place_argument
@on_option
@local_disk_options
def doctor(place: str, on: str, local_disk: Local) -> None:
    """Is a place fit for a long build, and are the machines? Nothing of the run is changed.

    Looks at what the storage promises, clocks, versions, GPU memory and scratch space, on every node, and
    builds one shard of the run in PLACE, if one is there. Exit status 1: something is wrong.
    """
    from builder.doctor import examine

    nodes = None
    if on != "local":
        executor = executor_of(on)
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


@click.command()
@run_argument
@click.option("--watch", is_flag=True, help="Again every few seconds, until nothing is left or Ctrl-C.")
@as_json_option
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
