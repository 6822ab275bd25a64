"""What docs/cluster.md tells to type, as far as it can be typed here."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT
from nodes import wait_for_records
from test_cluster import RECIPE

from builder.core import Recipe
from builder.forecast import forecast
from builder.resolve import resolve
from builder.run import Run

CLUSTER = ROOT / "docs" / "cluster"
TEXT = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
MODEL = "user/model@0123abc"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return resolve("recap_datacomp_1b", ["metadata=x.parquet", f"captioner={MODEL}", f"clip={MODEL}"])


def test_the_table_of_what_it_takes_is_the_formulas(recipe: Recipe) -> None:
    rows = re.findall(r"^\| (\d[\d,]+) \|" + r" (.*?) \|" * 6 + "$", TEXT, re.M)
    assert len(rows) == 3
    for urls, gpus, hours, gpu_hours, cost, images, dropped in rows:
        number = int(gpus)
        told = forecast(
            recipe, [], rows=int(urls.replace(",", "")), rates={}, price=2.0,
            workers={"re_caption": number, "download": 8 * number, "score": max(1, number // 8)},
        )  # fmt: skip
        found = (f"{told.hours:.1f}", f"{told.gpu_hours:,.0f}", f"{told.cost:,.0f}")
        assert found == (hours, gpu_hours, cost)
        assert [_size(told.images_gib), _size(told.images_gib_dropped)] == [images, dropped]


def _size(gib: float) -> str:
    return f"{gib:.0f} GiB" if gib < 500 else f"{gib / 1024:.1f} TiB"


def test_ray_up_takes_the_yaml() -> None:
    """By Ray's own schema, with its defaults filled in."""
    util = pytest.importorskip("ray.autoscaler._private.util")
    util.validate_config(util.prepare_config(yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())))


def test_the_job_of_kuberay_has_what_a_rayjob_has() -> None:
    job = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["entrypoint"].startswith("recap build recap_datacomp_1b ")
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        names = {mount["name"] for mount in container["volumeMounts"]}
        assert names <= {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"]


SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
case "$1" in
    show) hostname ;;
    requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""


@pytest.mark.slow
def test_the_job_of_slurm_queues_itself_again_and_goes_on(tmp_path: Path) -> None:
    """With stand-ins for srun and scontrol; Ray and the build are real."""
    pytest.importorskip("ray")
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    rows = 60
    table = pa.table(
        {"uid": [f"{n:032x}" for n in range(rows)], "url": ["http://h/"] * rows, "text": ["a"] * rows}
    )
    pq.write_table(table, tmp_path / "in.parquet")
    (tmp_path / "recipe.py").write_text(RECIPE)
    (tmp_path / "home").mkdir()
    environment = os.environ | {
        "PATH": f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": "77", "REQUEUED": f"{tmp_path}/requeued",
        "HOME": str(tmp_path / "home"), "RAY_TMPDIR": "/tmp",
    }  # fmt: skip
    command = [
        "bash", str(CLUSTER / "recap.sbatch"), "build", f"{tmp_path}/recipe.py:modelled",
        f"metadata={tmp_path}/in.parquet", f"notes={tmp_path}/notes", "--run", f"{tmp_path}/run",
    ]  # fmt: skip

    def submit() -> subprocess.Popen[bytes]:
        with open(tmp_path / "log", "ab") as log:
            return subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, cwd=ROOT, start_new_session=True
            )

    class Job:
        process = submit()

    wait_for_records(tmp_path / "run", 70, Job)  # type: ignore[arg-type]  # only whether it has ended is asked
    try:
        os.kill(Job.process.pid, signal.SIGUSR1)
        assert Job.process.wait(60) == 0, (tmp_path / "log").read_text()
        assert (tmp_path / "requeued").read_text() == "77\n"
        assert Run.open(tmp_path / "run").unfinished()
        os.killpg(Job.process.pid, signal.SIGKILL)  # as Slurm ends all that a job has left
        time.sleep(1)
        again = submit()
        assert again.wait(200) == 0, (tmp_path / "log").read_text()
        assert Run.open(tmp_path / "run").unfinished() == {}
    finally:
        for process in (Job.process, again):
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
