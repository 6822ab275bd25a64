"""What a cluster's driver costs: N empty tasks with records on one Ray, and calls of bare Ray beside it.

The tasks read a table of one row and write one as small; what is before them (a run whose source is done) is
laid out as records. Tasks a second, and the driver's memory after every tenth of them.

    python benchmarks/scheduling.py [--tasks 100000]
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from common import keep
from scale import record_of

from builder.commit import COMPACTED, put_record
from builder.core import RUN, Recipe, Record, Resources, Stage, Task, Work
from builder.executors.ray import connected, on_ray
from builder.files import sha256_file, write_parquet
from builder.index import SLICES, Index
from builder.plan import BlockPlan, Plan
from builder.run import Run
from builder.schedule import Outcome, Schedule
from builder.stages.source import Source
from builder.store import Folder


@dataclass(frozen=True, kw_only=True)
class Empty(Stage):
    """Writes a small file of the same bytes for every shard."""

    name: str = "empty"

    def reads(self) -> tuple[str, ...]:
        return ("source",)

    def num_workers(self) -> int:
        return os.cpu_count() or 1

    def resources(self) -> Resources:
        return Resources(cpus=0.5)

    @contextmanager
    def open(self) -> Iterator[Work]:
        def work(task: Task) -> Mapping[str, int]:
            (file,) = task.files.values()
            shutil.copyfile(file, task.output())
            return {"ok": 1}

        yield work


def make(place: Path, tasks: int) -> Run:
    """A run whose source is done."""
    (place / "metadata").mkdir(parents=True)
    one = pa.table({"uid": ["0" * 32], "url": ["http://h/"], "text": ["a"]})
    pq.write_table(one, place / "metadata" / "a.parquet")
    store = Folder(place / "run")
    recipe = Recipe("empty", (Source(files=str(place / "metadata"), rows_per_shard=1), Empty()))
    columns: dict[str, Any] = {
        "shard": range(tasks), "file": ["a.parquet"] * tasks, "sha256": ["0" * 64] * tasks,
        "stored": pa.nulls(tasks, pa.string()), "start": range(tasks), "stop": range(1, tasks + 1),
        "file_rows": [tasks] * tasks,
    }  # fmt: skip
    table = pa.table(columns).cast(SLICES)
    slices = store.scratch() / "slices"
    write_parquet(table, slices)
    name = f"source/{RUN}/00000.00000000.parquet"
    about = {"outputs": {name: sha256_file(slices)}, "bytes": {name: slices.stat().st_size}}
    store.put(slices, name)
    put_record(store, f"source/{RUN}", "00000", Record("batch", **about))
    run = Run(store, recipe)
    run.index = Index([table])
    for block in run.index.blocks:
        small = place / f"small-{block.name}.parquet"  # a file has only so many names
        write_parquet(one, small)
        opened, found = BlockPlan(Plan(recipe, store, run.index), block), {}
        (store.root / "source" / block.name).mkdir(parents=True)
        for shard in opened.names(recipe.stage("source")):
            task = opened.task(recipe.stage("source"), shard)
            assert task is not None
            record = record_of(task)
            (output,) = record.outputs
            os.link(small, store.root / output)
            made, size = {output: sha256_file(small)}, {output: small.stat().st_size}
            found[shard] = Record(
                task.key, dict(task.inputs), made, size, {"ok": 1},
                settings=task.settings, outside=task.outside,
            )  # fmt: skip
        records = {"name": list(found), "record": [record.to_json() for record in found.values()]}
        write_parquet(pa.table(records), store.root / "source" / block.name / COMPACTED)
    return run


class Nothing:
    def do(self, task: object) -> object:
        return task


def bare(calls: int) -> float:
    """Calls a second of as many actors, two of each in flight, with nothing around them."""
    actors = [ray.remote(num_cpus=0)(Nothing).remote() for _ in range(os.cpu_count() or 1)]
    pending = {actor.do.remote("00000"): actor for actor in actors for _ in range(2)}
    begun, done = time.monotonic(), 0
    while done < calls:
        ready, _ = ray.wait(list(pending), num_returns=1)
        for ref in ready:
            actor = pending.pop(ref)
            ray.get(ref)
            done += 1
            pending[actor.do.remote("00000")] = actor
    rate = calls / (time.monotonic() - begun)
    for actor in actors:
        ray.kill(actor)
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tasks", type=int, default=100_000)
    arguments = parser.parse_args()
    logging.disable()
    os.environ["SOURCE_DATE_EPOCH"] = "1700000000"
    with tempfile.TemporaryDirectory() as folder, connected("ray"):
        run = make(Path(folder), arguments.tasks)
        calls = [bare(5000)]
        schedule = Schedule(run.plan())
        rates, memory, since = [], [], 0.0
        with run.store.lease():
            outcomes: Iterator[Outcome] = on_ray("ray")(schedule)
            for done, outcome in enumerate(outcomes, 1):
                assert outcome.record, outcome.error
                since = since or time.monotonic()  # workers have started
                if done % (arguments.tasks // 10) == 0:
                    rates.append(arguments.tasks / 10 / (time.monotonic() - since))
                    since = time.monotonic()
                    memory.append(psutil.Process().memory_info().rss >> 20)
                    print(f"{done:,}: {rates[-1]:.0f}/s, {memory[-1]} MiB", flush=True)
        calls.append(bare(5000))
    keep("scheduling", {
        "tasks": arguments.tasks, "tasks_per_s": round(statistics.median(rates)),
        "tasks_per_s_by_tenth": [round(rate) for rate in rates],
        "bare_ray_calls_per_s": [round(rate) for rate in calls],
        "driver_mib_by_tenth": memory,
        "driver_max_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    })  # fmt: skip


if __name__ == "__main__":
    main()
