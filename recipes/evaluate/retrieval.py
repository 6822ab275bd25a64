"""Retrieval: of images by their captions and of captions by their images.

Layouts, each with its protocol:

    karpathy      dataset.json of Karpathy's splits (images[].filename, .sentences[].raw, .split)
    one caption   `<name>.jpg` and `<name>.txt`, of which the first line is the caption: Urban1K, DOCCI
    table         csv or parquet of `image,caption`, as Flickr8k's captions.txt, or JSON {image: [captions]}

A query is a hit at k if at least one that is right is among the first k, as clip_benchmark has it; what is as
near as one that is right comes after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from builder.errors import InputError
from builder.files import read_file, read_lines
from builder.stages.clip import Clip
from builder.typed import from_json
from recipes.evaluate.results import Metric, Result, metric
from recipes.join import PICTURES

BATCH = 128
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Pairs:
    """Images, and captions with the number of their image."""

    protocol: str
    images: tuple[Path, ...]
    captions: tuple[str, ...]
    of: tuple[int, ...]


def karpathy(dataset: Path, images: Path, split: str = "test") -> Pairs:
    """COCO (5,000 of the test split, 25,010 captions), Flickr30K (1,000 and 5,000), Flickr8k."""
    read = from_json(dict[str, Any], read_file(dataset), what=str(dataset))
    chosen = [image for image in read["images"] if image["split"] == split]
    where = [images / image.get("filepath", "") / image["filename"] for image in chosen]
    pairs = [(n, s["raw"]) for n, image in enumerate(chosen) for s in image["sentences"]]
    return _pairs(f"karpathy-{split}", where, [text for _, text in pairs], [n for n, _ in pairs])


def one_caption(folder: Path) -> Pairs:
    """Urban1K's and DOCCI's: the first line of `<name>.txt` is the caption of `<name>.jpg`."""
    texts = sorted(folder.rglob("*.txt"))
    found = [(image, text) for text in texts if (image := _image_of(text))]
    captions = [text.read_text(encoding="utf-8").partition("\n")[0].strip() for _, text in found]
    return _pairs("one-caption", [image for image, _ in found], captions, list(range(len(found))))


def table(path: Path, images: Path, only: Path | None = None) -> Pairs:
    """An image may have several captions. `only` lists the images that are asked for, a line each."""
    import pandas as pd

    if path.suffix == ".json":
        given = from_json(dict[str, list[str]], read_file(path), what=str(path))
        rows = [(image, caption) for image, captions in given.items() for caption in captions]
    else:
        table = (
            pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, keep_default_na=False)
        )
        if not {"image", "caption"} <= set(table.columns):
            reason = f"{path} has not the columns image and caption"
            raise InputError(reason, "name them so in its first line")
        rows = list(zip(table["image"], table["caption"], strict=True))
    chosen = {line.strip() for line in read_lines(only)} if only else {image for image, _ in rows}
    rows = [(image, caption) for image, caption in rows if image in chosen]
    names = list(dict.fromkeys(image for image, _ in rows))
    number = {name: n for n, name in enumerate(names)}
    protocol = f"table-{only.stem}" if only else "table"
    of = [number[image] for image, _ in rows]
    return _pairs(protocol, [images / name for name in names], [caption for _, caption in rows], of)


def _image_of(text: Path) -> Path | None:
    found = (text.with_suffix(kind) for kind in PICTURES)
    return next((image for image in found if image.exists()), None)


def _pairs(protocol: str, images: Sequence[Path], captions: Sequence[str], of: Sequence[int]) -> Pairs:
    if not images:
        raise InputError(
            f"there is nothing to retrieve ({protocol})", "see that the split and folder are right"
        )
    if missing := [path for path in images if not path.is_file()]:
        reason = f"{len(missing):,} of {len(images):,} images are missing, the first is {missing[0]}"
        raise InputError(reason, "give the folder that they are in")
    return Pairs(protocol, tuple(images), tuple(captions), tuple(of))


def retrieval(clip: Clip, model: str, benchmark: str, pairs: Pairs) -> Result:
    """Recall at 1, 5 and 10, both ways."""
    image_NE = np.concatenate(list(image_vectors(clip, pairs.images)))
    text_ME = np.concatenate(list(text_vectors(clip, pairs.captions)))
    samples = {"images": len(image_NE), "captions": len(text_ME)}
    return Result(benchmark, pairs.protocol, model, samples, recalls(image_NE, text_ME, np.array(pairs.of)))


def recalls(
    image_NE: Vectors, text_ME: Vectors, of_M: npt.NDArray[Any], ks: Sequence[int] = (1, 5, 10)
) -> tuple[Metric, ...]:
    """Of unit vectors; a unit of the intervals is an image with all its captions."""
    text_ranks = np.empty(len(text_ME), np.int64)
    for start in range(0, len(text_ME), 4096):
        part = slice(start, start + 4096)
        scores = text_ME[part] @ image_NE.T
        right = scores[np.arange(len(scores)), of_M[part]]
        text_ranks[part] = (scores > right[:, None]).sum(1)
    image_ranks = np.empty(len(image_NE), np.int64)
    order = np.argsort(of_M, kind="stable")
    starts = np.searchsorted(of_M[order], np.arange(len(image_NE)))
    for start in range(0, len(image_NE), 1024):
        part = slice(start, start + 1024)
        scores = image_NE[part] @ text_ME.T
        numbers = np.arange(len(image_NE))[part]
        best = np.array([scores[n - start][of_M == n].max(initial=-np.inf) for n in numbers])
        image_ranks[part] = (scores > best[:, None]).sum(1)
    has = np.diff(np.append(starts, len(of_M)))
    found = [metric(f"I2T R@{k}", (image_ranks < k) * (has > 0), (has > 0).astype(float)) for k in ks]
    for k in ks:
        hits = np.bincount(of_M, text_ranks < k, minlength=len(image_NE))
        found.append(metric(f"T2I R@{k}", hits, has.astype(float)))
    return tuple(found)


def image_vectors(clip: Clip, paths: Sequence[Path]) -> Iterator[Vectors]:
    decoded = (clip.decode(path.read_bytes()) for path in paths)
    while batch := list(islice(decoded, BATCH)):
        yield clip.images(batch).cpu().numpy()


def text_vectors(clip: Clip, texts: Sequence[str]) -> Iterator[Vectors]:
    for start in range(0, len(texts), BATCH):
        vectors, _ = clip.texts(list(texts[start : start + BATCH]))
        yield vectors.cpu().numpy()
