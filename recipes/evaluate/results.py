"""What a benchmark says: one schema for all, with intervals, and two models beside each other.

An interval is the 2.5th and 97.5th percentile over 1,000 draws of the benchmark's units with replacement
(images, or pairs), seeded: the same numbers on every machine. Two models are compared on the same draws.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from builder.errors import InputError
from builder.files import read_file
from builder.typed import from_json

DRAWS = 1000
Hits = npt.NDArray[Any]


@dataclass(frozen=True)
class Metric:
    """A mean over units, in percent. `hits` is each unit's sum and `of` how many it is of: five captions of
    an image are one unit.
    """

    name: str
    value: float
    low: float
    high: float
    hits: list[float]
    of: list[float]


@dataclass(frozen=True)
class Result:
    """Of a model on a benchmark. `protocol` names how it was asked; `samples` what was asked; `in_training`
    how many of the images are in the training set by sha256, where that is known.
    """

    benchmark: str
    protocol: str
    model: str
    samples: Mapping[str, int]
    metrics: tuple[Metric, ...]
    in_training: int | None = None

    def __str__(self) -> str:
        shown = ", ".join(f"{m.name} {m.value:.1f} [{m.low:.1f}, {m.high:.1f}]" for m in self.metrics)
        return f"{self.benchmark} ({self.protocol}): {shown}"


def metric(name: str, hits: Sequence[float] | Hits, of: Sequence[float] | Hits | None = None) -> Metric:
    """The mean of `hits`, a unit each, in percent, with its interval."""
    hits = np.asarray(hits, np.float64)
    of = np.ones_like(hits) if of is None else np.asarray(of, np.float64)
    drawn = _draws(hits, of)
    low, high = np.percentile(drawn, [2.5, 97.5])
    value = 100 * hits.sum() / of.sum()
    return Metric(name, float(value), float(low), float(high), hits.tolist(), of.tolist())


def _draws(hits: Hits, of: Hits) -> Hits:
    chance = np.random.Generator(np.random.PCG64(len(hits)))
    means = np.empty(DRAWS)
    for number in range(DRAWS):  # one at a time: a benchmark may have many units
        units = chance.integers(0, len(hits), len(hits))
        means[number] = 100 * hits[units].sum() / of[units].sum()
    return means


def compare(ours: Result, theirs: Result) -> list[dict[str, Any]]:
    """A row a metric: both values, the difference and its paired interval.

    Raises:
        InputError: they are of other benchmarks, protocols or samples.
    """
    for name in ("benchmark", "protocol", "samples"):
        if getattr(ours, name) != getattr(theirs, name):
            reason = f"{name} is {getattr(ours, name)} and {getattr(theirs, name)}: not to be compared"
            raise InputError(reason, "evaluate both on the same: recap eval MODEL BENCHMARK")
    rows = []
    known = {metric.name: metric for metric in theirs.metrics}
    for one in ours.metrics:
        other = known[one.name]
        differ = _draws(np.array(one.hits), np.array(one.of)) - _draws(
            np.array(other.hits), np.array(other.of)
        )
        low, high = np.percentile(differ, [2.5, 97.5])
        rows.append(
            {
                "metric": one.name, ours.model: round(one.value, 2), theirs.model: round(other.value, 2),
                "difference": round(one.value - other.value, 2), "low": round(float(low), 2),
                "high": round(float(high), 2),
            }
        )  # fmt: skip
    return rows


def write(results: Sequence[Result], path: Path) -> None:
    path.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


def read(path: Path) -> list[Result]:
    """Raises:
    InputError: it is no file of results.
    """
    return list(from_json(list[Result], read_file(path), what=str(path)))
