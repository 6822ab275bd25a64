"""What all tests share: no network but loopback, the real data if it is there, and one finished demo run."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yarl
from click.testing import CliRunner, Result
from filelock import FileLock

if TYPE_CHECKING:
    from builder.core import Stage

ROOT = Path(__file__).parent.parent
GUARD = Path(__file__).parent / "guard"
SHARED = ROOT.parent / "shared"
CAPTIONER = ROOT / "recipes" / "demo" / "weights" / "captioner"
CLIP = ROOT / "recipes" / "demo" / "weights" / "clip"

FULL = bool(os.environ.get("RECAP_FULL"))  # make test-slow: what is `slow`, more cases of what is `full`
SESSION = Path(os.environ.get("RECAP_TEST_SESSION") or tempfile.mkdtemp(prefix="recap-tests-"))
os.environ["RECAP_TEST_SESSION"] = str(SESSION)  # the workers of a session inherit it
_connections, _survived = SESSION / "connections", SESSION / "survived"
os.environ["RECAP_TEST_CONNECTIONS"] = str(_connections)
os.environ["PYTHONPATH"] = os.pathsep.join([str(GUARD), str(ROOT), str(ROOT / "tests")])
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault(
    "AWS_EC2_METADATA_DISABLED", "true"
)  # where no credentials are set, botocore asks a cloud's host
if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # the workers share the cores: threads of two engines would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("SOURCE_DATE_EPOCH", str(int(time.time())))  # one day for all builds of a session
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
_spec = importlib.util.spec_from_file_location("guard", GUARD / "sitecustomize.py")
assert _spec is not None and _spec.loader is not None  # noqa: PT018
_spec.loader.exec_module(importlib.util.module_from_spec(_spec))


def outlived(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that are at work still. Whoever has inherited one that has ended may take its time to reap it."""
    _, there = psutil.wait_procs(processes, timeout=5)
    found = []
    for process in there:
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def survived(line: str) -> None:
    """What a test of faults counted; printed at the end."""
    with open(_survived, "a") as file:
        file.write(line + "\n")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not FULL and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: make test-slow runs it"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _survived.exists():
        terminalreporter.write(_survived.read_text())


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):  # one of several workers: the session goes on
        return
    if _connections.exists():
        print(f"\nsomebody tried to leave this machine:\n{_connections.read_text()}")
        session.exitstatus = 1


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(SESSION, ignore_errors=True)


def recap(
    *arguments: object, cwd: Path = ROOT, check: int | None = 0, timeout_s: float = 400
) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would; `check` is the exit status that is expected."""
    done = subprocess.run(
        [sys.executable, "-m", "builder.cli", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert check is None or done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def recap_here(*arguments: object, check: int = 0) -> Result:
    """The same in this process: of what imports the training libraries, ten seconds of a core each time."""
    from builder.cli import main

    done = CliRunner().invoke(main, [*map(str, arguments)], prog_name="recap")
    assert done.exit_code == check, f"exit {done.exit_code}\n{done.output}\n{done.exception!r}"
    return done


def recap_if_full(*arguments: object, check: int = 0) -> subprocess.CompletedProcess[str] | Result:
    """A process of its own in make test-slow, in this one otherwise."""
    return recap(*arguments, check=check) if FULL else recap_here(*arguments, check=check)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real photos, captions and alt text; not part of the project."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the real data of ../shared/data is not here")
    return SHARED


@pytest.fixture(scope="session")
def demo_run() -> Path:
    """`recap demo` with 240 rows, once for all workers: a finished run, and next to it its version."""
    if os.environ.get("RECAP_TEST_RUN"):
        return Path(os.environ["RECAP_TEST_RUN"])
    run = SESSION / "demo" / "demo"
    with FileLock(SESSION / "demo.lock"):
        if not (run.parent / "stdout.txt").exists():
            done = recap("demo", "--rows", 240, "--port", 8651, "--no-train", "--run", run)
            (run.parent / "stdout.txt").write_text(done.stdout)
    return run


def with_stage(run: Path, place: Path, stage: Stage) -> Path:
    """A copy of a run, with one stage more, made in this process."""
    from builder.executors.work import in_this_process
    from builder.run import Run, build

    shutil.copytree(run, place)
    recipe = Run.open(place).recipe
    assert (
        build(replace(recipe, stages=(*recipe.stages, stage)), place, executor=in_this_process).failed == {}
    )
    return place


def output_of(run: Path, stage: str, suffix: str = ".parquet", number: int = 0) -> Path:
    """A file of a run: its stage's output `number`."""
    from builder.run import Run

    return run / Run.open(run).files(stage, suffix)[number]


def record_of(run: Path, stage: str, number: int = 0) -> Path:
    """The record of a task in the first block of a run."""
    return run / stage / "00000" / f"{number:05d}.json"


def a_version(
    folder: Path, data: pa.Table, ledger: pa.Table, captions: tuple[str, ...] = (), **about: str
) -> Path:
    """A published version as far as it is read: its rows, with null in the columns that `data` lacks, its
    ledger, recipe and manifest.
    """
    from builder.core import Recipe
    from builder.files import write_parquet
    from builder.stages.caption import Caption
    from builder.stages.select import LEDGER, Select, schemas

    made = tuple(Caption(model="no/model@0", name=name) for name in ("re_caption", *captions))
    recipe = Recipe("tiny", (*made, Select()), **about)
    whole = schemas(recipe)["data"]
    data = pa.table(
        {
            f.name: data[f.name].cast(f.type) if f.name in data.column_names else pa.nulls(len(data), f.type)
            for f in whole
        }
    )
    files = {}
    for kind, table in (("data", data), ("ledger", ledger.cast(LEDGER))):
        path = folder / kind / "train-00000-of-00001.parquet"
        path.parent.mkdir(parents=True)
        write_parquet(table, path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        files[str(path.relative_to(folder))] = {
            "sha256": sha256,
            "bytes": path.stat().st_size,
            "rows": table.num_rows,
        }
    (folder / "recipe.json").write_text(recipe.to_json())
    none = {"train": 0, "preview": 0, "ledger": 0}
    manifest = {"name": "tiny", "version": "1.2.3", "rows": none, "bytes": none, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@contextmanager
def web_of(run: Path) -> Iterator[Path]:
    """The small web that a demo run was built from, up again at its port; one test has it at a time."""
    from builder.run import Run
    from recipes.demo import web

    site = Path(Run.open(run).source.files).parent
    port = yarl.URL(pq.read_table(next((site / "metadata").glob("*.parquet")))["url"][0].as_py()).port
    assert port is not None
    with FileLock(SESSION / "web.lock"), web.serve(site, port):
        yield site


@contextmanager
def mounted(folder: Path, *, mib: int) -> Iterator[Path]:
    """A file system of `mib` MiB."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, kib_left: int) -> Path:
    """A file that takes all but `kib_left` of the disk."""
    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as full:
            if full.errno != errno.ENOSPC:
                raise
        file.truncate(max(file.tell() - kib_left * 1024, 0))
    return ballast
