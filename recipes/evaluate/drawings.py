"""Pictures that were drawn, beside their prompts: a folder of `recap sample`, or a model that draws them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image

from builder.errors import InputError
from builder.files import read_file, sha256_file
from builder.shown import echo
from builder.typed import from_json, parse
from recipes.dit import model as dit
from recipes.dit.sample import PROMPTS, SETTINGS, How, file_of, sample
from recipes.evaluate.model import Picture
from recipes.training import this_process


@dataclass(frozen=True)
class Drawings:
    """`name` is what was evaluated; `how` they were drawn, and of which prompts, is for a protocol."""

    name: str
    how: str
    prompts: tuple[str, ...]
    pictures: tuple[Picture, ...]

    def images(self) -> Iterator[Image.Image]:
        """Raises:
        InputError: one is not a square, or not as large as the others.
        """
        size = None
        for picture in self.pictures:
            image = picture.of(picture.read())
            size = size or (image.width, image.width)
            if image.size != size:
                reason = f"{picture.name} is {image.width} x {image.height} pixels, not {size[0]} x {size[1]}"
                raise InputError(reason, "delete it, and type the same recap sample again")
            yield image


@dataclass(frozen=True)
class Artist:
    """What is evaluated: a folder of `recap sample`, or a checkpoint of `recap train dit`, which draws as
    `how` says: what `recap sample` can be told.
    """

    name: str
    how: Mapping[str, Any] = field(default_factory=dict)

    def drawn(self, prompts: Sequence[str] | None, folder: Path) -> Drawings:
        """Its pictures of these prompts; a model draws them in `folder`, where they are not there yet.

        Raises:
            InputError: it is neither, it holds pictures of other prompts, or a model is not told any, or is
                drawn by several processes.
        """
        prompts = None if prompts is None else [prompt.strip() for prompt in prompts]  # as they are drawn
        place = Path(self.name)
        if (place / SETTINGS).is_file():
            if self.how:
                reason = f"{place} holds pictures, which are drawn already"
                raise InputError(reason, f"leave out {', '.join(self.how)}")
            found = load(place)
            if prompts is not None and found.prompts != tuple(prompts):
                reason = f"{place} holds pictures of other prompts than this benchmark's"
                raise InputError(reason, "evaluate the model itself: it draws them")
            return found
        if not all((place / name).is_file() for name in (dit.CONFIG, dit.WEIGHTS)):
            reason = f"{self.name} holds no pictures of recap sample and no model that draws"
            raise InputError(reason, "name a folder of recap sample, or a checkpoint of recap train dit")
        if not prompts:
            raise InputError("the model is not told what to draw", "give prompts=FILE")
        if this_process().ranks > 1:
            hint = "draw into a folder first: torchrun ... -m builder.cli sample; and evaluate that, alone"
            raise InputError("several processes evaluate", hint)
        told = [f"{name}={value}" for name, value in sorted(self.how.items())]
        out = folder / f"{sha256_file(place / dit.WEIGHTS)[:12]}-{_digest([*told, *prompts])}"
        sample(place, prompts, out, say=partial(echo, err=True), **self.how)
        return replace(load(out), name=self.name)


def load(folder: Path) -> Drawings:
    """Raises:
    InputError: it is not as `recap sample` leaves it, or pictures are missing.
    """
    about = from_json(dict[str, Any], read_file(folder / SETTINGS), what=str(folder / SETTINGS))
    how = parse(How, {name: about[name] for name in about if name != "model"}, what=str(folder / SETTINGS))
    lines = [
        from_json(dict[str, Any], line, what=str(folder / PROMPTS))
        for line in read_file(folder / PROMPTS).splitlines()
    ]
    prompts = tuple(str(line.get("prompt")) for line in lines)
    pictures = tuple(Picture(str(folder / file_of(number))) for number in range(len(lines)))
    if gone := [picture.name for picture in pictures if not Path(picture.name).is_file()]:
        reason = f"{len(gone):,} of {len(pictures):,} pictures are missing, the first is {gone[0]}"
        raise InputError(reason, "type the same recap sample again")
    told = f"{how.sampler}, {how.steps} steps, guidance {how.guidance:g} on {how.guided}, seed {how.seed}"
    return Drawings(str(folder), f"{told}; prompts {_digest(prompts)}", prompts, pictures)


def _digest(prompts: Sequence[str]) -> str:
    return sha256("\n".join(prompts).encode()).hexdigest()[:12]
