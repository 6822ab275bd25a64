"""Where tasks run. An executor takes a stage and its tasks and yields an outcome for each, in any order.

`local` is a pool of worker processes on this machine, each opening the stage once. A worker that dies, by the kernel's
hand or by its library's, costs its tasks an attempt and nothing else.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import multiprocessing.util
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from builder.commit import commit, damaged_input
from builder.core import Record, Stage, Task, Work
from builder.errors import UserError, telling_of_a_full_disk

ATTEMPTS = 3
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a task ended: a record, or the last line of what went wrong."""

    task: Task
    record: Record | None = None
    error: str = ""
    damaged: bool = False  # an input was damaged and has to be made again first


Executor = Callable[[Stage, Iterable[Task]], Iterator[Outcome]]


def local(stage: Stage, tasks: Iterable[Task]) -> Iterator[Outcome]:
    """Run tasks in `stage.num_workers()` processes.

    Raises:
        UserError: from a worker, for what no other shard could survive either (a model that cannot be loaded, a full disk).
    """
    todo = deque((task, 1, False) for task in tasks)  # attempt, and whether it has to be alone: a worker died that may have been its own
    running: dict[Future[Outcome], tuple[Task, int, bool]] = {}
    num_workers = min(stage.num_workers(), len(todo))
    log_file = todo[0][0].folder / "worker.log"
    pool = _pool(stage, num_workers, log_file)
    try:
        while todo or running:
            broken = False
            while todo and len(running) < num_workers and not (running and (todo[0][2] or any(alone for _, _, alone in running.values()))):
                try:
                    running[pool.submit(_run, todo[0][0])] = todo[0]
                except BrokenProcessPool:  # a worker died while nobody waited
                    broken = True
                    break
                todo.popleft()
            done = set() if broken else wait(running, return_when=FIRST_COMPLETED).done
            broken = broken or any(isinstance(future.exception(), BrokenProcessPool) for future in done)
            ended = [(future, running.pop(future)) for future in (list(running) if broken else done)]
            if broken:
                wait(future for future, _ in ended)
                _kill(pool)
                pool = _pool(stage, num_workers, log_file)
            dead = [future for future, _ in ended if isinstance(future.exception(), BrokenProcessPool)]
            for future, (task, attempt, _) in ended:
                if future in dead and len(dead) > 1:  # whose doing it was is not known
                    todo.append((task, attempt, True))
                    continue
                outcome = Outcome(task, error="a worker process died (out of memory?)") if future in dead else future.result()
                if outcome.error and not outcome.damaged and attempt < ATTEMPTS:
                    log.info("%s %s: %s; attempt %d of %d follows", stage.name, task.name, outcome.error, attempt + 1, ATTEMPTS)
                    todo.append((task, attempt + 1, future in dead))
                else:
                    yield outcome
    finally:
        _kill(pool)


def here(stage: Stage, survey: Task) -> Outcome:
    """Do a survey in this process: it is a query over a few columns, done sooner than a worker starts."""
    return _attempt(stage, survey, lambda: stage.survey)


def _pool(stage: Stage, num_workers: int, log_file: Path) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(num_workers, context, _start, (stage, os.getpid(), log_file, log.getEffectiveLevel()))


def _kill(pool: ProcessPoolExecutor) -> None:
    """End the workers: politely when they are idle, at once when they are not."""
    processes = list((pool._processes or {}).values())
    idle = not pool._pending_work_items
    pool.shutdown(wait=idle, cancel_futures=True)
    for process in processes:
        if process.is_alive():
            process.kill()


# --- in the worker ----------------------------------------------------------------------------------------------------

_stage: Stage
_work: Work | None = None
_stack = ExitStack()


def _start(stage: Stage, parent: int, log_file: Path, level: int) -> None:
    global _stage
    _stage = stage
    die_with(parent)
    multiprocessing.util.Finalize(None, _stack.close, exitpriority=10)  # models are unloaded when the worker ends by itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    with open(log_file, "ab") as file:  # what libraries print belongs there, not between the lines of the progress
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("builder").setLevel(level)


def _run(task: Task) -> Outcome:
    return _attempt(_stage, task, _open)


def _open() -> Work:
    global _work
    _work = _work or _stack.enter_context(_stage.open())
    return _work


def _attempt(stage: Stage, task: Task, open_: Callable[[], Work]) -> Outcome:
    for leftover in task.folder.glob(f".{task.name}.*.part"):
        leftover.unlink()
    try:
        with telling_of_a_full_disk(task.run):
            work = open_()
            start = time.monotonic()  # loading a model is not the shard's doing
            rows = work(task)
            return Outcome(task, commit(stage, task, rows, time.monotonic() - start))
    except UserError:
        if damaged := damaged_input(task):
            return Outcome(task, error=damaged, damaged=True)
        raise
    except Exception as error:  # noqa: BLE001 - the one shard boundary: whatever it was, the other shards go on
        log.warning("%s %s: %s", stage.name, task.name, traceback.format_exc())
        damaged = damaged_input(task)
        return Outcome(task, error=damaged or f"{type(error).__name__}: {error}".splitlines()[0], damaged=bool(damaged))


def die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent dies: a build killed with -9 leaves no writer behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)
