"""What a CLIP is trained on and how, one function each. `recap train clip NAME key=value` calls NAME."""

from __future__ import annotations

from typing import Literal

from builder.errors import RecipeError
from recipes.clip.model import Size, Towers
from recipes.clip.train import Phase, Training
from recipes.data import Mix


def demo(
    *,
    version: str = "runs/demo-published",
    images: str = "runs/demo",
    p_original: float = 0.5,
    concat: bool = False,
    samples: int = 30_000,
    batch: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
) -> Training:
    """The demo's, of 1.6M parameters, from nothing, on two cores."""
    return Training(
        name="demo", version=version, images=images, seed=seed,
        towers=Towers(vision="T", text="T", patch=8, context=80, tokenizer="recipes/demo/weights/clip"),
        phases=(Phase(px=64, samples=samples, warmup=samples // 10, batch=batch, lr=lr * 256 / batch),),
        mix=Mix(p_original=p_original, concat=concat), area=0.9, save_every=50,
    )  # fmt: skip


def recap_clip(
    *,
    version: str,
    images: str,
    tokenizer: str,
    vision: Size = "B",
    text: Size = "B",
    p_original: float = 0.8,
    concat: bool = False,
    one_sentence: bool = False,
    captions: tuple[str, ...] = ("re_caption",),
    keep: float = 1.0,
    samples: int = 2_560_000_000,
    batch: int = 32_768,
    micro: int | None = None,
    workers: int = 8,
    seed: int = 0,
) -> Training:
    """Recap-CLIP (arXiv 2406.08478): CLIPA's two phases, at 112 px and, with a twentieth of the samples, at
    224. Rates are those of the authors' next code (UCSC-VLAA/OpenVision, src/configs/openvision.py).
    `tokenizer` is a folder, for the paper's numbers with bert-base-uncased. With fewer `samples` all else
    shrinks alike.
    """
    first = Phase(px=112, samples=samples, warmup=samples // 50, batch=batch, lr=8e-6)
    second = Phase(px=224, samples=samples // 20, warmup=samples // 100, batch=max(1, batch // 2), lr=4e-7)
    return Training(
        name="recap_clip", version=version, images=images, seed=seed, micro=micro, workers=workers,
        towers=Towers(vision=vision, text=text, tokenizer=tokenizer, keep=keep), phases=(first, second),
        mix=Mix(dict.fromkeys(captions, 1.0), p_original, concat, one_sentence),
    )  # fmt: skip


def datacomp(
    *,
    version: str,
    images: str,
    tokenizer: str,
    scale: Literal["small", "medium", "large"] = "small",
    p_original: float = 0.0,
    subset: str | None = None,
    micro: int | None = None,
    workers: int = 8,
    seed: int = 0,
) -> Training:
    """DataComp's fixed compute (its scale_configs.py), so that versions and subsets can be compared: samples,
    batch, rate and warm-up are its own; the towers are the paper's, ViT-B of patch 32 (16 for large).

    Raises:
        RecipeError: there is no such scale.
    """
    scales = {"small": (12.8e6, 4096, 32), "medium": (128e6, 4096, 32), "large": (1.28e9, 8192, 16)}
    if scale not in scales:
        raise RecipeError(f"scale={scale}", f"there are: {', '.join(scales)}")
    samples, batch, patch = scales[scale]
    phase = Phase(px=224, samples=int(samples), warmup=500 * batch, batch=batch, lr=5e-4 * 256 / batch)
    return Training(
        name=f"datacomp_{scale}", version=version, images=images, subset=subset, seed=seed, micro=micro,
        towers=Towers(vision="B", text="B", patch=patch, context=77, tokenizer=tokenizer), phases=(phase,),
        mix=Mix(p_original=p_original), area=0.9, betas=(0.9, 0.98), workers=workers,
    )  # fmt: skip
