"""What is done in a block and what can be done: each task's key against its record's.

That one comparison is resuming, redoing after a changed setting, and the status.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby

from builder.commit import COMPACTED, records
from builder.core import RUN, Object, Question, Recipe, Record, Stage, Task, task_key
from builder.index import Block, Index
from builder.stages.source import Source
from builder.store import Store

PART = "part"  # the name of a block's part of an answer


@dataclass
class StagePlan:
    """One stage's tasks in one block, by name."""

    stage: Stage
    done: dict[str, Record] = field(default_factory=dict)
    todo: dict[str, Task] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)  # for inputs that are not there yet
    dropped: set[str] = field(default_factory=set)  # for images that were deleted on purpose

    def __len__(self) -> int:
        return len(self.done) + len(self.todo) + len(self.waiting) + len(self.dropped)

    def left(self) -> int:
        return len(self) - len(self.done)


def questions(recipe: Recipe) -> tuple[Question, ...]:
    """What the stages of a recipe ask of the whole run."""
    found = {question.name: question for stage in recipe.stages for question in stage.asks()}
    return tuple(found.values())


def line(recipe: Recipe) -> tuple[Stage, ...]:
    """Stages and questions in the order of the data: a question after the stage that it is about."""
    ordered: list[Stage] = []
    for stage in recipe.stages:
        ordered += [stage, *(question for question in questions(recipe) if question.of == stage.name)]
    return tuple(ordered)


class Plan:
    """A run's plan, a block at a time: nothing is held of a block that nobody works on."""

    def __init__(self, recipe: Recipe, store: Store, index: Index) -> None:
        self.recipe, self.store, self.index = recipe, store, index
        self.line = line(recipe)
        self.answers: dict[tuple[str, int], Record] = {}  # (question, batch)
        self._settings = {stage.name: stage.settings() for stage in self.line}
        for question in questions(recipe):
            self._find_answers(question)

    def blocks(self) -> Iterator[BlockPlan]:
        return (BlockPlan(self, block) for block in self.index.blocks)

    def settings_of(self, stage: Stage) -> dict[str, object]:
        """What a record keeps of what made its key."""
        return {**self._settings[stage.name], "version": stage.version}

    def task(
        self,
        stage: Stage,
        block: str,
        name: str,
        inputs: Mapping[str, str],
        outside: Mapping[str, str] | None = None,
    ) -> Task:
        outside = outside or {}
        key = task_key(stage, name, inputs, outside, self._settings[stage.name])
        return Task(stage.name, block, name, key, inputs, outside, self.settings_of(stage))

    # --- answers --------------------------------------------------------------------------------------------

    def answer_task(self, question: Question, batch: int, parts: Mapping[str, str]) -> Task:
        """The task of an answer. `parts` are those of all blocks of the batches up to it."""
        return self.task(question, RUN, f"{batch:05d}", parts)

    def parts(self, question: Question, batch: int) -> dict[str, str] | None:
        """The parts that the answer for a batch is made of; None while one of them is missing."""
        found: dict[str, str] = {}
        for block in self.index.blocks:
            if block.batch > batch:
                break
            record = self.part_record(question, block)
            if record is None:
                return None
            found |= record.outputs
        return found

    def part_record(self, question: Question, block: Block) -> Record | None:
        data = self.store.read(f"{question.name}/{block.name}/{PART}.json")
        return Record.from_json(data) if data else None

    def find_answer(self, question: Question, batch: int, parts: Mapping[str, str]) -> bool:
        """Take the answer from its record, if it was made of these parts."""
        data = self.store.read(f"{question.name}/{RUN}/{batch:05d}.json")
        record = Record.from_json(data) if data else None
        if not record or record.key != self.answer_task(question, batch, parts).key:
            return False
        self.answers[question.name, batch] = record
        return True

    def _find_answers(self, question: Question) -> None:
        """Those that are up to date; nothing is known of one whose parts are not all there."""
        if not self.store.names(f"{question.name}/{RUN}"):
            return
        parts: dict[str, str] = {}
        for batch, blocks in groupby(self.index.blocks, key=lambda block: block.batch):
            for block in blocks:
                record = self.part_record(question, block)
                if record is None:
                    return
                parts |= record.outputs
            self.find_answer(question, batch, parts)


class BlockPlan:
    """One block's tasks at every stage."""

    def __init__(self, plan: Plan, block: Block) -> None:
        self.plan, self.block = plan, block
        self.stages: dict[str, StagePlan] = {}
        self.records: dict[str, dict[str, Record]] = {}
        self.earlier: dict[str, dict[str, list[str]]] = {}
        for stage in plan.line:
            self._plan_stage(stage)

    def names(self, stage: Stage) -> list[str]:
        """Of a stage's tasks in this block."""
        if isinstance(stage, Question):
            return [PART]
        if stage.groups:
            return [f"{shards[0]:05d}" for shards in self.block.groups(stage.shards_per_task)]
        return [f"{shard:05d}" for shard in range(self.block.first, self.block.last)]

    def _plan_stage(self, stage: Stage) -> None:
        folder = f"{stage.name}/{self.block.name}"
        found = records(self.plan.store, folder)
        # What is missing of a finished block its readers find.
        alone = found and COMPACTED not in self.plan.store.names(folder)
        sizes = self.plan.store.sizes(folder) if alone else None
        self.records[stage.name] = found
        self.earlier[stage.name] = self._outputs_of_before(stage, folder)
        self.stages[stage.name] = StagePlan(stage)
        for name in self.names(stage):
            record = found.get(name)
            if record and sizes is not None and not _there(record, sizes):
                record = found[name] = Record(key="")
            self.place(stage, name)

    def _outputs_of_before(self, stage: Stage, folder: str) -> dict[str, list[str]]:
        """Task -> objects, of a stage that remembers: a model's replies outlive the settings that they were
        asked with.
        """
        found: dict[str, list[str]] = {}
        for name in self.plan.store.names(folder) if stage.remembers else ():
            if name.endswith(".parquet") and name != COMPACTED:
                found.setdefault(name.partition(".")[0], []).append(f"{folder}/{name}")
        return found

    def place(self, stage: Stage, name: str) -> Task | None:
        """Put a task where it belongs, by its record and those of the stages before; returns it if it is to
        do.
        """
        plan = self.stages[stage.name]
        plan.done.pop(name, None)
        plan.todo.pop(name, None)
        plan.dropped.discard(name)
        plan.waiting.discard(name)
        task, record = self.task(stage, name), self.records[stage.name].get(name)
        if task is None:
            plan.waiting.add(name)
            return None
        if record and record.key == task.key:
            plan.done[name] = record
            return None
        if any(map(self._is_dropped, task.inputs)):
            plan.dropped.add(name)
            return None
        plan.todo[name] = task = replace(
            task, earlier=dict.fromkeys(self.earlier[stage.name].get(name, ()), "")
        )
        return task

    def task(self, stage: Stage, name: str) -> Task | None:
        """A task as it would be done now; None while an input is missing."""
        if isinstance(stage, Question):
            inputs = self._outputs(f"{stage.of}.parquet", self.names(self.plan.recipe.stage(stage.of)))
            return None if inputs is None else self.plan.task(stage, self.block.name, PART, inputs)
        if isinstance(stage, Source):
            objects, outside = stage.task_inputs(self.plan.index.slices(int(name)))
            return self.plan.task(stage, self.block.name, name, objects, outside)
        inputs = {}
        for question in stage.asks():
            answer = self.plan.answers.get((question.name, self.block.batch))
            if answer is None:
                return None
            inputs |= answer.outputs
        first = int(name)
        shards = range(first, min(first + stage.shards_per_task, self.block.last))
        for read in stage.reads():
            outputs = self._outputs(read, [f"{shard:05d}" for shard in shards])
            if outputs is None:
                return None
            inputs |= outputs
        return self.plan.task(stage, self.block.name, name, inputs)

    def dependents(self, stage: str, name: str) -> Iterator[tuple[Stage, str]]:
        """(stage, task) of what a task's outputs are inputs of, in this block."""
        for other in self.plan.line:
            if isinstance(other, Question):
                if other.of == stage:
                    yield other, PART
            elif stage in (read.partition(".")[0] for read in other.reads()):
                size = other.shards_per_task
                first = self.block.first + (int(name) - self.block.first) // size * size
                yield other, f"{first:05d}"

    def _outputs(self, read: str, names: Iterable[str]) -> dict[str, str] | None:
        """Outputs of a stage's tasks, `download`, or those of one kind, `download.parquet`; None while a task
        is not done.
        """
        found: dict[str, str] = {}
        stage, _, kind = read.partition(".")
        done = self.stages[stage].done
        for name in names:
            record = done.get(name)
            if record is None:
                return None
            if kind:
                name = record.output(f".{kind}")
                found[name] = record.outputs[name]
            else:
                found |= record.outputs
        return found

    def _is_dropped(self, name: str) -> bool:
        one = Object.parse(name)
        record = self.records.get(one.stage, {}).get(one.shard)
        return bool(record and name in record.dropped)


def _there(record: Record, sizes: Mapping[str, int]) -> bool:
    """Are the outputs there in the sizes of the record? Hashes are compared when they cannot be read."""
    there = ((name, size) for name, size in record.bytes.items() if name not in record.dropped)
    return all(sizes.get(name.rpartition("/")[2]) == size for name, size in there)
