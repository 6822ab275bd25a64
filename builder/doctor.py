"""`recap doctor`: is a place fit for a long build, and are the machines? Asked before it is begun.

Storage has to show at once what was written, keep two builds apart, and agree about the time; every node has
to see it, run the same code, and have room. At the end one shard goes the whole way.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from builder.core import Recipe
from builder.errors import UserError
from builder.files import lock
from builder.machine import Machine, differences, software
from builder.run import RECIPE, Executor, build
from builder.scratch import ANYWHERE, Local
from builder.stages.source import Source
from builder.store import Folder, Remote, Store, store_of

LARGE_BYTES = 16 << 20
CLOCK_S = 60.0  # that clocks may differ; S3 refuses what is 15 minutes off
ENOUGH_GIB = 20.0  # of scratch space; a shard of 10,000 images at 512 pixels takes about 1

Nodes = Callable[[Callable[..., Any]], Iterator[tuple[str, Any]]]
"""Does something on every node; gives (node, answer or error)."""


@dataclass(frozen=True)
class Finding:
    what: str
    ok: bool
    told: str = ""


def examine(
    place: str | Path,
    *,
    executor: Executor | None = None,
    nodes: Nodes | None = None,
    local: Local = ANYWHERE,
) -> Iterator[Finding]:
    """What is found, one after the other. With `executor`, and a run in `place`, one shard of it is built."""
    name = f".doctor-{uuid.uuid4().hex[:8]}"
    here = f"{str(place).rstrip('/')}/{name}"
    store = store_of(here, local)
    try:
        try:
            yield from _storage(store)
        except (OSError, UserError) as error:
            yield Finding("storage", False, " ".join(str(error).split()))
            return
        yield _about("this machine", _machine(local))
        for node, answer in nodes(_Look(store)) if nodes else ():
            if isinstance(answer, Exception):
                yield Finding(f"node {node}", False, " ".join(str(answer).split())[:300])
            else:
                yield _about(f"node {node}", answer)
        if executor:
            yield _one_shard(str(place), here, executor, local)
    finally:
        _remove(store)


def _storage(store: Store) -> Iterator[Finding]:
    data = [uuid.uuid4().bytes for _ in range(3)]
    store.write("a/object", data[0])
    first = store.read("a/object")
    store.write("a/object", data[1])
    seen = (first, store.read("a/object"), store.names("a"), store.folders(""))
    yield Finding(
        "storage: what is written is read and listed at once", seen == (*data[:2], ["object"], ["a"])
    )
    store.delete("a/object")
    gone = (store.read("a/object"), store.names("a"))
    yield Finding("storage: what is deleted is gone", gone == (None, []))

    apart = store.is_conditional()
    told = "" if apart else "two builds are the user's to keep apart: --single-driver"
    yield Finding(
        "storage: of two that create an object one is refused", apart or store.local.single_driver, told
    )
    if isinstance(store, Folder):
        yield _locks(store)
    else:
        assert isinstance(store, Remote)
        yield _stale(store)

    off = _clock(store, data[2])
    if off is not None:
        told = f"this machine's clock and the storage's differ by {off:+.0f} s"
        yield Finding("clock", abs(off) < CLOCK_S, told)
    yield _speed(store)


def _locks(store: Folder) -> Finding:
    try:
        with lock(store.root / "a" / ".lock", "busy", ""):
            return Finding("storage: files can be locked", True)
    except (NotImplementedError, OSError, UserError) as error:
        told = f"{error}: a build that was killed is waited for, {store.expiry_s:g} s"
        return Finding("storage: files can be locked", True, told)


def _stale(store: Remote) -> Finding:
    """S3 alone gives fsspec a tag."""
    fs, path, what = store.filesystem, f"{store.root}/a/tagged", "storage: a stale condition is refused"
    answer = fs.pipe_file(path, b"one")
    if not isinstance(answer, dict) or "ETag" not in answer:
        return Finding(what, True, "not tried: this file system gives no tags")
    fs.pipe_file(path, b"two")
    try:
        fs.pipe_file(path, b"three", IfMatch=answer["ETag"])
    except OSError:
        return Finding(what, True, "")
    return Finding(what, False, "the server does not know of If-Match")


def _clock(store: Store, data: bytes) -> float | None:
    """Seconds by which the storage is ahead, as far as it says when an object was written."""
    before = time.time()
    store.write("a/timed", data)
    after = time.time()
    if isinstance(store, Folder):
        written = (store.root / "a" / "timed").stat().st_mtime
    else:
        about = store.filesystem.info(store.url("a/timed"))  # type: ignore[union-attr]
        when = next((about[name] for name in ("LastModified", "mtime", "updated") if name in about), None)
        if when is None:
            return None
        written = float(when.timestamp() if hasattr(when, "timestamp") else when)
    return written - before if written < before - 1 else max(0.0, written - after)


def _speed(store: Store) -> Finding:
    scratch = store.scratch()
    try:
        file = scratch / "large"
        file.write_bytes(os.urandom(LARGE_BYTES))
        begun = time.monotonic()
        store.put(file, "a/large")
        put = time.monotonic()
        size = store.fetch("a/large", scratch).stat().st_size
        got = time.monotonic()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    mib = LARGE_BYTES / 2**20
    told = f"{mib / max(put - begun, 1e-3):.0f} MiB/s there, {mib / max(got - put, 1e-3):.0f} MiB/s back"
    return Finding("storage: a large object", size == LARGE_BYTES, told)


# --- machines -----------------------------------------------------------------------------------------------


def _machine(local: Local) -> dict[str, Any]:
    machine, scratch = Machine.here(), local.scratch or Path(tempfile.gettempdir())
    scratch.mkdir(parents=True, exist_ok=True)
    return {
        "cpus": machine.cpus, "memory_gib": machine.memory_gib, "gpus": _gpu_memory(),
        "scratch": str(scratch), "scratch_gib": shutil.disk_usage(scratch).free / 2**30,
        "versions": software(), "time": time.time(),
    }  # fmt: skip


def _gpu_memory() -> list[str]:
    """Of each GPU: its name, and the memory that is free."""
    query = ["nvidia-smi", "--query-gpu=name,memory.free,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


class _Look:
    """What a node is asked: to see the storage, and to say what it is."""

    def __init__(self, store: Store) -> None:
        self.store, self.name, self.data = store, "a/for-all", uuid.uuid4().bytes
        if isinstance(store, Folder):
            store.root = store.root.resolve()
        store.write(self.name, self.data)

    def __call__(self) -> dict[str, Any]:
        found = _machine(self.store.local)
        if self.store.read(self.name) != self.data:
            raise UserError(f"it does not see {self.store.place}: mount it there, or use s3://")
        return found


def _about(what: str, found: dict[str, Any]) -> Finding:
    problems = [f"it has {what}" for what in differences(found["versions"])]
    if abs(off := found["time"] - time.time()) > CLOCK_S:
        problems.append(f"its clock is {off:+.0f} s off")
    if found["scratch_gib"] < ENOUGH_GIB:
        problems.append(f"only {found['scratch_gib']:.0f} GiB are free in {found['scratch']}")
    for gpu in found["gpus"]:
        numbers = [part.split()[0] for part in gpu.split(", ")[1:]]
        if not all(number.isdecimal() for number in numbers):  # of memory that it shares with the machine
            continue
        free, total = map(float, numbers)
        if free < 0.85 * total:
            problems.append(f"another process has memory of {gpu}")
    gpus = "; ".join(found["gpus"]) or "no GPU"
    said = f"{found['cpus']:g} cores, {found['memory_gib']:.0f} GiB, {gpus}; "
    said += f"{found['scratch_gib']:.0f} GiB free in {found['scratch']}"
    return Finding(what, not problems, "; ".join([said, *problems]))


# --- one shard ----------------------------------------------------------------------------------------------


def _one_shard(place: str, here: str, executor: Executor, local: Local) -> Finding:
    what = "one shard end to end"
    written = store_of(place).read(RECIPE)
    if written is None:
        told = "not tried: no run is there yet; begin it with: recap build RECIPE --run PLACE --limit 1000"
        return Finding(what, True, told)
    recipe = Recipe.from_json(written, RECIPE)
    stages = (
        replace(stage, limit=stage.rows_per_shard) if isinstance(stage, Source) else stage
        for stage in recipe.stages
    )
    begun = time.monotonic()
    try:
        result = build(
            replace(recipe, stages=tuple(stages)), f"{here}/run", executor=executor, local_disk=local
        )
    except UserError as error:
        return Finding(what, False, " ".join(str(error).split()))
    reasons = [f"{name}: {reason}" for name, reason in result.failed.items()]
    failed = "; ".join([*reasons, *result.held.values()])
    return Finding(what, not failed, failed or f"{time.monotonic() - begun:.0f} s, models loaded on the way")


def _remove(store: Store) -> None:
    with suppress(OSError, UserError):
        if isinstance(store, Folder):
            shutil.rmtree(store.root, ignore_errors=True)
        elif isinstance(store, Remote) and store.exists():
            store.filesystem.rm(store.root, recursive=True)
