"""Doing one task, wherever that is."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack

from builder.commit import commit, damaged_input, forget_maker, working
from builder.core import Stage, Task, Work
from builder.errors import OutdatedError, RecapError, ShardError, UserError, telling_of_a_full_disk
from builder.schedule import Outcome, Schedule
from builder.store import Store

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
        with telling_of_a_full_disk(store.place), prepared or working(store, task) as here:
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


class Prepared:
    """What `working` gave, entered before its time."""

    def __init__(self, here: Task, stack: ExitStack) -> None:
        self.here, self.stack = here, stack

    def __enter__(self) -> Task:
        return self.here

    def __exit__(self, *_: object) -> None:
        self.stack.close()


def said(error: Exception) -> str:
    """In one line; what recapkit raises on purpose says all by itself."""
    text = str(error) if isinstance(error, RecapError) else f"{type(error).__name__}: {error}"
    return text.splitlines()[0]


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
