"""What a benchmark says: one schema for all, with intervals, and two models beside each other.

An interval is the 2.5th and 97.5th percentile over 1,000 draws of the benchmark's units with replacement
(images, or pairs), seeded: the same numbers on every machine. Two models are compared on the same draws.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from builder.errors import InputError
from builder.files import read_file, write_atomically
from builder.typed import from_json

DRAWS = 1000
Numbers = npt.NDArray[Any]
Statistic = Literal["mean", "macro", "worst", "f1"]


@dataclass(frozen=True)
class Metric:
    """A number in percent, or a distance, which is of no units; and what it is of: of each unit its `hits`
    and how many they are `of` (five captions of an image are one unit), and its group. The mean is over all;
    "macro" is the mean over groups of their means, "worst" the lowest of them, "f1" the mean over groups of
    F1, where a hit is the group that was said.
    """

    name: str
    value: float
    low: float
    high: float
    hits: list[float]
    of: list[float]
    groups: list[int] | None = None
    statistic: Statistic = "mean"

    def __str__(self) -> str:
        form = ".1f" if self.hits else ".3g"
        return f"{self.name} {self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


@dataclass(frozen=True)
class Result:
    """Of a model on a benchmark. `protocol` names how it was asked; `samples` what was asked; `in_training`
    how many of the images are in the training set by sha256, where that is known; `main` the metric that
    stands for all, where there is one; `cut` how many texts are longer than the model's context; `data` names
    the images and texts, by content; `weights` those of a model's folder, by sha256.
    """

    benchmark: str
    protocol: str
    model: str
    samples: Mapping[str, int]
    metrics: tuple[Metric, ...]
    in_training: int | None = None
    main: str | None = None
    cut: int | None = None
    data: str = ""
    weights: str | None = None

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.metrics))
        cut = f"; texts cut: {self.cut:,}" if self.cut else ""
        return f"{self.benchmark} ({self.protocol}): {shown}; images trained on: {self.seen}{cut}"

    @property
    def seen(self) -> str:
        """Of the images, those that were trained on."""
        return "not known" if self.in_training is None else f"{self.in_training:,}"

    def value(self, name: str | None = None) -> float:
        """Of a metric, the main one unless named."""
        return next(m.value for m in self.metrics if m.name == (name or self.main))


def metric(
    name: str,
    hits: Sequence[float] | Numbers,
    of: Sequence[float] | Numbers | None = None,
    *,
    groups: Sequence[int] | Numbers | None = None,
    statistic: Statistic = "mean",
    all_units: bool = False,
) -> Metric:
    """A statistic of units, in percent, with its interval; units that are of nothing are left out, unless it
    is a model's doing that they are (`all_units`): two models are compared unit by unit.
    """
    hits = np.asarray(hits, np.float64)
    of = np.ones_like(hits) if of is None else np.asarray(of, np.float64)
    there: Numbers = np.ones_like(of, bool) if all_units else of > 0
    hits, of, group = hits[there], of[there], None if groups is None else np.asarray(groups, np.int64)[there]
    every = np.arange(len(hits))
    value = _STATISTICS[statistic](hits, of, group, every)
    listed = None if group is None else group.tolist()
    made = Metric(name, value, np.nan, np.nan, hits.tolist(), of.tolist(), listed, statistic)
    low, high = np.nanpercentile(_draws(made), [2.5, 97.5])
    return Metric(name, value, float(low), float(high), made.hits, made.of, listed, statistic)


def _draws(metric: Metric) -> Numbers:
    """(DRAWS) of the statistic; equal numbers of units are drawn alike."""
    hits, of = np.array(metric.hits), np.array(metric.of)
    groups = None if metric.groups is None else np.array(metric.groups)
    chance = np.random.Generator(np.random.PCG64(len(hits)))
    found = np.empty(DRAWS)
    for number in range(DRAWS):  # one at a time: a benchmark may have many units
        units = chance.integers(0, len(hits), len(hits))
        found[number] = _STATISTICS[metric.statistic](hits, of, groups, units)
    return found


def _mean(hits: Numbers, of: Numbers, _: Numbers | None, units: Numbers) -> float:
    number = of[units].sum()  # of few units that are of something a draw may have none
    return float(100 * hits[units].sum() / number) if number else np.nan


def _by_group(hits: Numbers, of: Numbers, groups: Numbers | None, units: Numbers) -> Numbers:
    """Of the groups that are among these units, their means."""
    assert groups is not None
    of_each = np.bincount(groups[units], of[units])
    hits_of_each = np.bincount(groups[units], hits[units])
    return 100 * hits_of_each[of_each > 0] / of_each[of_each > 0]


def _f1(hits: Numbers, _: Numbers, groups: Numbers | None, units: Numbers) -> float:
    """scikit-learn's macro F1 over the groups that are there, as WILDS has it."""
    assert groups is not None
    said, true = hits[units].astype(np.int64), groups[units]
    size = max(said.max(initial=0), true.max(initial=0)) + 1
    right = np.bincount(true[said == true], minlength=size)
    of_said, of_true = np.bincount(said, minlength=size), np.bincount(true, minlength=size)
    there = of_true > 0
    return float(100 * (2 * right[there] / (of_said + of_true)[there]).mean())


_STATISTICS: dict[Statistic, Callable[[Numbers, Numbers, Numbers | None, Numbers], float]] = {
    "mean": _mean,
    "macro": lambda *data: float(_by_group(*data).mean()),
    "worst": lambda *data: float(_by_group(*data).min()),
    "f1": _f1,
}


def named(hashes: Sequence[str], *texts: Sequence[str]) -> str:
    """What a benchmark's images, by sha256, and texts are called."""
    return sha256(json.dumps([list(hashes), *map(list, texts)]).encode()).hexdigest()[:16]


def compare(ours: Result, theirs: Result) -> list[dict[str, Any]]:
    """A row a metric: both values, the difference and its paired interval, where it is of units; None where
    one of them has no such metric.

    Raises:
        InputError: they are of other benchmarks, protocols or samples.
    """
    for name in ("benchmark", "protocol", "samples"):
        if getattr(ours, name) != getattr(theirs, name):
            reason = f"{name} is {getattr(ours, name)} and {getattr(theirs, name)}: not to be compared"
            raise InputError(reason, "evaluate both on the same: recap eval MODEL BENCHMARK")
    if ours.data and theirs.data and ours.data != theirs.data:
        reason = f"{ours.benchmark} was asked of other images or texts: not to be compared"
        raise InputError(reason, "evaluate both on the same: recap eval MODEL BENCHMARK")
    rows = []
    a_by_name, b_by_name = ({metric.name: metric for metric in one.metrics} for one in (ours, theirs))
    for name in a_by_name | b_by_name:  # of what a model never does the one has none
        a, b = a_by_name.get(name), b_by_name.get(name)
        of = a or b
        assert of is not None
        difference = low = high = np.nan
        if a and b:
            difference = a.value - b.value
            if a.hits:
                low, high = np.nanpercentile(_draws(a) - _draws(b), [2.5, 97.5])
        rows.append(
            {
                "metric": name, "a": _rounded(a.value if a else np.nan, of),
                "b": _rounded(b.value if b else np.nan, of), "difference": _rounded(difference, of),
                "low": _rounded(low, of), "high": _rounded(high, of),
            }
        )  # fmt: skip
    return rows


def _rounded(value: float, of: Metric) -> float | None:
    if np.isnan(value):
        return None
    return round(float(value), 2) if of.hits else float(f"{value:.4g}")


def write(results: Sequence[Result], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps([asdict(result) for result in results], indent=1) + "\n")


def read(path: Path) -> list[Result]:
    """Raises:
    InputError: it is no file of results.
    """
    return list(from_json(list[Result], read_file(path), what=str(path)))
