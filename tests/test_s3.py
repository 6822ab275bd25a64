"""A run on S3 is as one in a folder: every command, the same published bytes, whatever the network does."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import recap, survived, web_of
from s3 import S3, s3
from test_ray import outputs
from test_store import Count

from builder.core import Recipe
from builder.errors import InputError
from builder.executors.work import in_this_process
from builder.run import build
from builder.stages.source import Source


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3() as found:
        yield found


def faulty(server: S3, share: float) -> None:
    """Of all requests a share is answered with 503, or cut off in the middle."""
    chance, seen = random.Random(412), {"503": 0, "cut": 0}

    def fault(method: str, *_: object) -> tuple[int, str] | str | None:
        if chance.random() > share:
            return None
        kind = chance.choice(["503", "cut"] if method in ("GET", "PUT") else ["503"])
        seen[kind] += 1
        return "cut" if kind == "cut" else (503, "SlowDown")

    server.fault, server.seen = fault, seen  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def run(server: S3, demo_run: Path) -> str:
    """The demo's run again, on an S3 of which one request in 20 fails."""
    place = f"{server.bucket()}/some/demo"
    faulty(server, 0.05)
    try:
        with web_of(demo_run) as site:
            done = recap("build", "demo", f"web={site}", "--run", place, "--json")
    finally:
        server.fault = lambda *_: None
    seen = server.seen  # type: ignore[attr-defined]
    survived(f"a build on S3 survived {seen['503']} answers of 503 and {seen['cut']} cut off")
    assert json.loads(done.stdout)["failed"] == {}
    assert min(seen.values()) > 2
    return place


@pytest.mark.slow
def test_the_same_is_published(run: str, demo_run: Path, tmp_path: Path) -> None:
    recap("publish", run, tmp_path / "published", "--version", "0.1.0")
    here, there = (
        folder / "v0.1.0" for folder in (tmp_path / "published", demo_run.parent / "demo-published")
    )
    names = {str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()}
    assert names == {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()}
    assert [name for name in sorted(names) if (here / name).read_bytes() != (there / name).read_bytes()] == []
    assert "is there already" in recap("publish", run, tmp_path / "published", "--version", "0.1.0").stdout


@pytest.mark.slow
def test_it_is_looked_at_as_a_folder(run: str, demo_run: Path, tmp_path: Path) -> None:
    of_time = re.compile(r'"(rows_per_s|eta_s)": [^,\n]*')
    status = [of_time.sub("", recap("status", place, "--json").stdout) for place in (run, demo_run)]
    assert status[0] == status[1]
    for command in (("stats", "--json"), ("sql", "from published order by uid limit 3", "--json")):
        found = [json.loads(recap(command[0], place, *command[1:]).stdout) for place in (run, demo_run)]
        assert found[0] == found[1]
    recap("explore", run, "--out", tmp_path / "page")
    assert list((tmp_path / "page" / "thumbs").rglob("*.jpg"))
    assert recap("card", run).stdout.strip() == f"{run}/card/README.md"
    assert recap("gc", run).stdout == "there is nothing to delete\n"
    (row, *_) = json.loads(recap("plan", f"{run}/recipe.json", "--run", run, "--json").stdout)
    assert row["shards_left"] == 0


@pytest.mark.slow
def test_rows_are_downloaded_again(run: str, demo_run: Path) -> None:
    with web_of(demo_run):
        done = recap("retry", run, "--status", "dead_link", "--json")
        assert json.loads(done.stdout)["failed"] == {}
        again = recap("build", f"{run}/recipe.json", "--run", run, "--json")
    assert json.loads(again.stdout)["failed"] == {}


@pytest.mark.slow
def test_a_second_build_does_nothing(run: str) -> None:
    done = recap("build", f"{run}/recipe.json", "--run", run, "--json")
    assert json.loads(done.stdout)["done"] == 0


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    table = pa.table({"uid": [f"{n:032x}" for n in range(8)], "url": ["http://h/"] * 8, "text": ["a"] * 8})
    pq.write_table(table, tmp_path / "in.parquet")
    asleep = tmp_path / "asleep"
    asleep.touch()
    source = Source(files=str(tmp_path / "in.parquet"), rows_per_shard=1)
    return Recipe("counted", (source, Count(asleep=str(asleep))))


def test_credentials_that_expire_end_the_build_in_one_line_and_lose_nothing(
    server: S3, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, puts = f"{server.bucket()}/run", [0]

    def expired(method: str, path: str, _: object) -> tuple[int, str] | None:
        puts[0] += method == "PUT" and "/count/" in path
        return (400, "ExpiredToken") if puts[0] > 7 else None

    server.fault = expired
    try:
        with pytest.raises(InputError, match=r"refuses: ExpiredToken.*\n  see that the credentials"):
            build(recipe, place, executor=in_this_process)
    finally:
        server.fault = lambda *_: None
    monkeypatch.setattr("builder.lease.Holder.is_gone", lambda self: True)  # as its process would be
    result = build(recipe, place, executor=in_this_process)
    assert result.failed == {}
    assert sum(name.startswith("count/") for name in result.done) == 5  # of eight
    build(recipe, tmp_path / "run", executor=in_this_process)
    assert outputs(place, ("count",)).keys() == outputs(tmp_path / "run", ("count",)).keys()


def test_nothing_is_renamed_or_appended_and_the_record_comes_last(server: S3, recipe: Recipe) -> None:
    server.requests.clear()
    build(recipe, f"{server.bucket()}/run", executor=in_this_process)
    puts = [line.partition("/run/")[2] for line in server.requests if line.startswith("PUT ")]
    of_shard = [name for name in puts if name.startswith("count/00000/00003")]
    assert [name.rpartition(".")[2] for name in of_shard] == ["parquet", "json"]
    assert not any("copy" in line.lower() for line in server.requests)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("s3://no-such-bucket-at-all/run", "The specified bucket does not exist\n  create the bucket first"),
        ("nonsense://bucket/run", "cannot be used: Protocol not known: nonsense"),
    ],
)
def test_a_place_that_is_none_is_one_line(server: S3, place: str, said: str, tmp_path: Path) -> None:
    done = recap("build", "demo", f"web={tmp_path}", "--run", place, check=2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bucket_that_may_only_be_read_is_one_line(server: S3, recipe: Recipe) -> None:
    place = f"{server.bucket()}/run"
    server.fault = lambda method, *_: (403, "AccessDenied") if method in ("PUT", "DELETE") else None
    try:
        with pytest.raises(InputError, match="refuses: AccessDenied"):
            build(recipe, place, executor=in_this_process)
    finally:
        server.fault = lambda *_: None


def test_a_bucket_where_another_recipes_run_lives_is_one_line(server: S3, recipe: Recipe) -> None:
    place = f"{server.bucket()}/run"
    build(recipe, place, executor=in_this_process)
    with pytest.raises(InputError, match=f"{place}/recipe.json is of a run of recipe 'counted', not of 'x'"):
        build(Recipe("x", recipe.stages), place, executor=in_this_process)
