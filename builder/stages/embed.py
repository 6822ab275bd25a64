"""embed: the images' vectors by one CLIP, kept: later captions and image-based filters need no image.

Reads   download, dedup.
Writes  `<shard>.npz` as DataComp's: `img`, (rows, E) float16, unit vectors, zero where a row is not ok;
        and `uid`, its two halves as u8. `<shard>.parquet`: uid, status, error.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from builder.core import Count, Json, Resources, Stage, Status, Task, Work
from builder.files import read_rows, write_parquet
from builder.model import identity
from builder.stages.clip import Clip, Precision, check_clip, clip_workers, pictures


@dataclass(frozen=True, kw_only=True)
class Embed(Stage):
    """Vectors by one CLIP. `model` is a folder in open_clip's local-dir layout or a Hub id@revision."""

    effort: ClassVar[tuple[str, ...]] = ("batch",)
    libraries: ClassVar[tuple[str, ...]] = ("pyarrow", "open_clip_torch", "torch", "torchvision", "numpy")
    paths: ClassVar[tuple[str, ...]] = ("model",)

    name: str = "embed"
    model: str
    batch: Count = 128
    precision: Precision = "fp32"

    def reads(self) -> tuple[str, ...]:
        return ("download", "dedup")

    def num_workers(self) -> int:
        return clip_workers()

    def resources(self) -> Resources:
        return Resources(gpus=0.08, memory_gib=2)

    def settings(self) -> dict[str, Json]:
        return super().settings() | {"model": identity(self.model)}

    def check(self) -> None:
        check_clip(self.model)

    @contextmanager
    def open(self) -> Iterator[Work]:
        clip = Clip(self.model, self.precision)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            yield lambda task: self.embed(clip, pool, task)

    def embed(self, clip: Clip, pool: ThreadPoolExecutor, task: Task) -> Mapping[str, int]:
        table = list(read_rows(task.input("dedup"), ["uid", "status", "error"]))
        ok = [number for number, row in enumerate(table) if row["status"] == Status.OK]
        decoded = pictures(clip, pool, task, {table[number]["uid"] for number in ok}, self.batch)
        image_NE = np.zeros((len(table), clip.width), np.float16)
        for start in range(0, len(ok), self.batch):
            chosen = ok[start : start + self.batch]
            image_NE[chosen] = clip.images(list(itertools.islice(decoded, len(chosen)))).cpu().numpy()
        halves = [(int(row["uid"][:16], 16), int(row["uid"][16:], 16)) for row in table]
        uids = np.array(halves, dtype="u8,u8")
        np.savez(task.output(".npz"), img=image_NE, uid=uids)
        fields = [(name, pa.string()) for name in ("uid", "status", "error")]
        write_parquet(pa.Table.from_pylist(table, pa.schema(fields)), task.output())
        return Counter(row["status"] for row in table)
