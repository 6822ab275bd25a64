"""A run: what is done in it, what is to do, and doing it.

    runs/demo/
      recipe.json                              the resolved recipe
      <stage>/<block>/<shard>.json             commit records: the only state there is
      <stage>/<block>/<shard>.<key>.parquet    one row per source row, in the source's order
      <stage>/<block>/<shard>.failed           why a shard failed, until it succeeds
      <question>/<block>/part..., run/00000... what only the whole run can tell

A run is opened once, `Run.open(place)`; build, status, publish, statistics and card take it from there.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from builder import first_version
from builder.commit import COMPACTED, forget, records, today
from builder.core import RUN, TRANSPORT, Object, Recipe, Record, Stage, Status, Task
from builder.errors import InputError, RecipeError, command, named, telling_of_a_full_disk
from builder.executors.local import local
from builder.executors.pool import ATTEMPTS
from builder.index import Index, load
from builder.plan import BlockPlan, Plan
from builder.schedule import BLOCKS_AT_WORK, Left, Outcome, Schedule, is_early
from builder.scratch import ANYWHERE, Local
from builder.stages.download import Download
from builder.stages.source import Source
from builder.store import SCRATCH, Folder, Store, store_of
from builder.typed import from_json

log = logging.getLogger(__name__)
RECIPE = "recipe.json"
Executor = Callable[[Schedule], Iterator[Outcome]]
Progress = Callable[[Outcome, int, int], None]
"""Called for every task that ended, with the tasks of its stage that are done, and all, of the blocks opened
so far.
"""


@dataclass
class Result:
    """What a build did. `failed` and `held` hold the reason for each shard, and each block, that was not
    done.
    """

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    counts: dict[str, Counter[str]] = field(default_factory=dict)  # by stage, what it counted besides rows
    warnings: list[str] = field(default_factory=list)


class Run:
    """A run's store and its recipe."""

    def __init__(self, store: Store, recipe: Recipe) -> None:
        self.store, self.recipe = store, recipe
        self.place = store.place

    @classmethod
    def open(cls, place: str | Path, local: Local = ANYWHERE) -> Run:
        """The run that lies at a path or URL.

        Raises:
            InputError: there is none.
        """
        if not str(place).strip():
            raise InputError("the run has no name", "name its folder: runs/demo")
        store = store_of(place, local)
        written = store.read(RECIPE)
        if written is None:
            raise InputError(
                f"{place} holds no run (no {RECIPE})", "build one: recap build demo --run runs/demo"
            )
        if store.read("manifest.json") is not None:
            hint = f"look at it: {command('recap', 'verify', named(place))}"
            raise InputError(f"{place} is a published version, not a run", hint)
        return cls(store, Recipe.from_json(written, f"{place}/{RECIPE}"))

    @cached_property
    def is_first_version(self) -> bool:
        """Was it built by recapkit of before blocks? It can be read and published, not continued."""
        return first_version.is_one(self.store)

    @property
    def source(self) -> Source:
        source = self.recipe.stage("source")
        if not isinstance(source, Source):
            reason = f"recipe {self.recipe.name}: its stage source is another"
            raise RecipeError(reason, "use builder.stages.source.Source")
        return source

    @cached_property
    def index(self) -> Index:
        """The batches of metadata that the run has; empty before the first build."""
        return load(self.store, "source", self.source.limit)

    def extend(self, redo: Sequence[str] = ()) -> None:
        """Look at the metadata, and take in what is new.

        Raises:
            InputError: it is not what it was, downloads of it are there, and `redo` does not name the source.
        """
        self.index = self.source.extend(self.store, restart=partial(_may_restart, self, redo=redo))

    def plan(self) -> Plan:
        """What is done and to do, as it is now."""
        return Plan(self.recipe, self.store, self.index)

    def stage_names(self) -> list[str]:
        """Its stages in the order of the line."""
        if self.is_first_version:
            return first_version.stages(self.store)
        return [stage.name for stage in self.recipe.stages]

    def shards(self, stage: str) -> Iterator[tuple[str, Record]]:
        """(task, record) of what is done at a stage, in order, by the records alone."""
        if self.is_first_version:
            yield from first_version.shards(self.store, stage)
            return
        found = self.recipe.stage(stage)
        for block in self.index.blocks:
            there = records(self.store, f"{stage}/{block.name}")
            size = found.shards_per_task
            for shards in block.groups(size):
                if record := there.get(f"{shards[0]:05d}"):
                    yield f"{stage}/{block.name}/{shards[0]:05d}", record

    def done(self, stage: str) -> Iterator[Record]:
        """Records of what is done at a stage by the recipe and the inputs of now, in order."""
        if self.is_first_version:
            yield from (record for _, record in self.shards(stage))
            return
        for block in self.plan().blocks():
            yield from (record for _, record in sorted(block.stages[stage].done.items()))

    def files(self, stage: str, suffix: str = ".parquet") -> list[str]:
        """Objects of a stage, in order, that end so."""
        done = self.done(stage)
        found = (name for record in done for name in record.outputs if name not in record.dropped)
        return [name for name in found if Object.parse(name).suffix == suffix]

    def local(self, name: str) -> Path:
        """A file with an object's bytes on this machine, to be read only. What had to be brought goes with
        this process.

        Raises:
            FileNotFoundError: there is no such object.
        """
        return self.store.fetch(name, self.workspace)

    @cached_property
    def workspace(self) -> Path:
        """A folder of this machine for what is put together of a run: the run itself, where it is one."""
        if isinstance(self.store, Folder):
            return self.store.root
        self._workspace = tempfile.TemporaryDirectory(dir=self.store.scratch(), ignore_cleanup_errors=True)
        return Path(self._workspace.name)

    def unfinished(self) -> dict[str, int]:
        """Stage -> tasks that are left; of a run that has none it is empty."""
        if self.is_first_version:
            return first_version.unfinished(self.store)
        plan, left = self.plan(), Counter[str]()
        for block in plan.blocks():
            left.update({name: found.left() for name, found in block.stages.items() if found.left()})
        return dict(left)

    def finished(self) -> dict[str, Record]:
        """Task -> record of what is to be published, in order.

        Raises:
            InputError: something is left to do.
        """
        left = self.unfinished()
        selected = {} if left else dict(self.shards("select"))
        if not self.is_first_version and not left:
            size = self.recipe.stage("select").shards_per_task
            tasks = sum(len(list(block.groups(size))) for block in self.index.blocks)
            left = {"select": tasks - len(selected)} if tasks != len(selected) else {}  # a build has begun
        if left or not selected:
            names = ", ".join(f"{number} {name} shards" for name, number in left.items())
            again = command("recap", "build", named(self.store.url(RECIPE)), "--run", named(self.place))
            raise InputError(f"{self.place} is not complete: {names} left", f"finish it: {again}")
        return selected


# --- building -----------------------------------------------------------------------------------------------


def build(
    recipe: Recipe,
    place: str | Path,
    *,
    executor: Executor = local,
    progress: Progress | None = None,
    redo: Sequence[str] = (),
    drop_images: bool = False,
    blocks_at_work: int = BLOCKS_AT_WORK,
    local_disk: Local = ANYWHERE,
) -> Result:
    """Do all that is not done yet. `redo` names stages whose finished shards may be done again.

    `drop_images` deletes a shard's images when its captions and scores are there; `blocks_at_work` is how
    many blocks, of a thousand shards each, are begun before the first of them is done.

    Raises:
        InputError: it holds the run of another recipe, another build is at work in it, the input cannot be
        used, or
            finished downloads or captions would be done again and `redo` does not say so.
    """
    store = store_of(place, local_disk)
    for name in redo:
        recipe.stage(name)
    with telling_of_a_full_disk(place):
        adopt(recipe, store)
        with store.lease():
            check(recipe)
            if store.read(RECIPE) is None:
                store.write(RECIPE, recipe.to_json().encode())  # whatever follows, this is a run now
            run = Run(store, recipe)
            run.extend(redo)
            left = _may_redo(run, redo)
            store.write(RECIPE, recipe.to_json().encode())
            return _build(run, left, executor, progress, redo, drop_images, blocks_at_work)


def _build(
    run: Run,
    left: Left,
    executor: Executor,
    progress: Progress | None,
    redo: Sequence[str],
    drop_images: bool,
    blocks_at_work: int,
) -> Result:
    result, downloads = Result(), [stage for stage in run.recipe.stages if isinstance(stage, Download)]
    hold_above = min((stage.hold_above for stage in downloads), default=1.0)
    accept = any(stage.accept_failures for stage in downloads)
    for attempt in range(ATTEMPTS):  # again, for what turned out to be damaged
        known = left if attempt == 0 else None
        schedule = Schedule(
            run.plan(),
            left=known,
            hold_above=hold_above,
            accept=accept,
            drop_images=drop_images,
            blocks_at_work=blocks_at_work,
        )
        _carry_out(run, schedule, executor, progress, result)
        result.held = schedule.held
        if not schedule.damaged:
            break
        run.extend(redo)
    for stage in run.recipe.stages:
        result.warnings += stage.warns(result.counts.get(stage.name, {}))
    return result


def _carry_out(
    run: Run, schedule: Schedule, executor: Executor, progress: Progress | None, result: Result
) -> None:
    """Do what a schedule has, and note in `result` and beside the records what became of it."""
    for outcome in executor(schedule):
        name = _name_of(outcome.task)
        if is_early(outcome.task):
            continue
        if outcome.record:
            result.done.append(name)
            result.failed.pop(name, None)
            result.counts.setdefault(outcome.task.stage, Counter()).update(outcome.record.counts)
        else:
            result.failed[name] = outcome.error
            run.store.write(outcome.task.failure, (outcome.error + "\n").encode())
        if progress:
            progress(outcome, *schedule.totals[outcome.task.stage])


def _name_of(task: Task) -> str:
    """As a user reads it: shards are numbered over the whole run."""
    of_shard = task.name.isdecimal() and task.block != RUN
    return f"{task.stage}/{task.name if of_shard else task.block}"


def adopt(recipe: Recipe, store: Store) -> None:
    """Check that the place is new or holds a run of a recipe of this name.

    Raises:
        InputError: it is something else's.
    """
    may_be_a_run(store)
    written = store.read(RECIPE)
    if written is None:
        if set(store.names("")) | set(store.folders("")):
            reason = f"{store.place} is not empty and holds no run"
            raise InputError(reason, "name another directory with --run")
        return
    # Not as a recipe: its stages may be of another version.
    found = from_json(dict[str, Any], written, what=f"{store.place}/{RECIPE}")
    if (old := found.get("name")) != recipe.name:
        hint = f"name another directory: --run runs/{recipe.name}"
        reason = f"{store.place}/{RECIPE} is of a run of recipe '{old}', not of '{recipe.name}'"
        raise InputError(reason, hint)
    if first_version.is_one(store):
        hint = "publish it as it is, or build into another directory: --run"
        reason = f"{store.place} was built by a first version of recapkit and cannot be continued"
        raise InputError(reason, hint)


def may_be_a_run(store: Store) -> None:
    """Raises:
    InputError: a file is there instead.
    """
    if isinstance(store, Folder) and store.root.exists() and not store.root.is_dir():
        raise InputError(f"{store.place} is no directory", "name another with --run")


def check(recipe: Recipe) -> None:
    """Look for what would fail hours later.

    Raises:
        UserError: says what to change.
    """
    today()
    recipe.check_order()
    for stage in recipe.stages:
        stage.check()


# --- what a build would throw away --------------------------------------------------------------------------


@dataclass
class Stake:
    """Finished shards of a stage that would be done again: how many, their rows, and the seconds that they
    took.
    """

    shards: int = 0
    rows: int = 0
    seconds: float = 0.0

    def add(self, record: Record) -> None:
        self.shards += 1
        self.rows += sum(record.rows.values())
        self.seconds += record.seconds

    def __str__(self) -> str:
        return f"{self.shards:,} shards, {self.rows:,} rows, {self.seconds / 3600:.2f} hours"


def _may_restart(run: Run, reason: str, first: int, redo: Sequence[str]) -> None:
    """Raises:
    InputError: the rows from shard `first` on are others now, and downloads or captions of them are there.
    """
    run.index = load(run.store, "source", None)
    stakes: dict[str, Stake] = {}
    for stage in (stage for stage in run.recipe.stages if stage.costly):
        for name, record in run.shards(stage.name):
            if int(name.rpartition("/")[2]) >= first:
                stakes.setdefault(stage.name, Stake()).add(record)
    _refuse(stakes, "source", reason, redo)


def _may_redo(run: Run, redo: Sequence[str]) -> Left:
    """What is left to do in each block.

    Raises:
        InputError: a changed setting would do finished downloads or captions again, or images are needed that
            were dropped.
    """
    plan, left = run.plan(), Left()
    stakes: dict[str, Stake] = {}
    cause: tuple[str, str] | None = None  # the first stage with other settings, and which
    dropped, gone = Stake(), list[tuple[str, str]]()
    for block in plan.blocks():
        left[block.block.name] = {name for name, found in block.stages.items() if found.left()}
        for stage, record, why in _at_stake(plan, block):
            stakes.setdefault(stage, Stake()).add(record)
            cause = cause or why
        for shard in {shard for stage in run.recipe.stages for shard in block.stages[stage.name].dropped}:
            dropped.add(block.records["download"][shard])
            gone.append((block.block.name, shard))
    if cause:
        _refuse(stakes, *cause, redo)
    if gone and "download" not in redo:
        raise InputError(
            f"images are needed that were dropped; downloading them again takes about: {dropped}",
            "the same command with --redo download downloads them again",
        )
    for name, shard in gone:
        forget(run.store, f"download/{name}", shard)
        left[name] = {stage.name for stage in plan.line}
    return left


def _at_stake(plan: Plan, block: BlockPlan) -> Iterator[tuple[str, Record, tuple[str, str]]]:
    """(stage, record, why) of what is costly and would be done again because a stage has other settings.

    What is cheap may change: where its output stays as it is nothing follows, and replies are kept.
    """
    changed: dict[str, tuple[str, str]] = {}  # shard -> the first stage with other settings, and which
    for stage in plan.recipe.stages:
        found = block.stages[stage.name]
        may_change = stage.costly or isinstance(stage, Source)
        for name, record in block.records[stage.name].items():
            if stage.groups or not record.key or name in found.done:
                continue
            task = found.todo.get(name)
            if may_change and name not in changed and (which := _changed(plan, stage, record, task)):
                changed[name] = (stage.name, which)
            if name in changed and stage.costly:
                yield stage.name, record, changed[name]


def _changed(plan: Plan, stage: Stage, record: Record, task: Task | None) -> str:
    """Which settings of a record's stage are others now; empty where none is."""
    now = {**plan.settings_of(stage)}
    before = dict(record.settings)
    differ = []
    for name in sorted(now.keys() | before.keys()):
        was, is_ = before.get(name), now.get(name)
        if _plain(was) != _plain(is_):
            default = "its default"
            differ.append(f"{stage.name}.{name} was {_shown(was, default)} and is {_shown(is_, default)}")
    if not differ and isinstance(stage, Source) and task and task.outside != record.outside:
        return "source.limit, or the metadata, ends a shard at another row"
    return "; ".join(differ)


def _plain(value: Any) -> Any:
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _shown(value: Any, default: str) -> str:
    return default if value is None else f"{value!r:.60}"


def _refuse(stakes: dict[str, Stake], cause: str, which: str, redo: Sequence[str]) -> None:
    if not stakes or cause in redo or set(stakes) <= set(redo):
        return
    lost = "; ".join(f"{name}: {stake}" for name, stake in stakes.items())
    hint = f"--redo {cause} does it; or take the setting back, or build into another directory"
    raise InputError(f"{which}: that would do finished shards again ({lost})", hint)


# --- doing rows again ---------------------------------------------------------------------------------------


def retry(
    place: str | Path,
    statuses: Sequence[str],
    *,
    executor: Executor = local,
    progress: Progress | None = None,
    local_disk: Local = ANYWHERE,
) -> Result:
    """Download rows of finished shards again that have one of these statuses; the others stay as they are.

    What follows, captions of new images above all, is the next build's.

    Raises:
        InputError: there is no such status, or no such row.
    """
    for status in statuses:
        if status not in set(Status) - {Status.OK}:
            there = ", ".join(s for s in Status if s is not Status.OK)
            raise InputError(f"'{status}' is no status of a failed row", f"there are: {there}")
    if not statuses:
        raise InputError("no status of failed rows was named", f"for example: {','.join(TRANSPORT)}")
    run = Run.open(place, local_disk)
    if run.is_first_version:
        adopt(run.recipe, run.store)
    with telling_of_a_full_disk(place), run.store.lease():
        check(run.recipe)
        result, tasks = Result(), list(_tasks_again(run, statuses))
        if not tasks:
            rows = f"no row of a finished shard is {' or '.join(statuses)}"
            there = f"see what there is: {command('recap', 'status', named(place))}"
            raise InputError(f"{place}: {rows}", there)
        schedule = Schedule(run.plan(), only=tasks)
        _carry_out(run, schedule, executor, progress, result)
        return result


def _tasks_again(run: Run, statuses: Sequence[str]) -> Iterator[Task]:
    dropped = []
    for block in run.plan().blocks():
        for name, record in block.stages["download"].done.items():
            if any(record.rows.get(status) for status in statuses):
                if record.dropped:
                    dropped.append(name)
                    continue
                task = block.task(run.recipe.stage("download"), name)
                assert task is not None  # it is done
                before = dict(record.outputs)
                yield replace(task, attempt=record.attempt + 1, again=tuple(statuses), earlier=before)
    if dropped:
        log.warning("%d shards with such rows stay as they are: their images were dropped", len(dropped))


def garbage(place: str | Path, *, delete: bool = False, local_disk: Local = ANYWHERE) -> dict[str, int]:
    """Object -> bytes of outputs that no record names: what other settings made, or a crash left behind.

    Earlier captions are among them: as long as they are there no reply that they hold is asked for again.
    """
    run = Run.open(place, local_disk)
    if run.is_first_version:
        reason = f"{place} was built by a first version of recapkit"
        raise InputError(reason, "publish it, or delete it as a whole")
    with run.store.lease():
        found = dict(_garbage(run))
        for name in found if delete else ():
            run.store.delete(name)
    return found


def _garbage(run: Run) -> Iterator[tuple[str, int]]:
    blocks = {RUN, *(block.name for block in run.index.blocks)}
    for stage in (
        name for name in run.store.folders("") if name not in (SCRATCH, "logs", "versions", "card")
    ):
        for block in run.store.folders(stage):
            folder = f"{stage}/{block}"
            found = records(run.store, folder) if block in blocks else {}
            named = {
                name for record in found.values() for name in record.outputs if name not in record.dropped
            }
            for name, size in run.store.sizes(folder).items():
                task, _, kind = name.partition(".")
                output = name.endswith((".parquet", ".tar", ".txt", ".npz")) and name != COMPACTED
                done_without = task in found and kind in ("journal", "failed")
                beyond = block not in blocks  # the metadata were more once
                if (output and f"{folder}/{name}" not in named) or done_without or beyond:
                    yield f"{folder}/{name}", size
