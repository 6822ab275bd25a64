"""Table 7 of the paper (arXiv 2406.08478) in the demo's world: DiTs trained on original captions, on
recaptions, and on both, and what they draw.

    python -m recipes.dit.table7                     # docs/table7.md and .png; see there how long it takes
    python -m recipes.dit.table7 --seeds 1 --samples 5000 --scenes 50 --out /tmp/little --docs /tmp/little

The captions are those of the real line: a demo of 12,000 rows is built and published first.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import click
from PIL import Image

from builder.files import write_atomically
from builder.machine import Machine
from builder.shown import echo
from recipes.dit import sample, trainings
from recipes.dit.train import Training
from recipes.evaluate.benchmarks import Benchmark, world_drawings
from recipes.evaluate.drawings import Artist
from recipes.evaluate.results import Result
from recipes.evaluate.world_drawings import prompts, real
from recipes.study import Found, markdown, options, studied, trainings_in, write

# p_original -> of raw COCO captions FID and CLIP score; of recaptions FID, CLIP, Recap-CLIP and GPT-4V's 1-5
PAPER = {
    "0": (37.6, 29.2, 27.8, 32.5, 28.3, 2.53), "0.1": (36.0, 29.7, 27.2, 32.7, 28.2, 2.51),
    "0.2": (35.8, 29.8, 28.4, 32.7, 28.0, 2.53), "0.5": (35.3, 29.3, 30.2, 31.9, 26.7, 2.13),
    "0.75": (31.3, 29.4, 32.7, 31.2, 25.8, 1.89), "1": (32.5, 28.9, 36.2, 29.3, 19.9, 1.40),
}  # fmt: skip
LONG, SHORT = "descriptions", "alt text"
SHOWN = (
    (LONG, "pairs"), (LONG, "at their place"), (LONG, "colours"), (LONG, "unasked"),
    (f"{LONG}: distance", "Fréchet distance"), (f"{LONG}: CLIP score", "CLIP score"), (SHORT, "pairs"),
    (f"{SHORT}: distance", "Fréchet distance"), (f"{SHORT}: CLIP score", "CLIP score"),
)  # fmt: skip
PICTURES = 10  # prompts of the grid
STEPS = 25  # in which a picture is drawn


def training(arm: str, seed: int, version: Path, images: Path, samples: int) -> Training:
    return trainings.demo(
        version=str(version), images=str(images), samples=samples, seed=seed, workers=0, p_original=float(arm)
    )


def benchmark(*, folder: str, scenes: int) -> Benchmark:
    """At both kinds of prompts."""
    both = [
        world_drawings(scenes=scenes, style="described", folder=folder, name=LONG),
        world_drawings(scenes=scenes, style="alt", folder=folder, name=SHORT),
    ]

    def run(artist: Artist) -> Iterable[Result]:
        quick = replace(artist, how={"steps": STEPS})
        return (result for one in both for result in one.run(quick))

    return Benchmark(run, "pictures")


@click.command(help=__doc__)
@click.option("--arms", default="0,0.5,1", show_default=True, help="p_original.")
@options("runs/table7", seeds=2, samples=30_000, scenes=200)
def main(
    arms: str, seeds: int, rows: int, samples: int, scenes: int, version: Path | None, images: Path | None,
    port: int, out: Path, docs: Path,
) -> None:  # fmt: skip
    names = arms.split(",")
    begun, found = studied(
        training, names, seeds, rows, samples, scenes, version, images, port, out, benchmark
    )
    docs.mkdir(parents=True, exist_ok=True)
    _grid({arm: trainings_in(out, samples) / arm / "0" / "latest" for arm in names}, docs / "table7.png")
    command = f"python -m recipes.dit.table7 --arms {arms} --seeds {seeds} --rows {rows} --samples {samples}"
    minutes = (time.monotonic() - begun) / 60
    write(docs / "table7.md", _told(found, names, f"{command} --scenes {scenes}", minutes))
    echo(str(docs / "table7.md"))


def _grid(models: dict[str, Path], path: Path) -> None:
    """A row a prompt: its scene, and what each model draws, from the same noise."""
    scenes, texts = prompts(PICTURES, "described")
    columns: list[list[Image.Image]] = []
    for model in models.values():
        drawer = sample.Drawer(model)
        how = drawer.usual(batch=PICTURES, steps=STEPS)
        columns.append(drawer.draw(texts, sample.seeds_of(texts, how.seed), how))
    scenes_themselves = real(scenes, columns[0][0].size)
    pictures = [picture for row in zip(scenes_themselves, *columns, strict=True) for picture in row]
    write_atomically(path, sample.png(sample.grid(pictures, len(columns) + 1, scale=3)))


def _told(found: Found, names: list[str], command: str, minutes: float) -> str:
    head = ["p_original", *(f"{of.partition(':')[0]}: {name}" for of, name in SHOWN)]
    ours = [[arm, *(found.value(arm, *which) for which in SHOWN)] for arm in names]
    less = [
        [f"{arm} less 1", *(found.difference(arm, "1", *which) for which in SHOWN)]
        for arm in names
        if arm != "1" and "1" in names
    ]
    theirs = ["p", "raw FID", "raw CLIP", "recap FID", "recap CLIP", "Recap-CLIP", "GPT-4V"]
    verdict = ""
    if {"0", "1"} <= set(names):
        more = found.difference("0", "1", *SHOWN[0])
        agrees = "yes" if more.low > 0 else "no"
        verdict = (
            f"Recaptions alone against originals alone, pairs at descriptions: {more}; ahead: **{agrees}**."
        )
    return f"""# What a DiT draws: table 7 in the demo's world

`{command}`, {time.strftime("%Y-%m-%d")}, {round(Machine.here().cpus)} cores, {minutes:.0f} min (what lay
there before is not in it). Pictures of 32 px, drawn in {STEPS} steps, of scenes that nothing was trained on,
read back by templates (recipes/evaluate/world_drawings.py); distance and CLIP score by the demo's tiny CLIP.
Means over seeds, in percent, in brackets 95 % over draws of seeds and pictures; a distance is no percent, and
has none.

{markdown([head, *ours])}

What is more than with originals alone, of the same draws:

{markdown([head, *less])}

{verdict}

The paper's (DiT-B/4, 650,000 steps of 2,048 on Recap-DataComp-1B):

{markdown([theirs, *([p, *values] for p, values in PAPER.items())])}

The scene, and what is drawn from its description, from the same noise, with p_original = {", ".join(names)}:

![A row a prompt](table7.png)
"""


if __name__ == "__main__":
    main()
