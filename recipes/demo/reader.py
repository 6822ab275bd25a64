"""Reads the things back from a picture of the demo's world, whoever drew it: no model, templates.

The background is the one of all backgrounds that most of the picture is like. In each of the nine places
every thing that the world knows (colour, shape, size, pattern, a little to each side) is laid over it; the
one that is most like the picture is there, if there is anything and it explains most of what is not
background.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import numpy.typing as npt
from PIL import Image

from recipes.demo import world
from recipes.demo.world import Scene, Thing

Numbers = npt.NDArray[np.float32]
FINER = 8  # templates are drawn so much larger, and made smaller as pictures are
JITTER = (-0.012, 0.0, 0.012)
NOTHING = 0.004  # mean square of a place's difference from the background, of 1: less is none
EXPLAINED = 0.5  # the least share of it that a thing explains


@dataclass(frozen=True)
class Read:
    """A thing, by its place; `explained` is the share of what is not background there that it explains."""

    place: int
    colour: str
    shape: str
    explained: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


def read(image: Image.Image) -> list[Read]:
    """The things of a square RGB picture, in reading order. 32 and 64 pixels a side are what it was measured
    for.
    """
    px = image.width
    seen = np.asarray(image.convert("RGB"), np.float32) / 255
    grounds = _grounds(px)
    apart = np.median(np.abs(grounds - seen).sum(-1), axis=(1, 2))
    ground = grounds[int(apart.argmin())]
    found = []
    for place in range(9):
        top, left, side = _window(place, px)
        here = (slice(top, top + side), slice(left, left + side))
        empty = float(np.square(seen[here] - ground[here]).mean())
        if empty < NOTHING:
            continue
        names, masks, paints = _templates(place, px)
        laid = ground[here] + masks * (paints - ground[here])
        errors = np.square(laid - seen[here]).mean((1, 2, 3))
        best = int(errors.argmin())
        explained = 1 - float(errors[best]) / empty
        if explained >= EXPLAINED:
            found.append(Read(place, *names[best], explained))
    return found


def _window(place: int, px: int) -> tuple[int, int, int]:
    """Its place's part of the picture: top, left, side."""
    return round(px * (place // 3) / 3), round(px * (place % 3) / 3), px // 3


@lru_cache(4)
def _grounds(px: int) -> Numbers:
    """(30, px, px, 3)."""
    scenes = [Scene(0, ground, tone, ()) for ground, tone in product(world.GROUNDS, world.TONES)]
    return np.stack([_smaller(world.draw(scene, px * FINER), px) for scene in scenes])


@lru_cache(36)
def _templates(place: int, px: int) -> tuple[list[tuple[str, str]], Numbers, Numbers]:
    """Of each thing there could be: its names, its mask (M, S, S, 1) and its paint (M, S, S, 3)."""
    top, left, side = _window(place, px)
    names, masks, paints = [], [], []
    dark, pale = (
        level / 255 for level in (world.COLOURS["black"][0], world.lighter(world.COLOURS["black"])[0])
    )
    for shape, size, dx, dy, pattern in product(world.SHAPES, world.SIZES, JITTER, JITTER, world.PATTERNS):
        thing = Thing(shape, "black", size, pattern, place, dx, dy)  # others are as it is, but for the colour
        both = _on_both(thing, px)[top : top + side, left : left + side]
        black, white = both[..., :1], both[..., 1:2]
        mask = 1 - (white - black)
        share = (black / np.maximum(mask, 0.01) - dark) / (pale - dark)  # of the pattern
        for colour, rgb in world.COLOURS.items():
            plain, light = (np.array(paint, np.float32) / 255 for paint in (rgb, world.lighter(rgb)))
            names.append((colour, shape))
            masks.append(mask)
            paints.append(plain + share * (light - plain))
    return names, np.stack(masks).astype(np.float32), np.stack(paints).astype(np.float32)


def _on_both(thing: Thing, px: int) -> Numbers:
    """A thing of grey on black, and on white: in the first two channels."""
    image = Image.new("RGB", (px * FINER, px * FINER), (0, 255, 0))
    world.draw_thing(image, thing, px * FINER)
    return _smaller(image, px)


def _smaller(image: Image.Image, px: int) -> Numbers:
    return np.asarray(image.resize((px, px), Image.Resampling.BILINEAR), np.float32) / np.float32(255)
