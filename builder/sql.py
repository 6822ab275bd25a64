"""DuckDB, opened and quoted in one place: nothing in a name or a path is taken for SQL or for a pattern.

Every connection spills into a private folder that goes with it, and neither installs nor loads extensions.
"""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any

import duckdb

from builder.errors import InputError

READERS = {
    ".parquet": "read_parquet", ".csv": "read_csv", ".tsv": "read_csv",
    ".json": "read_json", ".jsonl": "read_json",
}  # fmt: skip


@contextmanager
def connect(spill: Path | None = None, **config: Any) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB with `config`.

    What does not fit its memory goes into a folder in `spill`, or the system's for temporary files.
    """
    with _private_folder(spill) as folder:
        closed: dict[str, Any] = {
            "autoinstall_known_extensions": False, "autoload_known_extensions": False,
            "allow_community_extensions": False, "custom_extension_repository": folder,
            "extension_directory": folder,
        }  # fmt: skip
        try:
            with duckdb.connect(config={"temp_directory": folder, **closed, **config}) as con:
                con.execute("set lock_configuration = true")
                yield con
        except RuntimeError as error:
            # All that DuckDB leaves of the exception of a signal's handler.
            if "Query interrupted" in str(error):
                raise KeyboardInterrupt from error
            raise


@contextmanager
def _private_folder(place: Path | None) -> Iterator[str]:
    """A folder that goes with its process. Those of killed processes are nobody's: their locks are free."""
    place = place or Path(tempfile.gettempdir())
    for leftover in place.glob(".duckdb-recap-*"):
        if (free := _locked(leftover)) is not None:
            shutil.rmtree(leftover, ignore_errors=True)
            os.close(free)
    folder = tempfile.mkdtemp(prefix=".duckdb-recap-", dir=place)
    lock = _locked(folder)
    while not os.path.exists(folder):  # another process took it for a leftover before it was locked
        folder = tempfile.mkdtemp(prefix=".duckdb-recap-", dir=place)
        lock = _locked(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:  # a file system without locks lets nobody else take it either
            os.close(lock)


def _locked(folder: str | PathLike[str]) -> int | None:
    """A descriptor with the folder's lock; None if somebody else has it, or the folder is gone."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                return descriptor
        os.close(descriptor)
    return None


def identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def absolute(path: str | PathLike[str]) -> str:
    """A local path that DuckDB takes as it is: `~` and `file:` at the start of a relative one mean more."""
    return str(path) if "://" in str(path) else os.path.abspath(path)


def literal(text: str | PathLike[str]) -> str:
    return "'" + str(text).replace("'", "''") + "'"


def table(paths: str | PathLike[str] | Iterable[str | PathLike[str]], **options: str) -> str:
    """SQL of the rows of files of one kind, in their order.

    Names are taken as they are: neither globs nor `key=value` folders.
    """
    names = [str(path) for path in ([paths] if isinstance(paths, str | PathLike) else paths)]
    reader = next(reader for kind, reader in READERS.items() if names[0].lower().endswith(kind))
    for name in (name for name in names if "\\" in name and glob.has_magic(name)):
        reason = f"{name}: DuckDB cannot read a path with a backslash beside one of *?["
        raise InputError(reason, "give the file or its folder another name")
    listed = ", ".join(literal(glob.escape(absolute(name))) for name in names)
    given = {"hive_partitioning": "false", **options}
    settings = "".join(f", {key} = {value}" for key, value in given.items())
    return f"{reader}([{listed}]{settings})"
