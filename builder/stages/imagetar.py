"""Reading the images of a download tar, one after the other, in row order."""

from __future__ import annotations

import os
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from PIL import Image

# What Pillow raises where a file is no picture: fuzzed files find them all.
PILLOW_SAYS_NO = (
    OSError, ValueError, SyntaxError, MemoryError, RuntimeError, AttributeError, TypeError, LookupError,
    ArithmeticError, struct.error,
)  # fmt: skip
NO_PICTURE = (*PILLOW_SAYS_NO, Image.DecompressionBombError)
BLOCK = tarfile.BLOCKSIZE
_PASSED_OVER = (tarfile.XHDTYPE, tarfile.XGLTYPE)  # more about the file that follows


def images(path: Path) -> Iterator[tuple[str, bytes]]:
    """(key, encoded image) of each sample. Raises as `entries`."""
    with open(path, "rb") as file:
        for key, _, size in _walk(file, path):
            yield key, file.read(size)


def entries(path: Path) -> Iterator[tuple[str, int, int]]:
    """(key, where its image begins, bytes) of each sample of a tar that the download stage wrote: plain
    files, short names.

    It reads what is needed of the headers: to `tarfile` those of a sample's three files are a fortieth of the
    time that a small captioner takes for it.

    Raises:
        tarfile.ReadError: it is damaged.
    """
    with open(path, "rb") as file:
        yield from _walk(file, path)


def _walk(file: BinaryIO, path: Path) -> Iterator[tuple[str, int, int]]:
    """As `entries`; the file stands at the image then."""
    total = os.fstat(file.fileno()).st_size
    while (header := file.read(BLOCK)) != bytes(BLOCK):
        try:
            name, size = header[:100].rstrip(b"\0").decode(), int(header[124:136].rstrip(b"\0 "), 8)
            checked = sum(header) - sum(header[148:156]) + 8 * ord(" ")
            whole = checked == int(header[148:156].rstrip(b"\0 "), 8)
        except ValueError:
            whole = False
        start = file.tell()
        if not whole or start + size > total:
            raise tarfile.ReadError(f"{path} is damaged at byte {start:,}")
        key, _, extension = name.partition(".")
        if extension == "jpg" and header[156:157] not in _PASSED_OVER:
            yield key, start, size
        file.seek(start + -(-size // BLOCK) * BLOCK)
