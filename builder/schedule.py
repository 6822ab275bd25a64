"""The ready queue: which task comes next, deepest stage first, block by block.

    phase 0    source of all blocks: metadata are small, and no uid may occur twice
    phase 1    download, dedup, captions, scores: they overlap; a block or two are at work at a time
    phase 2    select, which applies what only the whole run could tell

A stage that waits for an answer over the whole run begins a phase; the recipe decides where. An executor
takes tasks and says what became of them.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain

from builder.commit import compact, drop
from builder.core import RUN, TRANSPORT, Object, Question, Record, Stage, Task
from builder.index import Block
from builder.plan import PART, BlockPlan, Plan, questions
from builder.store import Store

log = logging.getLogger(__name__)
BLOCKS_AT_WORK = 2
EARLY = "early-"  # with the number of a batch: a task of what only the whole run can answer
ACCEPTED = "accepted"  # beside a block's downloads: they are taken as they are
DROPPING = 16  # threads
ENOUGH_TO_JUDGE = 10  # shards of a block, after which it may be held back


@dataclass(frozen=True)
class Outcome:
    """How a task ended: a record, or the last line of what went wrong."""

    task: Task
    record: Record | None = None
    error: str = ""
    damaged: bool = False  # an input was damaged and has to be made again first
    final: bool = False  # trying again would not help
    lost: bool = False  # the machine went, perhaps for a reason that has nothing to do with the task


Left = dict[str, set[str]]
"""Block -> stages that have something to do there."""


class _Queue:
    """Tasks that are ready, those of the oldest block first: blocks at work would else end at the same time,
    and nothing be there to do while the next ones begin.
    """

    def __init__(self) -> None:
        self.blocks: dict[str, deque[Task]] = {}

    def __len__(self) -> int:
        return sum(map(len, self.blocks.values()))

    def __iter__(self) -> Iterator[Task]:
        return chain.from_iterable(self.blocks[block] for block in sorted(self.blocks))

    def append(self, task: Task) -> None:
        self.blocks.setdefault(task.block, deque()).append(task)

    def remove(self, task: Task) -> None:
        self.blocks[task.block].remove(task)
        if not self.blocks[task.block]:
            del self.blocks[task.block]

    def drop(self, block: str) -> int:
        """Those of a block; says how many they were."""
        return len(self.blocks.pop(block, ()))


class Schedule:
    """What is to do of a plan.

    `left` says which stages have something to do in a block, where that is known; `hold_above` is the share
    of rows that may fail by transport before a block is held back, unless it is to be accepted for good;
    `blocks_at_work` is how many are open at a time: what lies about of them is what a disk has to hold;
    `only` are tasks to do and nothing else.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        left: Left | None = None,
        hold_above: float = 1.0,
        accept: bool = False,
        drop_images: bool = False,
        blocks_at_work: int = BLOCKS_AT_WORK,
        only: Iterable[Task] | None = None,
    ) -> None:
        self.plan, self.hold_above, self.accept, self.drop_images = plan, hold_above, accept, drop_images
        self.blocks_at_work = blocks_at_work
        self.stages = {stage.name: stage for stage in plan.line}
        self.store: Store = plan.store
        self.damaged = False
        self.held: dict[str, str] = {}  # block -> why
        # Of opened blocks: tasks done, and all.
        self.totals: dict[str, list[int]] = {name: [0, 0] for name in self.stages}
        self._phases = _phases(plan)
        self._phase, self._blocks = -1, deque[Block]()
        self._open: dict[str, BlockPlan] = {}
        self._ready: dict[str, _Queue] = {name: _Queue() for name in self.stages}
        self._sharing: dict[str, tuple[Stage, ...]] = {}
        self._running: dict[tuple[str, str, str], Task] = {}
        self._at_work: Counter[str] = Counter()  # block -> tasks that are ready or running
        self._left = left
        self._asked: set[tuple[str, int]] = set()
        self._early = _Early(plan)
        self._only = only is not None
        for task in only or ():
            self._add(task)
            self.totals[task.stage][1] += 1

    # --- what an executor does ------------------------------------------------------------------------------

    def take(
        self, choose: Callable[[Stage, Iterable[Task]], Task | None] = lambda _, tasks: next(iter(tasks))
    ) -> Task | None:
        """The next task of a stage that may run, as `choose` chooses of those that are ready; None while
        there is none.
        """
        while True:
            for name in reversed(self.stages):
                ready = self._ready[name]
                if ready and (task := choose(self.stages[name], ready)):
                    ready.remove(task)
                    self._running[task.stage, task.block, task.name] = task
                    return replace(task, hints=self._early.hints(self.stages[name], task))
            if not self._more():
                return None

    def give_back(self, task: Task) -> None:
        """It was not done, and is to be tried again."""
        del self._running[task.stage, task.block, task.name]
        self._ready[task.stage].append(task)

    def sharing(self, stage: Stage) -> tuple[Stage, ...]:
        """The stages that one worker does with this one, itself among them."""
        if stage.name not in self._sharing:
            what = stage.shares()
            others = (other for other in self.stages.values() if what is not None and other.shares() == what)
            self._sharing[stage.name] = tuple(others) or (stage,)
        return self._sharing[stage.name]

    def has_ready(self, stage: Stage) -> bool:
        return bool(self._ready[stage.name])

    def num_ready(self, stage: Stage) -> int:
        return len(self._ready[stage.name])

    def waits(self, stage: Stage) -> bool:
        """Is there more to come for a stage in the blocks at work?"""
        if self._ready[stage.name]:
            return True
        shallower = list(self.stages)[: list(self.stages).index(stage.name)]
        coming = any(task.stage in shallower for task in self._running.values())
        coming = coming or any(self._ready[name] for name in shallower)
        return coming and any(block.stages[stage.name].waiting for block in self._open.values())

    def is_over(self, stage: Stage) -> bool:
        """Will nothing more come for a stage?"""
        if self._ready[stage.name] or self._phases[stage.name] > self._phase:
            return False
        coming = any(block.stages[stage.name].waiting for block in self._open.values())
        return not coming and (not self._blocks or self._phases[stage.name] < self._phase)

    def is_ready(self) -> list[Stage]:
        """Stages with tasks that only wait to be taken, deepest first."""
        return [self.stages[name] for name in reversed(self.stages) if self._ready[name]]

    def done(self, outcome: Outcome) -> None:
        """What follows from a task's end."""
        task = outcome.task
        del self._running[task.stage, task.block, task.name]
        self._at_work[task.block] -= 1
        self.damaged |= outcome.damaged
        if self._only:
            self.totals[task.stage][0] += outcome.record is not None
            return
        if is_early(task):
            self._early.done(outcome)
            return
        if task.block == RUN:
            if outcome.record:
                self.plan.answers[task.stage, int(task.name)] = outcome.record
                self._left = None  # what has another answer may have to be done again, wherever it is
            return
        block = self._open[task.block]
        if outcome.record:
            self.totals[task.stage][0] += 1
            block.records[task.stage][task.name] = outcome.record
            block.place(self.stages[task.stage], task.name)
            self._judge(block, task.stage)
            if task.name == PART:
                self._forget_answers(task.stage, block.block.batch)
            self._follow(block, task.stage, task.name)
            self._ask_early(task.stage, [block.block])
        if not self._at_work[task.block]:
            self._close(block)

    def _follow(self, block: BlockPlan, stage: str, name: str) -> None:
        """What can be done, or is done, now that a task is."""
        for dependent, its_name in block.dependents(stage, name):
            if not self._is_now(dependent) or block.block.name in self.held:
                continue
            done = block.stages[dependent.name].done
            was_done = its_name in done
            if follows := block.place(dependent, its_name):
                self._add(follows)
            elif its_name in done and not was_done:  # its input has the bytes that it had before
                self._follow(block, dependent.name, its_name)

    # --- blocks and phases ----------------------------------------------------------------------------------

    def _is_now(self, stage: Stage) -> bool:
        return self._phases[stage.name] <= self._phase

    def _add(self, task: Task) -> None:
        self._ready[task.stage].append(task)
        self._at_work[task.block] += 1

    def _more(self) -> bool:
        """Open another block, or begin the next phase; False where neither is possible yet."""
        if self._only:
            return False
        if self._blocks and len(self._open) < self.blocks_at_work:
            self._open_block(self._blocks.popleft())
            return True
        if self._blocks or self._running or any(self._ready.values()):
            return False
        if answers := list(self._answers_to_find()):
            for task in answers:
                self._add(task)
            return True
        if self._phase == max(self._phases.values()):
            return False
        self._phase += 1
        self._blocks = deque(block for block in self.plan.index.blocks if self._has_work(block.name))
        left = (self._left if self._blocks else None) or {}
        for stage in self._stages_of_phase() if left else ():
            there = [block for block in self.plan.index.blocks if stage.name not in left[block.name]]
            self._ask_early(stage.name, there)
        return True

    def _has_work(self, block: str) -> bool:
        """May there be something to do in a block in this phase?"""
        if block in self.held:
            return False
        of_phase = {stage.name for stage in self._stages_of_phase()}
        return self._left is None or self.drop_images or bool(self._left[block] & of_phase)

    def _stages_of_phase(self) -> list[Stage]:
        return [stage for stage in self.plan.line if self._phases[stage.name] == self._phase]

    def _open_block(self, block: Block) -> None:
        opened = BlockPlan(self.plan, block)
        of_phase = self._stages_of_phase()
        self._open[block.name] = opened
        for stage in self.plan.line:
            found = opened.stages[stage.name]
            if stage in of_phase:
                self.totals[stage.name][0] += len(found.done)
                self.totals[stage.name][1] += len(found)
                for task in found.todo.values():
                    self._add(task)
            if PART in found.done:
                self._ask_early(stage.name, [block])
        for stage in of_phase:
            self._judge(opened, stage.name)
        if not self._at_work[block.name]:
            self._close(opened)

    def _close(self, block: BlockPlan) -> None:
        name = block.block.name
        del self._open[name]
        if self.drop_images and name not in self.held:
            self._drop_images(block)
        for stage in self.plan.line:
            if self._phases[stage.name] == self._phase and not block.stages[stage.name].left():
                compact(self.store, f"{stage.name}/{name}")

    def _drop_images(self, block: BlockPlan) -> None:
        """Delete the tars of shards whose readers are all done."""
        readers = [stage for stage in self.plan.recipe.stages if "download" in stage.reads()]
        if not readers or not self._is_now(readers[-1]):
            return
        ready = []
        for shard, record in block.stages["download"].done.items():
            tars = [name for name in record.outputs if Object.parse(name).suffix == ".tar"]
            there = [name for name in tars if name not in record.dropped]
            if there and all(shard in block.stages[reader.name].done for reader in readers):
                ready.append((shard, record))
        folder = f"download/{block.block.name}"
        with ThreadPoolExecutor(DROPPING) as pool:  # an object store takes its time for each
            dropped = [
                pool.submit(drop, self.store, folder, shard, record, ".tar") for shard, record in ready
            ]
            for one in dropped:
                one.result()

    # --- what only the whole run can answer -----------------------------------------------------------------

    def _forget_answers(self, question: str, batch: int) -> None:
        """A part is another one: what was answered from it counts no more."""
        for known in [known for known in self.plan.answers if known[0] == question and known[1] >= batch]:
            del self.plan.answers[known]

    def _answers_to_find(self) -> Iterator[Task]:
        """Answers of this phase whose parts are all there."""
        for question in questions(self.plan.recipe):
            for batch in sorted({block.batch for block in self.plan.index.blocks}):
                known = (question.name, batch) in self.plan.answers or (question.name, batch) in self._asked
                if self._phases[question.name] == self._phase and not known:
                    self._asked.add((question.name, batch))
                    parts = self.plan.parts(question, batch)
                    if parts is not None and not self.plan.find_answer(question, batch, parts):
                        yield self.plan.answer_task(question, batch, parts)

    def _ask_early(self, stage: str, blocks: list[Block]) -> None:
        for task in self._early.parts_done(stage, blocks):
            self._add(task)

    # --- failures of this machine, or of the web on a bad day -----------------------------------------------

    def _judge(self, block: BlockPlan, stage: str) -> None:
        """Hold a block back in which too many rows failed by transport: it is no data yet."""
        if stage != "download" or self.hold_above >= 1 or block.block.name in self.held:
            return
        plan = block.stages["download"]
        if len(plan.done) < min(ENOUGH_TO_JUDGE, len(plan)):
            return
        rows: Counter[str] = Counter()
        for record in plan.done.values():
            rows.update(record.rows)
        failed = sum(rows[status] for status in TRANSPORT)
        if failed <= self.hold_above * rows.total():
            return
        accepted = f"download/{block.block.name}/{ACCEPTED}"
        if self.accept and len(plan.done) == len(plan):
            self.store.write(accepted, f"{failed} of {rows.total()} rows\n".encode())
        if self.accept or self.store.read(accepted) is not None:
            return
        self.held[block.block.name] = (
            f"{failed:,} of {rows.total():,} rows of block {block.block.name} failed by transport "
            f"({', '.join(f'{rows[status]:,} {status}' for status in TRANSPORT)})"
        )
        for name, queue in self._ready.items():
            if name not in ("source", "download"):
                self._at_work[block.block.name] -= queue.drop(block.block.name)


def _phases(plan: Plan) -> dict[str, int]:
    """Stage or question -> the phase in which it can be done: after the answers that it needs."""
    phases: dict[str, int] = {}
    for stage in plan.line:
        if isinstance(stage, Question):
            phases[stage.name] = phases[stage.of]
            continue
        read = [phases[name.partition(".")[0]] for name in stage.reads()]
        asked = [phases[question.of] + 1 for question in stage.asks()]
        phases[stage.name] = max([0, *read, *asked])
    return phases


def is_early(task: Task) -> bool:
    """Is it asked before all blocks have been? Without an answer the build goes on as well."""
    return task.block == RUN and task.name.startswith(EARLY)


class _Early:
    """What the blocks that are there say to a question before all have been asked.

    Workers answer it, again as the number of blocks doubles: in all at most twice the work of one answer. It
    may save captions. Which ones depends on timing, so it enters no key, and changes nothing that is
    published.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.hinting = {stage.hint for stage in plan.recipe.stages if stage.hint}
        self.blocks: dict[str, set[str]] = {name: set() for name in self.hinting}  # that have their part
        self.asked: dict[tuple[str, int], int] = {}  # (question, batch) -> blocks
        self.waiting: set[tuple[str, int]] = set()  # for their answer: of each one is asked at a time
        self.found: dict[tuple[str, int], tuple[str, ...]] = {}  # (question, batch) -> objects
        self.batches = {block.name: block.batch for block in plan.index.blocks}

    def parts_done(self, stage: str, blocks: list[Block]) -> Iterator[Task]:
        """What is worth asking now that these have their parts: of each batch with those before it."""
        if stage not in self.hinting:
            return
        self.blocks[stage] |= {block.name for block in blocks}
        (question,) = (question for question in questions(self.plan.recipe) if question.name == stage)
        for batch in sorted({block.batch for block in blocks}):
            known = [b for b in self.plan.index.blocks if b.batch <= batch and b.name in self.blocks[stage]]
            which = stage, batch
            if (
                which in self.plan.answers
                or which in self.waiting
                or len(known) < 2 * self.asked.get(which, 0)
            ):
                continue
            self.asked[which] = len(known)
            self.waiting.add(which)
            parts: dict[str, str] = {}
            for block in known:
                record = self.plan.part_record(question, block)
                parts |= record.outputs if record else {}
            yield replace(self.plan.answer_task(question, batch, parts), name=f"{EARLY}{batch:05d}")

    def done(self, outcome: Outcome) -> None:
        task = outcome.task
        which = task.stage, int(task.name.removeprefix(EARLY))
        self.waiting.discard(which)
        if outcome.record:
            self.found[which] = tuple(outcome.record.outputs)
        else:
            log.info("%s: nothing is known early: %s", task.stage, outcome.error)

    def hints(self, stage: Stage, task: Task) -> tuple[str, ...]:
        """Objects for a task of a stage that asks for them: never from rows that came later than its own."""
        if not stage.hint:
            return ()
        batch = self.batches[task.block]
        if answer := self.plan.answers.get((stage.hint, batch)):
            return tuple(answer.outputs)
        earlier = (self.found.get((stage.hint, before)) for before in range(batch, -1, -1))
        return next((found for found in earlier if found), ())
