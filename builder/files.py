"""Files: hashing, reading, writing, finding them."""

from __future__ import annotations

import errno
import glob
import hashlib
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import charset_normalizer
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from fsspec import AbstractFileSystem

from builder.errors import InputError, command


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_known(path: Path) -> str:
    """As `sha256_file`, of a file that every shard asks about: read again when its size or time changed."""
    stat = path.stat()
    return _sha256_of(path, stat.st_size, stat.st_mtime_ns)


@cache
def _sha256_of(path: Path, _bytes: int, _mtime_ns: int) -> str:
    return sha256_file(path)


def write_parquet(table: pa.Table, path: Path, *, row_group_size: int = 10_000) -> None:
    """The one way to write rows: zstd, page index, no clock, so that the same rows are the same bytes.

    Pages end where the content says so: a changed row changes the bytes around it, not all that follow.
    """
    pq.write_table(
        table,
        path,
        compression="zstd",
        write_page_index=True,
        row_group_size=row_group_size,
        use_content_defined_chunking=True,
    )


def table_of(data: bytes) -> pa.Table:
    """A parquet file's table, read in this thread: of those of `pq.read_table` one may still hold the bytes
    when the interpreter ends, and then ends it with SIGABRT.
    """
    return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)


def read_rows(path: Path, columns: list[str] | None = None, *, batch: int = 1024) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file as dicts, with bounded memory."""
    with pq.ParquetFile(path) as file:
        for part in file.iter_batches(batch, columns=columns):
            yield from part.to_pylist()


def read_lines(path: Path) -> list[str]:
    """Of a text file that a user gives.

    Raises:
        InputError: it is not there, or not UTF-8.
    """
    data = read_file(path)
    try:
        return data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        encoding = encoding_of(data)
        hint = f"convert it: {command('iconv', '-f', encoding, '-t', 'utf-8', path)} > FILE"
        raise InputError(f"{path} is not UTF-8; it looks like {encoding}", hint) from None


def read_file(path: Path) -> bytes:
    """All of a file.

    Raises:
        InputError: it is not there, or is no regular file: a pipe would be waited for.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path} is no regular file", "name a file")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", "name a file that is there") from error


def matching(fs: AbstractFileSystem, path: str) -> list[str]:
    """Regular files that a file's name, a folder or a pattern names, hidden ones not.

    What is there is no pattern, nor is how a path begins.
    """
    if fs.isdir(path):
        found = fs.find(path)
    elif fs.exists(path):
        found = [path]
    else:
        there, rest = path, ""
        while there and not fs.exists(there):
            there, slash, last = there.rpartition("/")
            rest = f"{slash}{last}{rest}"
        found = fs.glob(glob.escape(there) + rest)
    shown = (name for name in found if name == path or not name.rpartition("/")[2].startswith("."))
    return [name for name in shown if fs.isfile(name)]


def is_amazons(error: BaseException) -> bool:
    """Is it an error of botocore's own, of no class that others have? It stands for an OSError."""
    return type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore")


def finite(data: Any) -> Any:
    """JSON data without what JSON has no number for: a mean over nothing, or over somebody's NaN."""
    if isinstance(data, dict):
        return {name: finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def encoding_of(data: bytes) -> str:
    """Which encoding bytes that are not UTF-8 look like."""
    best = charset_normalizer.from_bytes(data[:100_000]).best()
    return best.encoding if best else "an unknown one"


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a whole file or nothing of it, and make it last."""
    part = part_of(path)
    try:
        part.write_bytes(data.encode() if isinstance(data, str) else data)
        sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)  # on a full disk
        raise
    sync(path.parent)


def part_of(path: Path) -> Path:
    """Where a file is while it is written; a kill then leaves it there."""
    return path.with_name(f".{path.name}.part")


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def lock(path: Path, busy: str, hint: str, *, wait_s: float = 0) -> Iterator[None]:
    """Hold a file's lock; the kernel lets go when the process ends, however it ends.

    Raises:
        InputError: somebody else holds it for longer than `wait_s`; says `busy`.
        NotImplementedError: the file system has no locks.
    """
    held = FileLock(path, timeout=wait_s, fallback_to_soft=False)  # a marker file would outlive its process
    try:
        held.acquire()
    except Timeout:
        raise InputError(busy, hint) from None
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
            raise NotImplementedError(f"{path} cannot be locked: {error.strerror}") from error
        raise
    try:
        yield
    finally:
        held.release()
