"""Table 4 of the paper (arXiv 2406.08478) in the demo's world: what a larger text tower is worth.

python -m recipes.clip.table4                     # docs/table4.md; on the demo that table3 has built
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from builder.machine import Machine
from builder.shown import echo
from recipes.clip import table3
from recipes.clip.table3 import SHOWN
from recipes.clip.train import Training
from recipes.study import Found, markdown, options, studied, write

# vision, text, recaptions -> IN1k top-1, COCO I2T and T2I R@1, Flickr I2T and T2I R@1
PAPER = (
    ("S", "small", "none", 60.7, 49.2, 30.1, 73.5, 53.3),
    ("S", "small", "p 0.8", 60.2, 53.7, 34.3, 78.6, 57.9),
    ("S", "base", "p 0.8", 61.7, 56.4, 34.8, 79.7, 59.1),
    ("B", "base", "none", 69.7, 57.3, 37.7, 84.2, 63.0),
    ("B", "base", "p 0.8", 69.2, 61.5, 42.2, 85.2, 66.9),
    ("B", "large", "p 0.8", 69.8, 62.9, 42.8, 86.7, 67.3),
    ("L", "large", "none", 74.1, 60.2, 41.9, 86.0, 68.5),
    ("L", "large", "p 0.8", 73.8, 64.3, 46.1, 88.3, 70.5),
    ("L", "huge", "p 0.8", 74.2, 66.0, 46.6, 89.9, 72.7),
)
ARMS = ("N-P-1", "N-P-0.8", "N-N-1", "N-N-0.8")  # vision, text, p_original
PAIRS = (
    ("N-P-0.8", "N-P-1"), ("N-N-0.8", "N-N-1"), ("T-N-0.8", "T-N-1"),
    ("N-N-1", "N-P-1"), ("N-N-0.8", "N-P-0.8"), ("T-T-0.8", "T-N-0.8"),
)  # fmt: skip


def training(arm: str, seed: int, version: Path, images: Path, samples: int) -> Training:
    """Table 3's, of other towers than two N."""
    vision, text, p = arm.split("-") if "-" in arm else ("N", "N", arm)
    made = table3.training(p, seed, version, images, samples)
    sizes: Any = {"vision": vision, "text": text}
    return replace(made, towers=replace(made.towers, **sizes))


def _folder(arm: str) -> str:
    """Where its trainings lie: those of two N are table 3's."""
    return arm.removeprefix("N-N-")


@click.command(help=__doc__)
@click.option("--arms", default=",".join(ARMS), show_default=True, help="Vision, text and p_original each.")
@options("runs/table3")
def main(
    arms: str, seeds: int, rows: int, samples: int, scenes: int, version: Path | None, images: Path | None,
    port: int, out: Path, docs: Path,
) -> None:  # fmt: skip
    names = arms.split(",")
    if wrong := [name for name in names if name.count("-") != 2]:
        raise click.BadParameter(f"'{wrong[0]}' is not vision-text-p_original, such as {ARMS[0]}")
    folders = list(map(_folder, names))
    begun, found = studied(training, folders, seeds, rows, samples, scenes, version, images, port, out)
    command = f"python -m recipes.clip.table4 --arms {arms} --seeds {seeds} --rows {rows} --samples {samples}"
    docs.mkdir(parents=True, exist_ok=True)
    write(docs / "table4.md", _told(found, names, command, (time.monotonic() - begun) / 60))
    echo(str(docs / "table4.md"))


def _told(found: Found, names: Sequence[str], command: str, minutes: float) -> str:
    head = ["vision", "text", "p_original", *(f"{b.removeprefix('world, ')}: {m}" for b, m in SHOWN)]
    ours = [[*arm.split("-"), *(found.value(_folder(arm), *which) for which in SHOWN)] for arm in names]
    less = [
        [f"{a} less {b}", *(found.difference(_folder(a), _folder(b), *which) for which in SHOWN)]
        for a, b in PAIRS
        if {a, b} <= set(names)
    ]
    theirs = ["vision", "text", "recaptions", "IN1k", "COCO I2T", "COCO T2I", "Flickr I2T", "Flickr T2I"]
    return f"""# Text towers: table 4 in the demo's world

`{command}`, {time.strftime("%Y-%m-%d")}, {round(Machine.here().cpus)} cores, {minutes:.0f} min (what lay
there before is not in it). Towers: P is one block of 64, N two of 96, T three of 128 (of images 2, 3 and 4
blocks). R@1 and top-1 in percent, means over seeds; in brackets 95 % over draws of seeds and of the
benchmark's units.

{markdown([head, *ours])}

What recaptions are worth (0.8 less 1), and a larger text tower, of the same draws:

{markdown([["", *head[3:]], *less])}

The paper's:

{markdown([theirs, *PAPER])}
"""


if __name__ == "__main__":
    main()
