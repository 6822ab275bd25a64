"""How far a run is: what is done of it, what is left, and what that would take."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from builder import first_version
from builder.commit import failures
from builder.core import Recipe, Stage, Status
from builder.index import Index
from builder.lease import holder
from builder.plan import BlockPlan, StagePlan
from builder.run import Run, check, may_be_a_run
from builder.store import store_of


@dataclass
class _Sums:
    """Of a stage, over the blocks: nothing is kept of a shard."""

    stage: Stage
    done: int = 0
    left: int = 0
    rows: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    seconds: float = 0.0
    rows_left: int = 0  # of shards that are not done
    dropped: int = 0  # shards that need images that were dropped
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, found: StagePlan, block: BlockPlan, index: Index) -> None:
        for record in found.done.values():
            self.rows.update(record.rows)
            self.counts.update(record.counts)
            self.bytes += sum(record.bytes.values())
            self.seconds += record.seconds
        self.done += len(found.done)
        self.left += found.left()
        self.dropped += len(found.dropped)
        size = self.stage.shards_per_task
        source = block.stages["source"].done
        for name in (name for name in block.names(self.stage) if name not in found.done):
            first = int(name)
            for shard in range(first, min(first + size, block.block.last)):
                kept = source.get(f"{shard:05d}")
                self.rows_left += sum(kept.rows.values()) if kept else index.rows(shard)


def _sums(run: Run) -> dict[str, _Sums]:
    plan = run.plan()
    sums = {stage.name: _Sums(stage) for stage in run.recipe.stages}
    for block in plan.blocks():
        for name, sum_ in sums.items():
            found = block.stages[name]
            sum_.add(found, block, run.index)
            if found.left():
                why = failures(run.store, f"{name}/{block.block.name}")
                sum_.failed |= {shard: reason for shard, reason in why.items() if shard not in found.done}
    return sums


def estimate(recipe: Recipe, place: str | Path) -> list[dict[str, object]]:
    """Per stage: shards done and left, and rows, bytes on disk and hours that are left, as measured on
    finished shards.

    Nothing is guessed: where no shard of a stage is done, bytes and hours are None. Of a subset, rows that
    the source has not looked at yet count as if all of them were in it. `images_dropped` is how many shards
    need images that were dropped and would have to be downloaded again.

    Raises:
        UserError: what `check` finds.
    """
    check(recipe)
    store = store_of(place)
    may_be_a_run(store)
    run = Run(store, recipe)
    known = {file: rows for file, (_, rows) in run.index.covered().items()}
    total = run.source.num_rows(known)
    more = 0 if total is None else max(0, total - run.index.num_rows())  # that no build has looked at yet
    shards = -(-more // run.source.rows_per_shard)
    table: list[dict[str, object]] = []
    for name, sums in _sums(run).items():
        done = sums.rows.total()
        left = sums.rows_left + more if known or total is not None else None
        share = None if left is None or not done else left / done
        hours = None if share is None else round(share * sums.seconds / sums.stage.likely_workers() / 3600, 3)
        table.append(
            {
                "stage": name,
                "shards_done": sums.done,
                "shards_left": sums.left + -(-shards // sums.stage.shards_per_task) if known else None,
                "rows_done": done,
                "rows_left": left,
                "bytes_left": None if share is None else round(share * sums.bytes),
                "hours_left": hours,
                "images_dropped": sums.dropped,
                "rows_ok": sums.rows["ok"],
                "bytes_done": sums.bytes,
                "seconds_done": round(sums.seconds, 3),
            }
        )
    return table


def status(run: Run) -> list[dict[str, object]]:
    """Per stage: shards done and left, rows by status, what else was counted, rows per second of all workers,
    seconds left, failures. Columns of one engine take turns: their times are right in sum, and most of the
    time counts for the column that comes first.

    `captions_wasted`: rows that were captioned, and then found to be placeholders by images that came later.
    """
    if run.is_first_version:
        return first_version.status(run.store)
    table: list[dict[str, object]] = []
    everything, held = _sums(run), holder(run.store)
    at_work = held.workers if held else {}
    for name, sums in everything.items():
        workers = at_work.get(name) or sums.stage.likely_workers()
        at_once = sums.seconds / max(1, min(workers, sums.done))  # they worked at the same time
        eta = round(-(-sums.left // workers) * sums.seconds / sums.done) if sums.done else None
        table.append(
            {
                "stage": name,
                "shards_done": sums.done,
                "shards_left": sums.left,
                "rows": dict(sums.rows),
                "counts": dict(sums.counts),
                "rows_per_s": round(sums.rows.total() / at_once, 1) if at_once else None,
                "eta_s": eta,
                "failed": sums.failed,
                **({"workers": at_work.get(name, 0)} if at_work else {}),
            }
        )
    if {"score", "select"} <= everything.keys() and not everything["select"].left:
        passed_over = [everything[name].rows[Status.DUPLICATE_IMAGE] for name in ("score", "select")]
        table[-1]["captions_wasted"] = passed_over[1] - passed_over[0]
    return table
