"""Benchmarks as clip_benchmark writes them: tars of images, each with its .cls, .txt or .npy."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from builder.errors import InputError
from recipes.evaluate.model import Picture
from recipes.images import PICTURES


@dataclass(frozen=True)
class Sample:
    """`label`: a class's number; `about`: what .npy holds, several labels or groups; `texts`: lines."""

    picture: Picture
    label: int | None
    texts: tuple[str, ...]
    about: Any


def samples(folder: Path, split: str = "test") -> Iterator[Sample]:
    """In the order of the tars.

    Raises:
        InputError: it is not laid out so.
    """
    count = folder / split / "nshards.txt"
    if not count.is_file():
        raise InputError(f"{count} is missing", "see clip_benchmark's layout of webdatasets")
    number = _number(count.read_bytes(), str(count))
    tars = [folder / split / f"{n}.tar" for n in range(number)]
    if gone := [tar for tar in tars if not tar.is_file()]:
        raise InputError(f"{gone[0]} is missing", f"{count} says that there are {len(tars)}")
    for name, sample in (found for tar in tars for found in _samples(tar)):
        image = next((sample[kind[1:]] for kind in PICTURES if kind[1:] in sample), None)
        if image is None:
            raise InputError(f"{name} has no image", "see clip_benchmark's layout")
        about = np.load(io.BytesIO(sample["npy"]), allow_pickle=False) if "npy" in sample else None
        label = _number(sample["cls"], f"{name}'s .cls") if "cls" in sample else None
        texts = tuple(sample["txt"].decode().splitlines()) if "txt" in sample else ()
        yield Sample(Picture(name, image), label, texts, about)


def _number(text: bytes, what: str) -> int:
    """Raises:
    InputError: it is none.
    """
    try:
        return int(text)
    except ValueError as error:
        said = text[:40].decode(errors="replace").strip()
        raise InputError(f"{what} is '{said}', not a number", "see clip_benchmark's layout") from error


def _samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(name, kind -> content): of one name up to its first dot, one behind the other."""
    try:
        with tarfile.open(path) as tar:
            members = (member for member in tar if member.isfile())
            for key, group in groupby(members, lambda member: _parts(member)[0]):
                sample = {}
                for member in group:
                    content = tar.extractfile(member)
                    assert content is not None
                    sample[_parts(member)[1]] = content.read()
                yield f"{path}:{key}", sample
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{path} is damaged: {error}", "get it again") from error


def _parts(member: tarfile.TarInfo) -> tuple[str, str]:
    """Its sample's name, and its kind: what is behind the first dot of the file's own name."""
    folder, slash, name = member.name.rpartition("/")
    key, _, kind = name.partition(".")
    return f"{folder}{slash}{key}", kind.lower()
