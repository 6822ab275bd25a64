"""Objects, colours, counts and positions, checked by a detector: as GenEval (arXiv 2310.11513), of whose
evaluation_metadata.jsonl every line is a prompt with what its picture is to have.

Its thresholds, its rules for positions, and four pictures a prompt unless told; colours are told by an
open_clip model from an object's box, where GenEval cuts it out by its mask. Any detector that transformers
loads will do: it is named in the protocol, and numbers of two detectors are not comparable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from builder.errors import InputError
from builder.files import read_file
from builder.model import check_files, fetched, hub_model, model_folder
from builder.typed import from_json
from recipes.evaluate.drawings import Drawings
from recipes.evaluate.model import Model, Vectors, known_as
from recipes.evaluate.results import Result, metric
from recipes.evaluate.zeroshot import weights

SURE, SURE_TO_COUNT, AT_MOST = 0.3, 0.9, 16  # of a detection; objects of a class
APART = 0.1  # of both objects' sizes: a position within it is none
NAMES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}  # COCO's
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {{c}} {}", "a photo of a {{c}}-colored {}", "a photo of a {{c}} object")


@dataclass(frozen=True)
class Asked:
    """`include` and `exclude`: class, count, and of the former perhaps color and position."""

    tag: str
    prompt: str
    include: list[dict[str, Any]]
    exclude: list[dict[str, Any]]


@dataclass(frozen=True)
class Object:
    """Found in a picture; `box` is left, top, right, bottom in pixels."""

    name: str
    score: float
    box: tuple[float, float, float, float]


def read(path: Path) -> list[Asked]:
    """Raises:
    InputError: it is not of that layout.
    """
    found = []
    for number, line in enumerate(read_file(path).splitlines(), 1):
        if line.strip():
            about = from_json(dict[str, Any], line, what=f"{path}, line {number}")
            try:
                include = [_object(one) for one in about["include"]]
                exclude = [_object(one) | {"count": one["count"]} for one in about.get("exclude", [])]
                if any(one["position"][1] >= place for place, one in enumerate(include) if "position" in one):
                    raise ValueError("a position is to an object before it")
                found.append(Asked(about["tag"], about["prompt"], include, exclude))
            except (KeyError, TypeError, ValueError, IndexError) as error:
                reason = f"{path}, line {number} has not tag, prompt, include and exclude: {error}"
                raise InputError(reason, "give GenEval's evaluation_metadata.jsonl") from error
    if not found:
        raise InputError(f"{path} has no prompts", "give GenEval's evaluation_metadata.jsonl")
    return found


def _object(one: dict[str, Any]) -> dict[str, Any]:
    return {"count": 1, **one, "class": NAMES.get(one["class"], one["class"])}


def check_detector(model: str, asked: Sequence[Asked]) -> None:
    """Before anything is drawn. Of one from the Hub its classes are looked at when it is there.

    Raises:
        InputError: it is no detector, or does not know a class that is asked for.
    """
    folder, hint = model_folder(model), "name a detector of transformers, such as DETR"
    if folder is None:
        hub_model(model)
        return
    for name in ("config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}", hint)
    path = folder / "config.json"
    known = from_json(dict[str, Any], read_file(path), what=str(path)).get("id2label") or {}
    _check_classes(model, set(known.values()), asked)
    check_files(folder)


def _check_classes(model: str, known: set[str], asked: Sequence[Asked]) -> None:
    classes = {one["class"] for of in asked for one in (*of.include, *of.exclude)}
    if unknown := sorted(classes - known):
        reason = f"{model} does not know '{unknown[0]}', which is asked for"
        raise InputError(reason, "give a detector of COCO's classes, by these names")


class Detector:
    """Of transformers, for inference."""

    def __init__(self, model: str) -> None:
        """Raises:
        InputError: it detects nothing.
        """
        import torch
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        folder = fetched(model)
        self.name, self.torch = model, torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            loaded: Any = AutoModelForObjectDetection.from_pretrained(folder, use_safetensors=True)
        except ValueError as error:
            reason = f"{model} is no detector: {str(error).splitlines()[0][:120]}"
            raise InputError(reason, "name a detector of transformers, such as DETR") from error
        self.model = loaded.to(self.device).eval()
        self.processor: Any = AutoImageProcessor.from_pretrained(folder)
        self.names: dict[int, str] = self.model.config.id2label

    def __call__(self, image: Image.Image) -> list[Object]:
        """The surest first."""
        with self.torch.inference_mode():
            inputs = self.processor(images=image, return_tensors="pt").to(self.device)
            out = self.model(**inputs)
        (found,) = self.processor.post_process_object_detection(
            out, threshold=SURE, target_sizes=[(image.height, image.width)]
        )
        objects = [
            Object(self.names[int(label)], float(score), tuple(box.tolist()))
            for label, score, box in zip(found["labels"], found["scores"], found["boxes"], strict=True)
        ]
        return sorted(objects, key=lambda one: -one.score)


def geneval(
    benchmark: str, drawings: Drawings, asked: Sequence[Asked], detector: Detector, clip: Model
) -> Result:
    """The share of pictures that are right, by tag, and the mean over tags; the pictures of a prompt are one
    unit.

    Raises:
        InputError: the detector does not know a class that is asked for.
    """
    _check_classes(detector.name, set(detector.names.values()), asked)
    right: Counter[tuple[str, str]] = Counter()
    pictures = Counter((one.tag, one.prompt) for one in asked)
    colours = Colours(clip)
    for image, one in zip(drawings.images(), asked, strict=True):
        right[one.tag, one.prompt] += wrong(image, one, detector(image), colours) is None
    hits, of = (np.array([each[unit] for unit in pictures]) for each in (right, pictures))
    tags = sorted({tag for tag, _ in pictures})
    groups = np.array([tags.index(tag) for tag, _ in pictures])
    found = [metric("mean over tags", hits, of, groups=groups, statistic="macro")]
    found += [metric(tag, hits[groups == number], of[groups == number]) for number, tag in enumerate(tags)]
    by = f"{known_as(detector.name)}, colours by {known_as(clip.name)}"
    how = f"as GenEval, {len(asked) / len(pictures):g} a prompt, by {by}; {drawings.how}"
    counts = {"pictures": len(asked)}
    return Result(benchmark, how, drawings.name, counts, tuple(found), main="mean over tags")


def wrong(image: Image.Image, asked: Asked, objects: Sequence[Object], colours: Colours) -> str | None:
    """What is not as it was asked for, first."""
    sure = SURE_TO_COUNT if asked.tag == "counting" else SURE
    groups: list[list[Object]] = []
    for one in asked.include:
        there = [o for o in objects if o.name == one["class"] and o.score > sure][:AT_MOST]
        found = there[: one["count"]]
        if len(found) < one["count"]:
            return f"{len(found)} of {one['count']} {one['class']}"
        if colour := one.get("color"):
            seen = colours(image, found)
            if seen.count(colour) < one["count"]:
                return f"{one['class']} is {', '.join(seen)}, not {colour}"
        if position := one.get("position"):
            where, of = position
            for ours in found:
                if any(where not in positions(ours, theirs) for theirs in groups[of]):
                    return f"{one['class']} is not {where} {groups[of][0].name}"
        groups.append(found)
    for one in asked.exclude:
        number = sum(o.name == one["class"] and o.score > sure for o in objects)
        if number >= one["count"]:
            return f"{number} {one['class']}, fewer than {one['count']} were asked for"
    return None


def positions(ours: Object, theirs: Object) -> set[str]:
    """Of our object to theirs: left of, right of, above, below; of neither where they are about together."""
    boxes = np.array([ours.box, theirs.box]).reshape(2, 2, 2)
    middle, size = boxes.mean(1), boxes[:, 1] - boxes[:, 0]
    offset = middle[0] - middle[1]
    apart = np.maximum(np.abs(offset) - APART * size.sum(0), 0) * np.sign(offset)
    if (np.abs(apart) < 1e-3).all():
        return set()
    x, y = apart / np.linalg.norm(offset)
    found = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, is_so in found.items() if is_so}


class Colours:
    """Of objects in a picture, by their classes' names in three templates."""

    def __init__(self, clip: Model) -> None:
        self.clip = clip
        self._of_class = lru_cache(100)(self._weights)

    def _weights(self, name: str) -> Vectors:
        return weights(self.clip, COLOURS, [template.format(name) for template in TEMPLATES])

    def __call__(self, image: Image.Image, objects: Sequence[Object]) -> list[str]:
        found = []
        for one in objects:
            left, top = (max(0, round(edge)) for edge in one.box[:2])
            right, bottom = min(image.width, round(one.box[2])), min(image.height, round(one.box[3]))
            part = image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
            near = self.clip.vectors([part]) @ self._of_class(one.name).T
            found.append(COLOURS[int(near.argmax())])
        return found
