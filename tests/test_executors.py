"""Worker processes by cores, GPUs and memory: a loaded model stays as long as something is to come for it."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from builder import index
from builder.core import Json, Recipe, Resources, Stage, Task, Work
from builder.errors import InputError
from builder.executors import local as executor
from builder.executors.local import local
from builder.executors.pool import Node
from builder.files import write_parquet
from builder.machine import Machine, gpus
from builder.run import Result, Run, build
from builder.schedule import Outcome
from builder.stages.source import Source


@dataclass(frozen=True, kw_only=True)
class Model(Stage):
    """Notes when it is loaded, where, and what it does; `share` of a GPU, for as many workers as fit."""

    notes: str
    after_stage: str
    share: float = 1.0
    cpus: float = 0.1
    workers: int = 1
    gib: float = 0.0
    seconds: float = 0.0

    def reads(self) -> tuple[str, ...]:
        return (self.after_stage,)

    def num_workers(self) -> int:
        return self.workers

    def resources(self) -> Resources:
        return Resources(cpus=self.cpus, gpus=self.share, memory_gib=self.gib)

    @contextmanager
    def open(self) -> Iterator[Work]:
        note(self.notes, f"load {self.name} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}")

        def work(task: Task) -> Mapping[str, int]:
            note(
                self.notes,
                f"do {self.name} {task.name} {os.environ.get('CUDA_VISIBLE_DEVICES', '')} {os.getpid()}",
            )
            time.sleep(self.seconds)
            write_parquet(pa.table({"uid": [task.name]}), task.output())
            return {"ok": 1}

        yield work
        note(self.notes, f"left {self.name}")


@dataclass(frozen=True, kw_only=True)
class Slow(Model):
    """Takes its time to leave."""

    @contextmanager
    def open(self) -> Iterator[Work]:
        note(self.notes, f"load {self.name}")
        with super().open() as work:
            yield work
            time.sleep(1)


@dataclass(frozen=True, kw_only=True)
class Eager(Stage):
    """Takes the next task before it is done with one, and raises once, at shard 1."""

    ahead: ClassVar[bool] = True

    name: str = "eager"
    notes: str
    raises: bool = False

    def reads(self) -> tuple[str, ...]:
        return ("source",)

    @contextmanager
    def open(self) -> Iterator[Work]:
        yield EagerWork(self)


@dataclass(frozen=True, kw_only=True)
class Poisoned(Model):
    """Raises at shard 0, after the next one has been given ahead; what it does then is noted as poisoned."""

    ahead: ClassVar[bool] = True

    @contextmanager
    def open(self) -> Iterator[Work]:
        yield PoisonedWork(self)


class PoisonedWork:
    next_task: Callable[[], Task | None]

    def __init__(self, stage: Poisoned) -> None:
        self.stage, self.raised = stage, False

    def __call__(self, task: Task) -> Mapping[str, int]:
        note(self.stage.notes, f"do {task.name}{' poisoned' if self.raised else ''}")
        if task.name == "00000" and not Path(self.stage.notes + ".raised").exists():
            while self.next_task() is None:
                time.sleep(0.01)
            Path(self.stage.notes + ".raised").touch()
            self.raised = True
            raise ValueError("once")
        write_parquet(pa.table({"uid": [task.name]}), task.output())
        return {"ok": 1}


@dataclass(frozen=True, kw_only=True)
class Column(Model):
    """Shares its worker with others of its kind."""

    ahead: ClassVar[bool] = True

    def shares(self) -> Json:
        return "one model"

    @contextmanager
    def open_with(self, others: Sequence[Stage]) -> Iterator[Work]:
        yield ColumnWork({stage.name: stage for stage in (self, *others) if isinstance(stage, Column)})


class ColumnWork:
    next_task: Callable[[], Task | None]
    is_loaded: Callable[[bool], None]

    def __init__(self, stages: dict[str, Column]) -> None:
        self.stages = stages

    def __call__(self, task: Task) -> Mapping[str, int]:
        stage = self.stages[task.stage]
        note(stage.notes, f"do {stage.name} {task.name} {os.getpid()}")
        time.sleep(stage.seconds)
        self.next_task()
        if stage.name == "dies":
            self.is_loaded(False)
            os.kill(os.getpid(), signal.SIGKILL)
        write_parquet(pa.table({"uid": [task.name]}), task.output())
        return {"ok": 1}


class EagerWork:
    next_task: Callable[[], Task | None]

    def __init__(self, stage: Eager) -> None:
        self.stage = stage

    def __call__(self, task: Task) -> Mapping[str, int]:
        end = time.monotonic() + 5
        following = None
        while following is None and time.monotonic() < end and task.name != "00003":
            following = self.next_task()
            time.sleep(0.01)
        note(self.stage.notes, f"do {task.name} before {following.name if following else 'the end'}")
        if following:
            assert following.input("source").exists()
        if task.name == "00001" and self.stage.raises and not Path(self.stage.notes + ".raised").exists():
            Path(self.stage.notes + ".raised").touch()
            raise ValueError("once")
        write_parquet(pa.table({"uid": [task.name]}), task.output())
        return {"ok": 1}


def note(file: str, line: str) -> None:
    with open(file, "a") as notes:
        notes.write(line + "\n")


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    rows = 12
    uids = [f"{n:032x}" for n in range(rows)]
    pq.write_table(
        pa.table({"uid": uids, "url": ["http://h/"] * rows, "text": ["a"] * rows}), tmp_path / "in.parquet"
    )
    return tmp_path / "in.parquet"


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of four shards on a machine with one GPU and much of all else."""
    monkeypatch.setattr(index, "BLOCK", 4)
    monkeypatch.setattr(executor.Machine, "here", classmethod(lambda cls: Machine(16, ("0",), 64)))


def built(metadata: Path, *stages: Stage) -> Result:
    source = Source(files=str(metadata), rows_per_shard=1)
    result = build(Recipe("models", (source, *stages)), metadata.parent / "run", executor=local)
    assert result.failed == {}
    return result


def told(notes: Path) -> Counter[str]:
    return Counter(" ".join(line.split()[:2]) for line in notes.read_text().splitlines())


@pytest.mark.slow
@pytest.mark.usefixtures("one_gpu")
def test_a_loaded_model_is_changed_once_a_block(metadata: Path, tmp_path: Path) -> None:
    """Two models that each take the whole GPU, and three blocks: six loads for 24 tasks."""
    notes = str(tmp_path / "notes")
    first = Model(name="first", notes=notes, after_stage="source")
    built(metadata, first, Model(name="second", notes=notes, after_stage="first"))
    found = told(tmp_path / "notes")
    assert found["do first"] == found["do second"] == 12
    assert found["load first"] <= 3
    assert found["load second"] <= 3
    lines = [line.split()[:2] for line in (tmp_path / "notes").read_text().splitlines()]
    there: set[str] = set()
    for what, name in lines:  # they are never there at the same time
        there = there | {name} if what == "load" else there - {name} if what == "left" else there
        assert len(there) == 1 or what == "left"


@pytest.mark.slow
@pytest.mark.usefixtures("one_gpu")
def test_models_that_share_a_gpu_stay_both(metadata: Path, tmp_path: Path) -> None:
    notes = str(tmp_path / "notes")
    first = Model(name="first", notes=notes, after_stage="source", share=0.9)
    built(metadata, first, Model(name="second", notes=notes, after_stage="first", share=0.1))
    found = told(tmp_path / "notes")
    assert (found["load first"], found["load second"]) == (1, 1)
    assert "load first 0" in (tmp_path / "notes").read_text()


def test_every_gpu_gets_a_worker_of_its_own(
    metadata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor.Machine, "here", classmethod(lambda cls: Machine(16, ("3", "5"), 64)))
    notes = str(tmp_path / "notes")
    built(metadata, Model(name="first", notes=notes, after_stage="source", workers=2, seconds=0.3))
    loads = [line for line in (tmp_path / "notes").read_text().splitlines() if line.startswith("load")]
    assert sorted(loads) == ["load first 3", "load first 5"]


def test_columns_of_a_shard_meet_at_one_worker(
    metadata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There it is decoded once; at the end one that has nothing else to do may take another's."""
    monkeypatch.setattr(executor.Machine, "here", classmethod(lambda cls: Machine(16, ("0", "1"), 64)))
    about = {"notes": str(tmp_path / "notes"), "after_stage": "source", "workers": 2, "seconds": 0.1}
    built(metadata, *(Column(name=name, **about) for name in ("one", "two", "three")))  # type: ignore[arg-type]
    workers: dict[str, set[str]] = {}
    lines = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    for _, _, shard, worker in lines:
        workers.setdefault(shard, set()).add(worker)
    assert len(lines) == 36
    assert len(set().union(*workers.values())) == 2
    assert sum(len(did) == 1 for did in workers.values()) >= 10, workers


def test_a_worker_that_dies_of_loading_stops_the_run(metadata: Path, tmp_path: Path) -> None:
    """At the next shard it would load again."""
    about = {"notes": str(tmp_path / "notes"), "after_stage": "source", "share": 0.0}
    with pytest.raises(InputError, match=r"stage dies cannot start: .* killed by signal 9 \(out of memory"):
        built(metadata, Column(name="dies", **about))  # type: ignore[arg-type]
    assert told(tmp_path / "notes") == {"do dies": 1}


@pytest.mark.slow
def test_memory_is_shared_out_too(metadata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers of 5 GiB each do not fit in 8; one that wants more than there is is tried alone.

    Without a GPU both run all the same.
    """
    monkeypatch.setattr(executor.Machine, "here", classmethod(lambda cls: Machine(16, (), 8)))
    notes = str(tmp_path / "notes")
    first = Model(name="first", notes=notes, after_stage="source", workers=4, gib=5)
    built(metadata, first, Model(name="second", notes=notes, after_stage="first", gib=50))
    found = told(tmp_path / "notes")
    assert found["load first"] == 1
    assert found["do second"] == 12


@pytest.mark.slow
def test_a_worker_for_which_nothing_more_comes_leaves(
    metadata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor.Machine, "here", classmethod(lambda cls: Machine(16, (), 64)))
    notes = str(tmp_path / "notes")
    first = Model(name="first", notes=notes, after_stage="source")
    built(metadata, first, Model(name="second", notes=notes, after_stage="first", seconds=0.4))
    lines = (tmp_path / "notes").read_text().splitlines()
    last = max(n for n, line in enumerate(lines) if line.startswith("do second"))
    assert lines.index("left first") < last


def node_with(*working: float) -> Node:
    """Workers at work that take so many cores each, on two cores."""
    node = object.__new__(Node)
    node.machine, node.wanted = Machine(2, (), 64), 0.0
    node.needs = {str(cpus): Resources(cpus=cpus) for cpus in working}
    node.workers = [SimpleNamespace(name=str(c), tasks=[1]) for c in working]  # type: ignore[misc]
    return node


@pytest.mark.parametrize(
    ("working", "wanted", "cpus", "may"),
    [
        ((), 0.0, 8.0, True),  # whatever it takes, somebody works
        ((0.5,), 0.0, 1.5, True),
        ((0.5, 0.5), 0.0, 1.5, False),
        ((0.5, 0.5), 0.0, 0.5, True),
        ((0.5, 0.5), 1.5, 0.5, False),  # one more small task would keep the large one waiting
        ((1.5,), 1.0, 0.5, True),  # what waits for the large one does so with or without a small one
    ],
)
def test_many_small_tasks_do_not_keep_a_large_one_waiting(
    working: tuple[float, ...], wanted: float, cpus: float, may: bool
) -> None:
    """`wanted` are the cores that a deeper stage waits for."""
    node = node_with(*working)
    node.wanted = wanted
    assert node._has_cores(cpus) is may


def test_the_next_task_is_begun_before_one_is_done(metadata: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    four = Recipe("four", (Source(files=str(metadata), rows_per_shard=3), Eager(notes=str(notes))))
    assert build(four, tmp_path / "run", executor=local).failed == {}
    assert notes.read_text().splitlines() == [
        "do 00000 before 00001",
        "do 00001 before 00002",
        "do 00002 before 00003",
        "do 00003 before the end",
    ]


@pytest.mark.slow
def test_a_task_that_was_begun_ahead_is_not_charged_for_the_one_before(
    metadata: Path, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    stages = (Source(files=str(metadata), rows_per_shard=3), Eager(notes=str(notes), raises=True))
    assert build(Recipe("four", stages), tmp_path / "run", executor=local).failed == {}
    assert Run.open(tmp_path / "run").unfinished() == {}
    assert Counter(line.split()[1] for line in notes.read_text().splitlines()) == {
        "00000": 1, "00001": 2, "00002": 1, "00003": 1,
    }  # fmt: skip


@pytest.mark.slow
def test_a_worker_that_raised_does_not_begin_what_it_was_given_ahead(
    metadata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though whoever gave it hears of the exception late."""
    hear = executor._Process.hear

    def late(worker: executor._Process) -> Outcome | None:
        time.sleep(0.3 if worker.name == "poisoned" else 0)
        return hear(worker)

    monkeypatch.setattr(executor._Process, "hear", late)
    notes = tmp_path / "notes"
    built(metadata, Poisoned(name="poisoned", notes=str(notes), after_stage="source", share=0.0))
    assert "poisoned" not in notes.read_text()
    assert told(notes)["do 00000"] == 2


def test_what_is_begun_ahead_takes_no_cores_from_a_deeper_stage(
    metadata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two cores a captioner of 1.5 would else do all of its shards before the first one is scored."""
    monkeypatch.setattr(executor.Machine, "here", classmethod(lambda cls: Machine(2, (), 64)))
    notes = tmp_path / "notes"
    about = {"notes": str(notes), "share": 0.0}
    first = Poisoned(name="first", after_stage="source", cpus=1.5, **about)  # type: ignore[arg-type]
    (tmp_path / "notes.raised").touch()
    built(metadata, first, Model(name="second", after_stage="first", cpus=1.0, **about))  # type: ignore[arg-type]
    lines = [line for line in notes.read_text().splitlines() if line.startswith("do ")]
    assert lines.index(next(line for line in lines if "second" in line)) < 6


@pytest.mark.slow
@pytest.mark.usefixtures("one_gpu")
def test_a_worker_that_leaves_has_its_gpu_until_it_has_left(metadata: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    first = Slow(name="first", notes=str(notes), after_stage="source")
    between = Model(name="between", notes=str(notes), after_stage="first", share=0.0, seconds=0.1)
    built(metadata, first, between, Model(name="last", notes=str(notes), after_stage="between"))
    lines = [" ".join(line.split()[:2]) for line in notes.read_text().splitlines()]
    holds: set[str] = set()
    for line in lines:
        what, _, name = line.partition(" ")
        if name in ("first", "last") and what in ("load", "left"):
            (holds.add if what == "load" else holds.remove)(name)
            assert len(holds) <= 1, lines


@pytest.mark.usefixtures("one_gpu")
def test_what_no_machine_has_is_told_in_one_line(metadata: Path, tmp_path: Path) -> None:
    large = Model(name="large", notes=str(tmp_path / "notes"), after_stage="source", share=2.0)
    with pytest.raises(InputError, match=r"stage large needs 0.1 cores, 2 GPUs .*; this machine has 16, 1"):
        built(metadata, large)


def test_gpus_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, found in (("2,3", ("2", "3")), ("", ()), ("-1", ()), ("GPU-a1", ("GPU-a1",))):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        assert gpus() == found
