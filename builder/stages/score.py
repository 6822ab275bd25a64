"""score: cosine of each image with its original caption and with each new one, by open_clip.

Reads   source, download, dedup, and every caption stage.
Writes  `<shard>.parquet`: uid, status, error, and for each caption its cosine and whether the model's context
        cut it.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
from PIL import Image

from builder.core import Count, Json, Resources, Stage, Status, Task, Work
from builder.errors import InputError, RecipeError
from builder.files import read_file, read_rows, write_parquet
from builder.model import check_files, hub_model, identity, model_folder
from builder.stages.imagetar import images
from builder.typed import from_json

MAX_CHARACTERS = 20_000  # a caption is cut here before tokenizing; no CLIP reads that far


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
    precision: Literal["fp32", "fp16", "bf16", "pure_fp16", "pure_bf16"] = "fp32"

    def __post_init__(self) -> None:
        captions = self.captions or ()
        for name in (name for name in captions if captions.count(name) > 1):
            raise RecipeError(f"score.captions names '{name}' twice", "leave one of them out")

    def after(self, earlier: tuple[Stage, ...]) -> Stage:
        made = tuple(name for stage in earlier for name in stage.makes_captions())
        return replace(self, captions=("org_caption", *made)) if self.captions is None else self

    def names_captions(self) -> tuple[str, ...]:
        return self.captions or ()

    def reads(self) -> tuple[str, ...]:
        made = (name for name in self.names_captions() if name != "org_caption")
        return ("source", "download", "dedup", *made)

    def resources(self) -> Resources:
        return Resources(gpus=0.08, memory_gib=2)  # beside a captioner that takes 0.9 of one

    def settings(self) -> dict[str, Json]:
        return super().settings() | {"model": identity(self.model)}

    def check(self) -> None:
        folder = model_folder(self.model)
        if folder is None:
            hub_model(self.model)
            return
        path, hint = folder / "open_clip_config.json", "name a folder in open_clip's local-dir layout"
        if not path.exists():
            raise InputError(f"model folder {folder} has no open_clip_config.json", hint)
        config = from_json(dict[str, Any], read_file(path), what=str(path))
        if not isinstance(config.get("model_cfg"), dict):
            raise InputError(f"{path} has no model_cfg", hint)
        check_files(folder)

    @contextmanager
    def open(self) -> Iterator[Work]:
        clip = Clip(self)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            yield lambda task: self.score(clip, pool, task)

    def score(self, clip: Clip, pool: ThreadPoolExecutor, task: Task) -> Mapping[str, int]:
        captions = self.names_captions()
        table = list(read_rows(task.input("dedup"), ["uid", "status", "error"]))
        for name in captions:
            is_made = name != "org_caption"
            stage, columns = (name, ["status", "error", name]) if is_made else ("source", [name])
            for row, given in zip(table, read_rows(task.input(stage), columns), strict=True):
                row[name] = given[name]
                if row["status"] == Status.OK and given.get("status", Status.OK) != Status.OK:
                    row |= {"status": given["status"], "error": given["error"]}
        wanted = (row for row in table if row["status"] == Status.OK)
        keys = {row["key"]: row["uid"] for row in read_rows(task.input("download"), ["key", "uid"])}
        ok = {row["uid"] for row in table if row["status"] == Status.OK}
        jpgs = (jpg for key, jpg in images(task.input("download", ".tar")) if keys[key] in ok)
        decoded = _ahead(pool, clip.decode, jpgs, self.batch)
        while batch := list(itertools.islice(wanted, self.batch)):
            image_BE = clip.images(list(itertools.islice(decoded, len(batch))))
            for name in captions:
                text_BE, cut = clip.texts([row[name][:MAX_CHARACTERS] for row in batch])
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
        made = open_clip.create_model_from_pretrained(name, precision=settings.precision, device=self.device)
        self.model, self.preprocess = made
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(name)
        self.context = int(self.model.context_length)
        self.pad = int(self.tokenizer([""], context_length=self.context + 1)[0, -1])
        picture = self.preprocess(Image.new("RGB", (64, 64)))
        tried = self.images([picture]).sum() + self.texts(["a photo"])[0].sum()
        if not tried.isfinite():
            reason = f"the vectors of model {settings.model} are not finite: its weights are damaged"
            raise InputError(reason, "copy them again")

    def decode(self, jpg: bytes) -> Any:
        return self.preprocess(Image.open(io.BytesIO(jpg)).convert("RGB"))

    def images(self, pictures: list[Any]) -> Any:
        """(B, 3, H, W) pictures -> (B, E) unit vectors."""
        with self.torch.inference_mode():
            batch = self.torch.stack(pictures).to(self.device, next(self.model.parameters()).dtype)
            return self.model.encode_image(batch, normalize=True).float()

    def texts(self, texts: list[str]) -> tuple[Any, list[bool]]:
        """(B, E) unit vectors, and which texts are longer than the context.

        Of those, tokenized with one place more, that place is taken.
        """
        longer = self.tokenizer(texts, context_length=self.context + 1)
        cut = (longer[:, -1] != self.pad).tolist()
        with self.torch.inference_mode():
            tokens = self.tokenizer(texts, context_length=self.context) if any(cut) else longer[:, :-1]
            return self.model.encode_text(tokens.to(self.device), normalize=True).float(), cut
