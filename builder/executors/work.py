"""Doing tasks, wherever that is."""

from __future__ import annotations

import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack

from builder.commit import commit, damaged_input, forget_maker, working
from builder.core import Stage, Task, Work
from builder.errors import (
    InputError,
    OutdatedError,
    RecapError,
    ShardError,
    UserError,
    telling_of_a_full_disk,
)
from builder.schedule import Outcome, Schedule
from builder.store import Store

ROOM_S = 0.5  # between looks whether there is room in the scratch folder
log = logging.getLogger(__name__)


def attempt(
    store: Store, stage: Stage, task: Task, work: Work, prepared: AbstractContextManager[Task] | None = None
) -> Outcome:
    """Do one task and commit it, or say what went wrong with it. `prepared` is what `working` gave, if it was
    asked already.

    Raises:
        UserError: no other task of the stage could be done either.
    """
    try:
        disks = (store.place, store.local.scratch)
        with telling_of_a_full_disk(*disks), prepared or working(store, task) as here:
            start = time.monotonic()
            rows = work(here)
            seconds = time.monotonic() - start - sum(here.loading)
            return Outcome(task, commit(store, stage, here, rows, seconds))
    except OutdatedError as error:
        for name in error.names:
            forget_maker(store, name)
        return Outcome(task, error=said(error), damaged=True)
    except UserError:
        if damaged := damaged_input(store, task):
            return Outcome(task, error=damaged, damaged=True)
        raise
    except Exception as error:  # noqa: BLE001 - the one shard boundary: whatever it was, the other shards go on
        log.warning("%s %s: %s", stage.name, task.name, traceback.format_exc())
        damaged = damaged_input(store, task)
        final = isinstance(error, ShardError)
        return Outcome(task, error=damaged or said(error), damaged=bool(damaged), final=final)


def said(error: Exception) -> str:
    """In one line; what recapkit raises on purpose says all by itself."""
    text = str(error) if isinstance(error, RecapError) else f"{type(error).__name__}: {error}"
    return text.splitlines()[0]


class Serving:
    """What a worker does: it opens a stage and those that share what it loads, then does tasks as they come.

    `poll` gives a task that has come, or None; `wait` waits for one, and gives None where there will be none.
    """

    def __init__(
        self,
        store: Store,
        stages: tuple[Stage, ...],
        poll: Callable[[], Task | None],
        wait: Callable[[], Task | None],
        is_loaded: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self.store, self.stages, self.poll, self.wait, self.is_loaded = store, stages, poll, wait, is_loaded
        self.by_name = {stage.name: stage for stage in stages}
        self.stack = ExitStack()
        self.begun: deque[tuple[Task, AbstractContextManager[Task] | None]] = deque()

    def open(self, words: str) -> UserError | None:
        """Why it cannot be opened, if it cannot; `words` say where more is told."""
        stage = self.stages[0]
        try:
            with telling_of_a_full_disk(self.store.place, self.store.local.scratch):
                self.work = self.stack.enter_context(stage.open_with(self.stages[1:]))
            if stage.ahead:
                self.work.next_task = self.peek  # type: ignore[attr-defined]  # of the work of such a stage
                self.work.is_loaded = self.is_loaded  # type: ignore[attr-defined]
        except UserError as error:
            return error
        except Exception as error:  # noqa: BLE001 - whatever it was, every shard would meet it
            log.warning("%s: %s", stage.name, traceback.format_exc())
            given = ", ".join(f"{name}={value}" for name in stage.paths if (value := getattr(stage, name)))
            reason = f"stage {stage.name} cannot start{', ' if given else ''}{given}: {said(error)}"
            if "out of memory" in str(error).lower():
                lower = f"{stage.name}.gpu_memory_utilization, {stage.name}.in_flight or .max_model_len"
                words = f"it ran out of memory: lower {lower}, or use a larger GPU; {words}"
            return InputError(reason, words)
        return None

    def do(self) -> Outcome | UserError | None:
        """Do the next task; None where there will be none. After an error it is to do no other: what that
        left behind reaches none, one that was begun ahead either.
        """
        task, prepared = self.begun.popleft() if self.begun else (self.wait(), None)
        if task is None:
            return None
        if not prepared and not self.store.has_room():  # others are at work there, and will make some
            log.warning("%s %s waits for room in the scratch folder", task.stage, task.name)
            while not self.store.has_room():
                time.sleep(ROOM_S)
        try:
            return attempt(self.store, self.by_name[task.stage], task, self.work, prepared)
        except UserError as error:
            return error

    def peek(self) -> Task | None:
        """The next task with its inputs at hand, each once, if there is one already."""
        task = self.poll() if self.store.has_room() else None
        if task is None:
            return None
        stack = ExitStack()
        try:
            here = stack.enter_context(working(self.store, task))
        except OSError:
            self.begun.append((task, None))
            return None  # which is told when its turn comes
        self.begun.append((task, _Prepared(here, stack)))
        return here

    def close(self) -> None:
        self.stack.close()


class _Prepared:
    """What `working` gave, entered before its time."""

    def __init__(self, here: Task, stack: ExitStack) -> None:
        self.here, self.stack = here, stack

    def __enter__(self) -> Task:
        return self.here

    def __exit__(self, *_: object) -> None:
        self.stack.close()


def in_this_process(schedule: Schedule) -> Iterator[Outcome]:
    """All tasks, one after the other and each once, without a process of their own."""
    with ExitStack() as stack:
        works: dict[str, Work] = {}
        while task := schedule.take():
            stage = schedule.stages[task.stage]
            if stage.name not in works:
                sharing = schedule.sharing(stage)
                work = stack.enter_context(sharing[0].open_with(sharing[1:]))
                works |= dict.fromkeys((each.name for each in sharing), work)
            outcome = attempt(schedule.store, stage, task, works[stage.name])
            schedule.done(outcome)
            yield outcome
