"""latents: the images as a VAE's latents, kept, so that a DiT is trained without images and without the VAE.

Reads   download, dedup.
Writes  `<shard>.safetensors`: `latents`, (ok rows, C, h, w) float16, in row order, times the VAE's scaling
        factor; of which VAE and how is in its metadata. `<shard>.parquet`: uid, image_sha256, status, error.

An image is the square in its middle, `px` pixels a side. Its latent is the mean of what the VAE gives, not
drawn: the same on every day, but for last bits that depend on the number of threads.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from PIL import Image

from builder.core import Count, Json, Resources, Stage, Status, Task, Work
from builder.errors import InputError
from builder.files import read_file, read_rows, write_parquet
from builder.model import check_files, fetched, hub_model, identity, model_folder
from builder.stages import tensors
from builder.stages.clip import clip_workers, map_ahead
from builder.stages.imagetar import images
from builder.typed import from_json

KIND = "AutoencoderKL"
TENSOR = "latents"


@dataclass(frozen=True, kw_only=True)
class Latents(Stage):
    """By one VAE. `model` is a folder with diffusers' AutoencoderKL, or a Hub id@revision."""

    version: ClassVar[int] = 2
    effort: ClassVar[tuple[str, ...]] = ("batch",)
    libraries: ClassVar[tuple[str, ...]] = ("pyarrow", "diffusers", "torch", "numpy", "pillow")
    paths: ClassVar[tuple[str, ...]] = ("model",)

    name: str = "latents"
    model: str
    px: Count = 256
    batch: Count = 32
    precision: Literal["fp32", "bf16"] = "fp32"

    def reads(self) -> tuple[str, ...]:
        return ("download", "dedup")

    def num_workers(self) -> int:
        return clip_workers()

    def resources(self) -> Resources:
        return Resources(gpus=0.25, memory_gib=3)

    def settings(self) -> dict[str, Json]:
        return super().settings() | {"model": identity(self.model)}

    def check(self) -> None:
        check_vae(self.model)

    @contextmanager
    def open(self) -> Iterator[Work]:
        vae = Vae(self.model, self.precision)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            yield lambda task: self.encode(vae, pool, task)

    def encode(self, vae: Vae, pool: ThreadPoolExecutor, task: Task) -> Mapping[str, int]:
        table = list(read_rows(task.input("dedup"), ["uid", "status", "error"]))
        ok = {row["uid"] for row in table if row["status"] == Status.OK}
        about = {row["key"]: row for row in read_rows(task.input("download"), ["key", "uid", "image_sha256"])}
        jpgs = (jpg for key, jpg in images(task.input("download", ".tar")) if about[key]["uid"] in ok)
        decoded = map_ahead(pool, self._picture, jpgs, 2 * self.batch)
        told = {"vae": vae.identity, "px": str(self.px), "factor": f"{vae.factor:g}"}
        told |= {"precision": self.precision}
        with tensors.write(task.output(".safetensors"), TENSOR, vae.shape(self.px), told) as latents:
            while some := list(islice(decoded, self.batch)):
                latents.write(vae.encode(np.stack(some)))
        sha256 = {row["uid"]: row["image_sha256"] for row in about.values()}
        rows = [{**row, "image_sha256": sha256.get(row["uid"])} for row in table]
        fields = [(name, pa.string()) for name in ("uid", "image_sha256", "status", "error")]
        write_parquet(pa.Table.from_pylist(rows, pa.schema(fields)), task.output())
        return Counter(row["status"] for row in table)

    def _picture(self, jpg: bytes) -> Any:
        return np.asarray(centre(Image.open(io.BytesIO(jpg)).convert("RGB"), self.px))


def centre(image: Image.Image, px: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """The square in its middle."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((px, px), resample, box=(left, top, left + side, top + side))


def check_vae(model: str) -> None:
    """Raises:
    InputError: it is none.
    """
    folder = model_folder(model)
    if folder is None:
        hub_model(model)
        return
    path, hint = folder / "config.json", f"name a folder with diffusers' {KIND}, such as a checkpoint's vae/"
    if not path.exists():
        raise InputError(f"model folder {folder} has no config.json", hint)
    config = from_json(dict[str, Any], read_file(path), what=str(path))
    if config.get("_class_name") != KIND:
        raise InputError(f"{path} is of {config.get('_class_name') or 'no model of diffusers'}", hint)
    check_files(folder)


class Vae:
    """An AutoencoderKL for inference. B pictures of P pixels a side, C channels of p latents a side."""

    def __init__(self, model: str, precision: str = "fp32") -> None:
        """Raises:
        InputError: it is none, or diffusers is not installed.
        """
        check_vae(model)
        import torch

        try:
            from diffusers import AutoencoderKL
        except ModuleNotFoundError as error:
            raise InputError("diffusers is not installed", "pip install 'recapkit[train]'") from error
        folder = fetched(model)
        self.torch, self.identity = torch, identity(model)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        loading: Any = AutoencoderKL.from_pretrained
        self.model = (
            loading(folder, torch_dtype=dtype, use_safetensors=True, low_cpu_mem_usage=False)
            .to(self.device)
            .eval()
        )
        self.factor = float(self.model.config.scaling_factor)
        self.shift = float(self.model.config.shift_factor or 0)

    def shape(self, px: int) -> tuple[int, int, int]:
        """Of the latents of a picture.

        Raises:
            InputError: no whole number of latents a side.
        """
        smaller = 2 ** (len(self.model.config.block_out_channels) - 1)
        if px % smaller:
            raise InputError(f"px={px} is no multiple of {smaller}, by which this VAE divides", "give one")
        return int(self.model.config.latent_channels), px // smaller, px // smaller

    def encode(self, images_BPP3: Any) -> Any:
        """(B, P, P, 3) uint8 -> (B, C, p, p) float16.

        Raises:
            InputError: they are not finite.
        """
        with self.torch.inference_mode():
            pixels = self.torch.from_numpy(images_BPP3).permute(0, 3, 1, 2).to(self.device)
            mean = self.model.encode(pixels.to(self.model.dtype) / 127.5 - 1).latent_dist.mode()
            latents = ((mean.float() - self.shift) * self.factor).half()
        if not latents.isfinite().all():
            raise InputError("the VAE's latents are not finite: its weights are damaged", "copy them again")
        return latents.cpu().numpy()

    def decode(self, latents_BCpp: Any) -> Any:
        """(B, C, p, p) -> (B, 3, P, P) from -1 to 1."""
        with self.torch.inference_mode():
            latents = latents_BCpp.to(self.device) / self.factor + self.shift
            return self.model.decode(latents.to(self.model.dtype)).sample.float()
