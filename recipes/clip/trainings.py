"""What a CLIP is trained on and how, one function each. `recap train clip NAME key=value` calls NAME."""

from __future__ import annotations

from typing import Literal

from builder.errors import RecipeError
from recipes.clip.losses import Loss
from recipes.clip.model import TEXT, Size, Towers
from recipes.clip.train import Phase, Training
from recipes.data import Mix
from recipes.training import Precision, best_precision


def demo(
    *,
    version: str = "runs/demo-published",
    images: str = "runs/demo",
    p_original: float = 0.5,
    concat: bool = False,
    vision: Size = "N",
    text: Size = "N",
    samples: int = 30_000,
    batch: int = 128,
    lr: float = 1e-3,
    loss: Loss = "clip",
    precision: Precision | None = None,
    min_found: float = 0.9,
    workers: int = 1,
    tensorboard: bool = False,
    seed: int = 0,
) -> Training:
    """The demo's, of 0.7M parameters, from nothing, on two cores. `lr` is the peak; the precision the best of
    this machine unless given.
    """
    rate = lr * 256 / max(1, batch)
    return Training(
        name="demo", version=version, images=images, seed=seed, loss=loss, min_found=min_found,
        workers=workers,
        towers=Towers(
            vision=vision, text=text, patch=8, context=80, tokenizer="recipes/demo/weights/clip",
            sigmoid=loss == "siglip",
        ),
        phases=(Phase(px=64, samples=samples, warmup=samples // 10, batch=batch, lr=rate),),
        mix=Mix(p_original=p_original, concat=concat), area=0.9, save_every=50, tensorboard=tensorboard,
        precision=precision or best_precision(),
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
    weights: tuple[float, ...] = (),
    subset: str | None = None,
    min_found: float = 0.99,
    context: int = 128,
    draft: bool = False,
    keep: float = 1.0,
    loss: Loss = "clip",
    captioning: float = 0.0,
    samples: int = 2_560_000_000,
    batch: int = 32_768,
    lr: float = 8e-6,
    micro: int | None = None,
    precision: Precision = "bf16",
    start: str | None = None,
    compile: bool = False,
    sharded: bool = False,
    tensorboard: bool = False,
    workers: int = 8,
    save_every: int = 1000,
    seed: int = 0,
) -> Training:
    """Recap-CLIP (arXiv 2406.08478): CLIPA's two phases, at 112 px and, with a twentieth of the samples, at
    224. Rates, `lr` per 256 samples and a twentieth of it, are those of the authors' next code
    (UCSC-VLAA/OpenVision, src/configs/openvision.py). `tokenizer` is a folder, for the paper's numbers with
    bert-base-uncased. H is of patches of 14, the others of 16. With fewer `samples` all else shrinks alike.
    Of several `captions` one is drawn, by their `weights`: evenly, unless given. `draft` reads JPEGs at a
    half or less where a crop is that much too large, for when the GPU waits for the cores.
    """
    first = Phase(px=112, samples=samples, warmup=samples // 50, batch=batch, lr=lr)
    second = Phase(px=224, samples=samples // 20, warmup=samples // 100, batch=max(1, batch // 2), lr=lr / 20)
    return Training(
        name="recap_clip", version=version, images=images, subset=subset, seed=seed, micro=micro, loss=loss,
        workers=workers, save_every=save_every, captioning=captioning, precision=precision, start=start,
        compile=compile, sharded=sharded, tensorboard=tensorboard, phases=(first, second),
        min_found=min_found, draft=draft,
        towers=Towers(
            vision=vision, text=text, patch=14 if vision == "H" else 16, tokenizer=tokenizer, keep=keep,
            context=context, sigmoid=loss == "siglip", decoder_layers=TEXT[text][0] if captioning else 0,
        ),
        mix=Mix(_weighted(captions, weights), p_original, concat, one_sentence),
    )  # fmt: skip


def clips(
    *,
    version: str,
    images: str,
    tokenizer: str,
    vision: Size = "L",
    text: Size = "L",
    p_original: float = 0.5,
    captions: tuple[str, ...] = ("re_caption",),
    weights: tuple[float, ...] = (),
    subset: str | None = None,
    min_found: float = 0.99,
    draft: bool = False,
    samples: int = 2_560_000_000,
    batch: int = 32_768,
    lr: float = 8e-6,
    micro: int | None = None,
    precision: Precision = "bf16",
    compile: bool = False,
    sharded: bool = False,
    workers: int = 8,
    seed: int = 0,
) -> Training:
    """CLIPS (arXiv 2411.16828): one sentence of the caption, 80 tokens, and a decoder of the whole caption
    with twice the weight. CLIPS shows both texts to the text tower in every step; here a sample has one of
    them, the original with p_original.
    """
    return recap_clip(
        version=version, images=images, tokenizer=tokenizer, vision=vision, text=text, p_original=p_original,
        captions=captions, weights=weights, subset=subset, min_found=min_found, one_sentence=True, context=80,
        captioning=2.0, samples=samples, batch=batch, micro=micro, precision=precision, compile=compile,
        sharded=sharded, workers=workers, seed=seed, draft=draft, lr=lr,
    )  # fmt: skip


def datacomp(
    *,
    version: str,
    images: str,
    tokenizer: str,
    scale: Literal["small", "medium", "large"] = "small",
    p_original: float = 0.0,
    concat: bool = False,
    captions: tuple[str, ...] = ("re_caption",),
    weights: tuple[float, ...] = (),
    subset: str | None = None,
    min_found: float = 0.99,
    micro: int | None = None,
    precision: Precision = "bf16",
    compile: bool = False,
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
        compile=compile, workers=workers, phases=(phase,), area=0.9, min_found=min_found, precision=precision,
        mix=Mix(_weighted(captions, weights), p_original, concat),
        towers=Towers(vision="B", text="B", patch=patch, context=77, tokenizer=tokenizer), betas=(0.9, 0.98),
    )  # fmt: skip


def _weighted(captions: tuple[str, ...], weights: tuple[float, ...]) -> dict[str, float]:
    if weights and len(weights) != len(captions):
        reason = f"{len(weights)} weights of {len(captions)} captions"
        raise RecipeError(reason, "give one for each, in their order, or none")
    return dict(zip(captions, weights or (1.0,) * len(captions), strict=True))
