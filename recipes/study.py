"""Comparisons over trainings: one setting changed, several seeds of each, the same benchmarks.

    FOLDER/<arm>/<seed>/          a training (recipes/training.py)
    FOLDER/<arm>/<seed>/results-<benchmark>.json

What is done is not done again; another training's folder is refused. A value is the mean over seeds; its
interval, and that of a difference, is over draws of seeds and of the benchmark's units with replacement: of
arms beside each other the same draws.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from builder.errors import InputError
from builder.files import write_atomically
from builder.machine import Machine
from builder.shown import echo
from recipes.evaluate import results
from recipes.evaluate.benchmarks import Benchmark
from recipes.evaluate.benchmarks import demo as demo_benchmark
from recipes.evaluate.results import DRAWS, Metric, Numbers, Result
from recipes.training import ALONE, settle

Arms = Mapping[str, Sequence[Any]]
"""Of each arm a training a seed: of recipes/clip or of recipes/dit."""


def run(
    arms: Arms, benchmark: Callable[[], Benchmark], name: str, folder: Path, say: Callable[[str], None]
) -> Found:
    """Train and evaluate whatever is not there: on a GPU one after the other, else a core each. `name` is the
    benchmark's, and says all about it.
    """
    jobs = [
        (folder / arm / str(training.seed), training)
        for number in range(max(map(len, arms.values())))
        for arm, trainings in arms.items()
        for training in trainings[number : number + 1]
    ]  # seed by seed: what is interrupted has something of each arm
    file = f"results-{name}.json"
    for out, training in jobs:
        if out.exists():
            settle(training, out, _recipe(training).FREE, ALONE)
    left = [job for job in jobs if not (job[0] / file).exists()]
    begun = time.monotonic()
    benchmark()  # it is drawn once
    at_once = 1 if torch.cuda.is_available() else max(1, round(Machine.here().cpus))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(at_once, mp_context=spawn, initializer=_on_one_core) as pool:
        doing = [pool.submit(_one, *job, benchmark, file) for job in left]
        try:
            for number, done in enumerate(as_completed(doing), 1):
                minutes = (time.monotonic() - begun) / 60
                say(f"{done.result()} ({number} of {len(left)}, {minutes:.1f} min)")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return Found({arm: [folder / arm / str(one.seed) / file for one in of] for arm, of in arms.items()})


def _on_one_core() -> None:
    """By its name in the process that begins: an engine of vLLM in this one has replaced torch's own."""
    torch.set_num_threads(1)


def _recipe(training: Any) -> Any:
    """The module of a training: how it is trained, and which of its settings are free."""
    return sys.modules[type(training).__module__]


def _one(out: Path, training: Any, benchmark: Callable[[], Benchmark], file: str) -> str:
    there = _recipe(training).train(training, out, say=lambda _: None)
    asked = benchmark()
    found = list(asked.results(asked.subject(str(there))))
    results.write(found, out / file)
    return f"{out.parent.name}, seed {training.seed}: " + ", ".join(
        f"{r.main} {r.value():.3g}" for r in found if r.main
    )


@dataclass(frozen=True)
class Value:
    """In percent, with its interval; or a distance, whose seeds are too few for one."""

    value: float
    low: float
    high: float
    is_distance: bool = False

    def __str__(self) -> str:
        if self.is_distance:
            return f"{self.value:.3g}"
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


class Found:
    """What a study has found, by arm, benchmark and metric."""

    def __init__(self, arms: Mapping[str, Sequence[Path]]) -> None:
        """Raises:
        InputError: what was asked of one is not what was asked of another.
        """
        self.of: dict[str, list[dict[str, Result]]] = {arm: [] for arm in arms}
        protocols: dict[str, str] = {}
        for arm, path in ((arm, path) for arm, paths in arms.items() for path in paths):
            found = {result.benchmark: result for result in results.read(path)}
            for name, result in found.items():
                if result.protocol != protocols.setdefault(name, result.protocol):
                    reason = f"{path}: {name} was asked as '{result.protocol}', before '{protocols[name]}'"
                    raise InputError(reason, "delete the older file: the same command evaluates again")
            self.of[arm].append(found)

    def value(self, arm: str, benchmark: str, metric: str) -> Value:
        found = self._metrics(arm, benchmark, metric)
        return _value(_draws(found), is_distance=not found[0].hits)

    def difference(self, arm: str, other: str, benchmark: str, metric: str) -> Value:
        """`arm` less `other`."""
        ours, theirs = (self._metrics(name, benchmark, metric) for name in (arm, other))
        draws = [a - b for a, b in zip(_draws(ours), _draws(theirs), strict=True)]
        return _value(draws, is_distance=not ours[0].hits)

    def seeds(self, arm: str, benchmark: str, metric: str) -> list[float]:
        return [round(metric.value, 2) for metric in self._metrics(arm, benchmark, metric)]

    def _metrics(self, arm: str, benchmark: str, metric: str) -> list[Metric]:
        return [next(m for m in one[benchmark].metrics if m.name == metric) for one in self.of[arm]]


def _draws(metrics: Sequence[Metric]) -> list[float]:
    """The value, and those of the draws; of a distance its seeds are all that is drawn."""
    if not metrics[0].hits:
        metrics = [replace(one, hits=[one.value / 100], of=[1.0]) for one in metrics]
    hits_SU, of_SU = (np.array([getattr(metric, name) for metric in metrics]) for name in ("hits", "of"))
    chance = np.random.Generator(np.random.PCG64(hits_SU.shape[1]))
    found = [_mean(hits_SU, of_SU)]
    for _ in range(DRAWS):
        seeds = chance.integers(0, len(hits_SU), len(hits_SU))
        units = chance.integers(0, hits_SU.shape[1], hits_SU.shape[1])
        found.append(_mean(hits_SU[seeds][:, units], of_SU[seeds][:, units]))
    return found


def _mean(hits: Numbers, of: Numbers) -> float:
    return float(100 * hits.sum() / of.sum()) if of.sum() else np.nan


def _value(draws: Sequence[float], *, is_distance: bool) -> Value:
    low, high = np.nanpercentile(draws[1:], [2.5, 97.5])
    return Value(draws[0], float(low), float(high), is_distance)


def demo_version(folder: Path, rows: int, port: int, say: Callable[[str], None]) -> tuple[Path, Path]:
    """(version, run) of a demo of so many rows: its web, the whole line, published."""
    from recipes.demo.demo import line

    place, target = folder / f"demo-{rows}", folder / f"demo-{rows}-published"
    if (target / "latest").exists():
        return target / "latest", place
    begun = time.monotonic()
    if line(place, folder / f"web-{rows}-{port}", target, rows=rows, port=port) is None:
        raise InputError(f"shards of {place} failed", "the same command tries them again")
    say(f"{rows} rows were built and published in {(time.monotonic() - begun) / 60:.1f} min")
    return target / "latest", place


def options(out: str, *, seeds: int = 3, samples: int = 45_000, scenes: int = 1000) -> Callable[[Any], Any]:
    """Of a study's command."""
    place = click.Path(path_type=Path)
    given = (
        click.option("--seeds", default=seeds, show_default=True),
        click.option("--rows", default=12_000, show_default=True, help="Of the demo's web."),
        click.option("--samples", default=samples, show_default=True, help="Of each training."),
        click.option("--scenes", default=scenes, show_default=True, help="Of the benchmark."),
        click.option("--version", type=place, help="Published, instead of a demo that is built."),
        click.option("--images", type=place, help="The run of that version."),
        click.option("--port", default=8655, show_default=True),
        click.option("--out", default=out, show_default=True, type=place),
        click.option("--docs", default="docs", show_default=True, type=place),
    )

    def with_options(command: Any) -> Any:
        for option in reversed(given):
            command = option(command)
        return command

    return with_options


def studied(
    training: Callable[[str, int, Path, Path, int], Any], arms: Sequence[str], seeds: int, rows: int,
    samples: int, scenes: int, version: Path | None, images: Path | None, port: int, out: Path,
    benchmark: Callable[..., Benchmark] = demo_benchmark,
) -> tuple[float, Found]:  # fmt: skip
    """Build what is needed, train, evaluate; gives when it began."""
    begun, say = time.monotonic(), partial(echo, err=True)
    if version is None or images is None:
        version, images = demo_version(out, rows, port, say)
    chosen = {arm: [training(arm, seed, version, images, samples) for seed in range(seeds)] for arm in arms}
    asked = partial(benchmark, folder=str(out / "benchmark"), scenes=scenes)
    return begun, run(chosen, asked, f"world-{scenes}", trainings_in(out, samples), say)


def trainings_in(out: Path, samples: int) -> Path:
    """Where a study's trainings of so many samples lie."""
    return out / f"samples-{samples}"


REMARKS = "## Remarks"


def write(path: Path, text: str) -> None:
    """A study's page. What somebody wrote below its remarks stays there."""
    _, line, kept = path.read_text().partition(f"\n{REMARKS}\n") if path.exists() else ("", "", "")
    write_atomically(path, text + line + kept)


def markdown(rows: Sequence[Sequence[Any]]) -> str:
    """A table; the first row is its head."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
