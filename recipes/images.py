"""Where the images of a data set lie, and what stands in their place: in a run, in what img2dataset wrote, or
in a folder of pictures.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from builder.core import Status
from builder.errors import InputError
from builder.files import sha256_file
from builder.run import RECIPE, Run
from builder.stages.imagetar import entries
from builder.stages.latents import TENSOR as LATENTS
from builder.stages.latents import Latents
from builder.stages.tensors import Shard, read_header
from builder.stages.textfeatures import TextFeatures

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
FILES_A_SHARD = 10_000
HASHED = "run img2dataset with compute_hash=sha256"
Found = tuple[str | None, str, int, str, int, int]
"""An image: uid or None, sha256, shard, file, where in it, bytes."""


def walk(folder: Path) -> Iterator[Path]:
    """Files, in the order of their names."""
    for root, folders, files in os.walk(folder):
        folders.sort()
        yield from (Path(root, name) for name in sorted(files))


def images_of(place: str, folder: Path) -> Iterator[Found]:
    """(uid or None, sha256, shard, file, where in it, bytes) of every image. What cannot be read where it
    lies is written to `folder`.

    Raises:
        InputError: nothing of the kinds that `join` knows is there.
    """
    path = Path(place)
    if "://" in place or (path / RECIPE).exists():
        return _of_run(Run.open(place))
    if not path.is_dir():
        raise InputError(f"{place} is no folder", "name a run, img2dataset's output, or a folder of pictures")
    if tars := sorted(path.glob("*.tar")):
        return _of_tars(tars)
    if tables := list(_with_pictures(path)):
        return _of_tables(tables, folder)
    pictures = (file for file in walk(path) if file.suffix.lower() in PICTURES)
    first = next(pictures, None)
    if first is None:
        hint = f"name a run, img2dataset's output, or a folder of {', '.join(PICTURES)}"
        raise InputError(f"{place} has neither tars nor tables of pictures nor pictures", hint)
    return (
        (None, sha256_file(file), number // FILES_A_SHARD, str(file), 0, file.stat().st_size)
        for number, file in enumerate(chain([first], pictures))
    )


def run_with(images: str, stage: str) -> Run:
    """Raises:
    InputError: it is no run here, or has no such stage.
    """
    if "://" in images or not (Path(images) / RECIPE).exists():
        raise InputError(f"images={images} is no run on this machine", f"name the run that has {stage}")
    run = Run.open(images)
    if stage not in (one.name for one in run.recipe.stages):
        known = ", ".join(one.name for one in run.recipe.stages)
        raise InputError(f"the recipe of {images} has no stage {stage}", f"there are: {known}")
    if not isinstance(run.recipe.stage(stage), Latents | TextFeatures):
        reason = f"the stage {stage} of {images} makes no latents, and no features of texts"
        raise InputError(reason, "name one that does")
    return run


def shards_of(images: str, stage: str, tensor: str) -> Iterator[tuple[Path, Path, Shard]]:
    """(file, its table, what it says of itself) of every shard of tensors."""
    run = run_with(images, stage)
    for _, record in run.shards(stage):  # the model that made them need not be here
        path = run.local(record.output(".safetensors"))
        yield path, run.local(record.output(".parquet")), read_header(path, tensor)


def check_alike(path: Path, of: dict[str, Any], before: dict[str, Any], what: str, by: str) -> None:
    """Raises:
    InputError: a shard says something else of itself than those before.
    """
    if differ := [name for name in of if before and before.get(name) != of[name]]:
        reason = f"{path} has other {what} than the shards before: {differ[0]} is {of[differ[0]]}"
        raise InputError(f"{reason}, was {before.get(differ[0])}", f"build the stage with one {by}")


def latents_of(images: str, stage: str, about: dict[str, Any]) -> Iterator[Found]:
    """`about` is filled with what all of them say of themselves.

    Raises:
        InputError: they are of several kinds.
    """
    for number, (path, table, shard) in enumerate(shards_of(images, stage, LATENTS)):
        of = {**shard.about, "shape": list(shard.shape)}
        check_alike(path, of, about, "latents", "VAE")
        about |= of
        columns = ["uid", "image_sha256", "status"]
        rows = [
            row for row in pq.read_table(table, columns=columns).to_pylist() if row["status"] == Status.OK
        ]
        if len(rows) != shard.number:
            raise InputError(f"{path} has {shard.number:,} latents of {len(rows):,} rows", "build it again")
        for place, row in enumerate(rows):
            start = shard.start + place * shard.bytes
            yield row["uid"], row["image_sha256"], number, str(path), start, shard.bytes


def _of_run(run: Run) -> Iterator[Found]:
    if run.store.filesystem is not None:
        reason = f"the images of {run.store.place} are not on this machine"
        raise InputError(reason, "copy the run here, or mount it, and name that")
    for shard, (_, record) in enumerate(run.shards("download")):
        tar = record.output(".tar")
        if tar in record.dropped:
            reason = f"{run.store.place}: the images of {tar} were dropped"
            raise InputError(reason, "build it without --drop-images, or name another copy of the images")
        about = pq.read_table(run.local(record.output(".parquet")), columns=["key", "uid", "image_sha256"])
        known = {row["key"]: row for row in about.to_pylist()}
        path = run.local(tar)
        for key, start, size in entries(path):
            yield known[key]["uid"], known[key]["image_sha256"], shard, str(path), start, size


def _of_tars(tars: list[Path]) -> Iterator[Found]:
    """img2dataset's: beside a tar its table, with the sha256 of the download, and uid where it was kept."""
    for shard, path in enumerate(tars):
        beside = path.with_suffix(".parquet")
        there = _names(beside) if beside.exists() else []
        if not {"key", "sha256"} <= set(there):
            raise InputError(f"{beside} is missing, or has not key and sha256", HASHED)
        try:
            table = pq.read_table(
                beside, columns=[name for name in ("key", "sha256", "uid") if name in there]
            )
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(f"{beside} is damaged: {str(error)[:100]}", "write that tar again") from error
        known = {row["key"]: row for row in table.to_pylist()}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.rpartition("/")[2].partition(".")
                if f".{extension.lower()}" in PICTURES and key in known:
                    row = known[key]
                    yield row.get("uid"), row["sha256"], shard, str(path), member.offset_data, member.size


def _names(path: Path) -> list[str]:
    try:
        names: list[str] = pq.read_schema(path).names
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{path} cannot be read: {error}", "delete it, or write it again") from error
    return names


def _with_pictures(folder: Path) -> Iterator[tuple[Path, str]]:
    """Tables that hold pictures, and in which column."""
    for path in sorted(folder.glob("*.parquet")):
        there = _names(path)
        yield from ((path, kind[1:]) for kind in PICTURES if kind[1:] in there)


def _of_tables(tables: list[tuple[Path, str]], folder: Path) -> Iterator[Found]:
    """img2dataset's parquet output. A picture in a page of parquet cannot be read alone: a copy can."""
    for shard, (path, column) in enumerate(tables):
        there = pq.ParquetFile(path)
        names = [name for name in ("sha256", "uid", column) if name in there.schema_arrow.names]
        if "sha256" not in names:
            raise InputError(f"{path} has no sha256", HASHED)
        with open((folder / f"{shard:05d}.images").absolute(), "wb") as file:
            for batch in there.iter_batches(256, columns=names):
                for row in batch.to_pylist():
                    if (picture := row[column]) is not None:
                        yield row.get("uid"), row["sha256"], shard, str(file.name), file.tell(), len(picture)
                        file.write(picture)
