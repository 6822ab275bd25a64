"""A run directory: what is done stays done, what is damaged is made again, what goes wrong costs only itself.

Three real stages over a small faulty web; most builds run their tasks in this process, those about worker
processes do not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import fill, mounted, recap

from builder import index, sql
from builder.commit import compact, forget, put_record, records
from builder.core import Object, Question, Recipe, Record, Stage, Task, Work
from builder.errors import InputError, RecipeError
from builder.executors.local import local
from builder.executors.work import in_this_process
from builder.files import lock, sha256_file, write_parquet
from builder.resolve import resolve
from builder.run import Executor, Run, build, garbage, retry
from builder.schedule import Outcome, Schedule, _Early
from builder.stages import questions
from builder.stages.dedup import Dedup
from builder.stages.download import Download
from builder.stages.imagetar import images
from builder.stages.questions import Measured
from builder.stages.source import Source
from builder.status import estimate, status
from builder.store import Folder
from recipes.demo import web

PORT, ROWS = 8660, 60
SEED = 208  # it plants eleven faults of seven kinds, four placeholders among them, and none that is slow
BECOMES = {  # what the download makes of each fault when it does not compare hashes
    "ok": "ok", "changed": "ok", "redirect": "ok", "flaky": "ok", "placeholder": "ok",
    "noai": "opted_out", "gone": "dead_link",
    "truncated": "undecodable", "empty": "undecodable", "html": "undecodable",
}  # fmt: skip


@dataclass(frozen=True)
class Site:
    metadata: Path
    faults: dict[str, str]  # by uid, in the order of the rows
    seen: Counter[str]  # requests by path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("web")
    web.make(folder, rows=ROWS, seed=SEED, port=PORT, num_files=2)
    truth = json.loads((folder / "truth.json").read_text())
    uids = [
        uid
        for path in sorted((folder / "metadata").iterdir())
        for uid in pq.read_table(path)["uid"].to_pylist()
    ]
    with web.serve(folder, PORT) as seen:
        yield Site(folder / "metadata", {uid: truth[uid]["fault"] for uid in uids}, seen)


@dataclass(frozen=True, kw_only=True)
class Verdict(Stage):
    """What select does with the answer over the whole run, and nothing else."""

    name: str = "verdict"
    max_urls: int

    def reads(self) -> tuple[str, ...]:
        return ("download.parquet",)

    def asks(self) -> tuple[Question, ...]:
        return (Measured(max_urls=self.max_urls),)

    @contextmanager
    def open(self) -> Iterator[Work]:
        def work(task: Task) -> Mapping[str, int]:
            rows = sql.table(task.input("download"))
            of_images = questions.of_images("image_sha256")
            with sql.connect() as con:
                table = con.sql(
                    f"""select uid, if(urls is null, status, 'duplicate_image') as status
                        from (select *, {of_images}, row_number() over () as n from {rows}
                              where image_sha256 is not null
                              union all select *, null, null, row_number() over () from {rows}
                              where image_sha256 is null)
                             left join {sql.table(task.input("measured"))} using (high, low) order by key"""
                ).to_arrow_table()
            write_parquet(table, task.output())
            return Counter(table["status"].to_pylist())

        yield work


def recipe(site: Site, *, rows: int = ROWS, max_urls: int = 2, **settings: Any) -> Recipe:
    """Source, download and the verdict on placeholders, for which all downloads have to be there."""
    download = Download(
        image_px=64, timeout_s=20, retries=1, verify_sha256=False, allow_private=("127.0.0.1/32",), workers=1
    )
    source = Source(files=str(site.metadata), rows_per_shard=20, limit=rows)
    return Recipe("three", (source, replace(download, **settings), Verdict(max_urls=max_urls)))


OF_TWO_SHARDS = [
    "source/00000", "source/00001", "uids/00000", "uids/run", "download/00000", "download/00001",
    "measured/00000", "measured/run", "verdict/00000", "verdict/00001",
]  # fmt: skip


here = in_this_process


def done_by(recipe: Recipe, run: Path, executor: Executor = here, redo: Sequence[str] = ()) -> list[str]:
    """Build, and name the tasks that were done, as a user reads them."""
    result = build(recipe, run, executor=executor, redo=redo)
    assert not result.failed, result.failed
    return result.done


def outputs(run: Path) -> dict[str, str]:
    """sha256 of every file that a record names; the records agree with the files, and there are no others."""
    paths = [path for path in sorted(run.glob("*/*/*.json")) if not path.name.startswith(".")]
    found: dict[str, str] = {}
    for record in (Record.from_json(path.read_bytes()) for path in paths):
        assert record is not None
        found |= record.outputs
        assert all((run / name).stat().st_size == size for name, size in record.bytes.items())
    assert found == {name: sha256_file(run / name) for name in found}
    there = {
        str(path.relative_to(run))
        for end in ("parquet", "tar", "part", "txt")
        for path in run.rglob(f"*.{end}")
    }
    assert there == set(found)
    return found


def one(run: Path, plain: str) -> Path:
    """The file that is `dedup/00001.parquet` or `uids/run/00000.parquet`, whatever the digits of its key."""
    stage, _, rest = plain.partition("/")
    block, _, name = rest.rpartition("/")
    shard, _, suffix = name.partition(".")
    if suffix == "json":
        return run / stage / (block or "00000") / name
    (path,) = (run / stage / (block or "00000")).glob(f"{shard}.????????.{suffix}")
    return path


def times(run: Path) -> dict[str, int]:
    return {str(path.relative_to(run)): path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def built(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the first 40 rows: two shards. Only to be looked at."""
    run = tmp_path_factory.mktemp("built") / "run"
    done_by(recipe(site, rows=40), run)
    return run


@pytest.fixture
def run(built: Path, tmp_path: Path) -> Path:
    """A copy of it, which still is a finished run."""
    return Path(shutil.copytree(built, tmp_path / "run"))


@pytest.fixture(scope="module")
def whole(site: Site, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The outputs of a run of all 60 rows: three shards."""
    run = tmp_path_factory.mktemp("whole") / "run"
    done_by(recipe(site), run)
    return outputs(run)


# --- resuming -----------------------------------------------------------------------------------------------


def test_every_source_row_has_one_status_at_every_stage(site: Site, built: Path) -> None:
    faults = list(site.faults.values())[:40]
    downloaded = Counter(BECOMES[fault] for fault in faults)
    assert faults.count("placeholder") == 3  # one image behind three URLs, and max_urls is 2
    kept = Counter(downloaded)
    kept.update({"duplicate_image": 3, "ok": -3})
    table = status(Run.open(built))
    assert {row["stage"]: row["rows"] for row in table} == {
        "source": {"ok": 40},
        "download": dict(downloaded),
        "verdict": dict(kept),
    }
    assert all((row["shards_done"], row["shards_left"], row["failed"]) == (2, 0, {}) for row in table)
    for stage in ("source", "download", "verdict"):
        paths = [built / name for name in Run.open(built).files(stage)]
        uids = [uid for path in paths for uid in pq.read_table(path)["uid"].to_pylist()]
        assert uids == list(site.faults)[:40], stage


def test_a_finished_run_does_nothing_twice(site: Site, run: Path) -> None:
    before, seen = times(run), Counter(site.seen)
    assert done_by(recipe(site, rows=40), run, local) == []
    after = times(run)
    for changed in ("recipe.json", ".lock", ".lease/00000001"):
        del before[changed]
    assert after | before == after
    assert site.seen == seen
    assert Run.open(run).unfinished() == {}


def test_an_interrupted_run_goes_on_where_it_stopped(site: Site, built: Path, tmp_path: Path) -> None:
    def interrupted(schedule: Schedule) -> Iterator[Outcome]:
        for outcome in here(schedule):
            yield outcome
            if outcome.task.stage == "uids" and outcome.task.block == "run":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(recipe(site, rows=40), tmp_path / "run", executor=interrupted)
    found = status(Run.open(tmp_path / "run"))
    assert [(row["shards_done"], row["shards_left"]) for row in found] == [(2, 0), (0, 2), (0, 2)]
    with pytest.raises(
        InputError, match=r"is not complete: 2 download shards, .*2 verdict shards left\n.*recap build"
    ):
        Run.open(tmp_path / "run").finished()
    assert done_by(recipe(site, rows=40), tmp_path / "run") == OF_TWO_SHARDS[4:]
    assert outputs(tmp_path / "run") == outputs(built)


def test_a_plan_does_nothing(site: Site, run: Path) -> None:
    before = times(run)
    table = estimate(recipe(site, rows=40, max_urls=9), run)
    assert [(row["stage"], row["shards_done"], row["shards_left"]) for row in table] == [
        ("source", 2, 0),
        ("download", 2, 0),
        ("verdict", 0, 2),
    ]
    assert times(run) == before


def test_a_plan_counts_what_no_build_has_looked_at(site: Site, run: Path) -> None:
    """After a first `--limit`, or when the metadata has grown."""
    table = estimate(recipe(site), run)
    assert [(row["shards_left"], row["rows_left"]) for row in table] == [(1, 20)] * 3
    assert [row["rows_left"] for row in estimate(recipe(site, rows=50), run)] == [10] * 3
    hours, more = ([row["hours_left"] for row in estimate(recipe(site, rows=n), run)] for n in (40, 60))
    assert hours == [0.0] * 3
    assert all(isinstance(row["bytes_left"], int) and row["bytes_left"] > 0 for row in table)
    assert None not in more


def test_a_limit_that_ends_inside_a_finished_shard_is_told_first(site: Site, run: Path) -> None:
    says = r"source.limit.* ends a shard at another row: .*\(download: 1 shards, 20 rows, .*\n.*--redo source"
    with pytest.raises(InputError, match=says):
        build(recipe(site, rows=30), run, executor=here)
    assert not any(name.startswith("download") for name in done_by(recipe(site, rows=20), run))


def test_metadata_that_moved_is_the_same_metadata(site: Site, run: Path, tmp_path: Path) -> None:
    shutil.copytree(site.metadata, tmp_path / "elsewhere")
    moved = recipe(replace(site, metadata=tmp_path / "elsewhere"), rows=40)
    assert done_by(moved, run) == []


def test_a_changed_setting_redoes_its_stage_only(site: Site, built: Path, run: Path) -> None:
    """And where it is taken back, what it had made: earlier outputs lie beside the new ones."""
    seen = Counter(site.seen)
    again = ["measured/00000", "measured/run", "verdict/00000", "verdict/00001"]
    assert done_by(recipe(site, rows=40, max_urls=3), run) == again
    assert site.seen == seen
    assert "duplicate_image" not in status(Run.open(run))[2]["rows"]  # type: ignore[operator]
    assert len(garbage(run)) == 4
    assert done_by(recipe(site, rows=40), run) == again
    garbage(run, delete=True)
    assert outputs(run) == outputs(built)


def test_a_larger_limit_keeps_the_shards_that_are_there(site: Site, run: Path, whole: dict[str, str]) -> None:
    """What came is a batch of its own: the verdict on the rows before does not change with it."""
    before, seen = times(run), Counter(site.seen)
    assert done_by(recipe(site), run) == [
        "source/00002", "uids/00001", "uids/run", "download/00002", "measured/00001", "measured/run",
        "verdict/00002",
    ]  # fmt: skip
    assert {
        name: times(run)[name] for name in before if name.endswith((".parquet", ".tar"))
    }.items() <= before.items()
    new = set(list(site.faults)[40:])
    assert {path.split("/")[-1].removesuffix(".jpg") for path in (site.seen - seen)} == new
    plain = {
        Object.parse(name).plain(): sha256 for name, sha256 in outputs(run).items() if "/run/" not in name
    }
    at_once = {Object.parse(name).plain(): sha256 for name, sha256 in whole.items() if "/run/" not in name}
    assert all(plain[name] == at_once[name] for name in plain if name.startswith(("source/", "download/")))


def test_a_smaller_limit_looks_at_fewer_shards(site: Site, run: Path) -> None:
    done = done_by(recipe(site, rows=20), run)
    assert not any(name.startswith(("source", "download")) for name in done)
    assert [sum(row["rows"].values()) for row in status(Run.open(run))] == [20, 20, 20]  # type: ignore[attr-defined]


# --- damage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "again"),
    [
        ("source/00001.parquet", "source/00001"),
        ("download/00001.tar", "download/00001"),
        ("download/00001.json", "download/00001"),
        ("verdict/00000.parquet", "verdict/00000"),
        ("verdict/00000.json", "verdict/00000"),
        ("measured/run/00000.json", "measured/run"),
        ("measured/00000/part.json", "measured/00000"),
        ("measured/00000/part.parquet", "measured/00000"),
    ],
)
def test_a_file_that_was_cut_off_is_made_again_and_nothing_else(
    site: Site, built: Path, run: Path, name: str, again: str
) -> None:
    os.truncate(one(run, name), one(run, name).stat().st_size // 2)
    assert done_by(recipe(site, rows=40), run) == [again]
    assert outputs(run) == outputs(built)


def test_a_file_that_is_gone_is_made_again(site: Site, built: Path, run: Path) -> None:
    one(run, "verdict/00001.parquet").unlink()
    assert done_by(recipe(site, rows=40), run) == ["verdict/00001"]
    assert outputs(run) == outputs(built)


def flip(path: Path) -> None:
    """Other bytes, the same size."""
    path.write_bytes(bytes(byte ^ 0xFF for byte in path.read_bytes()))


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("source/00001.parquet", "download/00001.tar"),
        ("source/00000.parquet", "uids/00000/part.json"),
        ("download/00001.parquet", "verdict/00001.parquet"),
        ("download/00000.parquet", "measured/00000/part.json"),
        ("measured/00000/part.parquet", "measured/run/00000.json"),
        ("measured/run/00000.parquet", "verdict/00000.parquet"),
    ],
)
def test_a_file_with_other_bytes_is_made_again_when_somebody_reads_it(
    site: Site, built: Path, run: Path, name: str, reader: str
) -> None:
    flip(one(run, name))
    one(run, reader).unlink()
    result = build(recipe(site, rows=40), run, executor=here)
    assert result.failed == {}
    assert outputs(run) == outputs(built)
    assert not list(run.rglob("*.failed"))


@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_an_index_that_is_damaged_is_told(site: Site, run: Path, damage: Callable[[Path], None]) -> None:
    """Which rows are in which shard is known nowhere else."""
    damage(one(run, "source/run/00000.parquet"))
    with pytest.raises(InputError, match=r"source/run/00000\..*is missing or damaged"):
        build(recipe(site, rows=40), run, executor=here)


def test_a_text_table_that_was_converted_is_converted_again(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text(
        "url,caption\n" + "".join(f"http://h/{n},{n * n:x}\n" for n in range(300))
    )
    three = Recipe("r", (Source(files=str(tmp_path / "in.csv"), rows_per_shard=100),))
    done_by(three, tmp_path / "run")
    before = outputs(tmp_path / "run")
    flip(one(tmp_path / "run", "source/run/00000.0.parquet"))
    one(tmp_path / "run", "source/00001.parquet").unlink()
    assert build(three, tmp_path / "run", executor=here).failed == {}
    assert outputs(tmp_path / "run") == before


# --- what a build refuses -----------------------------------------------------------------------------------


def test_a_uid_that_occurs_twice_is_named_with_both_places(tmp_path: Path) -> None:
    uids = [f"{n:032x}" for n in range(50)]
    uids[41] = uids[7]
    pq.write_table(
        pa.table({"uid": uids, "url": ["http://h/"] * 50, "text": ["a"] * 50}), tmp_path / "in.parquet"
    )
    twice = Recipe("r", (Source(files=str(tmp_path / "in.parquet"), rows_per_shard=20), Download()))
    with pytest.raises(
        InputError, match=f"uid {uids[7]} occurs twice: shard 0 row 7 and shard 2 row 1;.*\n.*duckdb"
    ):
        build(twice, tmp_path / "run", executor=here)


def test_the_run_of_another_recipe_is_left_alone(site: Site, run: Path) -> None:
    before = times(run)
    with pytest.raises(InputError, match=r"is of a run of recipe 'three', not of 'four'\n.*--run runs/four"):
        build(replace(recipe(site, rows=40), name="four"), run, executor=here)
    assert times(run) == before


def test_a_directory_that_holds_something_else_is_left_alone(site: Site, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match=r"is not empty and holds no run\n.*--run"):
        build(recipe(site), tmp_path / "photos", executor=here)
    assert [path.name for path in (tmp_path / "photos").rglob("*")] == ["cat.jpg"]


@pytest.mark.parametrize(
    "left", [(), (".lock",), (".lock", ".recipe.json.part")], ids=["nothing", "a lock", "half a recipe.json"]
)
def test_what_a_build_leaves_that_ended_at_once_can_be_gone_on_with(
    tmp_path: Path, left: Sequence[str]
) -> None:
    for name in left:
        (tmp_path / name).touch()
    with pytest.raises(
        RecipeError, match="recipe empty has no stages"
    ):  # and not that the directory is somebody else's
        build(Recipe("empty", ()), tmp_path)


def test_a_second_build_is_refused_while_one_is_at_work(site: Site, run: Path) -> None:
    before = (run / "recipe.json").read_text()
    with (
        lock(run / ".lock", "busy", ""),
        pytest.raises(InputError, match=r"another build is at work in .*\n.*recap status"),
    ):
        build(recipe(site, rows=40, max_urls=9), run, executor=here)
    assert (run / "recipe.json").read_text() == before


def test_a_run_of_an_older_version_is_gone_on_with(site: Site, run: Path) -> None:
    """Its recipe.json may name settings and stages that are no more; what is built now is what was given."""
    old = json.loads((run / "recipe.json").read_text())
    old["stages"][1]["a_setting_of_old"] = 5
    old["stages"].append({"stage": "builder.gone:Gone"})
    (run / "recipe.json").write_text(json.dumps(old))
    assert done_by(recipe(site, rows=40), run) == []


def test_the_lock_is_a_builds_from_its_first_task_to_its_last(site: Site, run: Path) -> None:
    """And goes with the process that held it, however it ends: nobody has to remove a file."""
    refused = []

    def meanwhile(outcome: Outcome, *_: object) -> None:
        with pytest.raises(InputError, match="another build is at work"):
            build(recipe(site, rows=40), run, executor=here)
        refused.append(outcome.task.name)

    build(recipe(site, rows=40, max_urls=9), run, executor=here, progress=meanwhile)
    assert refused == ["part", "00000", "00000", "00001"]
    hold = (
        "import os, sys, signal; from pathlib import Path; from builder.files import lock\n"
        "with lock(Path(sys.argv[1]), 'busy', ''): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", hold, str(run / ".lock")], check=False, timeout=60)
    assert len(done_by(recipe(site, rows=40), run)) == 4


# --- shards that fail ---------------------------------------------------------------------------------------

USERS_FILE = '''
"""A user's recipe with a stage that does for each shard what `does` says, and notes when it does it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa

from builder.core import Recipe, Resources, Stage, Task, Work
from builder.files import write_parquet
from builder.stages.source import Source


@dataclass(frozen=True, kw_only=True)
class Fragile(Stage):
    effort: ClassVar[tuple[str, ...]] = ("workers",)

    name: str = "fragile"
    notes: str
    does: tuple[str, ...]
    workers: int = 1

    def reads(self) -> tuple[str, ...]:
        return ("source",)

    def num_workers(self) -> int:
        return self.workers

    def resources(self) -> Resources:
        return Resources(cpus=0.1)

    @contextmanager
    def open(self) -> Iterator[Work]:
        with open(Path(self.notes) / "openings", "a") as file:
            file.write("x")
        if self.does[0] == "not open":
            raise OSError("model.safetensors is cut off")
        if self.does[0] == "die opening":
            os.kill(os.getpid(), signal.SIGKILL)

        def work(task: Task) -> Mapping[str, int]:
            notes, does = Path(self.notes), self.does[int(task.name)]
            with open(notes / f"{task.name}.attempts", "a") as file:
                file.write("x")
            with open(notes / "processes", "a") as file:
                print(task.name, os.getpid(), file=file)
            if does.startswith("until ") and not (notes / "repaired").exists():
                does = does.removeprefix("until ")
            if does.startswith("wait for "):
                _, _, other, does = does.split(" ", 3)
                end = time.monotonic() + 20
                while not (notes / other).exists() and time.monotonic() < end:
                    time.sleep(0.01)
            if does == "take long":
                time.sleep(2)
            if does == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if does == "raise":
                raise ValueError("there is no such colour\\nsecond line")
            write_parquet(pa.table({"uid": [task.name]}), task.output())
            return {"ok": 1}

        yield work


@dataclass(frozen=True, kw_only=True)
class Follows(Stage):
    """Needs its own shard of `fragile`."""

    name: str = "follows"

    def reads(self) -> tuple[str, ...]:
        return ("fragile",)

    @contextmanager
    def open(self) -> Iterator[Work]:
        def work(task: Task) -> Mapping[str, int]:
            write_parquet(pa.table({"file": [task.input("fragile").name]}), task.output())
            return {"ok": 1}

        yield work


def fragile(*, metadata: str, notes: str, does: tuple[str, ...], workers: int = 1) -> Recipe:
    source = Source(files=metadata, rows_per_shard=1)
    return Recipe("fragile", (source, Fragile(notes=notes, does=does, workers=workers)))


def followed(*, metadata: str, notes: str, does: tuple[str, ...], workers: int = 1) -> Recipe:
    first = fragile(metadata=metadata, notes=notes, does=does, workers=workers)
    return Recipe("followed", (*first.stages, Follows()))
'''


@pytest.fixture(scope="module")
def users_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("user") / "fragile_stages.py"
    path.write_text(USERS_FILE)
    before = list(sys.path)
    yield path
    sys.path[:] = before


def settings(folder: Path, *does: str, workers: int = 1) -> list[str]:
    """Of a recipe of that file; writes its metadata, a row and so a shard for each of `does`."""
    rows = len(does)
    table = pa.table(
        {"uid": [f"{n}" for n in range(rows)], "url": ["http://h/"] * rows, "text": ["a"] * rows}
    )
    pq.write_table(table, folder / "in.parquet")
    return [
        f"metadata={folder / 'in.parquet'}",
        f"notes={folder}",
        f"does={','.join(does)}",
        f"workers={workers}",
    ]


def fragile(users_file: Path, folder: Path, *does: str, workers: int = 1, name: str = "fragile") -> Recipe:
    return resolve(f"{users_file}:{name}", settings(folder, *does, workers=workers))


def attempts(folder: Path) -> dict[str, int]:
    return {path.stem: path.stat().st_size for path in sorted(folder.glob("*.attempts"))}


@pytest.mark.slow
def test_a_shard_that_kills_its_worker_and_one_that_raises_cost_only_themselves(
    users_file: Path, tmp_path: Path
) -> None:
    """The command goes on with the others, names both with reasons, keeps these in the run, exits with 1."""
    given = settings(tmp_path, "work", "die", "raise", "work")
    only_source = replace(
        resolve(f"{users_file}:fragile", given),
        stages=(Source(files=str(tmp_path / "in.parquet"), rows_per_shard=1),),
    )
    build(only_source, tmp_path / "run", executor=here)
    done = recap("build", f"{users_file}:fragile", *given, "--run", tmp_path / "run", check=1)
    assert "2 shards done, 2 failed" in done.stdout
    assert "Traceback" not in done.stderr
    reasons = dict(
        line.removeprefix("failed: ").split(": ", 1)
        for line in done.stderr.splitlines()
        if line.startswith("failed: ")
    )
    assert sorted(reasons) == ["fragile/00001", "fragile/00002"]
    assert "worker process was killed by signal 9" in reasons["fragile/00001"]
    assert reasons["fragile/00002"] == "ValueError: there is no such colour"
    folder = tmp_path / "run" / "fragile" / "00000"
    assert {f"fragile/{path.stem}": path.read_text().strip() for path in folder.glob("*.failed")} == reasons
    assert sorted(path.name[:5] for path in folder.glob("*.parquet")) == ["00000", "00003"]
    assert attempts(tmp_path) == {"00000": 1, "00001": 3, "00002": 3, "00003": 1}
    log = (tmp_path / "run" / "logs" / "fragile.log").read_text()
    assert "Traceback" in log
    assert "second line" in log


def test_a_build_with_failed_shards_is_gone_on_with_by_the_same_command(
    users_file: Path, tmp_path: Path
) -> None:
    mine = fragile(users_file, tmp_path, "work", "until raise", "work")
    assert list(build(mine, tmp_path / "run", executor=here).failed) == ["fragile/00001"]
    (tmp_path / "repaired").touch()
    assert done_by(mine, tmp_path / "run") == ["fragile/00001"]
    assert not list((tmp_path / "run").rglob("*.failed"))
    assert attempts(tmp_path) == {"00000": 1, "00001": 2, "00002": 1}


def test_the_status_of_a_run_with_a_users_stage_names_failed_shards(users_file: Path, tmp_path: Path) -> None:
    build(fragile(users_file, tmp_path, "work", "raise"), tmp_path / "run", executor=here)
    assert [
        (r["stage"], r["shards_done"], r["shards_left"], r["failed"])
        for r in status(Run.open(tmp_path / "run"))
    ] == [
        ("source", 2, 0, {}),
        ("fragile", 1, 1, {"00001": "ValueError: there is no such colour"}),
    ]


def test_a_worker_that_raised_is_not_used_again(users_file: Path, tmp_path: Path) -> None:
    """What it left behind, requests in an engine, say, would reach the shards after it."""
    build(
        fragile(users_file, tmp_path, "raise", "work", "raise", "work"),
        tmp_path / "run",
        executor=local,
    )
    used: dict[str, list[str]] = {}
    for line in (tmp_path / "processes").read_text().splitlines():
        name, process = line.split()
        used.setdefault(process, []).append(name)
    assert all(name not in ("00000", "00002") for names in used.values() for name in names[:-1])
    assert attempts(tmp_path) == {"00000": 3, "00001": 1, "00002": 3, "00003": 1}


@pytest.mark.parametrize(
    ("first", "says"),
    [("not open", "model.safetensors is cut off"), ("die opening", "worker process was killed by signal 9")],
)
def test_a_stage_that_cannot_be_opened_is_tried_once_and_ends_the_build(
    users_file: Path, tmp_path: Path, first: str, says: str
) -> None:
    three = fragile(users_file, tmp_path, first, "work", "work")
    with pytest.raises(InputError, match=rf"stage fragile cannot start.*{says}"):
        build(three, tmp_path / "run", executor=local)
    assert (tmp_path / "openings").read_text() == "x"
    assert not attempts(tmp_path)


def test_rate_and_time_left_are_those_of_all_workers(users_file: Path, tmp_path: Path) -> None:
    four = fragile(users_file, tmp_path, "work", "raise", "work", "raise", workers=2)
    build(four, tmp_path / "run", executor=here)
    for name in ("00000", "00002"):
        path = tmp_path / "run" / "fragile" / "00000" / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 10.0}))
    row = status(Run.open(tmp_path / "run"))[1]
    assert (row["rows_per_s"], row["eta_s"]) == (0.2, 10)  # a row in 10 s from each of two; two more at once
    build(
        fragile(users_file, tmp_path, "work", "raise", "work", "raise", workers=8),
        tmp_path / "run",
        executor=here,
    )
    row = status(Run.open(tmp_path / "run"))[1]
    assert (row["stage"], row["rows_per_s"], row["eta_s"]) == (
        "fragile",
        0.2,
        10,
    )  # of eight workers no more than two have worked, or will


def test_a_worker_that_dies_does_not_fail_the_shard_next_to_it(users_file: Path, tmp_path: Path) -> None:
    """Two workers; whenever shard 1 kills its own, shard 0 is at work in the other."""
    pair = fragile(users_file, tmp_path, "take long", "wait for 00000.attempts die", workers=2)
    assert list(build(pair, tmp_path / "run", executor=local).failed) == ["fragile/00001"]


def test_a_worker_that_dies_while_nobody_waits_for_it_costs_an_attempt(
    users_file: Path, tmp_path: Path
) -> None:
    """The build is busy writing down shard 0 when shard 1 kills its worker, and then gives away shard 2."""
    three = fragile(users_file, tmp_path, "work", "until wait for noted die", "work", workers=2)

    def busy(outcome: Outcome, *_: object) -> None:
        if outcome.task.stage == "fragile" and outcome.task.name == "00000":
            (tmp_path / "noted").touch()
            time.sleep(1)
            (tmp_path / "repaired").touch()

    assert build(three, tmp_path / "run", executor=local, progress=busy).failed == {}
    assert attempts(tmp_path) == {"00000": 1, "00001": 2, "00002": 1}


def test_a_shard_whose_input_failed_waits_for_it(users_file: Path, tmp_path: Path) -> None:
    """It is not tried without; the others go on."""
    three = fragile(users_file, tmp_path, "work", "raise", "work", name="followed")
    result = build(three, tmp_path / "run", executor=here)
    assert list(result.failed) == ["fragile/00001"]
    (block,) = Run.open(tmp_path / "run").plan().blocks()
    found = block.stages["follows"]
    assert (sorted(found.done), found.todo, found.waiting) == (["00000", "00002"], {}, {"00001"})


@dataclass(frozen=True, kw_only=True)
class Broken(Download):
    @contextmanager
    def open(self) -> Iterator[Work]:
        def work(task: Task) -> Mapping[str, int]:
            raise ValueError("broken")

        yield work


def test_a_failure_is_forgotten_when_its_shard_is_done_after_all(site: Site, run: Path) -> None:
    """A setting that fails is taken back: what it failed at is done, and has been all the time."""
    good = recipe(site, rows=40)
    broken = Broken(**asdict(good.stage("download")) | {"image_px": 99})
    bad = replace(good, stages=(good.stages[0], broken, good.stages[2]))
    assert sorted(build(bad, run, executor=here, redo=["download"]).failed) == [
        "download/00000",
        "download/00001",
    ]
    assert done_by(good, run) == []
    assert [row["failed"] for row in status(Run.open(run))] == [{}, {}, {}]


# --- what would be thrown away ------------------------------------------------------------------------------


def test_a_setting_that_would_redo_downloads_is_told_before_anything_starts(site: Site, run: Path) -> None:
    before, seen = times(run), Counter(site.seen)
    other = recipe(site, rows=40, image_px=32)
    says = (
        r"download.image_px was 64 and is 32: .*"
        r"\(download: 2 shards, 40 rows, \d+\.\d\d hours\)\n.*--redo download"
    )
    with pytest.raises(InputError, match=says):
        build(other, run, executor=here)
    del before[".lease/00000001"]
    assert times(run) | before == times(run)
    assert site.seen == seen
    assert [name for name in done_by(other, run, redo=["download"]) if name.startswith("download")] == [
        "download/00000",
        "download/00001",
    ]


def test_what_says_how_hard_to_try_redoes_nothing(site: Site, run: Path) -> None:
    tries = {"timeout_s": 7.0, "retries": 5, "concurrency": 3, "workers": 2, "nameservers": ("127.0.0.1",)}
    assert done_by(recipe(site, rows=40, **tries), run) == []


def test_metadata_that_changed_would_redo_all(site: Site, run: Path, tmp_path: Path) -> None:
    shutil.copytree(site.metadata, tmp_path / "changed")
    first = min((tmp_path / "changed").iterdir())
    pq.write_table(pq.read_table(first), first, compression="none")
    changed = recipe(replace(site, metadata=tmp_path / "changed"), rows=40)
    with pytest.raises(
        InputError, match=r"metadata file .* is another: .*download: 2 shards.*\n.*--redo source"
    ):
        build(changed, run, executor=here)
    smaller = recipe(site, rows=40)
    smaller = replace(smaller, stages=(replace(smaller.stages[0], rows_per_shard=10), *smaller.stages[1:]))  # type: ignore[call-arg]
    with pytest.raises(InputError, match=r"source.rows_per_shard was 20 and is 10"):
        build(smaller, run, executor=here)
    assert len([name for name in done_by(smaller, run, redo=["source"]) if name.startswith("download")]) == 4


def test_what_no_record_names_is_listed_and_deleted(site: Site, built: Path, run: Path) -> None:
    done_by(recipe(site, rows=40, image_px=32), run, redo=["download"])
    found = garbage(run)
    assert {Object.parse(name).plain() for name in found} >= {"download/00000.tar", "download/00001.parquet"}
    assert garbage(run, delete=True) == found
    assert garbage(run) == {}
    assert not any((run / name).exists() for name in found)
    outputs(run)


# --- rows again, blocks, append, images that go -------------------------------------------------------------


def test_rows_are_downloaded_again_and_the_good_ones_are_left_alone(
    site: Site, run: Path, tmp_path: Path
) -> None:
    """Of shard 0 only the rows whose link is dead are asked for again; its images stay, byte for byte."""
    before, seen = Run.open(run), Counter(site.seen)
    dead = {uid for uid, fault in list(site.faults.items())[:40] if BECOMES[fault] == "dead_link"}
    assert dead
    tars = {name: sha256_file(run / name) for name in before.files("download", ".tar")}
    result = retry(run, ["dead_link"], executor=here)
    asked = {path.split("/")[-1].removesuffix(".jpg") for path in (site.seen - seen)}
    assert asked == dead
    assert result.failed == {}
    again = Run.open(run)
    assert [sha256_file(run / name) for name in again.files("download", ".tar")] == list(tars.values())
    assert done_by(recipe(site, rows=40), run) == []  # all came out as before: nothing follows from it
    with pytest.raises(InputError, match=r"no row of a finished shard is timeout"):
        retry(run, ["timeout"], executor=here)
    with pytest.raises(InputError, match=r"'ok' is no status of a failed row"):
        retry(run, ["ok"], executor=here)


def test_a_block_in_which_too_much_failed_by_transport_is_held_back(site: Site, tmp_path: Path) -> None:
    """A web that is down on that day is no data; when it is up again the rows are asked for again."""
    down = recipe(site, rows=40, timeout_s=0.001, hold_above=0.3)
    result = build(down, tmp_path / "run", executor=here)
    assert list(result.held) == ["00000"]
    assert re.search(r"\d+ of 40 rows of block 00000 failed by transport \(\d+ timeout", result.held["00000"])
    assert not any(name.startswith("verdict") for name in result.done)
    taken = build(
        recipe(site, rows=40, timeout_s=0.001, accept_failures=True), tmp_path / "run", executor=here
    )
    assert [name for name in taken.done if name.startswith("verdict")] == ["verdict/00000", "verdict/00001"]
    retry(tmp_path / "run", ["timeout"], executor=here)  # still with the settings of the run
    assert (tmp_path / "run" / "download" / "00000" / "00000.json").exists()


def test_what_was_accepted_stays_accepted_and_what_was_not_stays_held(site: Site, tmp_path: Path) -> None:
    down = recipe(site, rows=40, timeout_s=0.001, hold_above=0.3)
    for _ in range(2):
        assert list(build(down, tmp_path / "run", executor=here).held) == ["00000"]
    accepted = recipe(site, rows=40, timeout_s=0.001, hold_above=0.3, accept_failures=True)
    assert build(accepted, tmp_path / "run", executor=here).held == {}
    other = recipe(site, rows=40, timeout_s=0.001, hold_above=0.3, max_urls=7)
    again = build(other, tmp_path / "run", executor=here)
    assert again.held == {}
    assert [name for name in again.done if name.startswith("verdict")] == ["verdict/00000", "verdict/00001"]


def test_rows_are_not_taken_from_a_file_that_is_damaged(site: Site, run: Path) -> None:
    """It is told, and the next build downloads the shard again; the good shard's earlier files go."""
    earlier = one(run, "download/00001.tar")
    flip(one(run, "download/00000.tar"))
    failed = retry(run, ["dead_link", "undecodable"], executor=here).failed
    assert list(failed) == ["download/00000"]
    assert "no longer has the bytes of its record" in failed["download/00000"]
    assert not earlier.exists()
    assert "download/00000" in done_by(recipe(site, rows=40), run)
    assert garbage(run) == {}
    with pytest.raises(InputError, match=r"no status of failed rows was named"):
        retry(run, [], executor=here)


def test_records_are_found_while_somebody_compacts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the list of the folder and the reading of what it names."""
    store = Folder(tmp_path)
    for n in range(150):
        put_record(store, "a/00000", f"{n:05d}", Record(key=f"{n}"))
    real, times = Folder.read, [70, 10]

    def read(self: Folder, name: str) -> bytes | None:
        if times and name == f"a/00000/{times[-1]:05d}.json":
            times.pop()
            monkeypatch.setattr(Folder, "read", real)
            compact(store, "a/00000")
            monkeypatch.setattr(Folder, "read", read)
        return real(self, name)

    monkeypatch.setattr(Folder, "read", read)
    assert len(records(store, "a/00000")) == 150
    assert times == [70]


def test_metadata_may_grow(tmp_path: Path) -> None:
    """A then B: rows of A keep shards, bytes and verdicts whatever B is called; at once they would differ."""
    folder = tmp_path / "in"
    folder.mkdir()

    def write(name: str, first: int, number: int) -> None:
        uids = [f"{n:032x}" for n in range(first, first + number)]
        urls = [f"http://h/{n}" for n in range(first, first + number)]
        pq.write_table(pa.table({"uid": uids, "url": urls, "text": ["a"] * number}), folder / name)

    grows = Recipe("grows", (Source(files=str(folder), rows_per_shard=20), Questioning()))
    write("b.parquet", 0, 50)
    assert done_by(grows, tmp_path / "run")[:3] == ["source/00000", "source/00001", "source/00002"]
    before = outputs(tmp_path / "run")
    write("a.parquet", 50, 30)
    done = done_by(grows, tmp_path / "run")
    assert [name for name in done if name.startswith("source")] == ["source/00003", "source/00004"]
    after = outputs(tmp_path / "run")
    assert before.items() <= after.items()
    index = Run.open(tmp_path / "run").index
    assert index.of_batches() == [{"files": 1, "rows": 50}, {"files": 1, "rows": 30}]
    assert [(block.batch, block.first, block.last) for block in index.blocks] == [(0, 0, 3), (1, 3, 5)]
    uids = [
        u
        for name in Run.open(tmp_path / "run").files("source")
        for u in pq.read_table(tmp_path / "run" / name)["uid"].to_pylist()
    ]
    assert uids == [f"{n:032x}" for n in range(80)]
    write("c.parquet", 70, 30)  # of which some are there already
    with pytest.raises(InputError, match=r"uid 0*46 occurs twice: shard 4 row 0 and shard 5 row 0"):
        build(grows, tmp_path / "run", executor=here)


def test_the_verdict_on_a_row_does_not_change_with_rows_that_come_later(site: Site, tmp_path: Path) -> None:
    """Of four placeholders three are among the first 40 rows: with three URLs allowed only the last is one
    too many.
    """
    place = tmp_path / "run"
    done_by(recipe(site, rows=40, max_urls=3), place)
    before = {name: sha256_file(place / name) for name in Run.open(place).files("verdict")}
    assert "duplicate_image" not in status(Run.open(place))[2]["rows"]  # type: ignore[operator]
    done_by(recipe(site, max_urls=3), place)
    after = Run.open(place).files("verdict")
    assert {name: sha256_file(place / name) for name in after[:2]} == before
    assert status(Run.open(place))[2]["rows"]["duplicate_image"] == 1  # type: ignore[index]
    done_by(recipe(site, max_urls=3), tmp_path / "at once")
    assert status(Run.open(tmp_path / "at once"))[2]["rows"]["duplicate_image"] == 4  # type: ignore[index]


@dataclass(frozen=True, kw_only=True)
class Questioning(Stage):
    """Asks whether a uid occurs twice, and does nothing."""

    name: str = "questioning"

    def reads(self) -> tuple[str, ...]:
        return ("source",)

    def asks(self) -> tuple[Question, ...]:
        return (questions.Uids(),)

    @contextmanager
    def open(self) -> Iterator[Work]:
        def work(task: Task) -> Mapping[str, int]:
            write_parquet(pq.read_table(task.input("source"), columns=["uid"]), task.output())
            return {"ok": 1}

        yield work


def write_rows(path: Path, number: int) -> None:
    """Metadata of rows that nobody downloads."""
    uids = [f"{n:032x}" for n in range(number)]
    pq.write_table(pa.table({"uid": uids, "url": ["http://h/"] * number, "text": ["a"] * number}), path)


def test_a_finished_block_is_one_record_and_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 150 shards here. A compaction stopped anywhere, and a record redone after it, count right."""
    monkeypatch.setattr(index, "BLOCK", 150)
    number = 320
    write_rows(tmp_path / "in.parquet", number)
    many = Recipe("many", (Source(files=str(tmp_path / "in.parquet"), rows_per_shard=1), Questioning()))
    place = tmp_path / "run"
    real, deleted = Folder.delete, []

    def delete(store: Folder, name: str) -> None:
        if name.startswith("questioning/00000/") and name.endswith(".json"):
            deleted.append(name)
            if len(deleted) == 7:
                raise KeyboardInterrupt
        real(store, name)

    monkeypatch.setattr(Folder, "delete", delete)
    with pytest.raises(KeyboardInterrupt):
        build(many, place, executor=here)
    monkeypatch.setattr(Folder, "delete", real)
    assert not any(name.startswith(("source/", "questioning/00000")) for name in done_by(many, place))
    assert [(row["shards_done"], row["shards_left"]) for row in status(Run.open(place))] == [(320, 0)] * 2
    assert sorted(path.name for path in (place / "source" / "00001").glob("*.json")) == []
    assert (place / "source" / "00001" / "records.parquet").exists()
    entries = {str(folder): len(list(folder.iterdir())) for folder in place.rglob("*") if folder.is_dir()}
    assert max(entries.values()) <= 5000
    name = Run.open(place).files("source")[170]
    flip(place / name)
    Path(one(place, f"questioning/00001/{170:05d}.parquet")).unlink()
    forget(Folder(place), "questioning/00001", f"{170:05d}")
    assert build(many, place, executor=here).failed == {}
    assert Run.open(place).unfinished() == {}


@dataclass(frozen=True, kw_only=True)
class Hinted(Stage):
    """Writes down what is known early of `uids`, in which it has no say."""

    hint: ClassVar[str] = "uids"

    name: str = "hinted"

    def reads(self) -> tuple[str, ...]:
        return ("source",)

    @contextmanager
    def open(self) -> Iterator[Work]:
        def work(task: Task) -> Mapping[str, int]:
            write_parquet(pa.table({"hints": [list(task.hints)]}), task.output())
            return {"ok": 1}

        yield work


def test_what_blocks_say_early_is_asked_for_as_their_number_doubles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine blocks of two shards here: asked of 1, 2, 4 and 8 of them, by tasks that may fail."""
    monkeypatch.setattr(index, "BLOCK", 2)
    number = 18
    write_rows(tmp_path / "in.parquet", number)
    stages = (Source(files=str(tmp_path / "in.parquet"), rows_per_shard=1), Hinted(), Questioning())
    asked: list[int] = []
    real = questions.Uids.answer

    def answer(question: questions.Uids, task: Task) -> Mapping[str, int]:
        if task.name.startswith("early-"):
            asked.append(len(task.inputs))
            if len(task.inputs) == 4:
                raise OSError("on a bad day")
        return real(question, task)

    monkeypatch.setattr(questions.Uids, "answer", answer)
    place = tmp_path / "run"
    result = build(Recipe("early", stages), place, executor=here)
    assert asked == [1, 2, 4, 8]
    assert result.failed == {}
    assert len(result.done) == 3 * number + 9 + 1  # with the parts and the answer
    hints = [
        hint
        for name in Run.open(place).files("hinted")
        for hint in pq.read_table(place / name)["hints"].to_pylist()
    ]
    known = [len(hint) for hint in hints]
    assert known[:2] == [0, 0]
    assert all(known[4:])
    assert len({name for hint in hints for name in hint}) == 3
    assert all(re.fullmatch(r"uids/run/early-00000\.[0-9a-f]{8}\.txt", n) for hint in hints for n in hint)
    assert Run.open(place).unfinished() == {}

    forget(Folder(place), "hinted/00008", "00017")  # of the other blocks nothing is done again
    asked.clear()
    assert done_by(Recipe("early", stages), place) == ["hinted/00017"]
    assert asked == []  # the answer is there
    forget(Folder(place), "hinted/00008", "00017")
    forget(Folder(place), "uids/run", "00000")
    early = _Early(Run.open(place).plan())
    blocks = early.plan.index.blocks
    (first,) = early.parts_done("uids", blocks[:1])
    assert list(early.parts_done("uids", blocks[1:4])) == []  # while it is answered it is not asked again
    early.done(Outcome(first, error="on a bad day"))
    (second,) = early.parts_done("uids", blocks[4:5])
    assert (len(first.inputs), len(second.inputs)) == (1, 5)
    assert done_by(Recipe("early", stages), place) == ["hinted/00017", "uids/run"]
    assert asked == [9]


@dataclass(frozen=True, kw_only=True)
class After(Questioning):
    """The uids of the stage before it, again."""

    before: str

    def reads(self) -> tuple[str, ...]:
        return (self.before,)

    def asks(self) -> tuple[Question, ...]:
        return ()

    @contextmanager
    def open(self) -> Iterator[Work]:
        def work(task: Task) -> Mapping[str, int]:
            write_parquet(pq.read_table(task.input(self.before), columns=["uid"]), task.output())
            return {"ok": 1}

        yield work


def test_what_follows_from_what_came_out_as_it_was_is_done_too(tmp_path: Path) -> None:
    """a is lost, and made again as it was; so b, which read it, is done, and c is to do."""
    write_rows(tmp_path / "in.parquet", 3)
    names = ("source", "a", "b", "c")
    stages = [After(name=name, before=before) for before, name in pairwise(names)]
    chain = Recipe("chain", (Source(files=str(tmp_path / "in.parquet")), *stages))
    done_by(chain, tmp_path / "run")
    for name in ("a", "c"):
        one(tmp_path / "run", f"{name}/00000.parquet").unlink()
        one(tmp_path / "run", f"{name}/00000.json").unlink()
    assert done_by(chain, tmp_path / "run") == ["a/00000", "c/00000"]
    with pytest.raises(RecipeError, match=r"stage 'my-score', which cannot be a folder's name"):
        replace(chain, stages=(chain.stages[0], replace(stages[0], name="my-score")))


@dataclass(frozen=True, kw_only=True)
class Looks(Stage):
    """Reads the images, as captions and scores do."""

    name: str = "looks"
    colour: str = ""

    def reads(self) -> tuple[str, ...]:
        return ("download",)

    @contextmanager
    def open(self) -> Iterator[Work]:
        def work(task: Task) -> Mapping[str, int]:
            number = sum(1 for _ in images(task.input("download", ".tar")))
            write_parquet(pa.table({"images": [number]}), task.output())
            return {"ok": number}

        yield work


def test_images_that_were_dropped_are_a_state_and_not_a_fault(site: Site, tmp_path: Path) -> None:
    looking = replace(recipe(site, rows=40), stages=(*recipe(site, rows=40).stages[:2], Looks()))
    place = tmp_path / "run"
    build(looking, place, executor=here, drop_images=True)
    assert Run.open(place).files("download", ".tar") == []
    assert not list(place.rglob("*.tar"))
    assert Run.open(place).unfinished() == {}
    assert done_by(looking, place) == []
    kept = tmp_path / "kept"
    build(looking, kept, executor=here)
    assert Run.open(kept).files("download", ".tar")
    crash = Folder(kept)  # between the record that says so and the file
    record = next(record for _, record in Run.open(kept).shards("download"))
    put_record(crash, "download/00000", "00000", replace(record, dropped=(record.output(".tar"),)))
    assert list(garbage(kept, delete=True)) == [record.output(".tar")]
    build(looking, kept, executor=here, drop_images=True)  # of a run that is finished
    assert not list(kept.rglob("*.tar"))
    with pytest.raises(InputError, match=r"no row of a finished shard is dead_link"):
        retry(kept, ["dead_link"], executor=here)
    other = replace(looking, stages=(*looking.stages[:2], Looks(colour="red")))
    asks_too_much = replace(other, stages=(other.stages[0], replace(other.stages[1], image_px=32), Looks()))  # type: ignore[call-arg]
    with pytest.raises(InputError, match=r"download.image_px was 64"):
        build(asks_too_much, place, executor=here, redo=["source"])
    assert done_by(looking, place) == []  # what was refused has changed nothing
    says = (
        r"images are needed that were dropped; downloading them again takes about: 2 shards, 40 rows.*\n"
        r".*--redo download"
    )
    with pytest.raises(InputError, match=says):
        build(other, place, executor=here)
    seen = Counter(site.seen)
    assert "download/00000" in done_by(other, place, redo=["download"])
    assert sum((site.seen - seen).values()) >= 40


# --- a full disk --------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", mib=2) as folder:
        yield folder


@pytest.mark.parametrize("kib_left", [0, 4, 16, 100, 300])
def test_a_full_disk_is_the_users_to_free_and_then_the_build_goes_on(
    site: Site, whole: dict[str, str], small_disk: Path, kib_left: int
) -> None:
    """Wherever it happens: at recipe.json, at the source, in the tar, in the last stage."""
    ballast = fill(small_disk, kib_left)
    with pytest.raises(
        InputError, match=r"the disk of .* is full.*\n.*free some space, then type the same command again"
    ):
        build(recipe(site), small_disk / "run", executor=here)
    ballast.unlink()
    done_by(recipe(site), small_disk / "run")
    assert outputs(small_disk / "run") == whole


def test_the_command_says_that_a_disk_is_full_in_two_lines_and_exits_2(
    site: Site, small_disk: Path, tmp_path: Path
) -> None:
    source, download, _ = recipe(site).stages
    (tmp_path / "recipe.json").write_text(Recipe("three", (source, download, Dedup())).to_json())
    fill(small_disk, 16)
    done = recap("build", tmp_path / "recipe.json", "--run", small_disk / "run", check=2)
    first, second = done.stderr.strip().splitlines()[-2:]
    assert first.startswith("recap: the disk of ")
    assert second == "  free some space, then type the same command again"
    assert "Traceback" not in done.stderr


def test_of_a_subset_nothing_is_left_when_all_of_it_is_done(site: Site, tmp_path: Path) -> None:
    uids = sorted(list(site.faults)[::3])
    np.save(
        tmp_path / "subset.npy", np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids], "u8,u8")
    )
    whole = recipe(site)
    some = replace(
        whole, stages=(replace(whole.stages[0], subset=str(tmp_path / "subset.npy")), *whole.stages[1:])
    )  # type: ignore[call-arg]
    assert [row["rows_left"] for row in estimate(some, tmp_path / "run")] == [ROWS, ROWS, ROWS]
    done_by(some, tmp_path / "run")
    assert [(row["rows_done"], row["rows_left"]) for row in estimate(some, tmp_path / "run")] == [(20, 0)] * 3


@pytest.mark.parametrize("name", ["run[1]", "r*n", "r?n", "it's", "a=1", "{a,b}", "é " * 30])
def test_a_run_reads_its_own_files_whatever_its_name(site: Site, tmp_path: Path, name: str) -> None:
    """Beside it lies a run whose name the pattern would match, with other rows."""
    for decoy in ("run1", "rxn"):
        done_by(recipe(site, rows=20), tmp_path / decoy)
    done_by(recipe(site, rows=40), tmp_path / name)
    assert [sum(row["rows"].values()) for row in status(Run.open(tmp_path / name))] == [40, 40, 40]  # type: ignore[attr-defined]
    assert json.loads((tmp_path / name / "uids" / "run" / "00000.json").read_text())["rows"] == {"rows": 40}


def test_a_day_that_is_none_is_told_before_anything_is_done(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(InputError, match="SOURCE_DATE_EPOCH is 'yesterday'"):
        estimate(recipe(site, rows=20), tmp_path / "run")
    with pytest.raises(InputError, match="SOURCE_DATE_EPOCH"):
        build(recipe(site, rows=20), tmp_path / "run", executor=here)
    assert not (tmp_path / "run" / "source").exists()


def test_a_finished_run_can_be_looked_at_when_its_metadata_is_gone(
    site: Site, run: Path, tmp_path: Path
) -> None:
    """But not built any further: what the rows were is not known any more."""
    gone = recipe(site, rows=40)
    gone = replace(gone, stages=(replace(gone.stages[0], files=str(tmp_path / "gone")), *gone.stages[1:]))  # type: ignore[call-arg]
    assert Run(Folder(run), gone).unfinished() == {}
    with pytest.raises(InputError, match="no parquet, csv or tsv file"):
        build(gone, run, executor=here)


def test_what_cannot_work_is_refused_before_anything_is_done(site: Site, tmp_path: Path) -> None:
    whole = recipe(site, rows=40)
    bad = replace(
        whole,
        stages=(whole.stages[0], replace(whole.stage("download"), resize_mode="nonsense"), whole.stages[2]),
    )  # type: ignore[call-arg]
    with pytest.raises(InputError, match=r"no resize_mode 'nonsense'\n.*keep_ratio_largest"):
        build(bad, tmp_path / "new", executor=here)
    assert not (tmp_path / "new" / "source").exists()
