"""The model that is evaluated: unit vectors of images and texts, and what of it was trained on."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from builder import sql
from builder.errors import InputError
from builder.files import sha256_file
from builder.machine import Machine
from builder.model import identity, model_folder
from builder.stages.clip import Clip, map_ahead
from builder.stages.imagetar import NO_PICTURE
from builder.typed import from_json
from recipes.clip.model import WEIGHTS

BATCH = 128
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Picture:
    """An image of a benchmark: its file, or what is in it, and the part (left, top, right, bottom) that is
    asked about.
    """

    name: str
    content: bytes | None = None
    box: tuple[int, int, int, int] | None = None

    def read(self) -> bytes:
        return Path(self.name).read_bytes() if self.content is None else self.content

    def of(self, data: bytes) -> Image.Image:
        """Raises:
        InputError: it cannot be decoded.
        """
        try:
            image = Image.open(io.BytesIO(data)).convert("RGB")
        except NO_PICTURE as error:
            reason = f"{self.name} cannot be decoded: {str(error).partition(' <_io.')[0]}"
            raise InputError(reason, "get it again: a benchmark is asked whole or not at all") from error
        return image.crop(self.box) if self.box else image


def inside(folder: Path, name: str) -> Path:
    """A file that a benchmark names: in its folder, whoever wrote it.

    Raises:
        InputError: it is somewhere else.
    """
    path = os.path.normpath(folder / name)
    if os.path.isabs(name) or not Path(path).is_relative_to(os.path.normpath(folder)):
        raise InputError(f"'{name[:200]}' is no image in {folder}", "get the benchmark from its authors")
    return Path(path)


def missing(pictures: Iterable[Picture]) -> None:
    """Raises:
    InputError: images are not there.
    """
    names = list(dict.fromkeys(picture.name for picture in pictures if picture.content is None))
    if gone := [name for name in names if not Path(name).is_file()]:
        reason = f"{len(gone):,} of {len(names):,} images are missing, the first is {gone[0]}"
        raise InputError(reason, "give the folder that they are in")


def before(scores_NM: Vectors, right_N: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(N) how many come before the right one: those that are nearer, and as near but before it."""
    right_N1 = right_N[:, None]
    own_N1 = np.take_along_axis(scores_NM, right_N1, 1)
    earlier = (scores_NM == own_N1) & (np.arange(scores_NM.shape[1]) < right_N1)
    return np.asarray(((scores_NM > own_N1) | earlier).sum(1))


def known_as(model: str) -> str:
    """How a protocol names a model: a folder by its name and what is in it, wherever it lies."""
    folder = model_folder(model)
    content = identity(model).removeprefix("sha256:")
    return f"{folder.resolve().name} {content[:8]}" if folder else content


class Model:
    """An open_clip model. `training` is a training's folder or a file of its images' sha256; where it is not
    given that of the training which the model lies in.
    """

    def __init__(self, name: str, training: Path | None = None) -> None:
        self.name = name
        self.clip = Clip(name)
        folder = model_folder(name)
        weights = folder / WEIGHTS if folder else None
        self.weights = sha256_file(weights) if weights and weights.is_file() else None
        self.trained_on = _trained_on(training) if training else _of_its_training(Path(name))

    def images(self, pictures: Iterable[Picture]) -> tuple[Vectors, list[str]]:
        """(N, E), and each image's sha256."""
        vectors, hashes = [np.empty((0, self.clip.width), np.float32)], []
        for part, names in self.image_batches(pictures):
            vectors.append(part)
            hashes += names
        return np.concatenate(vectors), hashes

    def image_batches(self, pictures: Iterable[Picture]) -> Iterator[tuple[Vectors, list[str]]]:
        """As `images`, a batch at a time; decoded ahead."""

        def made(picture: Picture) -> tuple[Any, str]:
            data = picture.read()
            return self.clip.preprocess(picture.of(data)), sha256(data).hexdigest()

        with ThreadPoolExecutor(round(Machine.here().cpus)) as pool:
            ahead = map_ahead(pool, made, iter(pictures), 2 * BATCH)
            while some := list(islice(ahead, BATCH)):
                decoded, hashes = zip(*some, strict=True)
                yield self._unit(self.clip.images(list(decoded))), list(hashes)

    def vectors(self, images: Iterable[Image.Image]) -> Vectors:
        """(N, E) of what is decoded already."""
        found, waiting = [np.empty((0, self.clip.width), np.float32)], iter(images)
        while some := [self.clip.preprocess(image) for image in islice(waiting, BATCH)]:
            found.append(self._unit(self.clip.images(some)))
        return np.concatenate(found)

    def texts(self, texts: Sequence[str]) -> Vectors:
        """(M, E)."""
        return self.read(texts)[0]

    def read(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        """(M, E), and how many texts are longer than the context."""
        vectors, number = [np.empty((0, self.clip.width), np.float32)], 0
        for start in range(0, len(texts), BATCH):
            found, cut = self.clip.texts(list(texts[start : start + BATCH]))
            vectors.append(self._unit(found))
            number += sum(cut)
        return np.concatenate(vectors), number

    def _unit(self, vectors: Any) -> Vectors:
        """Raises:
        InputError: they are not of length 1: what is nearest is none of its.
        """
        found: Vectors = vectors.cpu().numpy()
        if not np.allclose((found * found).sum(1), 1, atol=1e-2):
            reason = f"{self.name} gives vectors of no direction: its weights are damaged, or not trained"
            raise InputError(reason, "copy them again, or train it anew")
        return found

    def in_training(self, hashes: Iterable[str]) -> int | None:
        """How many of these images it was trained on; None where that is not known."""
        if not self.trained_on:
            return None
        with sql.connect() as con:
            con.register("asked", pa.table({"sha256": pa.array(sorted(set(hashes)), pa.string())}))
            read = f"select distinct sha256 from {sql.table(self.trained_on)}"
            return int(
                con.sql(f"select count(*) from asked semi join ({read}) using (sha256)").fetchall()[0][0]
            )


def _trained_on(training: Path) -> list[str]:
    """Files with the sha256 of what was trained on.

    Raises:
        InputError: it does not say that.
    """
    joined = training / "joined"
    whole = sorted(joined.glob("[0-9]*.parquet")) if (joined / "join.json").is_file() else []
    found = whole if training.is_dir() else [training]
    if not found or any(
        path.suffix != ".parquet" or not path.is_file() or "sha256" not in pq.read_schema(path).names
        for path in found
    ):
        reason = f"{training} does not say what was trained on"
        raise InputError(reason, "name a training's folder, or a parquet file with a column sha256")
    return list(map(str, found))


def _of_its_training(model: Path) -> list[str]:
    """Of the training that a model lies in, unless it began with another model, of which it is unknown."""
    out = model.resolve().parent
    about = out / "training.json"
    if not about.is_file() or from_json(dict[str, Any], about.read_bytes(), what=str(about)).get("start"):
        return []
    return _trained_on(out)
