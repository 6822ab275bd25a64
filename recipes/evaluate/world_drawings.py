"""Pictures of the demo's world read back, by templates (recipes/demo/reader.py): is there what was asked for?

pairs           of the (colour, shape) pairs of a prompt, those that are in the picture
at their place  of the things, those that are there with colour and shape where they belong
colours         of the things, those in whose place there is something of their colour
unasked         of the places where nothing was asked for, those where there is something
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from PIL import Image

from recipes.demo import reader, world
from recipes.demo.world import Scene
from recipes.evaluate.drawings import Drawings
from recipes.evaluate.results import Result, metric

FIRST = 5 * world.HELD_OUT  # of the demo's own web, and of the other benchmarks', there are none
Style = Literal["described", "alt"]


def prompts(number: int, style: Style) -> tuple[list[Scene], list[str]]:
    """Scenes that nothing was trained on, and what is asked for: a description of all that is there, or alt
    text that names a pair.
    """
    scenes: list[Scene] = []
    texts: list[str] = []
    seed = FIRST
    while len(scenes) < number:
        scene, chance = world.scene(seed), random.Random(seed)
        seed += 1
        text = world.describe(scene, chance) if style == "described" else world.alt_text(scene, chance)
        if style == "described" or world.named_pairs(text):
            scenes.append(scene)
            texts.append(text)
    return scenes, texts


def real(scenes: Sequence[Scene], size: tuple[int, int]) -> list[Image.Image]:
    """The scenes themselves, as small as what is drawn."""
    return [world.draw(scene, 256).resize(size, Image.Resampling.BILINEAR) for scene in scenes]


def read_back(benchmark: str, drawings: Drawings, scenes: Sequence[Scene], style: Style) -> Result:
    pairs: list[tuple[int, int]] = []
    places: list[tuple[int, int]] = []
    colours: list[tuple[int, int]] = []
    unasked: list[tuple[int, int]] = []
    for image, prompt, scene in zip(drawings.images(), drawings.prompts, scenes, strict=True):
        found = reader.read(image)
        named = {one.name for one in found}
        asked = scene.pairs if style == "described" else world.named_pairs(prompt)
        pairs.append((len(asked & named), len(asked)))
        things = {thing.place: thing for thing in scene.things}
        there = [(things[one.place], one) for one in found if one.place in things]
        places.append((sum(thing.name == one.name for thing, one in there), len(things)))
        colours.append((sum(thing.colour == one.colour for thing, one in there), len(things)))
        unasked.append((len(found) - len(there), 9 - len(things)))
    told = [("pairs", pairs)]
    if style == "described":  # alt text does not say where
        told += [("at their place", places), ("colours", colours), ("unasked", unasked)]
    metrics = tuple(metric(name, *zip(*of, strict=True)) for name, of in told)
    counts = {"pictures": len(drawings.prompts)}
    return Result(
        benchmark, f"read by templates; {drawings.how}", drawings.name, counts, metrics, main="pairs"
    )
