"""Retrieval: of images by their captions and of captions by their images.

Layouts, each with its protocol:

    karpathy      dataset.json of Karpathy's splits (images[].filename, .sentences[].raw, .split)
    one caption   a text file an image, of one name and of which the first line is the caption; side by side,
                  or in folders `image` and `caption`, as Urban1K
    docci         docci_descriptions.jsonlines (example_id, split, image_file, description) and `images`
    table         csv or parquet of `image,caption`, as Flickr8k's captions.txt, or JSON {image: [captions]}
    webdataset    clip_benchmark's: test/nshards.txt, test/0.tar, ... of images with a .txt, a caption a line

A query is a hit at k if at least one that is right is among the first k, as clip_benchmark has it; of those
that are equally near the first one comes first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from builder.errors import InputError
from builder.files import read_file, read_lines
from builder.typed import from_json
from recipes.evaluate.model import Model, Picture, Vectors, before, inside, missing
from recipes.evaluate.results import Metric, Result, metric, named
from recipes.evaluate.webdatasets import samples
from recipes.images import PICTURES


@dataclass(frozen=True)
class Pairs:
    """Images, each with its captions."""

    protocol: str
    pictures: Callable[[], Iterator[tuple[Picture, Sequence[str]]]]


def karpathy(dataset: Path, images: Path, split: str = "test") -> Pairs:
    """COCO (5,000 of the test split, 25,010 captions), Flickr30K (1,000 and 5,000), Flickr8k."""
    read = from_json(dict[str, Any], read_file(dataset), what=str(dataset))
    try:
        chosen = [image for image in read["images"] if image["split"] == split]
        names = [os.path.join(image.get("filepath", ""), image["filename"]) for image in chosen]
        captions = [[sentence["raw"] for sentence in image["sentences"]] for image in chosen]
    except (KeyError, TypeError) as error:
        reason = f"{dataset} is not laid out as Karpathy's dataset.json: {error} is missing"
        raise InputError(reason, "get it again, or give a table of image and caption") from error
    where = [inside(images, name) for name in names]
    return _pairs(f"karpathy-{split}", where, captions)


def one_caption(folder: Path) -> Pairs:
    """Urban1K's: the first line of `<name>.txt` is the caption of `<name>.jpg`."""
    texts = sorted(folder.rglob("*.txt"))
    found = [(image, text) for text in texts if (image := _image_of(text))]
    if gone := sorted({*texts} - {text for _, text in found}):
        reason = f"{len(gone):,} of {len(texts):,} captions have no image, the first is {gone[0]}"
        raise InputError(reason, "get the images again: a benchmark is asked whole or not at all")
    captions = [[text.read_text(encoding="utf-8").partition("\n")[0].strip()] for _, text in found]
    return _pairs("one-caption", [image for image, _ in found], captions)


def docci(folder: Path, split: str = "test") -> Pairs:
    """5,000 of the test split."""

    class Row(BaseModel):
        split: str
        image_file: str
        description: str

    path = folder / "docci_descriptions.jsonlines"
    rows = [from_json(Row, line, what=str(path)) for line in read_lines(path) if line.strip()]
    chosen = [row for row in rows if row.split == split]
    where = [inside(folder / "images", row.image_file) for row in chosen]
    return _pairs(f"docci-{split}", where, [[row.description] for row in chosen])


def table(path: Path, images: Path, only: Path | None = None) -> Pairs:
    """An image may have several captions. `only` lists the images that are asked for, a line each."""
    import pandas as pd

    if path.suffix == ".json":
        given = from_json(dict[str, list[str]], read_file(path), what=str(path))
        rows = [(image, caption) for image, captions in given.items() for caption in captions]
    else:
        try:
            table = (
                pd.read_parquet(path)
                if path.suffix == ".parquet"
                else pd.read_csv(path, keep_default_na=False, dtype=str)
            )
        except (ValueError, OSError) as error:  # pandas' and pyarrow's own are ValueErrors
            reason = f"{path} cannot be read: {str(error).splitlines()[0][:200]}"
            raise InputError(reason, "a caption with a comma in it stands in quotes") from error
        if not {"image", "caption"} <= set(table.columns):
            reason = f"{path} has not the columns image and caption"
            raise InputError(reason, "name them so in its first line")
        rows = list(zip(table["image"], table["caption"], strict=True))
    chosen = {line.strip() for line in read_lines(only)} if only else {image for image, _ in rows}
    captions: dict[str, list[str]] = {}
    for image, caption in rows:
        if image in chosen:
            captions.setdefault(image, []).append(caption)
    protocol = f"table-{only.stem}" if only else "table"
    if gone := len(chosen - captions.keys()):
        protocol += f", {gone:,} listed images have no caption"
    return _pairs(protocol, [inside(images, str(name)) for name in captions], list(captions.values()))


def webdataset(folder: Path) -> Pairs:
    return Pairs("webdataset", lambda: ((one.picture, one.texts) for one in samples(folder)))


def _image_of(text: Path) -> Path | None:
    places = [text.parent, *(text.parent.with_name(name) for name in ("image", "images"))]
    found = (place / f"{text.stem}{kind}" for place in places for kind in PICTURES)
    return next((image for image in found if image.exists()), None)


def _pairs(protocol: str, images: Sequence[Path], captions: Sequence[Sequence[str]]) -> Pairs:
    if not images:
        reason = f"there is nothing to retrieve ({protocol})"
        raise InputError(reason, "see that the split and folder are right")
    pictures = [Picture(str(path)) for path in images]
    missing(pictures)
    return Pairs(protocol, lambda: zip(pictures, captions, strict=True))


def retrieval(model: Model, benchmark: str, pairs: Pairs) -> Result:
    """Recall at 1, 5 and 10, both ways, and the mean of both at 1."""
    captions: list[str] = []
    of: list[int] = []

    def noted() -> Iterator[Picture]:
        for number, (picture, texts) in enumerate(pairs.pictures()):
            captions.extend(texts)
            of.extend([number] * len(texts))
            yield picture

    image_NE, hashes = model.images(noted())
    if not captions:
        raise InputError(f"no image has a caption ({pairs.protocol})", "see that the folder is right")
    text_ME, cut = model.read(captions)
    counts = {"images": len(image_NE), "captions": len(text_ME)}
    found = recalls(image_NE, text_ME, np.array(of))
    seen = model.in_training(hashes)
    return Result(
        benchmark, pairs.protocol, model.name, counts, found, seen, "mean R@1", cut,
        named(hashes, captions),
    )  # fmt: skip


def recalls(
    image_NE: Vectors, text_ME: Vectors, of_M: npt.NDArray[Any], ks: Sequence[int] = (1, 5, 10)
) -> tuple[Metric, ...]:
    """Of unit vectors; a unit of the intervals is an image with all its captions. Ranks of images that have
    no captions are not used.
    """
    text_ranks = np.empty(len(text_ME), np.int64)
    for start in range(0, len(text_ME), 4096):
        part = slice(start, start + 4096)
        scores = text_ME[part] @ image_NE.T
        text_ranks[part] = before(scores, of_M[part])
    image_ranks = np.empty(len(image_NE), np.int64)
    for start in range(0, len(image_NE), 1024):
        part = slice(start, start + 1024)
        scores = image_NE[part] @ text_ME.T
        own = np.array([_best(row, of_M == start + n) for n, row in enumerate(scores)])
        image_ranks[part] = before(scores, own)
    captions = np.bincount(of_M, minlength=len(image_NE)).astype(float)
    has = (captions > 0).astype(float)
    found = [metric(f"I2T R@{k}", (image_ranks < k) * has, has) for k in ks]
    for k in ks:
        hits = np.bincount(of_M, text_ranks < k, minlength=len(image_NE))
        found.append(metric(f"T2I R@{k}", hits, captions))
    # An image counts as much as so many captions that both ways count half.
    hits = np.bincount(of_M, text_ranks < 1, minlength=len(image_NE))
    hits = hits + (image_ranks < 1) * has * captions.sum() / has.sum()
    return (*found, metric("mean R@1", hits / 2, captions))


def _best(scores_M: Vectors, own_M: npt.NDArray[Any]) -> int:
    """Which of an image's own captions is nearest, of several the first."""
    own = np.flatnonzero(own_M)
    return int(own[scores_M[own].argmax()]) if len(own) else 0
