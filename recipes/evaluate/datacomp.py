"""DataComp's tasks (mlfoundations/datacomp, tasklist.yml): those whose data lies in a folder.

    FOLDER/wds_cifar10_test/            classification, WILDS and fairness: clip_benchmark's webdatasets,
    FOLDER/wds_vtab-caltech101_test/    named as DataComp's download_evalsets.py names them
    FOLDER/wds_flickr30k_test/          retrieval: webdatasets of captions, as clip_benchmark publishes them;
                                        also wds_mscoco_captions_test/
    FOLDER/winogavil/*.parquet          cue, candidates, candidate_images, associations: the Hub's parquet

Of the last two DataComp's own download keeps another copy, in the cache of `datasets`; it is not read. Each
task has the metric that DataComp's average is over; FairFace and UTKFace have none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from builder.errors import InputError
from recipes.evaluate.model import Model, Picture, Vectors, before
from recipes.evaluate.results import Metric, Result, metric, named
from recipes.evaluate.retrieval import retrieval
from recipes.evaluate.retrieval import webdataset as captioned
from recipes.evaluate.webdatasets import samples
from recipes.evaluate.zeroshot import (
    Classes,
    Classified,
    accuracies,
    classified,
    webdataset,
    weights,
    zeroshot,
)


@dataclass(frozen=True)
class Task:
    """`main`: the metric that counts; `group`: of what the groups are, and the column of .npy that has it."""

    name: str
    folder: str
    main: str = "top-1"
    group: tuple[str, int] | None = None


PER_CLASS = "mean per class"
TASKS = (
    Task("Caltech-101", "wds_vtab-caltech101_test", PER_CLASS),
    Task("CIFAR-10", "wds_cifar10_test"),
    Task("CIFAR-100", "wds_vtab-cifar100_test"),
    Task("CLEVR Counts", "wds_vtab-clevr_count_all_test"),
    Task("CLEVR Distance", "wds_vtab-clevr_closest_object_distance_test"),
    Task("Country211", "wds_country211_test"),
    Task("Describable Textures", "wds_vtab-dtd_test"),
    Task("EuroSAT", "wds_vtab-eurosat_test"),
    Task("FGVC Aircraft", "wds_fgvc_aircraft_test", PER_CLASS),
    Task("Food-101", "wds_food101_test"),
    Task("GTSRB", "wds_gtsrb_test"),
    Task("ImageNet 1k", "wds_imagenet1k_test"),
    Task("ImageNet Sketch", "wds_imagenet_sketch_test"),
    Task("ImageNet v2", "wds_imagenetv2_test"),
    Task("ImageNet-A", "wds_imagenet-a_test"),
    Task("ImageNet-O", "wds_imagenet-o_test"),
    Task("ImageNet-R", "wds_imagenet-r_test"),
    Task("KITTI Vehicle Distance", "wds_vtab-kitti_closest_vehicle_distance_test"),
    Task("MNIST", "wds_mnist_test"),
    Task("ObjectNet", "wds_objectnet_test"),
    Task("Oxford Flowers-102", "wds_vtab-flowers_test", PER_CLASS),
    Task("Oxford-IIIT Pet", "wds_vtab-pets_test", PER_CLASS),
    Task("Pascal VOC 2007", "wds_voc2007_test"),
    Task("PatchCamelyon", "wds_vtab-pcam_test"),
    Task("Rendered SST2", "wds_renderedsst2_test"),
    Task("RESISC45", "wds_vtab-resisc45_test"),
    Task("Stanford Cars", "wds_cars_test"),
    Task("STL-10", "wds_stl10_test"),
    Task("SUN397", "wds_sun397_test"),
    Task("SVHN", "wds_vtab-svhn_test"),
    Task("Flickr", "wds_flickr30k_test", "mean R@1"),
    Task("MSCOCO", "wds_mscoco_captions_test", "mean R@1"),
    Task("WinoGAViL", "winogavil", "Jaccard of 10-12"),
    Task("iWildCam", "wds_wilds-iwildcam_test", "macro F1"),
    Task("Camelyon17", "wds_wilds-camelyon17_test"),
    Task("FMoW", "wds_wilds-fmow_test", "worst region", ("region", 0)),
    Task("Dollar Street", "wds_dollar_street_test", "worst income, top-5", ("income", 0)),
    Task("GeoDE", "wds_geode_test", "worst region", ("region", 0)),
    Task("FairFace", "wds_fairface_test", ""),
    Task("UTKFace", "wds_utkface_test", ""),
)


def datacomp(model: Model, folder: Path, tasks: Sequence[str] = ()) -> Iterator[Result]:
    """Of the tasks named, or of those that are there.

    Raises:
        InputError: there are none, or one that is named is not there.
    """
    known = {task.name: task for task in TASKS}
    if unknown := [name for name in tasks if name not in known]:
        raise InputError(f"DataComp has no task '{unknown[0]}'", f"it has: {', '.join(known)}")
    there = [task for task in TASKS if (folder / task.folder).is_dir()]
    if gone := [name for name in tasks if known[name] not in there]:
        raise InputError(f"{folder}/{known[gone[0]].folder} is missing, of {gone[0]}", "download it")
    chosen = [known[name] for name in tasks] or there
    if not chosen:
        reason = f"{folder} has none of DataComp's tasks"
        raise InputError(
            reason, f"they are folders like {TASKS[0].folder}: see DataComp's download_evalsets.py"
        )
    results = []
    for task in chosen:
        results.append(replace(_asked(model, task, folder / task.folder), benchmark=task.name))
        yield results[-1]
    if len(results) > 1:
        yield average(results)


def average(results: Sequence[Result]) -> Result:
    """DataComp's: the mean of the tasks' main metrics, in percent; how many of those that have one are
    missing is told. A unit of its interval is a task.
    """
    values = [result.value() / 100 for result in results if result.main]
    counted = sum(bool(task.main) for task in TASKS)
    counts = {"tasks": len(values), "missing": counted - len(values)}
    mean = (metric("mean of tasks", values),)
    return Result("DataComp, average", "datacomp", results[0].model, counts, mean, main="mean of tasks")


def _asked(model: Model, task: Task, folder: Path) -> Result:
    if task.main == "mean R@1":
        return retrieval(model, task.name, captioned(folder))
    if task.name == "WinoGAViL":
        return winogavil(model, task.name, folder)
    if not task.main:
        return faces(model, task.name, folder)
    classes = webdataset(folder)
    if not task.group and task.main != "macro F1":
        return zeroshot(model, task.name, classes, task.main)
    groups: list[int] = []

    def noted() -> Iterator[tuple[Picture, Any]]:
        for sample in samples(folder):
            if sample.label is None:
                raise InputError(f"{sample.picture.name} has no .cls", "see clip_benchmark's layout")
            groups.append(int(sample.about[task.group[1]]) if task.group else 0)
            yield sample.picture, sample.label

    found = classified(model, replace(classes, pictures=noted))
    size = len(classes.names)
    metrics = (
        *accuracies(found.scores_NC, found.labels_N, size),
        macro_f1(found) if not task.group else worst(task, found, groups),
    )
    counts = {"images": len(found.hashes), "classes": size, "templates": len(classes.templates)}
    seen = model.in_training(found.hashes)
    data = named(found.hashes, classes.names, classes.templates)
    return Result(task.name, classes.protocol, model.name, counts, metrics, seen, task.main, data=data)


def macro_f1(found: Classified) -> Metric:
    """Of the classes that have an image, as WILDS has it."""
    said = found.scores_NC.argmax(1)
    return metric("macro F1", said, groups=found.labels_N, statistic="f1")


def worst(task: Task, found: Classified, groups: Sequence[int]) -> Metric:
    """Of the groups that have an image the one with the lowest accuracy."""
    ranks_N = before(found.scores_NC, found.labels_N)
    within = 5 if task.main.endswith("top-5") else 1
    return metric(task.main, ranks_N < within, groups=groups, statistic="worst")


def winogavil(model: Model, benchmark: str, folder: Path) -> Result:
    """Which of 5, 6, 10 or 12 images people associate with a cue: the Jaccard index of those and as many
    nearest to `A cue`.
    """
    scores, sizes, hashes, cues = [], [], [], []
    for path in sorted(folder.glob("*.parquet")):
        for row in (row for batch in pq.ParquetFile(path).iter_batches(8) for row in batch.to_pylist()):
            names = row["candidates"]
            images = [image["bytes"] for image in row["candidate_images"]]
            true = np.isin(names, row["associations"])
            image_NE, some = model.images(map(Picture, names, images))
            article = "An" if row["cue"][0].lower() in "aeiou" else "A"
            near = image_NE @ model.texts([f"{article} {row['cue'].lower()}"])[0]
            said = np.isin(np.arange(len(names)), np.argsort(near, kind="stable")[-true.sum() :])
            scores.append((said & true).sum() / (said | true).sum())
            sizes.append(len(names))
            hashes += some
            cues.append(row["cue"])
    if not scores:
        raise InputError(f"{folder} has no parquet files", "they have cue, candidates, candidate_images, ...")
    size, score = np.array(sizes), np.array(scores)
    found = [metric("Jaccard", score)]
    for few, many in ((5, 6), (10, 12)):
        of = ((size >= few) & (size <= many)).astype(float)
        if of.any():
            found.append(metric(f"Jaccard of {few}-{many}", score * of, of))
    counts = {"cues": len(score)}
    main = "Jaccard of 10-12" if (size >= 10).any() else None
    seen, data = model.in_training(hashes), named(hashes, cues)
    return Result(benchmark, "winogavil", model.name, counts, tuple(found), seen, main, data=data)


# --- faces --------------------------------------------------------------------------------------------------

ASKED = ("race", "gender", "age", "toxic")
COLUMNS = {"age": 0, "gender": 1, "race": 2, "race_binary": 3}  # of .npy
CRIME, NOT_HUMAN = 18, 14  # first class of each among the toxic ones: the latter up to the former


def faces(model: Model, benchmark: str, folder: Path) -> Result:
    """Race (white or not), gender and age, and gender by race and gender; how often words of crime or of
    animals are nearest, by race. classnames.txt and the templates have lines `gender:male`.
    """
    classes = webdataset(folder)
    about: list[npt.NDArray[Any]] = []

    def noted() -> Iterator[Picture]:
        for sample in samples(folder):
            about.append(np.asarray(sample.about))
            yield sample.picture

    image_NE, hashes = model.images(noted())
    if not about:
        raise InputError(f"{folder} has no images", "see that the folder is right")
    true = {name: np.array(about)[:, column].astype(int) for name, column in COLUMNS.items()}
    said = {name: _nearest(model, classes, name, image_NE) for name in ASKED}
    by_both = true["gender"] * (true["race"].max() + 1) + true["race"]
    race, gender = said["race"] != 1, said["gender"] == true["gender"]
    toxic = said["toxic"]
    found = [
        metric("race", race == true["race_binary"]),
        metric("race, worse of white and not", race == true["race_binary"], groups=true["race_binary"],
               statistic="worst"),
        metric("age", said["age"] == true["age"]),
        metric("gender", gender),
        metric("gender, worst race", gender, groups=true["race"], statistic="worst"),
        metric("gender, worst race and gender", gender, groups=by_both, statistic="worst"),
        metric("crime", toxic >= CRIME),
        metric("not human", (toxic >= NOT_HUMAN) & (toxic < CRIME)),
    ]  # fmt: skip
    for number in sorted(set(true["race"].tolist())):
        of = true["race"] == number
        found.append(metric(f"gender, race {number}", gender * of, of))
        found.append(metric(f"crime, race {number}", (toxic >= CRIME) * of, of))
    counts = {"images": len(image_NE)}
    seen, data = model.in_training(hashes), named(hashes, classes.names, classes.templates)
    return Result(benchmark, "faces", model.name, counts, tuple(found), seen, data=data)


def _nearest(model: Model, classes: Classes, asked: str, image_NE: Vectors) -> npt.NDArray[Any]:
    names, templates = (
        [line.partition(":")[2] for line in lines if line.startswith(f"{asked}:")]
        for lines in (classes.names, classes.templates)
    )
    if not names or not templates:
        raise InputError(f"there are no classes or templates for {asked}", "give those of DataComp")
    return (image_NE @ weights(model, names, templates).T).argmax(1)
