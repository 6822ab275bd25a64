"""Benchmarks by name, one function each. `recap eval MODEL NAME key=value` calls NAME."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from builder.files import read_file
from builder.stages.clip import Clip
from recipes.evaluate.results import Result
from recipes.evaluate.retrieval import Pairs, karpathy, one_caption, table
from recipes.evaluate.retrieval import retrieval as retrieve
from recipes.evaluate.zeroshot import image_folder
from recipes.evaluate.zeroshot import zeroshot as classify


@dataclass(frozen=True)
class Benchmark:
    """`run(clip, the model's name)`."""

    run: Callable[[Clip, str], list[Result]]


def retrieval(
    *, captions: str, images: str, split: str = "test", only: str | None = None, name: str = "retrieval"
) -> Benchmark:
    """`captions` is Karpathy's dataset.json, of which `split` is asked, or a table of (image, caption), of
    which `only` lists the images that are.
    """
    path = Path(captions)
    is_karpathys = path.suffix == ".json" and b'"sentences"' in read_file(path)
    pairs = (
        karpathy(path, Path(images), split)
        if is_karpathys
        else table(path, Path(images), Path(only) if only else None)
    )
    return Benchmark(lambda clip, model: [retrieve(clip, model, name, pairs)])


def long_captions(*, folder: str, name: str = "long captions") -> Benchmark:
    """Urban1K's and DOCCI's layout."""
    pairs = one_caption(Path(folder))
    return Benchmark(lambda clip, model: [retrieve(clip, model, name, pairs)])


def zeroshot(*, images: str, names: str, templates: str | None = None, name: str = "zero-shot") -> Benchmark:
    """A folder a class; see recipes/evaluate/zeroshot.py."""
    classes = image_folder(Path(images), Path(names), Path(templates) if templates else None)
    return Benchmark(lambda clip, model: [classify(clip, model, name, classes)])


def demo(*, folder: str = "runs/demo-benchmark", scenes: int = 1000) -> Benchmark:
    """Scenes of the demo's world that nothing was trained on: retrieval by descriptions and by alt text, and
    scenes of one thing by its colour and shape.
    """
    place = Path(folder)
    if not (place / "names.txt").exists():
        _draw(place, scenes)
    described, alt = (table(place / f"{kind}.csv", place / "scenes") for kind in ("described", "alt"))
    classes = image_folder(place / "one", place / "names.txt")

    def run(clip: Clip, model: str) -> list[Result]:
        by: list[tuple[str, Pairs]] = [("world, by descriptions", described), ("world, by alt text", alt)]
        return [
            *(retrieve(clip, model, name, pairs) for name, pairs in by),
            classify(clip, model, "world, colour and shape", classes),
        ]

    return Benchmark(run)


def _draw(place: Path, scenes: int) -> None:
    """names.txt is written last."""
    from recipes.demo import world

    (place / "scenes").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[tuple[str, str]]] = {"described": [], "alt": []}
    for number in range(scenes):
        seed = 2 * world.HELD_OUT + number  # of the demo's own web there are none
        scene, chance = world.scene(seed), random.Random(seed)
        name = f"{number:05d}.jpg"
        (place / "scenes" / name).write_bytes(world.jpeg(world.draw(scene, 128), 90))
        rows["described"].append((name, world.describe(scene, chance)))
        if alt := world.alt_text(scene, chance).strip():
            rows["alt"].append((name, alt))
    for kind, lines in rows.items():
        with open(place / f"{kind}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("image", "caption"), *lines])
    classes = {f"{colour} {shape}" for colour in world.COLOURS for shape in world.SHAPES}
    for name in classes:
        (place / "one" / name).mkdir(parents=True, exist_ok=True)
    found, seed = 0, 3 * world.HELD_OUT
    while found < scenes:
        scene, seed = world.scene(seed), seed + 1
        if len(scene.things) == 1:
            image = world.jpeg(world.draw(scene, 128), 90)
            (place / "one" / scene.things[0].name / f"{seed}.jpg").write_bytes(image)
            found += 1
    (place / "names.txt").write_text("".join(f"{name}\ta {name}\n" for name in sorted(classes)))
