"""What a user sees: text that no terminal obeys, JSON, tables, a bar for every stage."""

from __future__ import annotations

import json
import logging
import re
import sys
from typing import Any

import click
from tqdm import tqdm

from builder import run as runs
from builder.files import finite
from builder.forecast import Forecast
from builder.schedule import Outcome

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Without what a terminal would obey: captions, URLs and names come from anybody.

    In JSON it stands for the same character.
    """
    return _CONTROLS.sub(lambda control: f"\\u{ord(control[0]):04x}", text)


def echo(text: str, *, err: bool = False) -> None:
    click.echo(printable(text).encode("utf-8", "replace").decode(), err=err)


class Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def show_status(table: list[dict[str, object]], as_json: bool) -> None:
    lines = []
    for row in table:
        rows, failed = row["rows"], row["failed"]
        assert isinstance(rows, dict)
        assert isinstance(failed, dict)
        eta = f", about {row['eta_s']} s left" if row["shards_left"] and row["eta_s"] is not None else ""
        rate = f", {row['rows_per_s']} rows/s" if row["rows_per_s"] else ""
        shards = f"{row['shards_done']} shards done, {row['shards_left']} left"
        if workers := row.get("workers"):
            shards += f", {workers} workers"
        lines.append(f"{row['stage']:<10} {shards}{rate}{eta}")
        lines += [f"{'':<10} {number:>9,} {name}" for name, number in rows.items()]
        if counts := row.get("counts"):
            assert isinstance(counts, dict)
            told = ", ".join(f"{name} {number:,}" for name, number in counts.items())
            lines.append(f"{'':<10} counted: {told}")
        lines += [f"{'':<10} failed {name}: {reason}" for name, reason in failed.items()]
        if row.get("captions_wasted"):
            what = "captions of images that turned out to be placeholders"
            lines.append(f"{'':<10} {row['captions_wasted']:>9,} {what}")
    print_(table, as_json, "\n".join(lines))


def forecast_table(told: Forecast) -> str:
    table = [
        {
            "stage": line.stage, "rows": f"{line.rows:,}",
            "rows/s of a worker": "?" if line.rows_per_s is None else f"{line.rows_per_s:.4g}",
            "workers": line.workers, "hours": "?" if line.hours is None else f"{line.hours:,.1f}",
            "from": line.source,
        }
        for line in told.lines
    ]  # fmt: skip
    cost = "" if told.cost is None else f", {told.cost:,.0f} at the price given"
    tables = "" if told.tables_gib is None else f"; tables of the stages {told.tables_gib:,.1f} GiB"
    return "\n".join(
        [
            columns(table),
            "hours = rows / (rows/s of a worker * workers) / 3600; stages overlap, so the slowest counts",
            f"{told.hours:,.1f} hours, of {told.slowest}; {told.gpu_hours:,.0f} GPU hours{cost}",
            f"images {told.images_gib:,.1f} GiB; {told.images_gib_dropped:,.1f} at a time with --drop-images"
            + tables,
        ]
    )


def print_(data: Any, as_json: bool, text: str) -> None:
    echo(json.dumps(finite(data), indent=1, ensure_ascii=False, default=str) if as_json else text)


def columns(table: list[dict[str, Any]]) -> str:
    lines = [list(table[0]), *([str(value) for value in row.values()] for row in table)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def stats_table(result: dict[str, Any]) -> str:
    from analysis.report import table

    head, lines = table(result)
    return columns([dict(zip(head, line, strict=True)) for line in lines])


class shown_progress:
    """A bar for every stage on a terminal, one line per finished shard in a log."""

    def __init__(self) -> None:
        self.bars: dict[str, tqdm[None]] = {}

    def __enter__(self) -> runs.Progress:
        return self.show

    def __exit__(self, *_: object) -> None:
        for bar in self.bars.values():
            bar.close()

    def show(self, outcome: Outcome, done: int, number: int) -> None:
        name = outcome.task.stage
        if sys.stderr.isatty():
            if name not in self.bars:
                self.bars[name] = tqdm(desc=f"{name:<12}", unit="shard", position=len(self.bars))
            bar = self.bars[name]
            bar.total, bar.n = number, done
            bar.refresh()
        elif outcome.record:
            rows = ", ".join(f"{rows} {status}" for status, rows in outcome.record.rows.items())
            echo(f"{name} {outcome.task.name}: {rows} ({outcome.record.seconds:.1f} s)", err=True)
        else:
            echo(f"{name} {outcome.task.name}: failed: {outcome.error}", err=True)
