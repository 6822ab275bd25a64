"""Pictures that were drawn, beside their prompts: a folder of `recap sample`, or a model that draws them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from builder.errors import InputError
from builder.files import read_file, sha256_file
from builder.typed import from_json
from recipes.dit import model as dit
from recipes.dit.sample import PROMPTS, SETTINGS, sample
from recipes.evaluate.model import Picture, missing


@dataclass(frozen=True)
class Drawings:
    """`how` they were drawn, for a protocol."""

    folder: Path
    how: str
    prompts: tuple[str, ...]
    pictures: tuple[Picture, ...]

    def images(self) -> Iterator[Image.Image]:
        return (picture.of(picture.read()) for picture in self.pictures)


@dataclass(frozen=True)
class Drawer:
    """What is evaluated: such a folder, or a checkpoint of `recap train dit`."""

    name: str

    def drawn(self, prompts: Sequence[str] | None, folder: Path, **how: Any) -> Drawings:
        """Its pictures of these prompts; a model draws them in `folder`, where they are not there yet.

        Raises:
            InputError: it is neither, it holds pictures of other prompts, or a model is not told any.
        """
        place = Path(self.name)
        if (place / SETTINGS).is_file():
            found = load(place)
            if prompts is not None and found.prompts != tuple(prompts):
                reason = f"{place} holds pictures of other prompts than this benchmark's"
                raise InputError(reason, "evaluate the model itself: it draws them")
            return found
        if not (place / dit.CONFIG).is_file():
            reason = f"{self.name} holds no pictures of recap sample and no model that draws"
            raise InputError(reason, "name a folder of recap sample, or a checkpoint of recap train dit")
        if prompts is None:
            raise InputError("the model is not told what to draw", "give prompts=FILE")
        out = folder / sha256_file(place / dit.WEIGHTS)[:12]
        sample(place, prompts, out, **how)
        return load(out)


def load(folder: Path) -> Drawings:
    """Raises:
    InputError: pictures are missing.
    """
    about = from_json(dict[str, Any], read_file(folder / SETTINGS), what=str(folder / SETTINGS))
    lines = [json.loads(line) for line in read_file(folder / PROMPTS).splitlines()]
    pictures = tuple(Picture(str(folder / f"{number:06d}.png")) for number in range(len(lines)))
    missing(pictures)
    how = "{sampler} {steps} steps, guidance {guidance:g} on {guided}".format_map(about)
    return Drawings(folder, how, tuple(line["prompt"] for line in lines), pictures)
