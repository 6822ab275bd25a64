"""MMVP-VLM (arXiv 2401.06209): two images and two statements, both of which have to pick theirs.

Questions.csv (number, kind, statement) and `MLLM_VLM Images/<kind>/<number>.jpg`; 9 kinds of 15 pairs.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from builder.errors import InputError
from recipes.evaluate.model import Model, Picture, inside, missing
from recipes.evaluate.results import Metric, Result, metric, named

PROMPT = "a photo of "


@dataclass(frozen=True)
class Both:
    pictures: tuple[Picture, Picture]
    texts: tuple[str, str]
    kind: str


def mmvp(folder: Path) -> list[Both]:
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
    data = named(hashes, [text for pair in pairs for text in pair.texts])
    return Result(benchmark, "mmvp-vlm", model.name, samples, tuple(found), seen, "both right", data=data)
