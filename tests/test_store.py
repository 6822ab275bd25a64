"""The contract of a store, for a folder and for fsspec's file systems: what is put is there, whole, alone."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from s3 import S3, s3
from test_run import Verdict

from builder.commit import damaged_input
from builder.core import Object, Recipe, Stage, Task, Work
from builder.errors import InputError
from builder.executors.local import local
from builder.executors.work import in_this_process
from builder.files import part_of, write_parquet
from builder.lease import FOLDER, holder, numbers
from builder.run import Run, build, garbage
from builder.scratch import Local, Scratch, _here
from builder.stages.download import Download
from builder.stages.source import Source
from builder.status import status
from builder.store import Folder, Remote, Store, store_of
from recipes.demo import web

PORT = 8661


@pytest.fixture(scope="module")
def s3_server() -> Iterator[S3]:
    with s3() as server:
        yield server


@pytest.fixture(params=["folder", "file", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "s3":
        bucket = request.getfixturevalue("s3_server").bucket()
        yield Remote(f"{bucket}/some/run", beat_s=0.1, expiry_s=1.0)
    elif request.param == "memory":
        yield Remote(f"memory://{tmp_path.name}/run", beat_s=0.05, expiry_s=0.5)
    elif request.param == "file":
        yield Remote(f"file://{tmp_path}/run", beat_s=0.05, expiry_s=0.5)
    else:
        yield Folder(tmp_path / "run")


def test_what_is_not_there(store: Store) -> None:
    assert not store.exists()
    assert store.read("a/b/c.json") is None
    assert store.names("a/b") == store.folders("a") == store.journaled("a/b/c.journal") == []
    assert store.sizes("a/b") == {}
    store.delete("a/b/c.json")
    with pytest.raises(FileNotFoundError):
        store.fetch("a/b/c.tar", store.scratch())


def test_an_object_is_what_was_put_last(store: Store) -> None:
    for data in (b"one", b"", b"another\0one"):
        file = store.scratch() / "made"
        file.write_bytes(data)
        store.put(file, "stage/00000/00001.0123abcd.tar")
        assert not file.exists()
        assert store.fetch("stage/00000/00001.0123abcd.tar", store.scratch()).read_bytes() == data
        store.write("stage/00000/00001.json", data)
        assert store.read("stage/00000/00001.json") == data
        assert store.sizes("stage/00000") == {"00001.0123abcd.tar": len(data), "00001.json": len(data)}
    assert store.exists()
    assert store.folders("") == ["stage"] or set(store.folders("")) <= {"stage", ".scratch"}
    assert store.folders("stage") == ["00000"]
    store.delete("stage/00000/00001.json")
    assert store.names("stage/00000") == ["00001.0123abcd.tar"]
    store.create("stage/00000/2.json", b"first")
    with pytest.raises(FileExistsError):
        store.create("stage/00000/2.json", b"second")
    assert store.read("stage/00000/2.json") == b"first"


def test_many_are_read_and_deleted_at_once(store: Store) -> None:
    for number in range(5):
        store.write(f"stage/00000/{number}.json", b"%d" % number)
    names = [f"stage/00000/{number}.json" for number in (3, 9, 1)]
    assert list(store.read_all(names)) == [b"3", None, b"1"]
    store.delete_all([names[0], names[2]])
    assert store.names("stage/00000") == ["0.json", "2.json", "4.json"]
    store.delete_all([])
    assert list(store.read_all([])) == []


def test_a_place_is_no_pattern(tmp_path: Path) -> None:
    one, other = (Remote(f"memory://{tmp_path.name}/run{name}") for name in ("[12]", "1"))
    for store in (one, other):
        store.write("a/b.json", store.place.encode())
    one.delete_all(["a/b.json"])
    assert list(one.read_all(["a/b.json"])) == [None]
    assert list(other.read_all(["a/b.json"])) == [other.place.encode()]


def test_a_journal_goes_on_where_it_stopped(store: Store) -> None:
    name = "caption/00000/00001.journal"
    for lines in (["a", "b"], ["c"], []):
        journal = store.journal(name)
        for line in lines:
            journal.add(line)
        journal.close()
    assert store.journaled(name) == ["a", "b", "c"]
    store.delete(name)
    assert store.journaled(name) == []


def test_a_line_that_was_cut_off_is_none_and_spoils_no_other(tmp_path: Path) -> None:
    store = Folder(tmp_path)
    (tmp_path / "j").write_bytes(b"whole\nhal")
    assert store.journaled("j") == ["whole"]
    journal = store.journal("j")
    journal.add("next")
    journal.close()
    assert store.journaled("j") == ["whole", "next"]


def test_one_build_at_a_time(store: Store) -> None:
    by = rf"{os.getpid()}, since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC"
    with store.lease() as first:
        with (
            pytest.raises(InputError, match=rf"another build is at work in .*: .*{by}\n.*recap status"),
            again(store).lease(),
        ):
            pass
        time.sleep(0.2)
    with again(store).lease() as second:
        assert second.number == first.number + 1


def again(store: Store) -> Store:
    """As another process opens it."""
    return (
        Remote(store.place, beat_s=0.05, expiry_s=0.5)
        if isinstance(store, Remote)
        else Folder(Path(store.place))
    )


HOLD = """
import os, sys, time
from pathlib import Path
import builder.lease, builder.store
from builder.store import Folder, Remote
kind, place, where = sys.argv[1:]
if where:
    builder.lease.where = lambda: where  # as another machine
store = {"folder": lambda: Folder(Path(place), beat_s=0.05, expiry_s=0.5),
         "remote": lambda: Remote(f"file://{place}", beat_s=0.05, expiry_s=0.5)}[kind]()
def no_lock(*_):
    raise NotImplementedError
if where:
    builder.store.lock = no_lock  # that it shares no kernel with
with store.lease():
    time.sleep(0.2); print("held", flush=True); time.sleep(60)
"""


def refused(store: Store) -> str:
    with pytest.raises(InputError, match="another build") as told, store.lease():
        pass
    return str(told.value)


@pytest.mark.parametrize("kind", ["folder", "remote"])
@pytest.mark.parametrize("where", ["", "another machine"])
def test_a_lease_whose_holder_is_gone_is_nobodys(tmp_path: Path, kind: str, where: str) -> None:
    """kill -9 of the holder. On this machine that is seen at once; elsewhere the observer waits, by its own
    clock, until the lease has not changed for long enough.
    """
    place = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, kind, str(place), where], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"

    def mine(expiry_s: float) -> Store:
        if kind == "folder":
            return Folder(place, beat_s=0.05, expiry_s=expiry_s)
        return Remote(f"file://{place}", beat_s=0.05, expiry_s=expiry_s)

    try:
        told = [refused(mine(2)) for _ in range(10)]  # a file:// object may be read while it is written
        while True:  # and a kill in its midst would leave nobody's name
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            if holder(mine(2)):
                break
            process.send_signal(signal.SIGCONT)
    finally:
        process.kill()
        process.communicate()
    if kind == "folder":
        part_of(place / FOLDER / "00000001").touch()  # the kill may come while it is written
    assert any(re.search(f"another build .* process {process.pid}", one) for one in told), told
    begun = time.monotonic()
    with mine(1.0).lease():
        assert (time.monotonic() - begun >= 1.0) == bool(where)
        assert not list((place / FOLDER).glob("*00000001*"))
        assert numbers(mine(1.0)) == [2]


ASLEEP = """
import sys
from builder.core import Recipe
import builder.run, builder.store
from test_store import asleep_recipe, quick
builder.run.store_of = quick
builder.run.build(asleep_recipe(sys.argv[1]), sys.argv[2])
"""


def quick(place: object, local: object = None) -> Store:
    return Remote(str(place), beat_s=0.1, expiry_s=1.0)


def asleep_recipe(folder: str) -> Recipe:
    source = Source(files=f"{folder}/web/metadata", rows_per_shard=20)
    return Recipe("asleep", (source, Count(asleep=f"{folder}/asleep")))


@dataclass(frozen=True, kw_only=True)
class Count(Stage):
    """Counts rows; over the last shard its machine falls asleep, once."""

    name: str = "count"
    effort: ClassVar[tuple[str, ...]] = ("asleep",)
    asleep: str = ""

    def reads(self) -> tuple[str, ...]:
        return ("source",)

    @contextmanager
    def open(self) -> Iterator[Work]:
        def work(task: Task) -> Mapping[str, int]:
            (rows,) = (pq.read_metadata(path).num_rows for path in task.files.values())
            write_parquet(pa.table({"rows": [rows], "pid": [os.getpid()]}), task.output())
            if task.name == "00002" and not Path(self.asleep).exists():
                Path(self.asleep).touch()
                os.kill(os.getppid(), signal.SIGSTOP)
                os.kill(os.getpid(), signal.SIGSTOP)
            return {"ok": rows}

        yield work


def test_a_build_that_was_only_asleep_commits_nothing_over_its_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Driver and worker stop over the last shard; another machine's build takes the run over and ends it."""
    web.make(tmp_path / "web", rows=60, seed=208, port=PORT, num_files=1)
    place = f"file://{tmp_path}/run"
    command = [sys.executable, "-c", ASLEEP, str(tmp_path), place]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    while not (tmp_path / "asleep").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)
    monkeypatch.setattr("builder.run.store_of", quick)
    monkeypatch.setattr("builder.lease.Holder.is_gone", lambda self: False)  # as from another machine
    result = build(asleep_recipe(str(tmp_path)), place, executor=in_this_process)
    assert (result.failed, result.done[-1]) == ({}, "count/00002")
    before = {path: path.read_bytes() for path in (tmp_path / "run" / "count").rglob("*") if path.is_file()}
    os.kill(process.pid, signal.SIGCONT)
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGCONT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "another build took it over" in said.splitlines()[-2] + said.splitlines()[-1], said
    after = {path: path.read_bytes() for path in (tmp_path / "run" / "count").rglob("*") if path.is_file()}
    assert after == before
    leases = [
        record.lease for _, record in Run(store_of(place), asleep_recipe(str(tmp_path))).shards("count")
    ]
    assert leases == [1, 1, 2]


def test_where_a_store_cannot_keep_two_builds_apart_the_user_has_to(s3_server: S3) -> None:
    """A server that does not know of conditions takes the second as the first."""
    place = f"{s3_server.bucket()}/run"
    s3_server.drops = ("If-None-Match",)
    try:
        with (
            pytest.raises(InputError, match=r"no conditional put.*\n.*--single-driver"),
            Remote(place).lease(),
        ):
            pass
        with Remote(place, Local(single_driver=True)).lease():
            pass
    finally:
        s3_server.drops = ()


def test_s3_refuses_a_stale_condition(s3_server: S3) -> None:
    """What `create` and the lease stand on, and what fsspec makes of a stale If-Match."""
    store = Remote(f"{s3_server.bucket()}/run")
    assert store.is_conditional()
    fs = store.filesystem
    tag = fs.pipe_file(f"{store.root}/x", b"one")["ETag"]
    fs.pipe_file(f"{store.root}/x", b"two", IfMatch=tag)
    with pytest.raises(OSError, match="pre-condition"):
        fs.pipe_file(f"{store.root}/x", b"three", IfMatch=tag)
    assert store.read("x") == b"two"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ((403, "AccessDenied"), "refuses: AccessDenied on purpose\n  see that the credentials"),
        ((400, "ExpiredToken"), "refuses: ExpiredToken on purpose\n  see that the credentials"),
        ((404, "NoSuchBucket"), "NoSuchBucket on purpose\n  create the bucket first"),
    ],
)
def test_what_no_other_try_would_survive_is_one_line(
    s3_server: S3, fault: tuple[int, str], said: str
) -> None:
    store = Remote(f"{s3_server.bucket()}/run")
    s3_server.fault = lambda method, *_: fault if method == "PUT" else None
    try:
        with pytest.raises(InputError) as error:
            store.write("x", b"data")
    finally:
        s3_server.fault = lambda *_: None
    assert said in str(error.value)


@pytest.mark.parametrize("fault", ["cut", (503, "SlowDown"), (500, "InternalError")])
def test_a_put_that_fails_once_is_survived(
    s3_server: S3, fault: tuple[int, str] | str, tmp_path: Path
) -> None:
    store = Remote(f"{s3_server.bucket()}/run")
    times = [0]

    def once(method: str, path: str, _: object) -> tuple[int, str] | str | None:
        times[0] += method == "PUT"
        return fault if method == "PUT" and times[0] == 1 else None

    file = store.scratch() / "file"
    file.write_bytes(bytes(100_000))
    s3_server.fault = once
    try:
        store.put(file, "a/b.tar")
    finally:
        s3_server.fault = lambda *_: None
    assert times[0] > 1
    assert store.fetch("a/b.tar", tmp_path).read_bytes() == bytes(100_000)


def test_scratch_is_bounded_and_what_dead_processes_left_goes(tmp_path: Path) -> None:
    store = Remote(f"memory://{tmp_path.name}/run", Local(tmp_path / "scratch", scratch_gib=1e-3))
    first = store.scratch()
    assert first.is_relative_to(tmp_path / "scratch")
    assert store.has_room()
    (first / "large").write_bytes(bytes(2 << 20))
    assert not store.has_room()
    local = f"Local(Path({str(tmp_path / 'scratch')!r}))"
    code = (
        f"from builder.store import *; s = Remote({store.place!r}, {local}); s.scratch(); print(os.getpid())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    there = list((tmp_path / "scratch").rglob(f"*-{done.stdout.strip()}-*"))
    assert len(there) == 1
    store.scratch()
    assert not there[0].exists()
    assert first.exists()


def test_what_a_machine_left_before_it_was_started_again_goes(tmp_path: Path) -> None:
    host, boot, container = _here()
    before = tmp_path / f"{host}-0123abcd-{container[::-1]}-{os.getpid()}-x"
    elsewhere = tmp_path / f"{host}-{boot}-{container[::-1]}-1-x"  # another container, perhaps at work
    for folder in (before, elsewhere):
        folder.mkdir()
        (folder / "file").write_bytes(bytes(2048))
    assert Scratch(tmp_path, gib=3000 / 2**30).has_room()
    assert not before.exists()
    assert elsewhere.exists()


def test_who_listed_the_leases_long_ago_gets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Remote(f"memory://{tmp_path.name}/run")
    late = again(store)
    with store.lease():
        pass
    listed, names = [late.names(FOLDER)], late.names
    with store.lease():
        pass
    with store.lease() as third:  # the second one's object is gone now
        monkeypatch.setattr(
            late, "names", lambda folder: listed.pop() if folder == FOLDER and listed else names(folder)
        )
        with pytest.raises(InputError, match="another build is at work"), late.lease():
            pass
        assert not listed
        assert names(FOLDER) == [f"{third.number:08d}"]


def test_an_input_that_cannot_be_fetched_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full scratch disk, a store that does not answer: the task failed, its inputs' makers stay done."""
    store = Folder(tmp_path)
    task = Task("stage", "00000", "00000", key="k", inputs={"source/00000/00000.ab.parquet": "0" * 64})
    for where in ("fetch", "scratch"):
        with monkeypatch.context() as patch:
            patch.setattr(store, where, lambda *_: os.open("/dev/full/x", 0))
            assert damaged_input(store, task) == ""


def test_a_lease_outlives_a_put_that_fails_and_is_given_up_when_too_many_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a second build would begin beside the first, which knows nothing of it."""
    store = Remote(f"file://{tmp_path}/run", beat_s=0.05, expiry_s=0.6)
    real, fails = store.filesystem.pipe_file, [True, False, True]

    def pipe_file(name: str, *arguments: object, **more: object) -> None:
        if "lease/" in name and fails and fails.pop():
            raise OSError("503")
        real(name, *arguments, **more)

    with store.lease():
        monkeypatch.setattr(store.filesystem, "pipe_file", pipe_file)
        time.sleep(0.5)
        assert not fails
        with pytest.raises(InputError, match="another build"), again(store).lease():
            pass
        store.write("a", b"")
        fails.extend([True] * 1000)
        time.sleep(1.2)
        with pytest.raises(InputError, match=r"could not be written to for 0\.6 s.*\n.*look whether"):
            store.write("a", b"")


def plain_outputs(store: Store, recipe: Recipe) -> dict[str, str]:
    run = Run(store, recipe)
    records = [record for stage in run.stage_names() for _, record in run.shards(stage)]
    return {
        Object.parse(name).plain(): sha256 for record in records for name, sha256 in record.outputs.items()
    }


@pytest.mark.slow
def test_a_run_is_the_same_bytes_wherever_it_is(tmp_path: Path) -> None:
    """A folder, objects in memory, and objects on a disk with worker processes."""
    web.make(tmp_path / "web", rows=60, seed=208, port=PORT, num_files=2)
    download = Download(
        image_px=64, timeout_s=20, retries=1, verify_sha256=False, allow_private=("127.0.0.1/32",), workers=1
    )
    stages = (
        Source(files=str(tmp_path / "web" / "metadata"), rows_per_shard=20),
        download,
        Verdict(max_urls=2),
    )
    recipe, found = Recipe("three", stages), []
    with web.serve(tmp_path / "web", PORT):
        for place, executor in (
            (str(tmp_path / "run"), in_this_process),
            (f"memory://{tmp_path.name}", in_this_process),
            (f"file://{tmp_path}/objects", local),
        ):
            assert build(recipe, place, executor=executor).failed == {}
            assert build(recipe, place, executor=executor).done == []
            found.append(plain_outputs(store_of(place), recipe))
            rows = [Counter(row["rows"]) for row in status(Run(store_of(place), recipe))]  # type: ignore[arg-type]
            assert [each.total() for each in rows] == [60, 60, 60]
            assert garbage(place) == {}
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 12
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


SEAM = {"rename", "symlink_to", "glob", "iglob", "rglob", "flock", "iterdir", "scandir", "listdir", "mkdtemp"}
BELOW = ("store.py", "scratch.py", "files.py", "sql.py")  # the store itself, and what it stands on
OUTSIDE = (
    "places.py",
    "model.py",
    "machine.py",
)  # somebody's tables, model folders, devices: no objects of a run


@pytest.mark.parametrize("path", sorted((ROOT / "builder").rglob("*.py")), ids=lambda path: path.name)
def test_nobody_but_the_store_renames_appends_or_globs(path: Path) -> None:
    """But for a task's own scratch folder, and for versions, which are put together in a folder."""
    if path.name in (*BELOW, *OUTSIDE) or path.parent.name == "versions":
        return
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    named = [(ast.unparse(func), func.attr) for func in calls if isinstance(func, ast.Attribute)]
    found = [text for text, name in named if name in SEAM or text == "os.replace"]
    assert [text for text in found if text != "task.scratch.glob"] == []


def test_a_store_is_named_by_a_path_or_a_url(tmp_path: Path) -> None:
    assert isinstance(store_of(tmp_path), Folder)
    assert isinstance(store_of("memory://x/run"), Remote)
    assert store_of("memory://x/run/").place == "memory://x/run"
