"""Where tasks run. An executor takes a stage and its tasks and yields an outcome for each, in any order.

`local` runs them in worker processes on this machine, each of which opens the stage once. A worker that died or raised
is replaced: it costs its own task an attempt, and nothing that it left behind reaches another shard.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from builder.commit import commit, damaged_input
from builder.core import Record, Stage, Task, Work
from builder.errors import InputError, RecapError, ShardError, UserError, telling_of_a_full_disk

ATTEMPTS = 3
LEAVE_S = 60  # for a worker that has nothing to do to unload its model
END_S = 5  # for one whose pipe is closed to be gone
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a task ended: a record, or the last line of what went wrong."""

    task: Task
    record: Record | None = None
    error: str = ""
    damaged: bool = False  # an input was damaged and has to be made again first
    final: bool = False  # trying again would not help


Executor = Callable[[Stage, Iterable[Task]], Iterator[Outcome]]


def local(stage: Stage, tasks: Iterable[Task]) -> Iterator[Outcome]:
    """Run tasks in `stage.num_workers()` processes.

    Raises:
        UserError: from a worker, for what no other shard could survive either: a model that cannot be loaded, a full disk.
    """
    todo = deque((task, 1) for task in tasks)
    num_workers = min(stage.num_workers(), len(todo))
    log_file = todo[0][0].folder / "worker.log"
    workers: list[_Worker] = []
    try:
        while todo or any(worker.task for worker in workers):
            while todo and len(workers) < num_workers:
                workers.append(_Worker(stage, log_file))
            for worker in workers:
                if todo and not worker.task:
                    worker.give(*todo.popleft())
            for worker in _speaking(workers):
                outcome = worker.hear()
                if outcome is None:
                    continue
                task, tries = outcome.task, worker.tries
                if outcome.error:
                    worker.kill()
                    workers.remove(worker)
                if outcome.error and not outcome.damaged and not outcome.final and tries < ATTEMPTS:
                    log.info(
                        "%s %s: %s; attempt %d of %d follows",
                        stage.name,
                        task.name,
                        outcome.error,
                        tries + 1,
                        ATTEMPTS,
                    )
                    todo.append((task, tries + 1))
                else:
                    yield outcome
        for worker in workers:
            worker.leave()
    finally:
        for worker in workers:
            worker.kill()


class _Worker:
    """A process that opens the stage, says so, and then does the tasks that it is given, one after the other."""

    def __init__(self, stage: Stage, log_file: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.stage, self.log_file = stage, log_file
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, stage, os.getpid(), log_file, log.getEffectiveLevel())
        )
        mask = signal.pthread_sigmask(
            signal.SIG_BLOCK, {signal.SIGINT}
        )  # Ctrl-C is for the parent, which ends us
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        self.is_open = self.is_killed = False
        self.task: Task | None = None
        self.tries = 0

    def give(self, task: Task, tries: int) -> None:
        self.task, self.tries = task, tries
        with suppress(OSError):  # it has died; whoever waits for it is told
            self.pipe.send(task)

    def hear(self) -> Outcome | None:
        """What became of the task; None where all that it says is that it has opened the stage.

        Raises:
            UserError: the worker's, or that it died while it opened the stage.
        """
        try:
            said = self.pipe.recv()
        except (EOFError, OSError):
            wait([self.process.sentinel], timeout=END_S)
            self.kill()
            code = self.process.exitcode or 0
            died = (
                f"was killed by signal {-code} (out of memory?)"
                if code < 0
                else f"ended with exit status {code}"
            )
            if not self.is_open:
                words = (
                    f"its last words are in {self.log_file}"
                    if self.log_file.exists()
                    else "a script needs: if __name__ == '__main__'"
                )
                raise InputError(
                    f"stage {self.stage.name} cannot start: its worker process {died}", words
                ) from None
            assert self.task is not None
            said = Outcome(self.task, error=f"a worker process {died}")
        if isinstance(said, UserError):
            raise said
        if said is None:
            self.is_open = True
            return None
        assert isinstance(said, Outcome)
        self.task = None
        return said

    def leave(self) -> None:
        self.pipe.close()
        wait([self.process.sentinel], timeout=LEAVE_S)
        self.kill()

    def kill(self) -> None:
        """End it and what it has started: an engine's own process would keep the memory of its GPU."""
        self.pipe.close()
        if self.is_killed:
            return
        self.is_killed = True
        assert self.process.pid is not None  # which nobody else has before `join`
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(ProcessLookupError):  # it had no group yet
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()


def _speaking(workers: list[_Worker]) -> list[_Worker]:
    """Wait until at least one worker that is at work has said something or died."""
    busy = [worker for worker in workers if worker.task]
    ready = wait([*(worker.pipe for worker in busy), *(worker.process.sentinel for worker in busy)])
    return [worker for worker in busy if worker.pipe in ready or worker.process.sentinel in ready]


# --- in the worker ----------------------------------------------------------------------------------------------------


def _serve(pipe: Connection, stage: Stage, parent: int, log_file: Path, level: int) -> None:
    die_with(parent)
    os.setpgid(0, 0)  # its parent ends it with all that it starts
    with open(
        log_file, "ab"
    ) as file:  # what libraries print belongs there, not between the lines of the progress
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("builder").setLevel(level)
    with ExitStack() as stack:
        try:
            with telling_of_a_full_disk(log_file.parent):
                work = stack.enter_context(stage.open())
        except UserError as error:
            return pipe.send(error)
        except Exception as error:  # noqa: BLE001 - whatever it was, every shard would meet it
            log.warning("%s: %s", stage.name, traceback.format_exc())
            given = ", ".join(f"{name}={value}" for name in stage.paths if (value := getattr(stage, name)))
            return pipe.send(
                InputError(
                    f"stage {stage.name} cannot start, {given}: {_said(error)}",
                    f"more of it is in {log_file}",
                )
            )
        pipe.send(None)
        while (task := _next(pipe)) is not None:
            try:
                pipe.send(attempt(stage, task, work))
            except UserError as error:
                pipe.send(error)


def _next(pipe: Connection) -> Task | None:
    """The next task; None where there will be none."""
    try:
        task: Task = pipe.recv()
    except EOFError:
        return None
    return task


def attempt(stage: Stage, task: Task, work: Work) -> Outcome:
    """Do one task and commit it, or say what went wrong with it.

    Raises:
        UserError: no other task of the stage could be done either.
    """
    _sweep(task)
    try:
        with telling_of_a_full_disk(task.run):
            start = time.monotonic()
            rows = work(task)
            return Outcome(task, commit(stage, task, rows, time.monotonic() - start))
    except UserError:
        _sweep(task)
        if damaged := damaged_input(task):
            return Outcome(task, error=damaged, damaged=True)
        raise
    except Exception as error:  # noqa: BLE001 - the one shard boundary: whatever it was, the other shards go on
        log.warning("%s %s: %s", stage.name, task.name, traceback.format_exc())
        _sweep(task)
        damaged = damaged_input(task)
        return Outcome(
            task, error=damaged or _said(error), damaged=bool(damaged), final=isinstance(error, ShardError)
        )


def _sweep(task: Task) -> None:
    """Remove what an attempt that did not end has written."""
    for leftover in task.folder.glob(f".{task.name}.*.part"):
        leftover.unlink()


def _said(error: Exception) -> str:
    """In one line; what recapkit raises on purpose says all by itself."""
    return (str(error) if isinstance(error, RecapError) else f"{type(error).__name__}: {error}").splitlines()[
        0
    ]


def die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent dies: a build killed with -9 leaves no writer behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)
