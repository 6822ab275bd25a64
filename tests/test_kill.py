"""kill -9 at random moments of a build, the same command again: the published bytes equal an uninterrupted run's."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from conftest import ROOT, recap, web_of

KILLS = 20 if os.environ.get("RECAP_FULL") else 2


def tree(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_kill_minus_nine_at_random_moments(demo_run: Path, tmp_path: Path) -> None:
    """The demo again, over the same web. Every second kill waits for a file of the run to appear, to be sure of progress."""
    rng = random.Random(os.environ.get("RECAP_KILL_SEED", "0"))
    run, killed = tmp_path / "killed", []
    with web_of(demo_run) as site:
        build = ["build", "demo", f"web={site}", "--run", run]
        command = [sys.executable, "-m", "builder.cli", *map(str, build)]
        for k in range(KILLS):
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            if k % 2 == 1:
                _until_something_new(run, process, rng.randint(1, 3), seconds=40)
            else:
                time.sleep(rng.uniform(0.5, 6))
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            killed.append(process.returncode == -signal.SIGKILL)
            _, alive = psutil.wait_procs(children, timeout=5)
            assert not alive, "a worker outlived its build"
        recap(*build)
        recap("publish", run, tmp_path / "out", "--version", "0.1.0")
    assert sum(killed) >= KILLS // 2  # the others had nothing left to do
    for stage in ("source", "download", "dedup", "caption", "score", "select"):
        files = {
            name: sha for name, sha in tree(demo_run / stage).items() if name.endswith((".parquet", ".tar"))
        }
        assert {
            name: sha for name, sha in tree(run / stage).items() if name.endswith((".parquet", ".tar"))
        } == files, stage
    assert tree(tmp_path / "out" / "v0.1.0") == tree(demo_run.with_name("demo-published") / "v0.1.0")


def _until_something_new(run: Path, process: subprocess.Popen[bytes], number: int, seconds: float) -> None:
    """Wait until that many files have appeared or gone in the run, or the build has ended."""

    def names() -> set[Path]:
        return set(run.rglob("*"))

    seen, end = names(), time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        if len(names() ^ seen) >= number:
            return
        time.sleep(0.005)
