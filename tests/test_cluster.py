"""A build on a cluster whose nodes, workers and driver die: the records are those of one machine."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import mounted, recap, survived, web_of
from nodes import FAULTS, Driver, harm, nodes, wait_for_records
from test_ray import outputs

from builder.run import Run

pytest.importorskip("ray", reason="the extra recapkit[ray] is not installed")
pytestmark = pytest.mark.slow
KINDS = ("node", "worker", "driver")
ROWS = 24
RECIPE = """
from test_executors import Model
from builder.core import Recipe
from builder.stages.source import Source

def modelled(metadata: str, notes: str) -> Recipe:
    source = Source(files=metadata, rows_per_shard=1)
    first = Model(name="first", notes=notes, after_stage="source", share=0.0, seconds=0.3, workers=2)
    second = Model(name="second", notes=notes, after_stage="first", share=0.0, seconds=0.1)
    return Recipe("modelled", (source, first, second))
"""


def test_nodes_workers_and_driver_die_and_nothing_is_lost(tmp_path: Path) -> None:
    """One of each kind, in turn, while small shards are done on three nodes."""
    table = pa.table(
        {"uid": [f"{n:032x}" for n in range(ROWS)], "url": ["http://h/"] * ROWS, "text": ["a"] * ROWS}
    )
    pq.write_table(table, tmp_path / "in.parquet")
    (tmp_path / "recipe.py").write_text(RECIPE)
    recipe = (f"{tmp_path}/recipe.py:modelled", f"metadata={tmp_path}/in.parquet", f"notes={tmp_path}/notes")
    recap("build", *recipe, "--run", tmp_path / "local")
    from builder.executors.ray import on_every_node

    chance, run = random.Random(7), tmp_path / "run"
    with nodes(3) as cluster:
        driver = Driver("build", *recipe, "--run", run, "--on", cluster.address, log=tmp_path / "log")
        for kind in KINDS:
            wait_for_records(run, 6, driver)
            assert harm(kind, cluster, driver, chance), (tmp_path / "log").read_text()
        assert driver.end(200)["failed"] == {}
        for _, place in on_every_node(cluster.address, where_it_runs):  # in the code that it was sent
            assert place.startswith(cluster.home)
    names = ("source", "first", "second")
    assert outputs(run, names) == outputs(tmp_path / "local", names)
    assert {record.lease for _, record in Run.open(run).shards("second")} <= {1, 2}
    survived(f"a build on 3 nodes survived that were killed: {', '.join(KINDS)}")


def where_it_runs() -> str:
    import builder

    return str(builder.__file__)


def test_the_demo_on_a_cluster_publishes_the_same_whatever_dies(demo_run: Path, tmp_path: Path) -> None:
    """The real captioner and CLIP on three nodes; what is published is the demo's, byte for byte."""
    faults = Counter(faulty_demo(demo_run, tmp_path, list(FAULTS), seed=3))
    assert faults.total() >= 2  # the last may come too late
    recap("publish", tmp_path / "demo", tmp_path / "published", "--version", "0.1.0")
    manifests = (
        json.loads((folder / "v0.1.0" / "manifest.json").read_text())
        for folder in (tmp_path / "published", demo_run.with_name("demo-published"))
    )
    here, there = (manifest["files"] for manifest in manifests)
    assert here == there
    survived(f"the demo on 3 nodes survived {dict(faults)}")


def faulty_demo(demo_run: Path, folder: Path, faults: list[str], seed: int, **settings: object) -> list[str]:
    """The demo's run again on three nodes, in `folder`/demo, with these faults; those that happened."""
    chance, run, done = random.Random(seed), folder / "demo", []
    about = [f"{key}={value}" for key, value in settings.items()]
    with web_of(demo_run) as site, nodes(3, cpus=2) as cluster, mounted(folder / "disk", mib=64) as disk:
        driver = Driver(
            "build", "demo", f"web={site}", *about, "re_caption.workers=1-1", "download.workers=1",
            "score.workers=1", "--run", run, "--on", cluster.address, "--scratch", disk, log=folder / "log",
        )  # fmt: skip
        for kind in faults:
            wait_for_records(run, 1, driver)
            if harm(kind, cluster, driver, chance, disk):
                done.append(kind)
        assert driver.end(400)["failed"] == {}
    return done
