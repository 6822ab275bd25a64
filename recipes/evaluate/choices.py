"""Which of two captions an image is nearer to. What is as near to the wrong one as to the right is no hit.

Layouts, each with its protocol:

    sugarcrepe      a folder of add_att.json, add_obj.json, ...: {number: {filename, caption,
                    negative_caption}}; images are COCO's val2017 (arXiv 2306.14610)
    vg-attribution  visual_genome_attribution.json: image_path, box, true_caption, false_caption, attributes;
                    the mean over pairs of attributes with at least 25 cases (ARO, arXiv 2210.01936)
    mmvp-vlm        Questions.csv (number, kind, statement), `MLLM_VLM Images/<kind>/<number>.jpg`: two images
                    and two statements, both of which have to pick theirs (arXiv 2401.06209)
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from builder.errors import InputError
from builder.files import read_file
from builder.typed import from_json
from recipes.evaluate.model import Model, Picture
from recipes.evaluate.results import Metric, Result, metric

FEWEST_CASES = 25  # of a pair of attributes
PROMPT = "a photo of "  # of MMVP-VLM


@dataclass(frozen=True)
class Choice:
    picture: Picture
    right: str
    wrong: str
    kind: str


def sugarcrepe(folder: Path, images: Path) -> list[Choice]:
    """7 kinds, 7,511 choices."""

    class Item(BaseModel):
        filename: str
        caption: str
        negative_caption: str

    found = []
    for path in sorted(folder.glob("*.json")):
        for item in from_json(dict[str, Item], read_file(path), what=str(path)).values():
            picture = Picture(str(inside(images, item.filename)))
            found.append(Choice(picture, item.caption, item.negative_caption, path.stem))
    return _there(found, folder)


def vg_attribution(annotations: Path, images: Path) -> list[Choice]:
    class Item(BaseModel):
        image_path: str
        bbox_x: float
        bbox_y: float
        bbox_w: float
        bbox_h: float
        true_caption: str
        false_caption: str
        attributes: tuple[str, str]

    found = []
    for item in from_json(list[Item], read_file(annotations), what=str(annotations)):
        left, top = int(item.bbox_x), int(item.bbox_y)
        box = left, top, left + int(item.bbox_w), top + int(item.bbox_h)
        picture = Picture(str(inside(images, item.image_path)), box=box)
        found.append(Choice(picture, item.true_caption, item.false_caption, "_".join(item.attributes)))
    return _there(found, annotations)


def _there(choices: list[Choice], where: Path) -> list[Choice]:
    if not choices:
        raise InputError(f"{where} has no choices", "give what the benchmark's authors publish")
    missing(choice.picture for choice in choices)
    return choices


def inside(folder: Path, name: str) -> Path:
    """A file that a benchmark names: in its folder, whoever wrote it.

    Raises:
        InputError: it is somewhere else.
    """
    path = os.path.normpath(folder / name)
    if os.path.isabs(name) or not Path(path).is_relative_to(os.path.normpath(folder)):
        raise InputError(f"'{name[:200]}' is no image in {folder}", "get the benchmark from its authors")
    return Path(path)


def missing(pictures: Any) -> None:
    """Raises:
    InputError: images are not there.
    """
    names = list(dict.fromkeys(picture.name for picture in pictures if picture.content is None))
    if gone := [name for name in names if not Path(name).is_file()]:
        reason = f"{len(gone):,} of {len(names):,} images are missing, the first is {gone[0]}"
        raise InputError(reason, "give the folder that they are in")


def chosen(model: Model, benchmark: str, protocol: str, choices: Sequence[Choice], fewest: int = 1) -> Result:
    """The mean over kinds with `fewest` choices, and of SugarCrepe each kind's."""
    image_NE, hashes = model.images(choice.picture for choice in choices)
    right_NE = model.texts([choice.right for choice in choices])
    wrong_NE = model.texts([choice.wrong for choice in choices])
    hits = ((image_NE * right_NE).sum(1) > (image_NE * wrong_NE).sum(1)).astype(float)
    counts = Counter(choice.kind for choice in choices)
    kinds = sorted(kind for kind, number in counts.items() if number >= fewest)
    if not kinds:
        raise InputError(f"of no kind there are {fewest} choices", "give the whole benchmark")
    number = {kind: place for place, kind in enumerate(kinds)}
    of = np.array([float(choice.kind in number) for choice in choices])
    groups = np.array([number.get(choice.kind, 0) for choice in choices])
    found = [metric("mean over kinds", hits * of, of, groups=groups, statistic="macro")]
    if protocol == "sugarcrepe":
        found += [metric(kind, hits[groups == place]) for kind, place in number.items()]
    samples = {"choices": int(of.sum()), "kinds": len(kinds)}
    seen = model.in_training(hashes)
    return Result(benchmark, protocol, model.name, samples, tuple(found), seen, "mean over kinds")


# --- two images and two statements --------------------------------------------------------------------------


@dataclass(frozen=True)
class Both:
    pictures: tuple[Picture, Picture]
    texts: tuple[str, str]
    kind: str


def mmvp(folder: Path) -> list[Both]:
    """9 kinds of 15 pairs."""
    with open(folder / "Questions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    if not rows or len(rows) % 2 or any(len(row) != 3 or not row[0].strip().isdecimal() for row in rows):
        raise InputError(f"{folder}/Questions.csv has not pairs of number, kind, statement", "get it again")
    images = folder / "MLLM_VLM Images"
    pairs = []
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        names = (f"{kind}/{int(number)}.jpg" for number, kind, _ in (one, other))
        pictures = [Picture(str(inside(images, name))) for name in names]
        texts = [PROMPT + statement for _, _, statement in (one, other)]
        pairs.append(Both((pictures[0], pictures[1]), (texts[0], texts[1]), one[1]))
    missing(picture for pair in pairs for picture in pair.pictures)
    return pairs


def both(model: Model, benchmark: str, pairs: Sequence[Both]) -> Result:
    images, hashes = model.images(picture for pair in pairs for picture in pair.pictures)
    texts = model.texts([text for pair in pairs for text in pair.texts])
    scores_N22 = np.einsum("nte,nie->nti", *(v.reshape(len(pairs), 2, -1) for v in (texts, images)))
    first, second = (scores_N22[:, t, t] > scores_N22[:, t, 1 - t] for t in (0, 1))
    kinds = sorted({pair.kind for pair in pairs})
    groups = np.array([kinds.index(pair.kind) for pair in pairs])
    found: list[Metric] = [metric("both right", first & second)]
    found += [metric(kind, (first & second)[groups == place]) for place, kind in enumerate(kinds)]
    samples = {"pairs": len(pairs), "kinds": len(kinds)}
    seen = model.in_training(hashes)
    return Result(benchmark, "mmvp-vlm", model.name, samples, tuple(found), seen, "both right")
