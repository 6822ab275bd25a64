"""A task's last step: its files become objects, then its record is written. A crash in between leaves what no
record names.

Records of a block lie beside its outputs, `<stage>/<block>/<shard>.json`. Those of a finished block are
compacted into `records.parquet` there; a record in a file of its own counts more than one in it, and one
without a key says "not done".
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime

import pyarrow as pa

from builder.core import RUN, Object, Record, Stage, Task, versions
from builder.errors import InputError
from builder.files import sha256_file, table_of, write_parquet
from builder.lease import confirm
from builder.store import Store

COMPACTED = "records.parquet"
WORTH_COMPACTING = 100  # records; fewer are read one by one as fast


@contextmanager
def working(store: Store, task: Task) -> Iterator[Task]:
    """The task with its inputs at hand and a place for its outputs, which goes at the end.

    Raises:
        FileNotFoundError: an input is missing.
    """
    scratch = store.scratch()
    try:
        files = {name: store.fetch(name, scratch) for name in task.inputs}
        for name in (*task.hints, *task.earlier):
            with suppress(FileNotFoundError):  # it was garbage, and somebody collected it
                files[name] = store.fetch(name, scratch)
        yield replace(task, scratch=scratch, files=files, store=store, counts={}, loading=[])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def commit(store: Store, stage: Stage, task: Task, rows: Mapping[str, int], seconds: float) -> Record:
    """Make what the task wrote its result."""
    confirm(store)
    outputs, sizes = {}, {}
    for file in sorted(task.scratch.glob("out.*")):
        name = task.object(file.name.removeprefix("out"))
        outputs[name], sizes[name] = sha256_file(file), file.stat().st_size
        store.put(file, name)
    record = Record(
        key=task.key, inputs=dict(task.inputs), outputs=outputs, bytes=sizes,
        rows={str(status): n for status, n in sorted(rows.items())},
        counts=dict(sorted(task.counts.items())), seconds=round(seconds, 3),
        versions=versions(stage.libraries), day=today(), settings=dict(task.settings),
        outside=dict(task.outside),
        attempt=task.attempt, lease=store.held.number if store.held else 0,
    )  # fmt: skip
    confirm(store)  # what was put meanwhile nobody names
    put_record(store, task.folder, task.name, record)
    replaced = task.earlier if task.again else ()  # all that is good of them is in the new ones
    for leftover in (task.failure, task.journal, *replaced):
        store.delete(leftover)
    return record


def put_record(store: Store, folder: str, name: str, record: Record) -> None:
    store.write(f"{folder}/{name}.json", record.to_json().encode())


def forget(store: Store, folder: str, name: str) -> None:
    """The task is not done any more."""
    confirm(store)
    if COMPACTED in store.names(folder):
        put_record(store, folder, name, Record(key=""))
    else:
        store.delete(f"{folder}/{name}.json")


def records(store: Store, folder: str) -> dict[str, Record]:
    """Task -> record of a block, or of what lies directly in a stage's folder."""
    while (found := _records(store, folder)) is None:
        continue  # somebody compacts them: they are all in another place now
    return found


def _records(store: Store, folder: str) -> dict[str, Record] | None:
    """None where a record went between being listed and being read."""
    names = store.names(folder)
    found = _compacted(store, folder) if COMPACTED in names else {}
    names = [name for name in names if name.endswith(".json")]
    for name, data in zip(names, store.read_all([f"{folder}/{name}" for name in names]), strict=True):
        if data is None:
            return None
        record = Record.from_json(data)
        if record and record.key:
            found[name.removesuffix(".json")] = record
        else:
            found.pop(name.removesuffix(".json"), None)
    return found


def compact(store: Store, folder: str) -> None:
    """Write a block's records into one object, then delete theirs; stopped at any moment it has lost none."""
    alone = [name for name in store.names(folder) if name.endswith(".json")]
    if len(alone) < WORTH_COMPACTING:
        return
    found = records(store, folder)
    table = pa.table({"name": list(found), "record": [record.to_json() for record in found.values()]})
    scratch = store.scratch()
    try:
        write_parquet(table, scratch / COMPACTED)
        confirm(store)
        store.put(scratch / COMPACTED, f"{folder}/{COMPACTED}")
        confirm(store)
    finally:
        shutil.rmtree(scratch)
    store.delete_all([f"{folder}/{name}" for name in alone])


def _compacted(store: Store, folder: str) -> dict[str, Record]:
    data = store.read(f"{folder}/{COMPACTED}")
    try:
        table = table_of(data or b"")
        pairs = zip(table["name"].to_pylist(), table["record"].to_pylist(), strict=True)
    except (pa.ArrowException, OSError, KeyError) as error:
        place = f"{store.place}/{folder}/{COMPACTED}"
        raise InputError(
            f"{place} is damaged: {error}", "get it from a copy, or delete it: the block is done again"
        ) from error
    return {name: record for name, text in pairs if (record := Record.from_json(text))}


def failures(store: Store, folder: str) -> dict[str, str]:
    """Task -> the first line of why it could not be done."""
    found = {}
    for name in (name for name in store.names(folder) if name.endswith(".failed")):
        text = (store.read(f"{folder}/{name}") or b"").decode("utf-8", "replace")
        found[name.removesuffix(".failed")] = text.partition("\n")[0]
    return found


def today() -> str:
    """UTC day; SOURCE_DATE_EPOCH sets it, as reproducible-builds.org has it, for the same bytes on another
    day.

    Raises:
        InputError: SOURCE_DATE_EPOCH is no time.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        return datetime.fromtimestamp(float(given or time.time()), UTC).date().isoformat()
    except (ValueError, OverflowError, OSError) as error:
        hint = "give seconds since 1970, or unset SOURCE_DATE_EPOCH"
        raise InputError(f"SOURCE_DATE_EPOCH is {given!r}, which is no time", hint) from error


def damaged_input(store: Store, task: Task) -> str:
    """Which input of a failed task no longer has the bytes of its record, if any.

    Its record goes, so that the next pass makes it again.
    """
    confirm(store)  # what another build has replaced meanwhile is not damaged
    try:
        scratch = store.scratch()
    except OSError:
        return ""
    try:
        for name, sha256 in task.inputs.items():
            try:
                whole = sha256_file(store.fetch(name, scratch)) == sha256
            except FileNotFoundError:
                whole = False
            except OSError:  # a full disk, a store that does not answer: it is not known
                return ""
            if not whole:
                forget_maker(store, name)
                return f"{name} no longer has the bytes of its record; it will be made again"
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return ""


def forget_maker(store: Store, name: str) -> None:
    """The task that made an object is not done any more."""
    folder, _, shard = name.rpartition("/")
    if Object.parse(name).suffix.count(".") == 1 or not folder.endswith(f"/{RUN}"):
        forget(store, folder, shard.partition(".")[0])
    else:  # of the index only the table that was converted: which rows are in which shard stays
        store.delete(name)


def drop(store: Store, folder: str, name: str, record: Record, suffix: str) -> Record:
    """Delete an output on purpose; its record says so first."""
    confirm(store)
    output = record.output(suffix)
    record = replace(record, dropped=(*record.dropped, output))
    put_record(store, folder, name, record)
    store.delete(output)
    return record
