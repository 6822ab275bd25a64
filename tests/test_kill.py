"""kill -9 at random moments of a build, the same command again: the bytes equal an uninterrupted run's."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, outlived, recap, survived, web_of

from builder.commit import records
from builder.core import Object
from builder.files import sha256_file
from builder.plan import line
from builder.run import Run, garbage
from builder.store import Folder

KILLS = 40


def tree(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def results(place: Path) -> dict[str, dict[str, str]]:
    """Stage or question -> object without the digits of its key -> sha256, of what the records name.

    The bytes that are there, which the records tell too.
    """
    run, found = Run.open(place), {}
    for stage in line(run.recipe):
        named: dict[str, str] = {}
        for block in run.store.folders(stage.name):
            for record in records(run.store, f"{stage.name}/{block}").values():
                for name, sha256 in record.outputs.items():
                    if "/run/early-" in name:
                        continue  # which were asked depends on timing
                    assert sha256_file(run.local(name)) == sha256, name
                    named[f"{block}: {Object.parse(name).plain()}"] = sha256
        found[stage.name] = named
    return found


def replies(place: Path) -> set[str]:
    """Keys of the replies that a run holds, in journals and in outputs."""
    store, found = Folder(place), set[str]()
    for block in store.folders("re_caption"):
        folder = f"re_caption/{block}"
        for name in store.names(folder):
            if name.endswith(".journal"):
                found |= {json.loads(line)["key"] for line in store.journaled(f"{folder}/{name}")}
            elif name.endswith(".parquet"):
                found |= {*pq.read_table(place / folder / name)["reply_key"].to_pylist()} - {None}
    return found


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_kill_minus_nine_at_random_moments(demo_run: Path, tmp_path: Path) -> None:
    """The demo again, over the same web: two runs at a time, for a build waits more than it computes."""
    seed = int(os.environ.get("RECAP_KILL_SEED", "0"))
    with web_of(demo_run) as site, ThreadPoolExecutor(2) as pool:
        lines = [pool.submit(_killed, demo_run, site, tmp_path / str(n), seed + n) for n in range(2)]
        runs, asked = (sum(numbers) for numbers in zip(*(line.result() for line in lines), strict=True))
    survived(f"{KILLS} kills of {runs} builds, {asked} captions asked for by those that were killed")


def _killed(demo_run: Path, site: Path, here: Path, seed: int) -> tuple[int, int]:
    """Half of the kills; some wait for records or captions, to be sure of progress.

    A run that is done is compared, and another one begun, until there were kills enough. Returns how many
    runs there were, and how many captions the killed builds asked for.
    """
    here.mkdir()
    rng, run, notes, out = random.Random(seed), here / "killed", here / "asked", here / "out"
    environment = os.environ | {"RECAP_TEST_ASKED": str(notes)}
    known: set[str] = set()  # replies that were journaled or committed when a build was killed
    kills = asked = runs = 0
    build = ["build", "demo", f"web={site}", "--run", run]
    command = [sys.executable, "-m", "builder.cli", *map(str, build)]
    while kills < KILLS // 2:
        notes.write_text("")
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )
        if kills % 8 == 3:
            _until_more(lambda: len(replies(run)), rng.randint(1, 50), process, 45)
        elif kills % 4 == 1:
            _until_more(lambda: len(glob(f"{run}/**/*.json", recursive=True)), rng.randint(1, 3), process, 20)
        else:
            time.sleep(rng.uniform(0.5, 8))
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        ended = process.wait()
        assert not outlived(children), "a worker outlived its build"
        of_this_build = notes.read_text().split()
        assert not known & set(of_this_build), "a reply that was journaled was asked for again"
        asked, known = asked + len(of_this_build), known | replies(run)
        if ended == -signal.SIGKILL:
            kills += 1
            continue
        assert ended == 0
        _same(demo_run, run)
        shutil.rmtree(run)
        known, runs = set(), runs + 1
    recap(*build)
    recap("publish", run, out, "--version", "0.1.0")
    _same(demo_run, run)
    assert tree(out / "v0.1.0") == tree(demo_run.with_name("demo-published") / "v0.1.0")
    return runs + 1, asked


def _same(whole: Path, run: Path) -> None:
    """All that the records of a run name has the bytes of a run that nobody killed; little else is there."""
    expected, found = results(whole), results(run)
    assert {*expected} > {
        "source",
        "download",
        "claimed",
        "dedup",
        "re_caption",
        "measured",
        "score",
        "select",
    }
    for stage, files in expected.items():
        assert files, stage
        assert found[stage] == files, stage
    hints = {name for name in garbage(run) if name.startswith("measured/run/early-")}
    assert set(garbage(run)) == hints  # a killed worker's objects have the names of those that came after it
    assert not [*run.rglob("*.journal"), *run.rglob("*.failed"), *run.glob(".scratch")]


def _until_more(
    count: Callable[[], int], more: int, process: subprocess.Popen[bytes], seconds: float
) -> None:
    """Wait until there are so many more, or the build has ended."""
    before, end = count(), time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end and count() < before + more:
        time.sleep(0.1)
