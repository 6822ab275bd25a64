"""A run directory: what is done in it, what is to do, and doing it.

    runs/demo/
      recipe.json                the resolved recipe
      <stage>/<shard>.json       commit records: the only state there is
      <stage>/<shard>.parquet    one row per source row, in the source's order
      <stage>/<shard>.failed     why a shard failed, until it succeeds

Planning compares each task's key with its record's. That one comparison is resuming, redoing after a changed setting,
and the status.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from builder.commit import lock, today, write_atomically
from builder.core import (
    Recipe,
    Record,
    Stage,
    Task,
    by_shard,
    from_json,
    read_file,
    read_lines,
    sha256_file,
    task_key,
)
from builder.errors import InputError, command, telling_of_a_full_disk
from builder.executors.local import ATTEMPTS, Executor, Outcome, attempt, local
from builder.stages.source import Source
from builder.versions.version import MANIFEST


@dataclass
class StagePlan:
    """One stage's tasks. `waiting` counts those whose inputs are not there yet."""

    stage: Stage
    done: dict[str, Record] = field(default_factory=dict)
    todo: list[Task] = field(default_factory=list)
    waiting: int = 0

    def sort(self, task: Task) -> Record | None:
        """Put the task where it belongs; its record if it is done."""
        record = Record.read(task.record)
        if record and record.key == task.key and _intact(task.run, record):
            self.done[task.name] = replace(
                record, inputs={}
            )  # there may be a million of them, and the task knew its inputs
            return record
        self.todo.append(task)
        return None

    def shards(self) -> list[Record]:
        """Records of the shards that are done, in order."""
        return [
            record
            for name, record in sorted(self.done.items(), key=lambda item: by_shard(item[0]))
            if name != "survey"
        ]

    def files(self, run: Path, suffix: str = ".parquet") -> list[Path]:
        """Outputs of the shards that are done, in order, whose name after the shard's number is `suffix`."""
        names = (name for record in self.shards() for name in record.outputs)
        return [run / name for name in names if name.partition(".")[2] == suffix.lstrip(".")]


Plans = dict[str, StagePlan]
Progress = Callable[[StagePlan, Outcome], None]


@dataclass(frozen=True)
class Result:
    """What a build did. `failed` holds the last reason of each shard that could not be done."""

    done: list[str]
    failed: dict[str, str]


def build(
    recipe: Recipe, run: Path, *, executor: Executor = local, progress: Progress | None = None
) -> Result:
    """Do all that is not done yet.

    Raises:
        InputError: the directory holds the run of another recipe, another build is at work in it, or the input cannot be used.
    """
    with telling_of_a_full_disk(run):
        adopt(recipe, run)
        with lock(
            run / ".lock",
            f"another build is at work in {run}",
            f"see how far it is: {command('recap', 'status', run)}",
        ):
            check(recipe)
            write_atomically(run / "recipe.json", recipe.to_json())
            result = Result([], {})
            for _ in range(ATTEMPTS):  # again, for what turned out to be damaged
                if not _one_pass(recipe, run, executor, progress, result):
                    break
            return result


def _one_pass(
    recipe: Recipe, run: Path, executor: Executor, progress: Progress | None, result: Result
) -> bool:
    """Every stage once. Returns whether a damaged file was found whose record is now gone."""
    damaged = False
    plans: Plans = {}
    for stage in recipe.stages:
        (run / stage.name).mkdir(exist_ok=True)
        plans[stage.name] = plan_stage(stage, run, plans)
        while (todo := plans[stage.name]).todo:
            survey = todo.todo[0].name == "survey"
            for outcome in (
                [attempt(stage, todo.todo[0], stage.survey)] if survey else executor(stage, todo.todo)
            ):
                name = f"{stage.name}/{outcome.task.name}"
                damaged |= outcome.damaged
                if outcome.record:
                    result.done.append(name)
                    result.failed.pop(name, None)
                else:
                    result.failed[name] = outcome.error
                    write_atomically(outcome.task.failure, outcome.error + "\n")
                if progress:
                    progress(todo, outcome)
            plans[stage.name] = plan_stage(stage, run, plans)
            if not survey or f"{stage.name}/survey" in result.failed:
                break  # only a survey is followed by more tasks of its stage
    return damaged


def adopt(recipe: Recipe, run: Path) -> None:
    """Check that the directory is new or holds a run of a recipe of this name.

    Raises:
        InputError: it is something else's.
    """
    _may_be_a_run(run)
    if not (run / "recipe.json").exists():
        if run.exists() and {path.name for path in run.iterdir()} - {".lock", ".recipe.json.part"}:
            raise InputError(f"{run} is not empty and holds no run", "name another directory with --run")
        run.mkdir(parents=True, exist_ok=True)
        return
    written = from_json(
        dict[str, Any], read_file(run / "recipe.json"), what=f"{run}/recipe.json"
    )  # its stages may be of another version
    if (old := written.get("name")) != recipe.name:
        raise InputError(
            f"{run}/recipe.json is of a run of recipe '{old}', not of '{recipe.name}'",
            f"name another directory: --run runs/{recipe.name}",
        )


def _may_be_a_run(run: Path) -> None:
    if run.exists() and not run.is_dir():
        raise InputError(f"{run} is no directory", "name another with --run")


def check(recipe: Recipe) -> None:
    """Look for what would fail hours later.

    Raises:
        UserError: says what to change.
    """
    today()
    recipe.check_order()
    for stage in recipe.stages:
        stage.check()


def load_recipe(run: Path) -> Recipe:
    """The recipe of a run directory."""
    if not (run / "recipe.json").exists():
        raise InputError(
            f"{run} holds no run (no recipe.json)", "build one: recap build demo --run runs/demo"
        )
    if (run / MANIFEST).exists():
        raise InputError(
            f"{run} is a published version, not a run", f"look at it: {command('recap', 'verify', run)}"
        )
    return Recipe.from_json(read_file(run / "recipe.json"), f"{run}/recipe.json")


def plan(recipe: Recipe, run: Path) -> Plans:
    """Every stage's plan, as far as it can be known before the earlier stages are done."""
    plans: Plans = {}
    for stage in recipe.stages:
        plans[stage.name] = plan_stage(stage, run, plans)
    return plans


def plan_stage(stage: Stage, run: Path, plans: Plans) -> StagePlan:
    """Compare each task of a stage with its record, given the plans of the stages before it."""
    plan = StagePlan(stage)
    survey: dict[str, str] = {}
    if stage.has_survey():
        inputs = stage.survey_inputs(run)
        for name in stage.surveys:
            for record in plans[name].shards():
                inputs |= {
                    path: sha256 for path, sha256 in record.outputs.items() if path.endswith(".parquet")
                }
        if not inputs:
            plan.waiting = _num_tasks(stage, plans)
            return plan
        found = plan.sort(Task(run, stage.name, "survey", task_key(stage, inputs, "survey"), inputs))
        if not found:
            plan.waiting = _num_tasks(stage, plans)
            return plan
        survey = dict(found.outputs)
    for index in range(_num_tasks(stage, plans | {stage.name: plan})):
        own, read = stage.shard_inputs(run, index), _outputs_read(stage, index, plans)
        inputs = own or survey | read
        if not inputs or (stage.reads and not read):
            plan.waiting += 1
            continue
        name = f"{index:05d}"
        plan.sort(Task(run, stage.name, name, task_key(stage, inputs, name), inputs))
    return plan


def num_shards(plans: Plans) -> int:
    """Source shards of a run; 0 until its source has been surveyed."""
    survey = plans["source"].done.get("survey") if "source" in plans else None
    return survey.rows["shards"] if survey else 0


def _num_tasks(stage: Stage, plans: Plans) -> int:
    return -(-num_shards(plans) // stage.shards_per_task)


def _outputs_read(stage: Stage, index: int, plans: Plans) -> dict[str, str]:
    """Outputs of earlier stages that a task reads; empty while one of them is missing."""
    inputs: dict[str, str] = {}
    first, last = index * stage.shards_per_task, min((index + 1) * stage.shards_per_task, num_shards(plans))
    for name in stage.reads:
        for shard in range(first, last):
            record = plans[name].done.get(f"{shard:05d}")
            if record is None:
                return {}
            inputs |= record.outputs
    return inputs


def _intact(run: Path, record: Record) -> bool:
    """Do the outputs exist with the sizes of the record? Hashes are compared when a stage cannot read them."""
    try:
        return all((run / name).stat().st_size == size for name, size in record.bytes.items()) and all(
            sha256_file(run / name) == sha256
            for name, sha256 in record.outputs.items()
            if name.endswith("/survey.parquet")
        )  # a survey is small, and planning reads it
    except FileNotFoundError:
        return False


def estimate(recipe: Recipe, run: Path) -> list[dict[str, object]]:
    """Per stage: shards done and left, and rows, bytes on disk and hours that are left, as measured on the shards that are done.

    Nothing is guessed: where no shard of a stage is done, bytes and hours are None. Of a subset, rows that the source has not
    looked at yet count as if all of them were in it.

    Raises:
        UserError: what `check` finds.
    """
    check(recipe)
    _may_be_a_run(run)
    plans = plan(recipe, run)
    source = plans["source"].stage if "source" in plans else None
    surveyed = num_shards(plans) > 0
    total = None if surveyed or not isinstance(source, Source) else source.num_rows()
    of_shard = _rows_of_shards(run, plans) if surveyed else []
    table: list[dict[str, object]] = []
    for name, stage_plan in plans.items():
        records, size = stage_plan.shards(), stage_plan.stage.shards_per_task
        done = sum(sum(record.rows.values()) for record in records)
        undone = (
            index
            for index in range(_num_tasks(stage_plan.stage, plans))
            if f"{index:05d}" not in stage_plan.done
        )
        left = (
            sum(sum(of_shard[index * size : (index + 1) * size]) for index in undone) if surveyed else total
        )
        per_row = None if left is None or not done else left / done
        table.append(
            {
                "stage": name,
                "shards_done": len(records),
                "shards_left": sum(task.name != "survey" for task in stage_plan.todo) + stage_plan.waiting
                if surveyed
                else None,
                "rows_done": done,
                "rows_left": left,
                "bytes_left": None
                if per_row is None
                else round(per_row * sum(sum(record.bytes.values()) for record in records)),
                "hours_left": None
                if per_row is None
                else round(
                    per_row
                    * sum(record.seconds for record in records)
                    / stage_plan.stage.num_workers()
                    / 3600,
                    3,
                ),
            }
        )
    return table


def _rows_of_shards(run: Path, plans: Plans) -> list[int]:
    """Rows of each source shard: those that the source kept, or, of a shard that is not done, those of the metadata."""
    source = plans["source"]
    assert isinstance(source.stage, Source)
    done = {name: sum(record.rows.values()) for name, record in source.done.items()}
    return [done.get(f"{index:05d}", rows) for index, rows in enumerate(source.stage.rows_of_shards(run))]


def status(run: Path) -> list[dict[str, object]]:
    """Per stage: shards done, to do, waiting and failed; rows by status; rows per second of all workers; seconds left at that rate."""
    table: list[dict[str, object]] = []
    for name, plan_ in plan(load_recipe(run), run).items():
        records = plan_.shards()
        rows = sum((Counter(record.rows) for record in records), Counter[str]())
        seconds, workers = sum(record.seconds for record in records), plan_.stage.num_workers()
        at_once = seconds / max(1, min(workers, len(records)))  # they worked at the same time
        left = len(plan_.todo) + plan_.waiting
        table.append(
            {
                "stage": name,
                "shards_done": len(records),
                "shards_left": left,
                "rows": dict(rows),
                "rows_per_s": round(rows.total() / at_once, 1) if at_once else None,
                "eta_s": round(-(-left // workers) * seconds / len(records)) if records else None,
                "failed": {
                    path.stem: "".join(read_lines(path)[:1])
                    for path in sorted((run / name).glob("*.failed"))
                    if path.stem not in plan_.done
                },
            }
        )
    return table


def finished(run: Path) -> Plans:
    """The plans of a run in which everything is done.

    Raises:
        InputError: something is left to do.
    """
    plans = plan(load_recipe(run), run)
    left = {name: len(p.todo) + p.waiting for name, p in plans.items() if p.todo or p.waiting}
    if left or not num_shards(plans):
        raise InputError(
            f"{run} is not complete: {', '.join(f'{n} {name} shards' for name, n in left.items())} left",
            f"finish it: {command('recap', 'build', run / 'recipe.json', '--run', run)}",
        )
    return plans
