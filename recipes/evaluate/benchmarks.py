"""Benchmarks by name, one function each. `recap eval MODEL NAME key=value` calls NAME."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from builder.captions import kinds
from builder.errors import InputError
from builder.files import read_file
from builder.stages.caption import Caption
from builder.stages.clip import check_clip
from recipes.demo import world
from recipes.dit import prompts as files_of_prompts
from recipes.evaluate import asked, choices
from recipes.evaluate import clip_score as by_cosine
from recipes.evaluate import frechet as distances
from recipes.evaluate import geneval as by_detector
from recipes.evaluate import mmvp as pairs_of
from recipes.evaluate import retrieval as by_captions
from recipes.evaluate import sugarcrepe as crepe
from recipes.evaluate import vg_attribution as attributes
from recipes.evaluate import world_drawings as of_the_world
from recipes.evaluate import zeroshot as by_names
from recipes.evaluate.datacomp import datacomp as tasks_of
from recipes.evaluate.drawings import Artist
from recipes.evaluate.model import Model, Picture
from recipes.evaluate.results import Result
from recipes.images import PICTURES


@dataclass(frozen=True)
class Benchmark:
    """`of` a model that sees, or of pictures, and a model that draws them."""

    run: Callable[[Any], Iterable[Result]]
    of: Literal["model", "pictures"] = "model"

    def subject(self, name: str, training: Path | None = None, **how: Any) -> Model | Artist:
        """What it is run on; `how` it draws is as of `recipes.dit.sample.sample`.

        Raises:
            InputError: it draws nothing, and is told how.
        """
        if self.of == "pictures":
            return Artist(name, how)
        if how:
            raise InputError(f"{', '.join(how)}: this benchmark is of nothing that draws", "leave it out")
        return Model(name, training)

    def results(self, subject: Model | Artist) -> Iterator[Result]:
        """Of what it is run on, as they come."""
        weights = subject.weights if isinstance(subject, Model) else None
        for result in self.run(subject):
            yield replace(result, weights=weights)


def retrieval(
    *,
    captions: str | None = None,
    images: str | None = None,
    folder: str | None = None,
    split: str = "test",
    only: str | None = None,
    name: str = "retrieval",
) -> Benchmark:
    """Retrieval both ways. `captions` is Karpathy's dataset.json, of which `split` is asked, or a table of
    (image, caption), of which `only` lists the images that are, and `images` their folder; `folder` is a
    webdataset of clip_benchmark's.
    """
    if folder:
        pairs = by_captions.webdataset(Path(folder))
    elif captions and images:
        path = Path(captions)
        is_karpathys = path.suffix == ".json" and b'"sentences"' in read_file(path)
        pairs = (
            by_captions.karpathy(path, Path(images), split)
            if is_karpathys
            else by_captions.table(path, Path(images), Path(only) if only else None)
        )
    else:
        raise InputError("retrieval of what?", "give captions=FILE images=FOLDER, or folder=WEBDATASET")
    return Benchmark(lambda model: [by_captions.retrieval(model, name, pairs)])


def long_captions(*, folder: str, split: str = "test", name: str = "long captions") -> Benchmark:
    """Urban1K's and DOCCI's layouts."""
    is_docci = (Path(folder) / "docci_descriptions.jsonlines").exists()
    pairs = by_captions.docci(Path(folder), split) if is_docci else by_captions.one_caption(Path(folder))
    return Benchmark(lambda model: [by_captions.retrieval(model, name, pairs)])


def zeroshot(
    *,
    images: str | None = None,
    folder: str | None = None,
    names: str | None = None,
    templates: str | None = None,
    name: str = "zero-shot",
) -> Benchmark:
    """Zero-shot classification. `images` is a folder of folders, a class each, with `names`; `folder` a
    webdataset of clip_benchmark's, which has its own.
    """
    own_names, own_templates = (Path(text) if text else None for text in (names, templates))
    if folder:
        classes = by_names.webdataset(Path(folder), own_names, own_templates)
    elif images and own_names:
        classes = by_names.image_folder(Path(images), own_names, own_templates)
    else:
        raise InputError("classify what?", "give images=FOLDER names=FILE, or folder=WEBDATASET")
    return Benchmark(lambda model: [by_names.zeroshot(model, name, classes)])


def sugarcrepe(*, folder: str, images: str) -> Benchmark:
    """`images` is COCO's val2017."""
    items = crepe.sugarcrepe(Path(folder), Path(images))
    return Benchmark(lambda model: [choices.chosen(model, "SugarCrepe", "sugarcrepe", items)])


def vg_attribution(*, annotations: str, images: str, fewest: int = attributes.FEWEST_CASES) -> Benchmark:
    """ARO's visual_genome_attribution.json."""
    items = attributes.vg_attribution(Path(annotations), Path(images))
    return Benchmark(lambda model: [choices.chosen(model, "VG-Attribution", "vg-attribution", items, fewest)])


def mmvp(*, folder: str) -> Benchmark:
    """MMVP-VLM."""
    pairs = pairs_of.mmvp(Path(folder))
    return Benchmark(lambda model: [pairs_of.both(model, "MMVP-VLM", pairs)])


def datacomp(*, folder: str, tasks: tuple[str, ...] = ()) -> Benchmark:
    """DataComp's tasks: all that lie in the folder, unless named."""
    return Benchmark(lambda model: tasks_of(model, Path(folder), tasks))


def fid(
    *,
    reference: str,
    inception: str | None = None,
    features: str | None = None,
    prompts: str | None = None,
    column: str = "caption",
    number: int | None = None,
    folder: str = "runs/drawn",
    name: str = "fid",
) -> Benchmark:
    """FID and KID of drawn pictures to those in `reference`, a folder, by `inception`, a file of its weights;
    or by `features`, an open_clip model, which is not FID. A model draws the `prompts` of a file (`number` of
    them, of a table's `column`) into `folder`; of pictures of `recap sample` these are not asked.
    """
    if bool(inception) == bool(features):
        raise InputError("fid by which features?", "give inception=FILE, or features=MODEL of open_clip")
    found = sorted(path for path in Path(reference).rglob("*") if path.suffix.lower() in PICTURES)
    real = [Picture(str(path)) for path in found if path.is_file()]
    if not real:
        raise InputError(f"reference={reference} has no pictures", f"there are none of {', '.join(PICTURES)}")
    named = distances.inception(Path(inception)) if inception else distances.of_model(Model(str(features)))
    texts = _prompts(prompts, column, number)
    return Benchmark(
        lambda artist: [distances.frechet(name, artist.drawn(texts, Path(folder)), real, named)], "pictures"
    )


def clip_score(
    *,
    model: str,
    prompts: str | None = None,
    column: str = "caption",
    number: int | None = None,
    folder: str = "runs/drawn",
    name: str = "clip score",
) -> Benchmark:
    """CLIP score of drawn pictures and their prompts by an open_clip `model`; `prompts` and the others as of
    fid.
    """
    texts = _prompts(prompts, column, number)
    check_clip(model)

    def run(artist: Artist) -> list[Result]:
        drawings = artist.drawn(texts, Path(folder))
        return [by_cosine.clip_score(Model(model), name, drawings)]

    return Benchmark(run, "pictures")


def judge(
    *,
    model: str,
    prompts: str | None = None,
    column: str = "caption",
    number: int | None = None,
    folder: str = "runs/drawn",
    endpoint: str = "",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    max_model_len: int | None = None,
    name: str = "judge",
) -> Benchmark:
    """How well drawn pictures match their prompts, from 1 to 5, by a vision-language `model`: a folder, a Hub
    id@revision, or a name at an `endpoint`; `prompts` and the others as of fid.
    """
    texts = _prompts(prompts, column, number)
    kind = kinds.judge("re_caption", "judge")
    asked_by = Caption.of(kind, model=model, endpoint=endpoint, dtype=dtype, max_model_len=max_model_len)
    asked_by.check()

    def run(artist: Artist) -> list[Result]:
        return [asked.rated(name, artist.drawn(texts, Path(folder)), asked_by)]

    return Benchmark(run, "pictures")


def geneval(
    *,
    metadata: str,
    detector: str,
    clip: str,
    pictures: int = 4,
    folder: str = "runs/drawn",
    name: str = "geneval",
) -> Benchmark:
    """Objects, colours, counts and positions in drawn pictures, as GenEval checks them: `metadata` is its
    evaluation_metadata.jsonl, of each prompt so many `pictures`, one behind the other; `detector` a detector
    of transformers (a folder or a Hub id@revision), `clip` an open_clip model that tells colours.
    """
    asked_for = [one for one in by_detector.read(Path(metadata)) for _ in range(pictures)]
    by_detector.check_detector(detector, asked_for)
    check_clip(clip)

    def run(artist: Artist) -> list[Result]:
        drawings = artist.drawn([one.prompt for one in asked_for], Path(folder))
        return [by_detector.geneval(name, drawings, asked_for, by_detector.Detector(detector), Model(clip))]

    return Benchmark(run, "pictures")


def _prompts(path: str | None, column: str, number: int | None) -> list[str] | None:
    if path is None and number is not None:
        raise InputError("number= of which prompts?", "give prompts=FILE")
    return files_of_prompts.read(Path(path), column=column, number=number) if path else None


def world_drawings(
    *,
    scenes: int = 200,
    style: of_the_world.Style = "described",
    folder: str = "runs/drawn-world",
    clip: str = "recipes/demo/weights/clip",
    captioner: str = "",
    name: str = "world, drawn",
) -> Benchmark:
    """What a model draws of scenes of the demo's world: what a reader that knows the world finds in it, the
    Fréchet distance to the scenes themselves, and the CLIP score, both by the tiny `clip`; also what a
    `captioner` reads in it, such as the demo's, recipes/demo/weights/captioner.
    """
    if scenes < 3:
        raise InputError(f"scenes={scenes} are too few for a distance", "give 3 or more")
    check_clip(clip)
    by = Caption(model=captioner, dtype="float32", max_model_len=768, kv_cache_gib=1) if captioner else None
    if by:
        by.check()
    real, texts = of_the_world.prompts(scenes, style)

    def run(artist: Artist) -> Iterable[Result]:
        drawings = artist.drawn(texts, Path(folder, style))
        yield of_the_world.read_back(name, drawings, real, style)
        model = Model(clip)
        pictures = [Picture(f"scene {s.seed}", world.jpeg(world.draw(s, 128), 90)) for s in real]
        yield distances.frechet(
            f"{name}: distance", drawings, pictures, distances.of_model(model), Image.Resampling.BILINEAR
        )  # as a training has made them small
        yield by_cosine.clip_score(model, f"{name}: CLIP score", drawings)
        if by:
            yield asked.read_back(f"{name}: captions", drawings, real, by)

    return Benchmark(run, "pictures")


def demo(*, folder: str = "runs/demo-benchmark", scenes: int = 1000) -> Benchmark:
    """Scenes of the demo's world that nothing was trained on: retrieval by descriptions and by alt text, and
    scenes of one thing by its colour and shape.
    """
    place = Path(folder, str(scenes))
    if not (place / "templates.txt").exists():
        _draw(place, scenes)
    described, alt = (
        by_captions.table(place / f"{kind}.csv", place / "scenes") for kind in ("described", "alt")
    )
    classes = by_names.image_folder(place / "one", place / "names.txt", place / "templates.txt")
    return Benchmark(
        lambda model: [
            by_captions.retrieval(model, "world, by descriptions", described),
            by_captions.retrieval(model, "world, by alt text", alt),
            by_names.zeroshot(model, "world, colour and shape", classes),
        ]
    )


def _draw(place: Path, scenes: int) -> None:
    """templates.txt is written last."""
    (place / "scenes").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[tuple[str, str]]] = {"described": [], "alt": []}
    for number in range(scenes):
        seed = 2 * world.HELD_OUT + number  # of the demo's own web there are none
        scene, chance = world.scene(seed), random.Random(seed)
        name = f"{number:05d}.jpg"
        (place / "scenes" / name).write_bytes(world.jpeg(world.draw(scene, 128), 90))
        rows["described"].append((name, world.describe(scene, chance)))
        if alt := world.alt_text(scene, chance).strip():
            rows["alt"].append((name, alt))
    for kind, lines in rows.items():
        with open(place / f"{kind}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("image", "caption"), *lines])
    classes = {f"{colour} {shape}" for colour in world.COLOURS for shape in world.SHAPES}
    for name in classes:
        (place / "one" / name).mkdir(parents=True, exist_ok=True)
    found, seed = 0, 3 * world.HELD_OUT
    while found < scenes:
        scene, seed = world.scene(seed), seed + 1
        if len(scene.things) == 1:
            image = world.jpeg(world.draw(scene, 128), 90)
            (place / "one" / scene.things[0].name / f"{seed}.jpg").write_bytes(image)
            found += 1
    (place / "names.txt").write_text("".join(f"{name}\t{name}\n" for name in sorted(classes)))
    (place / "templates.txt").write_text("{}\n")  # as alt text has them: in this world nothing is a photo
