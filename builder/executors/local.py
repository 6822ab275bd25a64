"""Worker processes on this machine."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path

from builder.core import Stage, Task
from builder.errors import InputError, UserError
from builder.executors.pool import Node, Pool, Worker
from builder.executors.work import Serving
from builder.machine import Machine
from builder.schedule import Outcome, Schedule
from builder.store import Store

LEAVE_S = 60  # for a worker that has nothing to do to unload its model
END_S = 5  # for one whose pipe is closed to be gone
log = logging.getLogger(__name__)


def local(schedule: Schedule) -> Iterator[Outcome]:
    """Do what is to do, by processes of this machine.

    Raises:
        UserError: as `Pool.carry_out`.
    """
    needs = {stage.name: stage.resources() for stage in schedule.stages.values()}
    most = {stage.name: stage.num_workers() for stage in schedule.stages.values()}
    node = Node(schedule, Machine.here(), needs, most, partial(_Process, schedule.store))
    return Pool(schedule, [node], _speaking).carry_out()


def _speaking(busy: list[Worker]) -> list[Worker]:
    processes = [worker for worker in busy if isinstance(worker, _Process)]
    ready = wait([*(one.pipe for one in processes), *(one.process.sentinel for one in processes)])
    return [one for one in processes if one.pipe in ready or one.process.sentinel in ready]


class _Process(Worker):
    def __init__(self, store: Store, stages: tuple[Stage, ...], gpus: tuple[str, ...]) -> None:
        super().__init__(stages, gpus)
        context = multiprocessing.get_context("spawn")
        self.log_file = store.logs / f"{self.name}.log"
        self.pipe, theirs = context.Pipe()
        level = log.getEffectiveLevel()
        arguments = (theirs, stages, store, gpus, os.getpid(), self.log_file, level)
        self.process = context.Process(target=_serve, args=arguments)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is its parent's to handle
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        self.is_killed = False

    def send(self, task: Task) -> None:
        with suppress(OSError):  # it has died; whoever waits for it is told
            self.pipe.send(task)

    def hear(self) -> Outcome | None:
        try:
            heard = self.pipe.recv()
        except (EOFError, OSError):
            wait([self.process.sentinel], timeout=END_S)
            self.kill()
            code = self.process.exitcode or 0
            died = (
                f"was killed by signal {-code} (out of memory?)" if code < 0 else f"ended with status {code}"
            )
            if not self.is_open:
                there = self.log_file.exists()
                last = f"its last words are in {self.log_file}"
                words = last if there else "a script needs: if __name__ == '__main__'"
                reason = f"stage {self.name} cannot start: its worker process {died}"
                raise InputError(reason, words) from None
            heard = Outcome(self.tasks[0], error=f"a worker process {died}")
        return self.heard(heard)

    def dismiss(self) -> None:
        self.pipe.close()

    def is_alive(self) -> bool:
        return self.process.is_alive()

    def leave(self) -> None:
        wait([self.process.sentinel], timeout=LEAVE_S)
        self.kill()

    def kill(self) -> None:
        # With what it has started: an engine's own process would keep the memory of its GPU.
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


# --- in the worker ------------------------------------------------------------------------------------------


def _serve(
    pipe: Connection,
    stages: tuple[Stage, ...],
    store: Store,
    gpus: tuple[str, ...],
    parent: int,
    log_file: Path,
    level: int,
) -> None:
    die_with(parent)
    os.setpgid(0, 0)  # its parent ends it with all that it starts
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    # What libraries print belongs there, not between the lines of the progress.
    with open(log_file, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("builder").setLevel(level)

    def wait_for_one() -> Task | None:
        try:
            task: Task = pipe.recv()
        except EOFError:
            return None
        return task

    def poll() -> Task | None:
        return wait_for_one() if pipe.poll() else None

    with closing(Serving(store, stages, poll, wait_for_one, pipe.send)) as serving:
        if error := serving.open(f"more of it is in {log_file}"):
            return pipe.send(error)
        pipe.send(True)
        while (outcome := serving.do()) is not None:
            pipe.send(outcome)
            if isinstance(outcome, UserError) or outcome.error:
                return None
    return None


def die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent dies: a build killed with -9 leaves no writer
    behind.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)
