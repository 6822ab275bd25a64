"""How long GPUs wait: the scheduler that really schedules, under a simulated clock.

Plan, Schedule, Pool and Node are the build's own; workers are simulated, and a store in memory has the
records. A worker takes what a stage took where it was measured, drawn from a log-normal (sigma 0.25), and one
shard in a hundred three times as long; a captioner loads its model in two minutes. A node has 8 GPUs and 96
cores. The share of GPU time that is waited is counted from the first caption of a GPU to the last caption of
all but the last block, and over the whole phase, its end included.

    python benchmarks/simulate.py [--workers 8 128 1024] [--shards 124000]
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import logging
import random
import resource
import tempfile
import time
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
from common import keep
from scale import ROWS, recipe_of, record_of

from builder.core import Resources, Stage, Task
from builder.executors.pool import Node, Pool, Worker
from builder.index import SLICES, Index
from builder.machine import Machine
from builder.plan import Plan
from builder.schedule import Outcome, Schedule

GPUS, CORES = 8, 96  # of a node
LOAD_S = 120.0
# Seconds of a shard of 10,000 rows. download: 84 URLs/s a core (img2dataset, 16 cores); caption: 7,500 images
# at 45/s, the goal on an H200, not measured; score: 7,500 at 312/s (ViT-L/14 at 336 px, A100, as reported).
SECONDS = {"source": 2.0, "download": ROWS / 84, "dedup": 1.0, "re_caption": 7500 / 45, "score": 7500 / 312}


class Memory:
    """A store of records, in memory."""

    place, held, filesystem = "memory", None, None

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, bytes]] = defaultdict(dict)  # folder -> name -> data

    def read(self, name: str) -> bytes | None:
        folder, _, name = name.rpartition("/")
        return self.objects[folder].get(name) if folder in self.objects else None

    def write(self, name: str, data: bytes) -> None:
        folder, _, name = name.rpartition("/")
        self.objects[folder][name] = data

    def delete(self, name: str) -> None:
        folder, _, name = name.rpartition("/")
        self.objects[folder].pop(name, None)

    def read_all(self, names: list[str]) -> list[bytes | None]:
        return [self.read(name) for name in names]

    def delete_all(self, names: list[str]) -> None:
        for name in names:
            self.delete(name)

    def names(self, folder: str) -> list[str]:
        return sorted(self.objects.get(folder, ()))

    def sizes(self, folder: str) -> dict[str, int]:
        return {name: len(data) for name, data in self.objects.get(folder, {}).items()}

    def folders(self, _: str) -> list[str]:
        return []

    def scratch(self) -> Path:
        return Path(tempfile.mkdtemp())

    def put(self, file: Path, name: str) -> None:
        self.write(name, file.read_bytes())


class Clock:
    """What will happen, in the order of time."""

    def __init__(self, seed: int) -> None:
        self.now, self.events, self.chance, self.number = 0.0, [], random.Random(seed), 0
        self.tasks: Counter[str] = Counter()

    def seconds(self, stage: str) -> float:
        drawn = self.chance.lognormvariate(0, 0.25) * SECONDS.get(stage, 1.0)
        return drawn * 3 if self.chance.random() < 0.01 else drawn

    def at(self, when: float, worker: Simulated) -> None:
        self.number += 1
        heapq.heappush(self.events, (when, self.number, worker))

    def wait(self, _: list[Worker]) -> list[Worker]:
        self.now, _, worker = heapq.heappop(self.events)
        return [worker]


class Simulated(Worker):
    """One that is at work until its first task's time is over, then at the next."""

    all: ClassVar[list[Simulated]] = []

    def __init__(self, clock: Clock, stages: tuple[Stage, ...], gpus: tuple[str, ...]) -> None:
        super().__init__(stages, gpus)
        self.clock, self.free, self.busy = clock, clock.now, 0.0
        self.spans: list[tuple[float, float]] = []
        self.ends: list[float] = []
        if self.name == "re_caption":
            self.free += LOAD_S
        Simulated.all.append(self)

    def send(self, task: Task) -> None:
        seconds = self.clock.seconds(task.stage)
        start = max(self.free, self.clock.now)
        self.free = start + seconds
        self.spans.append((start, self.free))
        self.ends.append(self.free)
        if len(self.tasks) == 1:
            self.clock.at(self.ends.pop(0), self)

    def hear(self) -> Outcome:
        task = self.tasks[0]
        if self.ends:
            self.clock.at(self.ends.pop(0), self)
        record = record_of(task)
        store: Any = self.clock.store  # type: ignore[attr-defined]
        store.write(f"{task.folder}/{task.name}.json", record.to_json().encode())
        self.clock.tasks[task.stage] += 1
        outcome = self.heard(Outcome(task, record))
        assert outcome is not None
        return outcome

    def dismiss(self) -> None:
        """Nothing to unload."""

    def leave(self) -> None:
        """At once."""

    def kill(self) -> None:
        """Nothing to end."""

    def is_alive(self) -> bool:
        return False


def simulate(workers: int, shards: int, blocks: int, seed: int) -> dict[str, Any]:
    store, clock = Memory(), Clock(seed)
    clock.store = store  # type: ignore[attr-defined]
    Simulated.all.clear()
    columns: dict[str, Any] = {
        "shard": range(shards), "file": ["a.parquet"] * shards, "sha256": ["0" * 64] * shards,
        "stored": pa.nulls(shards, pa.string()), "start": [n * ROWS for n in range(shards)],
        "stop": [(n + 1) * ROWS for n in range(shards)], "file_rows": [shards * ROWS] * shards,
    }  # fmt: skip
    index = Index([pa.table(columns).cast(SLICES)])
    schedule = Schedule(Plan(recipe_of(Path("/none")), store, index), blocks_at_work=blocks)  # type: ignore[arg-type]
    needs = {stage.name: Resources(cpus=0.5, memory_gib=0.7) for stage in schedule.stages.values()}
    needs["re_caption"] = Resources(cpus=1, gpus=0.9)
    needs["score"] = Resources(cpus=1, gpus=0.08)
    most = {name: {"download": 16, "re_caption": GPUS, "score": 2}.get(name, 4) for name in needs}
    machine = Machine(CORES, tuple(map(str, range(GPUS))), 1000.0)
    start = partial(Simulated, clock)
    nodes = [Node(schedule, machine, needs, most, start, f"node {n}") for n in range(workers // GPUS)]
    begun = time.monotonic()
    for _ in Pool(schedule, nodes, clock.wait).carry_out():
        pass
    real_s = time.monotonic() - begun
    captioners = [worker for worker in Simulated.all if worker.name == "re_caption"]
    first = max(worker.spans[0][0] for worker in captioners)  # when the last of them has loaded
    last = max(worker.spans[-1][1] for worker in captioners)
    steady = sorted(end for worker in captioners for _, end in worker.spans)[-blocks * 1000 - 1]
    tasks = clock.tasks.total()
    return {
        "workers": workers, "shards": shards, "blocks_at_work": blocks,
        "simulated_days": round(last / 86400, 2),
        "gpu_waits_percent": round(waits(captioners, first, steady), 2),
        "gpu_waits_percent_with_both_ends": round(waits(captioners, 0.0, last), 2),
        "tasks": tasks, "tasks_per_s_of_the_scheduler": round(tasks / real_s),
        "tasks_per_s_needed": round(tasks / last, 2),
        "max_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }  # fmt: skip


def waits(captioners: list[Simulated], start: float, stop: float) -> float:
    busy = sum(
        max(0.0, min(end, stop) - max(begin, start)) for worker in captioners for begin, end in worker.spans
    )
    return 100 * (1 - busy / (len(captioners) * (stop - start)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 128, 1024])
    parser.add_argument("--shards", type=int, default=124_000)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 2, 8])
    parser.add_argument("--name", default="simulate")
    arguments = parser.parse_args()
    logging.disable()
    pairs = zip(arguments.workers, arguments.blocks, strict=False)
    seed = int(hashlib.sha256(b"simulate").hexdigest()[:8], 16)
    results = []
    for workers, blocks in pairs:
        results.append(simulate(workers, arguments.shards, blocks, seed))
        print(results[-1], flush=True)
    keep(arguments.name, {"seconds_of_a_shard": SECONDS, "load_s": LOAD_S, "results": results})


if __name__ == "__main__":
    main()
