"""A task's last step: its files get their names, then its record is written. Both are atomic and on disk before the next."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from builder.core import Record, Stage, Task, sha256_file, versions
from builder.errors import InputError


def commit(stage: Stage, task: Task, rows: Mapping[str, int], seconds: float) -> Record:
    """Make what the task wrote its result.

    A crash before the record leaves files that no record names; the next attempt replaces them.
    """
    outputs, sizes = {}, {}
    prefix = f".{task.name}."
    for part in sorted(task.folder.glob(f"{prefix}*.part")):
        final = task.folder / part.name.removeprefix(".").removesuffix(".part")
        sync(part)
        name = str(final.relative_to(task.run))
        outputs[name], sizes[name] = sha256_file(part), part.stat().st_size
        os.replace(part, final)
    record = Record(
        key=task.key, inputs=dict(task.inputs), outputs=outputs, bytes=sizes,
        rows={str(status): n for status, n in sorted(rows.items())}, seconds=round(seconds, 3), versions=versions(stage.libraries), day=today(),
    )  # fmt: skip
    write_atomically(task.record, json.dumps(asdict(record), indent=1) + "\n")
    for leftover in (task.failure, task.journal):
        leftover.unlink(missing_ok=True)
    return record


def today() -> str:
    """UTC day; SOURCE_DATE_EPOCH sets it, as reproducible-builds.org has it, for a build that gives the same bytes on another day.

    Raises:
        InputError: SOURCE_DATE_EPOCH is no time.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        return datetime.fromtimestamp(float(given or time.time()), UTC).date().isoformat()
    except (ValueError, OverflowError, OSError) as error:
        raise InputError(
            f"SOURCE_DATE_EPOCH is {given!r}, which is no time",
            "give seconds since 1970, or unset SOURCE_DATE_EPOCH",
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or nothing of it, and make it last."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    sync(part)
    os.replace(part, path)
    sync(path.parent)


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def damaged_input(task: Task) -> str:
    """Which input of a failed task no longer has the bytes of its record, if any; that record is removed, so a rerun repairs it."""
    for name, sha256 in task.inputs.items():
        path = task.run / name.partition("[")[0]  # of a slice: the file
        if path.parent.parent == task.run and path.exists() and sha256_file(path) != sha256:
            (path.parent / (path.name.partition(".")[0] + ".json")).unlink(missing_ok=True)
            return f"{name} no longer has the bytes of its record; it will be made again"
    return ""


@contextmanager
def lock(path: Path, busy: str, hint: str) -> Iterator[None]:
    """Hold a file's lock; the kernel lets go when the process ends, however it ends.

    Raises:
        InputError: somebody else holds it; says `busy`.
    """
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(busy, hint) from None
        yield
