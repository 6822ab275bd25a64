"""What a user is told when something is wrong.

One line that names the place and what to type next, an exit status, and nothing else. The cases are in
`hostile/`, some two dozen kinds of them. Each is a command in a process of its own, forked from one that has
done its imports.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest
from conftest import FULL, outlived
from hostile import documents, models, places, queries, settings, tables
from hostile.case import Case, Outcome, Situation, published

ALL = list(
    itertools.chain.from_iterable(
        kind.cases() for kind in (tables, settings, models, documents, places, queries)
    )
)
CASES = ALL if FULL else ALL[::3]
CPU_S, LIMIT_S = (
    40,
    120,
)  # the first is what a command may take, the second when it is taken to hang: other tests run beside it
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
PARTIAL = re.compile(r"\.(part|tmp)$|^\.(staging|duckdb)")
MAY_CHANGE = re.compile(r"(^|/)(\.lock|\.files\.json|versions/.*)$")  # notes of our own
Run = Callable[
    [dict[str, object]], tuple[int | None, float]
]  # an order -> exit status, and the seconds of a processor that it took
Real = Callable[["Ground"], None]


@dataclass(frozen=True)
class Ground:
    """Where one case takes place: `here` is the user's, the command starts in `cwd`."""

    base: Path
    finished: Path

    @property
    def situation(self) -> Situation:
        return Situation(self.base / "here", self.finished)

    def made(self) -> Ground:
        for name in ("here", "cwd", "tmp"):
            (self.base / name).mkdir(parents=True)
        return self

    def order(self, case: Case, arguments: Sequence[object]) -> dict[str, object]:
        (self.base / "stdin").write_bytes(case.stdin)
        files = {name: str(self.base / name) for name in ("stdin", "stdout", "stderr", "cwd")}
        return {
            **files,
            "arguments": list(map(str, arguments)),
            "env": {"TMPDIR": str(self.base / "tmp"), **case.env},
            "limit_s": LIMIT_S,
        }

    def outcome(self, code: int | None, cpu_s: float) -> Outcome:
        out, err = (
            (self.base / name).read_bytes().decode("utf-8", "backslashreplace")
            for name in ("stdout", "stderr")
        )
        return Outcome(code, out, err, cpu_s)


class Forks:
    """The process that forks itself for every command."""

    def __init__(self) -> None:
        script = Path(__file__).parent / "hostile" / "forked.py"
        one_thread = os.environ | {
            "OPENBLAS_NUM_THREADS": "1",
            "JE_ARROW_MALLOC_CONF": "background_thread:false",
        }  # a fork has no other thread
        self.process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=one_thread
        )
        self.answer(ready=True)

    def __call__(self, order: dict[str, object]) -> tuple[int | None, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.answer())
        return answer["code"], answer["cpu_s"]

    def answer(self, *, ready: bool = False) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line and (line == "ready\n") == ready, f"the forking process said {line!r}"  # noqa: PT018
        return line

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def finished(demo_run: Path) -> Iterator[Path]:
    """The finished run, which no case may change, and what it published."""
    before = [contents(folder) for folder in (demo_run, published(demo_run))]
    yield demo_run
    assert [contents(folder) for folder in (demo_run, published(demo_run))] == before, (
        "a case wrote to the run that all of them share"
    )


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def forks(finished: Path, reals: object) -> Iterator[Forks]:  # real processes run while this one imports
    process = Forks()
    yield process
    process.close()


@pytest.fixture
def ground(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("h"), finished).made()


@pytest.fixture(scope="module")
def reals(
    request: pytest.FixtureRequest, finished: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[None]]]:
    """What is done by real processes, two at a time; begun at once, since it takes seconds each."""
    wanted = {
        item.callspec.params.get("real")
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and not item.get_closest_marker("skip")
    }
    with ThreadPoolExecutor(2) as pool:
        begun = {
            name: pool.submit(real, Ground(tmp_path_factory.mktemp("r"), finished).made())
            for name, real in (REALS | AS_PROCESSES).items()
            if name in wanted
        }
        yield begun
        for future in begun.values():
            future.cancel()


def as_a_process(order: dict[str, object]) -> tuple[int | None, float]:
    """The command as a user starts it."""
    with (
        open(str(order["stdin"])) as stdin,
        open(str(order["stdout"]), "w") as stdout,
        open(str(order["stderr"]), "w") as stderr,
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", "builder.cli", *order["arguments"]],  # type: ignore[misc]
            stdin=stdin, stdout=stdout, stderr=stderr, cwd=str(order["cwd"]),
            env=os.environ | order["env"], start_new_session=True,  # type: ignore[operator]
        )  # fmt: skip
        try:
            return process.wait(LIMIT_S), 0.0
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None, 0.0


# --- what holds of every case -------------------------------------------------------------------------------


def judged(case: Case, ground: Ground, run: Run) -> None:
    arguments = case.prepare(ground.situation)
    before = entries(ground.base / "here")
    outcome = ground.outcome(*run(ground.order(case, arguments)))
    shown = f"exit {outcome.code}, {outcome.cpu_s:.1f} s\n{outcome.out[:2000]}\n{outcome.err[:2000]}"
    assert outcome.code is not None, f"it hung: {shown}"
    assert "Traceback" not in outcome.out + outcome.err, shown
    assert outcome.code in case.codes, shown
    assert outcome.cpu_s < CPU_S, shown
    told = outcome.out + outcome.err
    if outcome.code == 2:
        assert_one_message(case, outcome.err, shown)
    if outcome.code or case.code == 0:
        named = (outcome.err if outcome.code == 2 else told).replace(f"{ground.base}/here", "")
        for place in case.places:
            assert place.search(named) if isinstance(place, re.Pattern) else place in named, (
                f"{place!r} is not named: {shown}"
            )
    assert not CONTROL.search(told), f"{CONTROL.findall(told)[:5]}: {shown}"
    assert outcome.code == 0 or max(map(len, told.splitlines()), default=0) <= 1000, shown
    assert not list((ground.base / "cwd").iterdir()), (
        f"left where it was started: {list((ground.base / 'cwd').iterdir())}"
    )
    assert not list((ground.base / "tmp").iterdir()), (
        f"left among temporary files: {list((ground.base / 'tmp').iterdir())}"
    )
    after = entries(ground.base / "here")
    assert [
        name for name in before if not MAY_CHANGE.search(name) and after.get(name) != before[name]
    ] == [], f"changed or gone: {shown}"
    # In a run the next attempt takes away what one has left.
    assert [
        name
        for name in after
        if name not in before and not name.startswith("run/") and PARTIAL.search(name.rpartition("/")[2])
    ] == [], f"left half done: {shown}"
    if case.also:
        case.also(ground.situation, outcome)


def assert_one_message(case: Case, err: str, shown: str) -> None:
    """`recap: what is wrong` and a hint, at most four lines; or click's usage error."""
    lines = err.splitlines()
    if case.after_progress:
        lines = list(itertools.dropwhile(lambda line: not line.startswith("recap: "), lines))
    assert lines, f"nothing was said: {shown}"
    assert lines[0].startswith("recap: ") or (
        lines[0].startswith("Usage: ") and lines[-1].startswith("Error: ")
    ), shown
    assert len(lines) <= 4, f"{len(lines)} lines: {shown}"
    assert sum(line.startswith("recap: ") for line in lines) <= 1, shown


def entries(folder: Path) -> dict[str, tuple[object, ...]]:
    """What is in a folder, without following links: kind, size, time and inode of files."""
    found: dict[str, tuple[object, ...]] = {}
    for path in folder.rglob("*"):
        about = path.lstat()
        file = (about.st_size, about.st_mtime_ns, about.st_ino) if stat.S_ISREG(about.st_mode) else ()
        found[str(path.relative_to(folder))] = (stat.S_IFMT(about.st_mode), *file)
    return found


@pytest.mark.full
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mistake_is_one_line_that_names_its_place(case: Case, forks: Forks, ground: Ground) -> None:
    judged(case, ground, forks)


def test_there_are_enough_of_them() -> None:
    assert len({case.name for case in ALL}) == len(ALL)
    assert len(CASES) >= 300


# --- signals, pipes and shells ------------------------------------------------------------------------------

SLOW = """
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from builder.core import Recipe, Stage
from builder.stages.source import Source


@dataclass(frozen=True, kw_only=True)
class Slow(Stage):
    name: str = "slow"

    def reads(self):
        return ("source",)

    @contextmanager
    def open(self):
        def work(task):
            Path(task.store.place, "started").touch()
            time.sleep(120)

        yield work


def rows(*, metadata: str) -> Recipe:
    return Recipe("rows", (Source(files=metadata), Slow()))
"""


def a_signal(number: signal.Signals, ground: Ground, *, to_all: bool) -> None:
    """One line and the usual exit status. A terminal signals all its foreground's processes, `kill` one."""
    s = ground.situation
    recipe, metadata = s.recipe(SLOW, "slow_rows.py"), s.parquet()
    # In the background of a shell the tests ignore SIGINT, under nohup SIGHUP, and so would the build.
    command = ["env", "--default-signal=INT,HUP", sys.executable, "-m", "builder.cli"]
    command += ["build", f"{recipe}:rows", f"metadata={metadata}", "--run", str(s.here / "run")]
    process = subprocess.Popen(
        command, cwd=ground.base / "cwd", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env=os.environ | {"TMPDIR": str(ground.base / "tmp")},
    )  # fmt: skip
    end = time.monotonic() + 200
    try:
        while not (s.here / "run/started").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
        (os.killpg if to_all else os.kill)(process.pid, number)
        out, err = process.communicate(timeout=LIMIT_S)
    finally:
        if process.poll() is None:
            process.kill()  # its workers die with it
            process.communicate()
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode  # as a shell says it
    assert code == 128 + number, (out, err)
    assert out == ""
    said = [line for line in err.splitlines() if not line.startswith("source ")]
    assert len(said) == 1, err
    assert said[0].startswith("recap: "), err
    assert not outlived(children), "a worker outlived its build"
    assert not list((ground.base / "tmp").iterdir())


def shell(ground: Ground, command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`recap` in the command is the command line; the last process of a pipe says how it ended."""
    recap = f"{shlex.quote(sys.executable)} -m builder.cli"
    script = f'set -o pipefail\nrecap() {{ {recap} "$@"; }}\n{command}'
    return subprocess.run(
        ["bash", "-c", script], cwd=ground.base / "cwd", capture_output=True, text=True, timeout=60,
        check=False, env=os.environ | env,
    )  # fmt: skip


def assert_calm(done: subprocess.CompletedProcess[str], lines: int = 1) -> None:
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    said = done.stderr.splitlines()
    assert len(said) <= 2 * lines
    assert not said or said[0].startswith("recap: "), done.stderr


def a_closed_pipe(arguments: str, ground: Ground) -> None:
    done = shell(ground, f"recap {arguments} | true".format(run=ground.finished))
    assert_calm(done)
    assert done.returncode in (0, 1, 2, 141)


def a_full_disk(ground: Ground) -> None:
    done = shell(ground, f"recap status {ground.finished} > /dev/full")
    assert_calm(done)
    assert done.returncode == 2
    assert done.stderr


def no_standard_input(ground: Ground) -> None:
    assert_calm(done := shell(ground, f"recap sql {ground.finished} <&-"))
    assert done.returncode in (0, 2)


def ascii_only(ground: Ground) -> None:
    table = ground.situation.parquet(text=["größe", "猫", "é"])
    done = shell(ground, f"recap sql {table} 'select text from published'", PYTHONIOENCODING="ascii")
    assert_calm(done)
    assert done.returncode == 0


def a_folder_that_is_gone(ground: Ground) -> None:
    table = ground.situation.parquet()
    done = shell(
        ground,
        "mkdir gone; cd gone; rmdir ../gone; "
        f"recap plan recap_datacomp_1b metadata={table} captioner=a clip=b",
    )
    assert_calm(done)
    assert done.returncode == 2


REALS: dict[str, Real] = {
    "SIGTERM to a build": partial(a_signal, signal.SIGTERM, to_all=False),
    "SIGHUP to a build and its workers": partial(a_signal, signal.SIGHUP, to_all=True),
    "SIGINT to a build and its workers": partial(a_signal, signal.SIGINT, to_all=True),
    "output to a pipe that is closed: status": partial(a_closed_pipe, "status {run}"),
    "output to a pipe that is closed: sql": partial(
        a_closed_pipe, "sql {run} 'select range from range(100000)' --json"
    ),
    "output to a full disk": a_full_disk,
    "standard input is closed": no_standard_input,
    "a terminal of ASCII only": ascii_only,
    "the folder that it is started in is gone": a_folder_that_is_gone,
}
AS_PROCESSES: dict[str, Real] = {
    case.name: partial(judged, case, run=as_a_process) for case in ALL if case.real
}


@pytest.mark.parametrize(
    "real", [*REALS, *(pytest.param(name, marks=pytest.mark.slow) for name in AS_PROCESSES)]
)
def test_a_real_process_says_one_line_too(real: str, reals: dict[str, Future[None]]) -> None:
    reals[real].result()


def test_there_are_enough_real_ones() -> None:
    assert len(REALS | AS_PROCESSES) >= 20
