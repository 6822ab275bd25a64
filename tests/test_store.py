"""The contract of a store, for a folder and for fsspec's file systems: what is put is there, whole, alone."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from conftest import ROOT
from test_run import Verdict

from builder.core import Object, Recipe
from builder.errors import InputError
from builder.executors.local import local
from builder.executors.work import in_this_process
from builder.run import Run, build, garbage
from builder.stages.download import Download
from builder.stages.source import Source
from builder.status import status
from builder.store import Folder, Remote, Store, store_of
from recipes.demo import web

PORT = 8661


@pytest.fixture(params=["folder", "file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "memory":
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
    with store.lease():
        with (
            pytest.raises(InputError, match=r"another build is at work in .*\n.*recap status"),
            again(store).lease(),
        ):
            pass
        time.sleep(0.2)
    with again(store).lease():
        pass


def again(store: Store) -> Store:
    """As another process opens it."""
    return (
        Remote(store.place, beat_s=0.05, expiry_s=0.5)
        if isinstance(store, Remote)
        else Folder(Path(store.place))
    )


def test_a_lease_whose_holder_is_gone_expires(tmp_path: Path) -> None:
    """kill -9 of the holder; the observer waits by its own clock until it has not changed for long enough."""
    place = f"file://{tmp_path}/run"
    hold = (
        "import os, sys, time; from builder.store import Remote\n"
        "with Remote(sys.argv[1], beat_s=0.05, expiry_s=0.5).lease():\n"
        "    time.sleep(0.2); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", hold, place], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(InputError, match="another build"), Remote(place, beat_s=0.05, expiry_s=2).lease():
        pass
    process.kill()
    process.communicate()
    with Remote(place, beat_s=0.05, expiry_s=0.5).lease():
        assert len(Folder(tmp_path / "run").names("lease")) == 1


def test_a_lease_outlives_a_put_that_fails_and_is_given_up_when_too_many_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a second build would begin beside the first, which knows nothing of it."""
    store = Remote(f"file://{tmp_path}/run", beat_s=0.05, expiry_s=0.6)
    real, fails = store.fs.pipe_file, [True, False, True]

    def pipe_file(name: str, *arguments: object, **more: object) -> None:
        if "lease/" in name and fails and fails.pop():
            raise OSError("503")
        real(name, *arguments, **more)

    with store.lease():
        monkeypatch.setattr(store.fs, "pipe_file", pipe_file)
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
BELOW = ("store.py", "files.py", "sql.py")  # the store itself, and what it stands on
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
