"""Which of two captions an image is nearer to. What is as near to the wrong one as to the right is no hit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from builder.errors import InputError
from recipes.evaluate.model import Model, Picture, missing
from recipes.evaluate.results import Result, metric, named


@dataclass(frozen=True)
class Choice:
    picture: Picture
    right: str
    wrong: str
    kind: str


def there(choices: list[Choice], where: Path) -> list[Choice]:
    if not choices:
        raise InputError(f"{where} has no choices", "give what the benchmark's authors publish")
    missing(choice.picture for choice in choices)
    return choices


def chosen(model: Model, benchmark: str, protocol: str, choices: Sequence[Choice], fewest: int = 1) -> Result:
    """The mean over kinds with `fewest` choices, and of SugarCrepe each kind's."""
    image_NE, hashes = model.images(choice.picture for choice in choices)
    texts = [choice.right for choice in choices] + [choice.wrong for choice in choices]
    text_ME, cut = model.read(texts)
    right_NE, wrong_NE = np.split(text_ME, 2)
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
    return Result(
        benchmark, protocol, model.name, samples, tuple(found), seen, "mean over kinds", cut,
        named(hashes, texts),
    )  # fmt: skip
