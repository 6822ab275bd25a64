"""Zero-shot classification: which class name, in templates, is nearest to an image.

The weight of a class is the mean of its templates' unit vectors, scaled to one again, as OpenAI and open_clip
have it. Layouts:

    image-folder    a folder a class, with names and templates given, a line each
    webdataset      clip_benchmark's: test/nshards.txt, test/0.tar, ... of images with a .cls, or several
                    labels in a .npy, classnames.txt and zeroshot_classification_templates.txt
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from builder.errors import InputError
from builder.files import read_lines
from recipes.evaluate.model import Model, Picture, Vectors, before
from recipes.evaluate.results import Metric, Result, metric, named
from recipes.evaluate.webdatasets import Sample, samples
from recipes.images import PICTURES

Labelled = tuple[Picture, Any]
"""A picture and its class's number; of several labels a classes' row of 0 and 1."""


@dataclass(frozen=True)
class Classes:
    """`names`: a class each, in the order of their numbers; `templates` have one {} or {c}."""

    protocol: str
    names: tuple[str, ...]
    templates: tuple[str, ...]
    pictures: Callable[[], Iterator[Labelled]]


def image_folder(folder: Path, names: Path, templates: Path | None = None) -> Classes:
    """A folder of folders, a class each; `names` has a line `folder<TAB>name`, or a name for each folder in
    their order.

    Raises:
        InputError: names and folders are not each other's, or a template has no {}.
    """
    folders = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if all(name.isdecimal() for name in folders):  # ImageNet-V2's are 0 to 999
        folders.sort(key=int)
    lines = _lines(names)
    if all("\t" in line for line in lines):
        named = dict(line.split("\t", 1) for line in lines)
        if missing := [name for name in folders if name not in named]:
            raise InputError(f"{names} has no name for {missing[0]}", f"it is a folder of {folder}")
        if extra := [name for name in named if name not in folders]:
            reason = (
                f"{names} names {len(extra):,} classes that {folder} has no folder of, such as {extra[0]}"
            )
            raise InputError(reason, "an empty folder is a class without pictures; or leave the name out")
        chosen = [named[name] for name in folders]
    elif len(lines) == len(folders):
        chosen = lines
    else:
        reason = f"{names} has {len(lines)} names, {folder} {len(folders)} folders"
        raise InputError(reason, "give a line a folder: folder<TAB>name")
    found = [
        (Picture(str(path)), number)
        for number, name in enumerate(folders)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in PICTURES
    ]
    if not found:
        raise InputError(f"{folder} has no images in folders", f"they end in {', '.join(PICTURES)}")
    given = _templates(templates) if templates else ("a photo of a {}.",)
    return Classes("zero-shot image-folder", tuple(chosen), given, lambda: iter(found))


def webdataset(folder: Path, names: Path | None = None, templates: Path | None = None) -> Classes:
    """Classes are those of the data set's own classnames.txt, unless given."""

    def pictures() -> Iterator[Labelled]:
        for sample in samples(folder):
            yield sample.picture, _label(sample)

    chosen = tuple(_lines(names or folder / "classnames.txt"))
    given = _templates(templates or folder / "zeroshot_classification_templates.txt")
    return Classes("zero-shot webdataset", chosen, given, pictures)


def _label(sample: Sample) -> Any:
    """Its .cls, or of several labels its .npy, as clip_benchmark's voc2007_multilabel has them."""
    found = sample.about if sample.label is None else sample.label
    if found is None:
        raise InputError(f"{sample.picture.name} has neither .cls nor .npy", "see clip_benchmark's layout")
    if sample.label is None and np.ndim(found) != 1:
        reason = f"{sample.picture.name}'s .npy is no row of labels: its shape is {np.shape(found)}"
        raise InputError(reason, "see clip_benchmark's layout")
    return found


def _lines(path: Path) -> list[str]:
    return [line.strip("\r\n") for line in read_lines(path) if line.strip()]


def _templates(path: Path) -> tuple[str, ...]:
    lines = _lines(path)
    if wrong := [line for line in lines if "{}" not in line and "{c}" not in line]:
        raise InputError(f"{path}: '{wrong[0]}' has no {{}}", "that is where the class's name goes")
    if not lines:
        raise InputError(f"{path} has no templates", "give a line each, with {} for the class's name")
    return tuple(lines)


def zeroshot(model: Model, benchmark: str, classes: Classes, main: str = "top-1") -> Result:
    """Top-1, top-5 and the mean over classes of top-1; of several labels an image, mean average precision."""
    found = classified(model, classes)
    number = len(classes.names)
    metrics: tuple[Metric, ...]
    if found.labels_N.ndim == 2:
        metrics, main = (average_precision(found.scores_NC, found.labels_N),), "mean average precision"
    else:
        metrics = accuracies(found.scores_NC, found.labels_N, number)
    samples = {"images": len(found.hashes), "classes": number, "templates": len(classes.templates)}
    seen = model.in_training(found.hashes)
    data = named(found.hashes, classes.names, classes.templates)
    return Result(benchmark, classes.protocol, model.name, samples, metrics, seen, main, data=data)


@dataclass(frozen=True)
class Classified:
    """`scores_NC`: cosines; `labels_N`: the class's number, or (N, C) where images have several."""

    scores_NC: Vectors
    labels_N: npt.NDArray[Any]
    hashes: list[str]


def classified(model: Model, classes: Classes) -> Classified:
    """Raises:
    InputError: a label is no class.
    """
    class_CE = weights(model, classes.names, classes.templates)
    labels: list[Any] = []

    def noted() -> Iterator[Picture]:
        for picture, label in classes.pictures():
            labels.append(label)
            yield picture

    scores, hashes = [], []
    for image_BE, names in model.image_batches(noted()):
        scores.append(image_BE @ class_CE.T)
        hashes += names
    if not scores:
        raise InputError(f"there are no images ({classes.protocol})", "see that the folder is right")
    if len({np.shape(label) for label in labels}) > 1:
        raise InputError(f"some images have one label, some several ({classes.protocol})", "give one kind")
    labels_N = np.array(labels)
    if labels_N.ndim == 1 and not 0 <= labels_N.min() <= labels_N.max() < len(classes.names):
        reason = f"labels are {labels_N.min()} to {labels_N.max()}, of {len(classes.names)} classes"
        raise InputError(reason, "give a name for each class")
    if labels_N.ndim == 2 and labels_N.shape[1] != len(classes.names):
        reason = f"images have {labels_N.shape[1]} labels, of {len(classes.names)} classes"
        raise InputError(reason, "give a name for each class")
    return Classified(np.concatenate(scores), labels_N, hashes)


def weights(model: Model, names: Sequence[str], templates: Sequence[str]) -> Vectors:
    """(C, E), a unit vector a class."""
    found = []
    for name in names:
        texts = [template.replace("{c}", name).replace("{}", name) for template in templates]
        mean = model.texts(texts).mean(0)
        found.append(mean / np.linalg.norm(mean))
    return np.stack(found)


def accuracies(scores_NC: Vectors, labels_N: npt.NDArray[Any], classes: int) -> tuple[Metric, ...]:
    """An image is a hit at k if fewer than k classes come before its own."""
    ranks_N = before(scores_NC, labels_N)
    found = [metric("top-1", ranks_N < 1)]
    if classes > 5:
        found.append(metric("top-5", ranks_N < 5))
    return (*found, metric("mean per class", ranks_N < 1, groups=labels_N, statistic="macro"))


def average_precision(scores_NC: Vectors, labels_NC: npt.NDArray[Any]) -> Metric:
    """The mean over classes of average precision, as clip_benchmark has it. A unit is a class."""
    order = np.argsort(-scores_NC, 0, kind="stable")
    truth = np.take_along_axis(labels_NC > 0, order, 0).astype(np.float64)
    precision = truth.cumsum(0) / np.arange(1, len(truth) + 1)[:, None]
    return metric("mean average precision", (precision * truth).sum(0) / np.maximum(truth.sum(0), 1))
