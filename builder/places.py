"""What a place holds: a run, a version, or somebody's tables with captions.

Asked here by the command line, the page and versions.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from analysis.views import Parts, schema_of
from builder import sql
from builder.core import Record
from builder.errors import InputError, command
from builder.files import matching
from builder.run import RECIPE, Run
from builder.stages.select import schemas
from builder.store import store_of
from builder.versions.targets import check_named, split, version_files
from builder.versions.version import HUB, Version, is_inside, opened


@dataclass(frozen=True)
class Place:
    """What was found: the files that a query reads, and the run or the version that they are of."""

    parts: Parts
    run: Run | None = None
    version: Version | None = None


def look(place: str | Path, captions: Sequence[str] = ()) -> Place:
    """What `RUN`, `TARGET`, `TARGET@v1.2.0`, a file, a glob or a folder of tables holds.

    Raises:
        InputError: none of these, or nothing yet.
    """
    check_named(str(place))
    folder, chosen = Path(place), tuple(captions)
    if is_run(place):
        run = Run.open(place)
        found = Place(run_parts(run, chosen), run)
    elif tables := _tables(str(place)):
        return Place(Parts(tables, [], None, chosen, name=str(place)))
    else:
        try:
            version = opened(*version_files(str(place)))
        except InputError:
            if "://" in str(place) or split(str(place))[1] or (folder / "manifest.json").exists():
                raise
            found = Place(Parts([], []))
        else:
            found = Place(version_parts(version, chosen), version=version)
    if not found.parts.published or not found.parts.ledger:
        neither = "neither a run with finished shards nor a published version nor tables"
        reason = f"{place} holds {neither} ({', '.join(sql.READERS)})"
        raise InputError(reason, "build one: recap build demo --run runs/demo")
    return replace(found, parts=replace(found.parts, name=str(place)))


def is_run(place: str | Path) -> bool:
    """Does a run lie there, whose rows are selected as far as they are done?"""
    if str(place).startswith(HUB):
        return False
    store = store_of(place)
    return store.read(RECIPE) is not None and bool(store.folders("select") or store.names("select"))


def parts(place: str | Path, captions: Sequence[str] = ()) -> Parts:
    """The files of a place, and which of their columns are captions, where given. Raises as `look`."""
    return look(place, captions).parts


def run_parts(run: Run, captions: Sequence[str] = (), records: Iterable[Record] | None = None) -> Parts:
    """The files of a run that would be published, as far as they are done.

    `records` are theirs, where they are at hand.
    """
    names = [name for record in records or run.done("select") for name in record.outputs]
    ledger = [run.store.url(name) for name in names if name.endswith(".ledger.parquet")]
    published = [run.store.url(name) for name in names if not name.endswith(".ledger.parquet")]
    spill = Path(run.place) if os.access(run.place, os.W_OK) else None
    return Parts(published, ledger, run.store.filesystem, tuple(captions), spill, run.place)


def version_parts(version: Version, captions: Sequence[str] = ()) -> Parts:
    """The parquet files of a version that its manifest names.

    Raises:
        InputError: one is no regular file inside the version, or has other columns than the version's recipe
            makes.
    """
    fs, root, expected = version.fs, version.root, schemas(version.recipe)
    found: dict[str, list[str]] = {kind: [] for kind in expected}
    for name in sorted(name for name in version.manifest["files"] if re.match("(data|ledger)/train-", name)):
        if version.is_local and not is_inside(root, name):
            reason = f"{root}/{name} is missing, or no regular file of this folder"
            raise InputError(reason, "get it again from where it was published")
        kind = name.partition("/")[0]
        found[kind].append(f"{root}/{name}" if version.is_local else fs.unstrip_protocol(f"{root}/{name}"))
    for kind, paths in found.items():
        for path in paths[:1]:  # with which `create` compares the others
            there = schema_of(path, fs)
            if not there.equals(expected[kind]):
                differ = sorted({*there.names} ^ {*expected[kind].names})[:5]
                what = ", ".join(differ) or "their types or order"
                reason = f"{path} has another schema than the recipe's: {what}"
                raise InputError(reason, f"see what differs: {command('recap', 'verify', root)}")
    filesystem = None if version.is_local else fs
    return Parts(found["data"], found["ledger"], filesystem, tuple(captions), name=root)


def _tables(place: str) -> list[str]:
    """Tables that a path, a glob or a folder names; of one kind, the first of `READERS` that is there."""
    if "://" in place:
        return []
    if Path(place).is_dir():
        there = (path for path in Path(place).iterdir() if path.is_file() and not path.name.startswith("."))
        names = sorted(map(str, there))
    else:
        names = [place] if Path(place).is_file() else sorted(matching(LocalFileSystem(), place))
    ours = any((Path(place) / name).exists() for name in ("manifest.json", RECIPE))
    if ours or any(Path(name, "manifest.json").exists() for name in names):
        return []
    by_kind = ([name for name in names if name.lower().endswith(kind)] for kind in sql.READERS)
    return next((of_kind for of_kind in by_kind if of_kind), [])
