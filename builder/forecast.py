"""What a build of some size would take: hours, disk and money, from rates that were measured or are stated.

hours = rows of the stage / (rows a second of one worker * workers) / 3600
The stages overlap: the build takes as long as the slowest. Columns of one model take turns: theirs add up.
money = hours of the build * GPUs * price of a GPU hour
images = rows of it * bytes of an image; with --drop-images only of the blocks at work
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from builder.core import Recipe, Stage
from builder.errors import InputError
from builder.index import BLOCK
from builder.schedule import BLOCKS_AT_WORK

# Rows a second of one worker where no shard is done and nothing was stated, and whose figures they are.
STATED = {
    "Download": (84.0, "img2dataset, one of 16 cores"),
    "Caption": (21.4, "one A100: 13,000 GPU hours for a billion images, said of Recap-DataComp-1B"),
    "Score": (312.0, "one A100, CLIP ViT-L/14 at 336 px, the lowest of those reported"),
    "Embed": (312.0, "as Score"),
    "Latents": (150.0, "a guess for one A100, the encoder of Stable Diffusion's VAE at 256 px"),
    "TextFeatures": (1000.0, "a guess for one A100, both captions of a row by CLIP ViT-L/14's text tower"),
}
# Kinds of stages that have nothing to do with rows without an image.
OF_IMAGES = ("Caption", "Score", "Embed", "Latents", "TextFeatures")
IMAGE_BYTES = 47_000  # of one that came, at 512 pixels: DataComp says 450 GB for 12.8M URLs
OK_SHARE = 0.75  # of URLs whose image comes, about: DataComp's loss is a fifth and more


@dataclass(frozen=True)
class Line:
    stage: str
    rows: int
    rows_per_s: float | None  # of one worker
    workers: int
    hours: float | None
    source: str


@dataclass(frozen=True)
class Forecast:
    lines: tuple[Line, ...]
    hours: float
    slowest: str
    gpus: int
    gpu_hours: float
    cost: float | None
    images_gib: float
    images_gib_dropped: float
    tables_gib: float | None


def forecast(
    recipe: Recipe,
    measured: list[dict[str, object]],
    *,
    rows: int,
    rates: Mapping[str, float],
    workers: Mapping[str, int],
    price: float | None = None,
    blocks: int = BLOCKS_AT_WORK,
) -> Forecast:
    """`measured` is what `status.estimate` found; `rates` and `workers`, by stage, count more.

    Raises:
        InputError: a rate or workers of a stage that the recipe does not have.
    """
    names = [stage.name for stage in recipe.stages]
    for given in (*rates, *workers):
        if given not in names:
            raise InputError(f"the recipe has no stage '{given}'", f"there are: {', '.join(names)}")
    there = {str(row["stage"]): row for row in measured}
    download = there.get("download", {})
    share = _share(download)
    lines, tables = [], 0.0
    for stage in recipe.stages:
        of_stage = round(rows * (share if type(stage).__name__ in OF_IMAGES else 1.0))
        rate, source = _rate(stage, rates, there.get(stage.name, {}))
        number = workers.get(stage.name, stage.likely_workers())
        hours = of_stage / (rate * number) / 3600 if rate else None
        lines.append(Line(stage.name, of_stage, rate, number, hours, source))
        done, size = there.get(stage.name, {}).get("rows_done"), there.get(stage.name, {}).get("bytes_done")
        if isinstance(done, int) and isinstance(size, int) and done and stage.name != "download":
            tables += size / done * rows
    groups: dict[str, list[Line]] = {}  # stages that one worker does, one after the other
    for line in lines:
        what = recipe.stage(line.stage).shares()
        groups.setdefault(line.stage if what is None else str(what), []).append(line)
    took = {" and ".join(line.stage for line in group): group for group in groups.values()}
    of_group = {name: sum(line.hours or 0.0 for line in group) for name, group in took.items()}
    slowest = max(of_group, key=lambda name: of_group[name])
    hours, gpus = of_group[slowest], sum(map(partial(_gpus, recipe), groups.values()))
    of_image = _image_bytes(download)
    at_work = min(rows, blocks * BLOCK * _rows_per_shard(recipe))
    return Forecast(
        tuple(lines), hours, slowest, gpus, hours * gpus,
        None if price is None else hours * gpus * price,
        rows * share * of_image / 2**30, at_work * share * of_image / 2**30, tables / 2**30 or None,
    )  # fmt: skip


def _gpus(recipe: Recipe, group: list[Line]) -> int:
    """Of captioners; a scorer has a place beside one."""
    stage = recipe.stage(group[0].stage)
    if type(stage).__name__ != "Caption" or getattr(stage, "endpoint", False):
        return 0
    return max(line.workers for line in group) * int(getattr(stage, "tensor_parallel_size", 1))


def _rate(stage: Stage, rates: Mapping[str, float], row: Mapping[str, object]) -> tuple[float | None, str]:
    if stage.name in rates:
        return rates[stage.name], "given"
    of_images = type(stage).__name__ in OF_IMAGES
    done, seconds = row.get("rows_ok" if of_images else "rows_done"), row.get("seconds_done")
    if isinstance(done, int) and isinstance(seconds, float) and done and seconds:
        return done / seconds, f"measured on {done:,} rows"
    return STATED.get(type(stage).__name__, (None, "not known: build a few shards first, with --limit"))


def _share(download: Mapping[str, object]) -> float:
    done, ok = download.get("rows_done"), download.get("rows_ok")
    return ok / done if isinstance(done, int) and isinstance(ok, int) and done else OK_SHARE


def _image_bytes(download: Mapping[str, object]) -> float:
    ok, size = download.get("rows_ok"), download.get("bytes_done")
    return size / ok if isinstance(ok, int) and isinstance(size, int) and ok else IMAGE_BYTES


def _rows_per_shard(recipe: Recipe) -> int:
    return int(getattr(recipe.stage("source"), "rows_per_shard", 10_000))
