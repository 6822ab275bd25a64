"""Many rows of float16 beside a shard's table: a safetensors file of one tensor, written as it is made and
read a row at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from builder.errors import InputError

HEADER = 4096  # bytes of it, filled with spaces: how many rows there are is known at the end


@dataclass
class Rows:
    """Being written: so many `number`, each of `shape`."""

    file: BinaryIO
    shape: tuple[int, ...]
    number: int = 0

    def write(self, rows: Any) -> None:
        """(N, *shape) float16."""
        found = np.ascontiguousarray(rows, np.float16)
        assert found.shape[1:] == self.shape
        self.file.write(found.tobytes())
        self.number += len(found)


@contextmanager
def write(path: Path | str, name: str, shape: tuple[int, ...], about: Mapping[str, str]) -> Iterator[Rows]:
    """`about` is what the file says of itself."""
    with open(path, "wb") as file:
        file.write(b" " * (8 + HEADER))
        rows = Rows(file, shape)
        yield rows
        size = rows.number * 2 * math.prod(shape)
        tensor = {"dtype": "F16", "shape": [rows.number, *shape], "data_offsets": [0, size]}
        header = json.dumps({"__metadata__": dict(about), name: tensor}).encode()
        assert len(header) <= HEADER
        file.seek(0)
        file.write(HEADER.to_bytes(8, "little") + header.ljust(HEADER))


@dataclass(frozen=True)
class Shard:
    """What a file of a tensor says of itself: `start` is where its first row begins, each of so many
    `bytes`.
    """

    about: Mapping[str, str]
    shape: tuple[int, ...]
    number: int
    start: int

    @property
    def bytes(self) -> int:
        return 2 * math.prod(self.shape)


def read_header(path: Path, name: str) -> Shard:
    """Raises:
    InputError: it is no file of such a tensor.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < 1_000_000 else {}
        tensor = header[name]
        number, *shape = tensor["shape"]
        found = Shard(header["__metadata__"], tuple(shape), number, 8 + length)
        if tensor["dtype"] != "F16" or path.stat().st_size != found.start + number * found.bytes:
            raise ValueError("other sizes than it says")
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no {name}: {error}", "build the stage again") from error
