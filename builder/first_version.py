"""Runs of recapkit before blocks: `<stage>/<shard>.json` and `<stage>/<shard>.parquet`.

They are read and published as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from builder.commit import failures, records
from builder.core import Record
from builder.store import Store

SURVEY = "survey"


def is_one(store: Store) -> bool:
    return store.read(f"source/{SURVEY}.json") is not None


def shards(store: Store, stage: str) -> Iterator[tuple[str, Record]]:
    """(task, record) in order."""
    found = records(store, stage)
    for name in sorted(found.keys() - {SURVEY}, key=lambda name: (len(name), name)):
        yield f"{stage}/{name}", found[name]


def stages(store: Store) -> list[str]:
    """Those that it has, in the order of the line."""
    there = store.folders("")
    return [name for name in ("source", "download", "dedup", "caption", "score", "select") if name in there]


def unfinished(store: Store) -> dict[str, int]:
    """Stage -> shards without a record, by the survey of its source.

    Files per shard of `select` are not known here.
    """
    survey = records(store, "source")[SURVEY]
    done = {stage: [record for _, record in shards(store, stage)] for stage in stages(store)}
    left = {stage: survey.rows["shards"] - len(of) for stage, of in done.items() if stage != "select"}
    rows = {stage: sum(sum(record.rows.values()) for record in of) for stage, of in done.items()}
    left["select"] = int(rows.get("select", 0) < rows["source"])
    return {stage: number for stage, number in left.items() if number}


def status(store: Store) -> list[dict[str, object]]:
    """As `run.status`, of what the records say."""
    left, table = unfinished(store), []
    for stage in stages(store):
        done = [record for _, record in shards(store, stage)]
        rows = sum((Counter(record.rows) for record in done), Counter[str]())
        seconds = sum(record.seconds for record in done)
        table.append(
            {
                "stage": stage, "shards_done": len(done), "shards_left": left.get(stage, 0),
                "rows": dict(rows),
                "rows_per_s": round(rows.total() / seconds, 1) if seconds else None, "eta_s": None,
                "failed": failures(store, stage),
            }
        )  # fmt: skip
    return table
