"""Arguments and options that several commands have."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import click

from builder import run as runs
from builder.errors import UserError
from builder.executors.local import local
from builder.scratch import Local

path_type = click.Path(path_type=Path)
as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
recipe_argument = click.argument("recipe")
settings_argument = click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
limit_option = click.option("--limit", type=click.IntRange(min=1), help="Only the first N source rows.")


class Directory(click.Path):
    """Of a run; a URL stays text: a Path would make a folder of it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return str(value) if "://" in str(value) else super().convert(value, param, ctx)


directory = Directory(path_type=Path, file_okay=False)
on_option = click.option(
    "--on",
    default="local",
    metavar="local|ray|ADDRESS",
    help="Where the work is done: processes here, a Ray that is started here, or the Ray cluster at"
    " HOST:PORT, ray://HOST:PORT or auto.",
)


def executor_of(on: str) -> runs.Executor:
    if on == "local":
        return local
    try:
        from builder.executors.ray import on_ray
    except ModuleNotFoundError as error:
        raise UserError("Ray is not installed", "pip install 'recapkit[ray]'") from error
    return on_ray(on)


run_option = click.option(
    "--run", type=directory, help="Run directory, or a URL: s3://BUCKET/PATH; runs/<recipe> unless given."
)
run_argument = click.argument("run", type=Directory(path_type=Path, exists=True, file_okay=False))
place_argument = click.argument("place", metavar="RUN|TARGET[@v1.2.0]")


captions_option = click.option(
    "--captions", default="", help="Caption columns, comma separated; found unless given."
)


version_option = click.option("--version", required=True, help="For example 0.1.0; a version never changes.")
dry_run_option = click.option(
    "--dry-run",
    is_flag=True,
    help="Put it together, check it and say what publishing would take, but do not publish.",
)
rebase_option = click.option("--rebase", is_flag=True, help="On top of what others put on main meanwhile.")


def local_disk_options(command: Any) -> Any:
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


def names_of(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
