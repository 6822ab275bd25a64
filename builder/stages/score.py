"""score: cosine of each image with its original caption and with each new one, by open_clip.

Reads   source, download, dedup, and every caption stage; no images where an `embed` stage of the same model
        has their vectors.
Writes  `<shard>.parquet`: uid, status, error, and for each caption its cosine and whether the model's context
        cut it.

Rows that are not ok have no scores. An empty caption has none either. A recipe may have several: one with a
long context, say, under another name.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from builder.core import Count, Json, Resources, Stage, Status, Task, Work
from builder.errors import RecipeError
from builder.files import read_rows, write_parquet
from builder.model import identity
from builder.stages.clip import Clip, Precision, check_clip, clip_workers, pictures
from builder.stages.embed import Embed

MAX_CHARACTERS = 20_000  # a caption is cut here before tokenizing; no encoder reads that far


def with_captions(task: Task, captions: Iterable[str]) -> list[dict[str, Any]]:
    """A shard's rows: uid, status, error, and these captions. A row that has failed in one has failed."""
    table = list(read_rows(task.input("dedup"), ["uid", "status", "error"]))
    for name in captions:
        is_made = name != "org_caption"
        stage, columns = (name, ["status", "error", name]) if is_made else ("source", [name])
        for row, given in zip(table, read_rows(task.input(stage), columns), strict=True):
            row[name] = given[name]
            if row["status"] == Status.OK and given.get("status", Status.OK) != Status.OK:
                row |= {"status": given["status"], "error": given["error"]}
    return table


@dataclass(frozen=True, kw_only=True)
class Score(Stage):
    """Scoring with one CLIP. `model` is a folder in open_clip's local-dir layout or a Hub id@revision."""

    effort: ClassVar[tuple[str, ...]] = ("batch",)
    libraries: ClassVar[tuple[str, ...]] = ("pyarrow", "open_clip_torch", "torch", "torchvision")
    paths: ClassVar[tuple[str, ...]] = ("model",)

    name: str = "score"
    model: str
    captions: tuple[str, ...] | None = None  # all that there are, the original first, unless given
    batch: Count = 128
    precision: Precision = "fp32"
    vectors: str = ""  # the stage that has the images' vectors: found, not given

    def __post_init__(self) -> None:
        captions = self.captions or ()
        for name in (name for name in captions if captions.count(name) > 1):
            raise RecipeError(f"score.captions names '{name}' twice", "leave one of them out")

    def after(self, earlier: tuple[Stage, ...]) -> Stage:
        made = tuple(name for stage in earlier for name in stage.makes_captions())
        captions = ("org_caption", *made) if self.captions is None else self.captions
        same = (
            stage.name
            for stage in earlier
            if isinstance(stage, Embed) and (stage.model, stage.precision) == (self.model, self.precision)
        )
        return replace(self, captions=captions, vectors=next(same, ""))

    def makes_scores(self) -> tuple[str, ...]:
        return self.captions or ()

    def names_captions(self) -> tuple[str, ...]:
        return self.captions or ()

    def reads(self) -> tuple[str, ...]:
        made = (name for name in self.names_captions() if name != "org_caption")
        pictures = (f"{self.vectors}.npz",) if self.vectors else ("download",)
        return ("source", "dedup", *pictures, *made)

    def num_workers(self) -> int:
        return clip_workers()

    def resources(self) -> Resources:
        return Resources(gpus=0.08, memory_gib=2)  # beside a captioner that takes 0.9 of one

    def settings(self) -> dict[str, Json]:
        return super().settings() | {"model": identity(self.model)}

    def check(self) -> None:
        check_clip(self.model)

    @contextmanager
    def open(self) -> Iterator[Work]:
        clip = Clip(self.model, self.precision)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            yield lambda task: self.score(clip, pool, task)

    def score(self, clip: Clip, pool: ThreadPoolExecutor, task: Task) -> Mapping[str, int]:
        captions = self.names_captions()
        table = with_captions(task, captions)
        wanted = (row for row in table if row["status"] == Status.OK)
        vectors = self._of_images(clip, pool, task, table)
        while batch := list(itertools.islice(wanted, self.batch)):
            image_BE = next(vectors)
            for name in captions:
                text_BE, cut = clip.texts([(row[name] or "")[:MAX_CHARACTERS] for row in batch])
                cosines = (image_BE * text_BE).sum(1).tolist()
                for row, cosine, was_cut in zip(batch, cosines, cut, strict=True):
                    if not math.isfinite(cosine):
                        reason = f"the cosine of {name} is not finite"
                        row |= {"status": str(Status.CAPTION_FAILED), "error": reason}
                    elif row[name]:
                        row |= {f"{name}_cosine": cosine, f"{name}_cut": was_cut}
        fields = [("uid", pa.string()), ("status", pa.string()), ("error", pa.string())]
        for name in captions:
            fields += [(f"{name}_cosine", pa.float64()), (f"{name}_cut", pa.bool_())]
        failed = {"uid", "status", "error"}
        rows = (row if row["status"] == Status.OK else {name: row[name] for name in failed} for row in table)
        write_parquet(pa.Table.from_pylist(list(rows), pa.schema(fields)), task.output())
        return Counter(row["status"] for row in table)

    def _of_images(
        self, clip: Clip, pool: ThreadPoolExecutor, task: Task, table: list[dict[str, Any]]
    ) -> Iterator[Any]:
        """(B, E) unit vectors of the rows that are ok, a batch at a time."""
        if self.vectors:
            with np.load(task.input(self.vectors, ".npz")) as arrays:
                image_NE = arrays["img"]
            rows = [number for number, row in enumerate(table) if row["status"] == Status.OK]
            for start in range(0, len(rows), self.batch):
                chosen = image_NE[rows[start : start + self.batch]].astype(np.float32)
                yield clip.torch.from_numpy(chosen).to(clip.device)
            return
        ok = {row["uid"] for row in table if row["status"] == Status.OK}
        decoded = pictures(clip, pool, task, ok, self.batch)
        while batch := list(itertools.islice(decoded, self.batch)):
            yield clip.images(batch)
