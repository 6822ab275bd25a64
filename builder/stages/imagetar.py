"""Reading the images of a download tar, one after the other, in row order."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path


def images(path: Path) -> Iterator[tuple[str, bytes]]:
    """(key, encoded image) of each sample."""
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            if extension == "jpg":
                file = tar.extractfile(member)
                assert file is not None  # a regular file: we wrote it
                yield key, file.read()
                tar.members = []  # type: ignore[attr-defined]  # tarfile remembers every member it has passed
