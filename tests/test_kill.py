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
from conftest import ROOT, recap

from recipes.demo import web

KILLS, ROWS, PORT = 20, 160, 8652


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_kill_minus_nine_at_twenty_random_moments(tmp_path: Path) -> None:
    """Most kills come a random time after the start, every seventh right after a file of the run appeared, to be sure of progress."""
    rng = random.Random(os.environ.get("RECAP_KILL_SEED", "0"))
    site = tmp_path / "web"
    web.make(site, rows=ROWS, port=PORT)
    build = ["build", "demo", f"web={site}", "rows_per_shard=40", "download.timeout_s=2", "select.shards_per_file=4"]
    with web.serve(site, PORT):
        start = time.monotonic()
        recap(*build, "--run", tmp_path / "whole")
        seconds = time.monotonic() - start
        recap("publish", tmp_path / "whole", tmp_path / "whole-out", "--version", "1.0.0")
        run, killed = tmp_path / "killed", []
        command = [sys.executable, "-m", "builder.cli", *build, "--run", str(run)]
        for k in range(KILLS):
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if k % 7 == 6:
                _until_something_new(run, process, rng.randint(1, 3), seconds)
            else:
                time.sleep(rng.uniform(0.01, 0.12) * seconds)
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            killed.append(process.returncode == -signal.SIGKILL)
            _, alive = psutil.wait_procs(children, timeout=5)
            assert not alive, "a worker outlived its build"
        recap(*build, "--run", run)
        recap("publish", run, tmp_path / "killed-out", "--version", "1.0.0")
    assert sum(killed) >= KILLS // 2  # the others had nothing left to do
    for stage in ("source", "download", "dedup", "caption", "score", "select"):
        files = {name: sha for name, sha in tree(tmp_path / "whole" / stage).items() if name.endswith((".parquet", ".tar"))}
        assert {name: sha for name, sha in tree(run / stage).items() if name.endswith((".parquet", ".tar"))} == files, stage
    assert tree(tmp_path / "killed-out") == tree(tmp_path / "whole-out")


def _until_something_new(run: Path, process: subprocess.Popen[bytes], number: int, seconds: float) -> None:
    """Wait until that many files have appeared or gone in the run, or the build has ended."""

    def names() -> set[Path]:
        return set(run.rglob("*"))

    seen, end = names(), time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        if len(names() ^ seen) >= number:
            return
        time.sleep(0.005)
