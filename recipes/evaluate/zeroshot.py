"""Zero-shot classification: which class name, in templates, is nearest to an image.

The weight of a class is the mean of its templates' unit vectors, scaled to one again, as OpenAI and open_clip
have it. Images lie in a folder a class (ImageFolder); names and templates are given, a line each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from builder.errors import InputError
from builder.files import read_lines
from builder.stages.clip import Clip
from recipes.evaluate.results import Metric, Result, metric
from recipes.evaluate.retrieval import image_vectors, text_vectors
from recipes.join import PICTURES


@dataclass(frozen=True)
class Classes:
    """`names`: a class each, in the order of the folders; `templates` have one {}."""

    names: tuple[str, ...]
    templates: tuple[str, ...]
    images: tuple[Path, ...]
    of: tuple[int, ...]


def image_folder(folder: Path, names: Path, templates: Path | None = None) -> Classes:
    """A folder of folders, a class each; `names` has a line `folder<TAB>name`, or a name for each folder in
    their order.

    Raises:
        InputError: names and folders are not each other's, or a template has no {}.
    """
    folders = sorted(path.name for path in folder.iterdir() if path.is_dir())
    lines = [line for line in read_lines(names) if line.strip()]
    if all("\t" in line for line in lines):
        named = dict(line.split("\t", 1) for line in lines)
        if missing := [name for name in folders if name not in named]:
            raise InputError(f"{names} has no name for {missing[0]}", f"it is a folder of {folder}")
        chosen = [named[name] for name in folders]
    elif len(lines) == len(folders):
        chosen = lines
    else:
        reason = f"{names} has {len(lines)} names, {folder} {len(folders)} folders"
        raise InputError(reason, "give a line a folder: folder<TAB>name")
    given = [line for line in read_lines(templates) if line.strip()] if templates else ["a photo of a {}."]
    if wrong := [line for line in given if "{}" not in line]:
        raise InputError(f"{templates}: '{wrong[0]}' has no {{}}", "that is where the class's name goes")
    found = [
        (path, number)
        for number, name in enumerate(folders)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in PICTURES
    ]
    if not found:
        raise InputError(f"{folder} has no images in folders", f"they end in {', '.join(PICTURES)}")
    images, of = zip(*found, strict=True)
    return Classes(tuple(chosen), tuple(given), images, of)


def zeroshot(clip: Clip, model: str, benchmark: str, classes: Classes) -> Result:
    """Top-1, top-5 and the mean over classes of top-1."""
    class_CE = np.stack([_weight(clip, name, classes.templates) for name in classes.names])
    of_N = np.array(classes.of)
    ranks_N = np.empty(len(of_N), np.int64)
    start = 0
    for image_BE in image_vectors(clip, classes.images):
        part = slice(start, start := start + len(image_BE))
        ranks_N[part] = _ranks(image_BE @ class_CE.T, of_N[part])
    samples = {"images": len(ranks_N), "classes": len(classes.names), "templates": len(classes.templates)}
    found = accuracies(ranks_N, of_N, len(classes.names))
    return Result(benchmark, "zero-shot", model, samples, found)


def accuracies(ranks_N: npt.NDArray[Any], of_N: npt.NDArray[Any], classes: int) -> tuple[Metric, ...]:
    """`ranks_N`: how many classes are nearer to an image than its own."""
    found = [metric("top-1", ranks_N < 1)]
    if classes > 5:
        found.append(metric("top-5", ranks_N < 5))
    sizes = np.bincount(of_N, minlength=classes)
    means = np.bincount(of_N, ranks_N < 1, minlength=classes)[sizes > 0] / sizes[sizes > 0]
    return (*found, metric("mean per class", means))


def _weight(clip: Clip, name: str, templates: Sequence[str]) -> npt.NDArray[np.float32]:
    """(E) of a class."""
    texts = [template.replace("{}", name) for template in templates]
    mean: npt.NDArray[np.float32] = np.concatenate(list(text_vectors(clip, texts))).mean(0)
    return mean / np.linalg.norm(mean)


def _ranks(scores_BC: npt.NDArray[Any], of_B: npt.NDArray[Any]) -> npt.NDArray[Any]:
    right = scores_BC[np.arange(len(of_B)), of_B]
    ranks: npt.NDArray[Any] = (scores_BC > right[:, None]).sum(1)
    return ranks
