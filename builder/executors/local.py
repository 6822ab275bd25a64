"""Worker processes on this machine, by its cores, GPUs and memory.

Each opens a stage once, with those that share what it loads, and then does their tasks. A loaded stage makes
room for another only when nothing more is to come for it in the blocks at work. A worker that died or raised
is replaced: it costs its own task an attempt, and nothing that it left behind reaches another shard.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import traceback
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Literal

from builder.commit import working
from builder.core import Resources, Stage, Task
from builder.errors import InputError, UserError, telling_of_a_full_disk
from builder.executors.work import attempt, said
from builder.machine import Machine
from builder.schedule import Outcome, Schedule
from builder.store import Store

ATTEMPTS = 3
LEAVE_S = 60  # for a worker that has nothing to do to unload its model
END_S = 5  # for one whose pipe is closed to be gone
LOOKED_AT = 64  # tasks among which a worker looks for one of a shard that it has at hand
log = logging.getLogger(__name__)


def local(schedule: Schedule) -> Iterator[Outcome]:
    """Do what is to do.

    Raises:
        UserError: from a worker, for what no other shard could survive either: a model that cannot be loaded,
        a full disk.
    """
    pool = _Pool(schedule, Machine.here())
    tries: Counter[tuple[str, str, str]] = Counter()
    try:
        while pool.give_work():
            for worker in pool.speaking():
                outcome = worker.hear()
                if outcome is None:
                    continue
                task = outcome.task
                which = (task.stage, task.block, task.name)
                tries[which] += 1
                if outcome.error:
                    pool.end(worker)
                if outcome.error and not outcome.damaged and not outcome.final and tries[which] < ATTEMPTS:
                    log.info("%s; attempt %d of %d follows", _which(outcome), tries[which] + 1, ATTEMPTS)
                    schedule.give_back(task)
                else:
                    del tries[which]
                    schedule.done(outcome)
                    yield outcome
        pool.dismiss()
    finally:
        pool.kill()


def _which(outcome: Outcome) -> str:
    return f"{outcome.task.stage} {outcome.task.name}: {outcome.error}"


class _Pool:
    """The workers, and what of the machine they take."""

    def __init__(self, schedule: Schedule, machine: Machine) -> None:
        self.schedule, self.machine = schedule, machine
        self.needs = {stage.name: stage.resources() for stage in schedule.stages.values()}
        self.workers: list[_Worker] = []
        self.leaving: list[_Worker] = []
        self.chosen: _Worker | Literal["new"] | None = None  # for the task that is taken next
        self.wanted = 0.0  # cores for which the deepest stage waits that has tasks and workers

    def give_work(self) -> bool:
        """Give tasks to workers as long as the machine has room for them; False where nobody has anything to
        do.
        """
        self.wanted = 0.0
        while task := self.schedule.take(self._choose):
            self._worker_for(self.schedule.stages[task.stage]).give(task)
            self.wanted = 0.0
        for worker in [w for w in self.workers if not w.tasks and all(map(self.schedule.is_over, w.stages))]:
            self.workers.remove(worker)
            self.leaving.append(worker)
            worker.pipe.close()  # it unloads its model while the others go on
        if any(worker.tasks for worker in self.workers):
            return True
        for stage in self.schedule.is_ready():  # all that is loaded is in the way of it
            for worker in list(self.workers):
                self.end(worker, gently=True)
            if not self._choice(stage):
                needs, here = self.needs[stage.name], self.machine
                wanted = f"{needs.cpus:g} cores, {needs.gpus:g} GPUs and {needs.memory_gib:g} GiB"
                there = f"{here.cpus:g}, {len(here.gpus)} and {here.memory_gib:.0f}"
                reason = f"stage {stage.name} needs {wanted} at once; this machine has {there}"
                raise InputError(reason, "build on another machine, or change the stage's settings")
            return self.give_work()
        return False

    def speaking(self) -> list[_Worker]:
        """Wait until at least one worker that is at work has said something or died."""
        busy = [worker for worker in self.workers if worker.tasks]
        ready = wait([*(worker.pipe for worker in busy), *(worker.process.sentinel for worker in busy)])
        return [worker for worker in busy if worker.pipe in ready or worker.process.sentinel in ready]

    def end(self, worker: _Worker, *, gently: bool = False) -> None:
        self.workers.remove(worker)
        for task in worker.tasks:  # what it had not begun is nobody's fault
            self.schedule.give_back(task)
        if gently:
            worker.leave()
        worker.kill()

    def dismiss(self) -> None:
        for worker in self.workers:
            worker.pipe.close()  # all of them at once
        for worker in (*self.workers, *self.leaving):
            worker.leave()

    def kill(self) -> None:
        for worker in (*self.workers, *self.leaving):
            worker.kill()

    def _choose(self, stage: Stage, tasks: Iterable[Task]) -> Task | None:
        """A task of this stage that is given to somebody now. Asked of the deepest stages first.

        Stages that share a worker make of a shard what others of them have decoded and computed already, so
        each worker keeps to shards of its own; but none is idle for that.
        """
        choice = self._choice(stage)
        tasks = list(islice(tasks, LOOKED_AT))
        mine = [worker for worker in self.workers if stage in worker.stages]
        begun = {shard for worker in mine for shard in worker.shards}
        for worker in choice:
            own = worker.shards if worker != "new" else ()
            first = [task for task in tasks if _shard(task) in own]
            first += [task for task in tasks if _shard(task) not in begun]
            if first:
                self.chosen = worker
                return first[0]
        self.chosen = next((worker for worker in choice if worker == "new" or not worker.tasks), None)
        return tasks[0] if self.chosen else None

    def _choice(self, stage: Stage) -> Sequence[_Worker | Literal["new"]]:
        """Who may do a task of this stage now: idle workers, a new one, or those that begin it ahead."""
        needs, deeper = self.needs[stage.name], self.wanted
        mine = [worker for worker in self.workers if stage in worker.stages]
        idle = [worker for worker in mine if not worker.tasks]
        if idle or (len(mine) < stage.num_workers() and self._has_room(needs)):
            if self._has_cores(needs.cpus):
                return idle or ["new"]
            self.wanted = self.wanted or needs.cpus
        may_begin = mine if stage.ahead and not deeper else []
        return [worker for worker in may_begin if self._may_begin(worker, stage)]

    def _may_begin(self, worker: _Worker, stage: Stage) -> bool:
        """Has it room for a task that it begins ahead? Stages that share a worker take turns, so that it has
        the same shard of all of them at hand.
        """
        begun = Counter(task.stage for task in worker.tasks)
        others = [other for other in worker.stages if other is stage or self.schedule.has_ready(other)]
        turn = min(begun[other.name] for other in others) == begun[stage.name]
        return turn and 0 < len(worker.tasks) < 2 * len(worker.stages)

    def _has_room(self, needs: Resources) -> bool:
        """Is there memory, and a GPU, for one more worker, if others that can be spared make room for it?"""
        return self._fits(needs, self.workers) or self._fits(needs, self._needed())

    def _has_cores(self, cpus: float) -> bool:
        """Are there cores for a task, so that a deeper one that waits has to wait no longer for it?

        Small tasks would else keep a large one from ever being begun: beside what it waits for, the largest
        that is at work, there has to be room for both.
        """
        busy = [self.needs[worker.name].cpus for worker in self.workers if worker.tasks]
        if not busy:
            return True
        if sum(busy) + cpus > self.machine.cpus:
            return False
        return not self.wanted or sum(busy) - max(busy) + self.wanted + cpus <= self.machine.cpus

    def _needed(self) -> list[_Worker]:
        """Workers that cannot be spared: at work, or with more to come for them."""
        return [w for w in self.workers if w.tasks or any(map(self.schedule.waits, w.stages))]

    def _fits(self, needs: Resources, beside: list[_Worker]) -> bool:
        memory = sum(self.needs[worker.name].memory_gib for worker in beside)
        if beside and memory + needs.memory_gib > self.machine.memory_gib:
            return False
        return not needs.gpus or self._gpus(needs, beside) is not None

    def _gpus(self, needs: Resources, beside: list[_Worker]) -> tuple[str, ...] | None:
        """GPUs for a worker: whole ones, or one with so large a share left. Where the machine has none it
        goes without.
        """
        if not needs.gpus or not self.machine.gpus:
            return ()
        share = min(needs.gpus, 1.0)
        left = dict.fromkeys(self.machine.gpus, 1.0)
        for worker in beside:
            for gpu in worker.gpus:
                left[gpu] -= min(self.needs[worker.name].gpus, 1.0)
        free = [gpu for gpu, rest in left.items() if rest + 1e-9 >= share]
        number = max(1, round(needs.gpus))
        return tuple(free[:number]) if len(free) >= number else None

    def _worker_for(self, stage: Stage) -> _Worker:
        """Who does the task that `_choose` chose."""
        assert self.chosen is not None
        if self.chosen != "new":
            return self.chosen
        needs = self.needs[stage.name]
        self.leaving = [worker for worker in self.leaving if worker.process.is_alive()]
        if not self._fits(needs, [*self.workers, *self.leaving]):
            for worker in self.leaving:
                worker.leave()
            self.leaving.clear()
        if not self._fits(needs, self.workers):
            needed = self._needed()
            for worker in [worker for worker in self.workers if worker not in needed]:
                self.end(worker, gently=True)
        gpus = self._gpus(needs, [*self.workers, *self.leaving])
        worker = _Worker(self.schedule.sharing(stage), self.schedule.store, gpus or ())
        self.workers.append(worker)
        return worker


class _Worker:
    """A process that opens stages, says so, and then does the tasks that it is given."""

    def __init__(self, stages: tuple[Stage, ...], store: Store, gpus: tuple[str, ...]) -> None:
        context = multiprocessing.get_context("spawn")
        self.stages, self.name, self.gpus = stages, stages[0].name, gpus
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
        self.is_open = self.is_killed = False
        self.tasks: list[Task] = []  # the one that it does, and those that it may begin ahead
        self.shards = deque[tuple[str, str]](maxlen=4)  # the last that were given to it

    def give(self, task: Task) -> None:
        self.tasks.append(task)
        if _shard(task) not in self.shards:
            self.shards.append(_shard(task))
        with suppress(OSError):  # it has died; whoever waits for it is told
            self.pipe.send(task)

    def hear(self) -> Outcome | None:
        """What became of the task; None where all that it says is whether it has opened the stage, or loads
        something for it.

        Raises:
            UserError: the worker's, or that it died while it opened the stage or loaded.
        """
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
        if isinstance(heard, UserError):
            raise heard
        if isinstance(heard, bool):
            self.is_open = heard
            return None
        assert isinstance(heard, Outcome)
        self.tasks.pop(0)
        return heard

    def leave(self) -> None:
        """Let it unload its model, and end it if it takes too long."""
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


def _shard(task: Task) -> tuple[str, str]:
    return task.block, task.name


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
    stage, by_name = stages[0], {each.name: each for each in stages}
    with ExitStack() as stack:
        try:
            with telling_of_a_full_disk(log_file.parent):
                work = stack.enter_context(stage.open_with(stages[1:]))
            inbox = _Inbox(pipe, store)
            if stage.ahead:
                work.next_task = inbox.peek  # type: ignore[attr-defined]  # of the work of such a stage
                work.is_loaded = pipe.send  # type: ignore[attr-defined]
        except UserError as error:
            return pipe.send(error)
        except Exception as error:  # noqa: BLE001 - whatever it was, every shard would meet it
            log.warning("%s: %s", stage.name, traceback.format_exc())
            given = ", ".join(f"{name}={value}" for name in stage.paths if (value := getattr(stage, name)))
            words = f"more of it is in {log_file}"
            return pipe.send(InputError(f"stage {stage.name} cannot start, {given}: {said(error)}", words))
        pipe.send(True)
        while following := inbox.next():
            try:
                outcome = attempt(store, by_name[following[0].stage], following[0], work, following[1])
            except UserError as error:
                return pipe.send(error)
            pipe.send(outcome)
            if outcome.error:  # what that left behind reaches no other task, one given ahead either
                return None
    return None


class _Inbox:
    """The tasks that come through the pipe, and a look at the next ones before their time."""

    def __init__(self, pipe: Connection, store: Store) -> None:
        self.pipe, self.store = pipe, store
        self.waiting: deque[tuple[Task, AbstractContextManager[Task] | None]] = deque()

    def next(self) -> tuple[Task, AbstractContextManager[Task] | None] | None:
        """The next task, and its inputs where they are at hand; None where there will be none."""
        if self.waiting:
            return self.waiting.popleft()
        try:
            return self.pipe.recv(), None
        except EOFError:
            return None

    def peek(self) -> Task | None:
        """The next task with its inputs at hand, each once, if there is one already."""
        if not self.pipe.poll():
            return None
        try:
            task: Task = self.pipe.recv()
        except EOFError:
            return None
        try:
            stack = ExitStack()
            here = stack.enter_context(working(self.store, task))
        except OSError:
            self.waiting.append((task, None))
            return None  # which is told when its turn comes
        self.waiting.append((task, _Prepared(here, stack)))
        return here


class _Prepared:
    """What `working` gave, entered before its time."""

    def __init__(self, here: Task, stack: ExitStack) -> None:
        self.here, self.stack = here, stack

    def __enter__(self) -> Task:
        return self.here

    def __exit__(self, *_: object) -> None:
        self.stack.close()


def die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent dies: a build killed with -9 leaves no writer
    behind.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)
