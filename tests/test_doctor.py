"""`recap doctor` and `recap plan --rows`: what a user asks before a long build."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_s3
from conftest import ROOT, recap, recap_here
from s3 import S3, s3

from builder.core import Recipe
from builder.doctor import examine
from builder.executors.work import in_this_process
from builder.forecast import forecast
from builder.run import build
from builder.stages.caption import Caption
from builder.stages.download import Download
from builder.stages.source import Source
from builder.store import store_of

recipe = test_s3.recipe


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3() as found:
        yield found


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_place_that_is_fit(kind: str, server: S3, tmp_path: Path, recipe: Recipe) -> None:
    place = str(tmp_path / "run") if kind == "folder" else f"{server.bucket()}/run"
    build(recipe, place, executor=in_this_process)
    found = {finding.what: finding for finding in examine(place, executor=in_this_process)}
    wrong = [finding for finding in found.values() if not finding.ok and finding.what != "this machine"]
    assert wrong == []
    assert "MiB/s there" in found["storage: a large object"].told
    assert "models loaded" in found["one shard end to end"].told
    stale = "storage: a stale condition is refused"
    assert (stale in found) == (kind == "s3")
    if kind == "folder":
        assert not list((tmp_path / "run").glob(".doctor*"))
    else:
        assert store_of(place).filesystem.find(f"{place}/.doctor-*", withdirs=True) == []  # type: ignore[union-attr]
        assert any("/.doctor-" in line for line in server.requests)


def test_a_server_that_knows_no_conditions_is_told_of(server: S3) -> None:
    server.drops = ("If-None-Match", "If-Match")
    try:
        found = {finding.what: finding for finding in examine(f"{server.bucket()}/run")}
    finally:
        server.drops = ()
    create = found["storage: of two that create an object one is refused"]
    assert (create.ok, create.told) == (False, "two builds are the user's to keep apart: --single-driver")
    assert not found["storage: a stale condition is refused"].ok


def test_a_clock_an_hour_off_is_told_of(server: S3) -> None:
    """By what storage says of an object, and where S3 refuses the request for it."""
    code = (
        "import sys, time; import builder.doctor as doctor; real = time.time\n"
        "doctor.time = type('T', (), {'time': staticmethod(lambda: real() + 3600),"
        " 'monotonic': staticmethod(time.monotonic)})\n"
        "print([f for f in doctor.examine(sys.argv[1]) if f.what == 'clock'])"
    )
    place = f"{server.bucket()}/run"
    done = subprocess.run([sys.executable, "-c", code, place], capture_output=True, text=True, cwd=ROOT)
    assert "ok=False" in done.stdout, done.stderr
    assert "differ by -3600 s" in done.stdout or "differ by -3601 s" in done.stdout
    server.fault = lambda method, *_: (403, "RequestTimeTooSkewed")
    try:
        (only,) = examine(place)
    finally:
        server.fault = lambda *_: None
    assert "set this machine's clock" in only.told


def test_the_command_tells_and_ends_with_1_where_something_is_wrong(tmp_path: Path) -> None:
    done = recap("doctor", tmp_path / "run", check=None)
    lines = done.stdout.splitlines()
    assert "ok    storage: what is deleted is gone" in lines
    assert done.returncode == any(line.startswith("WRONG") for line in lines)


def test_what_a_build_would_take_is_told_with_its_formula() -> None:
    """The paper's billion: hours are rows over rates, money is GPU hours times their price."""
    model = "user/model@0123abc"
    big = Recipe("big", (Source(files="x"), Download(), Caption(model=model)))
    told = forecast(
        big, [], rows=1_240_000_000, rates={"re_caption": 45.0}, price=2.5,
        workers={"re_caption": 64, "download": 640},
    )  # fmt: skip
    (_, download, caption) = told.lines
    assert caption.hours == pytest.approx(1_240_000_000 * 0.75 / (45 * 64) / 3600)
    assert download.hours == pytest.approx(1_240_000_000 / (84 * 640) / 3600)
    assert (told.slowest, told.hours, told.gpus) == ("re_caption", caption.hours, 64)
    assert told.cost == pytest.approx(caption.hours * 64 * 2.5)
    assert told.images_gib_dropped < told.images_gib / 50


def test_columns_of_one_model_take_turns_on_their_gpus() -> None:
    both = (
        Caption(model="user/model@0123abc", tensor_parallel_size=4, name=name, prompt=prompt)
        for name, prompt in (("long", "What is there?"), ("short", "In a word?"))
    )
    told = forecast(
        Recipe("two", (Source(files="x"), Download(), *both)), [], rows=1_000_000,
        rates={"long": 10.0, "short": 40.0, "download": 1e6}, workers={"long": 2, "short": 2},
    )  # fmt: skip
    assert told.slowest == "long and short"
    assert told.gpus == 8
    assert told.hours == pytest.approx(750_000 / 20 / 3600 + 750_000 / 80 / 3600)


def test_the_plan_of_a_size_is_measured_on_what_is_done(demo_run: Path) -> None:
    asked = ("plan", f"{demo_run}/recipe.json", "--run", demo_run, "--rows", 1_000_000)
    told = json.loads(recap_here(*asked, "--json").stdout)
    assert all(line["source"].startswith("measured on ") for line in told["lines"])
    assert told["tables_gib"] > 0
    said = recap_here(*asked, "--workers", "re_caption=8", "--price", 2).stdout
    assert "hours = rows / (rows/s of a worker * workers) / 3600" in said
    assert " GPU hours, " in said
    done = recap_here(*asked, "--rate", "nothing=5", check=2)
    assert "the recipe has no stage 'nothing'" in done.stderr
    assert "is no number" in recap_here(*asked, "--rate", "download=fast", check=2).stderr


def test_status_is_watched_until_nothing_is_left(demo_run: Path) -> None:
    assert "select" in recap("status", demo_run, "--watch", timeout_s=60).stdout
