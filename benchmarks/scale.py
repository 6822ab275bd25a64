"""What the core costs at the paper's scale: a run of N finished shards, made of records alone.

plan, status and the decision of a build that there is nothing to do, at 1,000, 10,000 and 124,000 shards
(1.24 billion rows) of six stages, from compacted blocks, with the last thousand shards not compacted yet:
seconds and resident memory of a process of its own each. Then the core's own cost of a task, in a run of 10
shards and in one of 100,000.

    python benchmarks/scale.py [--shards 1000 10000 124000]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from common import keep

from builder.commit import COMPACTED, put_record
from builder.core import RUN, Question, Recipe, Record, Stage, Task
from builder.executors.work import in_this_process
from builder.files import sha256_file, write_parquet
from builder.index import BLOCK, SLICES, Index
from builder.plan import BlockPlan, Plan, questions
from builder.run import RECIPE, Run, build
from builder.schedule import Schedule
from builder.status import estimate, status
from builder.store import Folder
from recipes.datasets import recap_datacomp_1b

ROWS = 10_000  # of a shard


def recipe_of(place: Path) -> Recipe:
    model = "user/model@0123abc"
    return recap_datacomp_1b(metadata=str(place / "metadata"), captioner=model, clip=model)


def make(place: Path, shards: int) -> None:
    """A run in which all is done, in the folder RUN of `place`."""
    (place / "metadata").mkdir(parents=True)
    pq.write_table(
        pa.table({"uid": ["0" * 32], "url": ["http://h/"], "text": ["a"]}), place / "metadata" / "a.parquet"
    )
    store, recipe = Folder(place / "run"), recipe_of(place)
    store.write(RECIPE, recipe.to_json().encode())
    sha256 = sha256_file(place / "metadata" / "a.parquet")
    number = pa.array(range(shards))
    columns: dict[str, Any] = {
        "shard": number, "file": ["a.parquet"] * shards, "sha256": [sha256] * shards,
        "stored": pa.nulls(shards, pa.string()), "start": [n * ROWS for n in range(shards)],
        "stop": [(n + 1) * ROWS for n in range(shards)], "file_rows": [shards * ROWS] * shards,
    }  # fmt: skip
    table = pa.table(columns).cast(SLICES)
    source = Run(store, recipe).source
    slices = store.scratch() / "slices"
    write_parquet(table, slices)
    name = f"source/{RUN}/00000.00000000.parquet"
    about = {"outputs": {name: sha256_file(slices)}, "bytes": {name: slices.stat().st_size}}
    store.put(slices, name)
    settings, outside = source.index_settings(), {"a.parquet": sha256}
    put_record(store, f"source/{RUN}", "00000", Record("batch", settings=settings, outside=outside, **about))
    index = Index([table])
    plan = Plan(recipe, store, index)
    for question in questions(recipe):  # answers first: their bytes are what the others depend on
        plan.answers[question.name, 0] = record_of(plan.task(question, RUN, "00000", {}))
    for block in index.blocks:
        made = _Made(plan, block)
        last = block is index.blocks[-1] and shards > BLOCK
        for stage in plan.line:
            folder = f"{stage.name}/{block.name}"
            found = made.make(stage)
            if last or isinstance(stage, Question):
                for task, record in found.items():
                    put_record(store, folder, task, record)
                    for output, size in record.bytes.items():
                        (store.root / output).touch()
                        with open(store.root / output, "r+b") as file:
                            file.truncate(size)
            else:
                records = {"name": list(found), "record": [record.to_json() for record in found.values()]}
                (store.root / folder).mkdir(parents=True)
                write_parquet(pa.table(records), store.root / folder / COMPACTED)
    for question in questions(recipe):
        parts = plan.parts(question, 0)
        assert parts is not None
        answer = plan.answers[question.name, 0]
        key = plan.answer_task(question, 0, parts).key
        put_record(
            store, f"{question.name}/{RUN}", "00000", Record(key, outputs=answer.outputs, bytes=answer.bytes)
        )


def record_of(task: Task) -> Record:
    """As a stage would have left it."""
    ends = {"download": (".parquet", ".tar"), "select": (".parquet", ".ledger.parquet")}.get(
        task.stage, (".parquet",)
    )
    outputs = {task.object(end): hashlib.sha256(f"{task.key}{end}".encode()).hexdigest() for end in ends}
    sizes = dict.fromkeys(outputs, 1_000_000)
    rows = {"ok": 7_500, "dead_link": 1_500, "timeout": 500, "hash_mismatch": 500}
    versions = {
        "recapkit": "0.1.0",
        "pyarrow": "26.0.1",
        "vllm": "0.32.0",
        "torch": "2.13.0",
        "transformers": "5.19.0",
    }
    return Record(
        task.key,
        dict(task.inputs),
        outputs,
        sizes,
        rows,
        300.0,
        versions,
        "2026-11-26",
        task.settings,
        task.outside,
    )


class _Made(BlockPlan):
    """A block whose tasks are done as soon as they are planned."""

    def make(self, stage: Stage) -> Mapping[str, Record]:
        found = self.stages[stage.name]
        names = self.names(stage)
        for name in names:
            task = self.task(stage, name)
            assert task is not None
            found.done[name] = record_of(task)
        return {name: found.done[name] for name in names}


def ask(what: str, place: Path) -> dict[str, float]:
    """In this process: seconds, and MiB resident at the most."""
    start = time.perf_counter()
    if what == "plan":
        assert all(row["shards_left"] == 0 for row in estimate(recipe_of(place), place / "run"))
    elif what == "status":
        assert all(row["shards_left"] == 0 for row in status(Run.open(place / "run")))
    else:
        assert build(recipe_of(place), place / "run").done == []
    seconds = time.perf_counter() - start
    return {
        "seconds": round(seconds, 2),
        "mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


@dataclass(frozen=True, kw_only=True)
class Nothing(Stage):
    """Does nothing, to see what is left."""

    name: str = "nothing"

    def reads(self) -> tuple[str, ...]:
        return ("score.parquet",)

    @contextmanager
    def open(self) -> Any:
        def work(task: Task) -> Mapping[str, int]:
            task.output().touch()
            return {"ok": 1}

        yield work


def of_a_task(place: Path, shards: int, tasks: int = 500) -> float:
    """Milliseconds that planning, committing and following up one task takes, besides opening its block."""
    recipe = recipe_of(place)
    recipe = Recipe(recipe.name, (*recipe.stages, Nothing()))
    run = Run(Folder(place / "run"), recipe)
    for name in islice(run.files("score"), tasks):
        run.local(name).touch()  # what the tasks read
    schedule = Schedule(run.plan())
    times, done = [], in_this_process(schedule)
    for _ in range(min(tasks, shards)):
        start = time.perf_counter()
        assert next(done).record
        times.append(time.perf_counter() - start)
    times = times[1:]  # the first one opens the block
    return round(1000 * sorted(times)[len(times) // 2], 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shards", type=int, nargs="*", default=[1_000, 10_000, 124_000])
    parser.add_argument("--ask", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.ask:
        print(json.dumps(ask(given.ask[0], Path(given.ask[1]))))
        return
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="recap-scale-") as folder:
        for shards in given.shards:
            place = Path(folder, str(shards))
            start = time.perf_counter()
            make(place, shards)
            print(f"{shards:,} shards made in {time.perf_counter() - start:.0f} s", file=sys.stderr)
            entries = max(len(list(path.iterdir())) for path in (place / "run").rglob("*") if path.is_dir())
            found: dict[str, Any] = {"largest_folder_entries": entries}
            for what in ("plan", "status", "resume"):
                command = [sys.executable, __file__, "--ask", what, str(place)]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
                found[what] = json.loads(done.stdout)
            found["task_ms"] = of_a_task(place, shards)
            result[f"{shards}_shards"] = found
            print(shards, found, file=sys.stderr)
    keep("scale", result)


if __name__ == "__main__":
    main()
