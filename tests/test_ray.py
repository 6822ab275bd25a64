"""Workers on a Ray cluster: the same records as by processes here, whatever dies."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3 import S3, s3
from test_executors import Eager, Model, note

from builder.core import Recipe, Stage, Task, Work
from builder.errors import InputError
from builder.executors.local import local
from builder.files import write_parquet
from builder.run import Executor, Run, build
from builder.stages.source import Source

ray = pytest.importorskip("ray", reason="the extra recapkit[ray] is not installed")
ROWS = 6


@dataclass(frozen=True, kw_only=True)
class Deadly(Model):
    """Kills its worker at shard 3, once or always."""

    always: bool = False

    @contextmanager
    def open(self) -> Iterator[Work]:
        def work(task: Task) -> Mapping[str, int]:
            note(self.notes, f"do {self.name} {task.name} {os.getpid()}")
            killed = Path(self.notes + ".killed")
            if task.name == "00003" and (self.always or not killed.exists()):
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            write_parquet(pa.table({"uid": [task.name]}), task.output())
            return {"ok": 1}

        yield work


@dataclass(frozen=True, kw_only=True)
class Broken(Model):
    @contextmanager
    def open(self) -> Iterator[Work]:
        raise OSError("no such model")
        yield


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3() as found:
        yield found


@pytest.fixture(scope="module")
def on_ray(server: S3) -> Iterator[Executor]:  # after it: its workers know the keys
    """One Ray for all, as `--on ray` starts it."""
    from builder.executors.ray import connected, on_ray

    with connected("ray"):
        yield on_ray("ray")


@pytest.fixture
def recipe_of(tmp_path: Path) -> object:
    table = pa.table(
        {"uid": [f"{n:032x}" for n in range(ROWS)], "url": ["http://h/"] * ROWS, "text": ["a"] * ROWS}
    )
    pq.write_table(table, tmp_path / "in.parquet")

    def recipe(*stages: Stage) -> Recipe:
        return Recipe("models", (Source(files=str(tmp_path / "in.parquet"), rows_per_shard=1), *stages))

    return recipe


def outputs(place: str | Path, stages: tuple[str, ...]) -> dict[str, str]:
    run = Run.open(place)
    return {
        name: digest
        for stage in stages
        for _, record in run.shards(stage)
        for name, digest in record.outputs.items()
    }


def test_records_are_those_of_local(  # type: ignore[no-untyped-def]
    on_ray: Executor, server: S3, recipe_of, tmp_path: Path
) -> None:
    """Wherever the run is."""
    notes = str(tmp_path / "notes")
    stages = (
        Model(name="first", notes=notes, after_stage="source", share=0.0, seconds=0.02),
        Eager(notes=notes),
    )
    on_s3 = f"{server.bucket()}/run"
    for place, executor in ((tmp_path / "local", local), (tmp_path / "ray", on_ray), (on_s3, on_ray)):
        result = build(recipe_of(*stages), place, executor=executor)
        assert result.failed == {}
        assert len(result.done) == 3 * ROWS
    names = ("source", "first", "eager")
    assert outputs(tmp_path / "ray", names) == outputs(tmp_path / "local", names) == outputs(on_s3, names)


SLOW = pytest.mark.skipif(not os.environ.get("RECAP_FULL"), reason="a minute; make test-slow runs it")


@SLOW
@pytest.mark.parametrize("always", [False, True])
def test_a_worker_that_dies_costs_its_shard_an_attempt(
    on_ray: Executor,
    recipe_of,
    tmp_path: Path,
    always: bool,  # type: ignore[no-untyped-def]
) -> None:
    notes = tmp_path / "notes"
    stage = Deadly(name="deadly", notes=str(notes), after_stage="source", share=0.0, always=always)
    result = build(recipe_of(stage), tmp_path / "run", executor=on_ray)
    did = Counter(line.split()[2] for line in notes.read_text().splitlines())
    assert {name for name, times in did.items() if times > 1} == {"00003"}
    assert did["00003"] == (3 if always else 2)
    if always:
        assert list(result.failed) == ["deadly/00003"]
        assert "a worker process died" in result.failed["deadly/00003"]
    assert len(result.done) == 2 * ROWS - always


def test_what_cannot_be_opened_is_told_in_one_line(on_ray: Executor, recipe_of, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    stage = Broken(name="broken", notes=str(tmp_path / "notes"), after_stage="source", share=0.0)
    with pytest.raises(InputError, match="stage broken cannot start: OSError: no such model"):
        build(recipe_of(stage), tmp_path / "run", executor=on_ray)


def test_where_no_ray_is_that_is_told(recipe_of, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from builder.executors.ray import on_ray

    ray.shutdown()  # of the tests before
    with pytest.raises(InputError, match=r"there is no Ray at 127\.0\.0\.1:1"):
        build(recipe_of(), tmp_path / "run", executor=on_ray("127.0.0.1:1"))
