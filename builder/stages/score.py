"""score: cosine of each image with its original caption and with each new one, by open_clip.

Reads   source, download (tar), caption.
Writes  `<shard>.parquet`: uid, status, error, and for each caption its cosine and whether the model's context cut it.

Rows that are not ok have no scores. An empty caption has none either.
"""

from __future__ import annotations

import io
import itertools
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
from PIL import Image

from builder.core import (
    Count,
    Json,
    Stage,
    Status,
    Task,
    Work,
    from_json,
    read_file,
    read_rows,
    write_parquet,
)
from builder.errors import InputError, RecipeError
from builder.model import check_files, hub_model, identity, model_folder
from builder.stages.imagetar import images

MAX_CHARACTERS = 20_000  # a caption is cut here before tokenizing; no CLIP reads that far


@dataclass(frozen=True, kw_only=True)
class Score(Stage):
    """Scoring with one CLIP. `model` is a folder in open_clip's local-dir layout or a Hub id with its revision."""

    name: ClassVar[str] = "score"
    reads: ClassVar[tuple[str, ...]] = ("source", "download", "caption")
    libraries: ClassVar[tuple[str, ...]] = ("pyarrow", "open_clip_torch", "torch", "torchvision")
    paths: ClassVar[tuple[str, ...]] = ("model",)

    model: str
    captions: tuple[str, ...] = ("org_caption", "re_caption")
    batch: Count = 128
    precision: Literal["fp32", "fp16", "bf16", "pure_fp16", "pure_bf16"] = "fp32"

    def __post_init__(self) -> None:
        for name in (name for name in self.captions if self.captions.count(name) > 1):
            raise RecipeError(f"score.captions names '{name}' twice", "leave one of them out")

    def names_captions(self) -> tuple[str, ...]:
        return self.captions

    def settings(self) -> dict[str, Json]:
        return super().settings() | {"model": identity(self.model)}

    def check(self) -> None:
        folder = model_folder(self.model)
        if folder is None:
            hub_model(self.model)
            return
        if not (folder / "open_clip_config.json").exists():
            raise InputError(
                f"model folder {folder} has no open_clip_config.json",
                "name a folder in open_clip's local-dir layout",
            )
        config = from_json(
            dict[str, Any],
            read_file(folder / "open_clip_config.json"),
            what=str(folder / "open_clip_config.json"),
        )
        if not isinstance(config.get("model_cfg"), dict):
            raise InputError(
                f"{folder / 'open_clip_config.json'} has no model_cfg",
                "name a folder in open_clip's local-dir layout",
            )
        check_files(folder)

    @contextmanager
    def open(self) -> Iterator[Work]:
        clip = Clip(self)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            yield lambda task: self.score(clip, pool, task)

    def score(self, clip: Clip, pool: ThreadPoolExecutor, task: Task) -> Mapping[str, int]:
        source = read_rows(task.input("source"), ["uid", "org_caption"])
        texts = [name for name in self.captions if name != "org_caption"]
        captioned = read_rows(task.input("caption"), ["uid", "status", "error", *texts])
        table = [
            row | {"org_caption": original["org_caption"]}
            for original, row in zip(source, captioned, strict=True)
        ]
        wanted = (row for row in table if row["status"] == Status.OK)
        keys = {row["key"]: row["uid"] for row in read_rows(task.input("download"), ["key", "uid"])}
        ok = {row["uid"] for row in table if row["status"] == Status.OK}
        decoded = _ahead(pool, lambda item: clip.preprocess(Image.open(io.BytesIO(item[1])).convert("RGB")),
                         (item for item in images(task.input("download", ".tar")) if keys[item[0]] in ok), self.batch)  # fmt: skip
        while batch := list(itertools.islice(wanted, self.batch)):
            image_BE = clip.images(list(itertools.islice(decoded, len(batch))))
            for name in self.captions:
                text_BE, cut = clip.texts([row[name][:MAX_CHARACTERS] for row in batch])
                cosines = (image_BE * text_BE).sum(1).tolist()
                for row, cosine, was_cut in zip(batch, cosines, cut, strict=True):
                    if not math.isfinite(cosine):
                        row |= {
                            "status": str(Status.CAPTION_FAILED),
                            "error": f"the cosine of {name} is not finite",
                        }
                    elif row[name]:
                        row |= {f"{name}_cosine": cosine, f"{name}_cut": was_cut}
        fields = [("uid", pa.string()), ("status", pa.string()), ("error", pa.string())]
        for name in self.captions:
            fields += [(f"{name}_cosine", pa.float64()), (f"{name}_cut", pa.bool_())]
        failed = {"uid", "status", "error"}
        rows = (row if row["status"] == Status.OK else {name: row[name] for name in failed} for row in table)
        write_parquet(pa.Table.from_pylist(list(rows), pa.schema(fields)), task.output())
        return Counter(row["status"] for row in table)


def _ahead(pool: ThreadPoolExecutor, function: Any, items: Iterator[Any], number: int) -> Iterator[Any]:
    """`map` over threads that stays at most `number` results ahead."""
    waiting = [pool.submit(function, item) for item in itertools.islice(items, number)]
    while waiting:
        yield waiting.pop(0).result()
        waiting += [pool.submit(function, item) for item in itertools.islice(items, 1)]


class Clip:
    """An open_clip model for inference: unit vectors of images and texts."""

    def __init__(self, settings: Score) -> None:
        import open_clip
        import torch

        settings.check()
        folder: Path | str | None = model_folder(settings.model)
        if folder is None:
            repository, revision = hub_model(settings.model)
            from huggingface_hub import snapshot_download

            folder = snapshot_download(repository, revision=revision)
        name = f"local-dir:{folder}"
        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.preprocess = open_clip.create_model_from_pretrained(
            name, precision=settings.precision, device=self.device
        )
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(name)
        self.context = int(self.model.context_length)
        self.pad = int(self.tokenizer([""], context_length=self.context + 1)[0, -1])
        tried = (
            self.images([self.preprocess(Image.new("RGB", (64, 64)))]).sum()
            + self.texts(["a photo"])[0].sum()
        )
        if not tried.isfinite():
            raise InputError(
                f"the vectors of model {settings.model} are not finite: its weights are damaged",
                "copy them again",
            )

    def images(self, pictures: list[Any]) -> Any:
        """(B, 3, H, W) pictures -> (B, E) unit vectors."""
        with self.torch.inference_mode():
            batch = self.torch.stack(pictures).to(self.device, next(self.model.parameters()).dtype)
            return self.model.encode_image(batch, normalize=True).float()

    def texts(self, texts: list[str]) -> tuple[Any, list[bool]]:
        """(B, E) unit vectors, and which texts are longer than the context: tokenized with one place more, that place is taken."""
        longer = self.tokenizer(texts, context_length=self.context + 1)
        cut = (longer[:, -1] != self.pad).tolist()
        with self.torch.inference_mode():
            tokens = self.tokenizer(texts, context_length=self.context) if any(cut) else longer[:, :-1]
            return self.model.encode_text(tokens.to(self.device), normalize=True).float(), cut
