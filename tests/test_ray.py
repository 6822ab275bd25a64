"""Workers on a Ray cluster: the same records as by processes here, whatever dies."""

from __future__ import annotations

import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CLIP
from s3 import S3, s3
from safetensors.numpy import load_file
from test_executors import Eager, Model, note

from builder.core import Recipe, Resources, Stage, Task, Work
from builder.errors import InputError
from builder.executors.local import local
from builder.files import write_parquet
from builder.run import Executor, Run, build
from builder.stages.latents import Latents
from builder.stages.source import Source
from builder.stages.textfeatures import TextFeatures

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


@pytest.mark.slow
def test_records_are_those_of_local(  # type: ignore[no-untyped-def]
    on_ray: Executor, server: S3, recipe_of, tmp_path: Path
) -> None:
    """Wherever the run is."""
    notes = str(tmp_path / "notes")
    stages = (
        Model(name="first", notes=notes, after_stage="source", share=0.0, seconds=0.02),
        Eager(notes=notes),
    )
    places = ((tmp_path / "local", local), (tmp_path / "ray", on_ray), (f"{server.bucket()}/run", on_ray))
    found = []
    for place, executor in places:
        result = build(recipe_of(*stages), place, executor=executor)
        assert result.failed == {}
        assert len(result.done) == 3 * ROWS
        found.append(outputs(place, ("source", "first", "eager")))
    assert all(one == found[0] for one in found)


@pytest.mark.slow
def test_what_a_dit_reads_is_made_on_ray_as_here(on_ray: Executor, demo_run: Path, tmp_path: Path) -> None:
    """Latents and features of texts, of a copy of the demo's run on each: their tables to the byte, and their
    numbers, in halves, nearly: convolutions sum as their number of threads wants it.
    """
    from test_latents import a_vae

    more = (Latents(model=str(a_vae(tmp_path / "vae")), px=32), TextFeatures(model=str(CLIP), context=50))
    found = []
    for name, executor in (("ray", on_ray), ("local", local)):
        shutil.copytree(demo_run, tmp_path / name)
        recipe = Run.open(tmp_path / name).recipe
        recipe = replace(recipe, stages=(*recipe.stages, *more))
        assert build(recipe, tmp_path / name, executor=executor).failed == {}
        found.append(outputs(tmp_path / name, ("latents", "text_features")))
    tensors = [name for name in found[0] if name.endswith(".safetensors")]
    assert len(tensors) > 2
    for name in found[0].keys() - tensors:
        assert found[0][name] == found[1].pop(name)
    assert sorted(found[1]) == sorted(tensors)
    for name in tensors:
        ours, theirs = (load_file(tmp_path / where / name) for where in ("ray", "local"))
        for tensor, values in ours.items():
            np.testing.assert_allclose(values, theirs[tensor], atol=4e-3)


def test_a_cluster_is_asked_for_the_gpus_that_workers_would_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two columns share an engine of 0.9 GPUs; two scorers share a GPU; a large model takes two."""
    import builder.executors.ray as on_cluster

    a, b, small, large = (
        Model(name=name, notes="", after_stage="source", workers=workers)
        for name, workers in (("a", "1-64"), ("b", "1-64"), ("small", 3), ("large", 4))
    )
    needs = {"a": 0.9, "b": 0.9, "small": 0.5, "large": 2.0}
    ready = {"a": 70, "b": 10, "small": 9, "large": 3}
    schedule = SimpleNamespace(
        stages={stage.name: stage for stage in (a, b, small, large)},
        sharing=lambda stage: (a, b) if stage in (a, b) else (stage,),
        num_ready=lambda stage: ready[stage.name],
        store=None,
    )
    asked: list[int] = []
    monkeypatch.setattr(on_cluster, "request_resources", lambda bundles: asked.append(len(bundles)))
    cluster = on_cluster._Cluster(schedule)  # type: ignore[arg-type]
    node = {"needs": {name: Resources(gpus=gpus) for name, gpus in needs.items()}, "workers": []}
    cluster.nodes.append(SimpleNamespace(**node))  # type: ignore[arg-type]
    cluster._ask_for_more()
    assert asked == [64 + 2 + 6]


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_cannot_be_opened_is_told_in_one_line(on_ray: Executor, recipe_of, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    stage = Broken(name="broken", notes=str(tmp_path / "notes"), after_stage="source", share=0.0)
    with pytest.raises(InputError, match="stage broken cannot start: OSError: no such model"):
        build(recipe_of(stage), tmp_path / "run", executor=on_ray)


def test_where_no_ray_is_that_is_told(recipe_of, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from builder.executors.ray import on_ray

    ray.shutdown()  # of the tests before
    with pytest.raises(InputError, match=r"there is no Ray at 127\.0\.0\.1:1"):
        build(recipe_of(), tmp_path / "run", executor=on_ray("127.0.0.1:1"))
