"""The whole line at once."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from builder.commands.options import executor_of, on_option, run_option
from builder.shown import shown_progress


@click.command()
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
@click.option("--train/--no-train", default=True, help="Train two small CLIPs on it at the end: a minute.")
@run_option
@on_option
def demo(rows: int, port: int, every: bool, train: bool, run: Path | str | None, on: str) -> None:
    """The whole line on the embedded default: serve, build, measure, publish, load back."""
    from recipes.demo.demo import demo as run_demo

    name = "demo-every" if every else "demo"
    run = run or Path("runs", name if (rows, port) == (2000, 8642) else f"{name}-{rows}-{port}")
    with shown_progress() as progress:
        code = run_demo(
            run, rows=rows, port=port, every=every, train=train, progress=progress, executor=executor_of(on)
        )
    sys.exit(code)
