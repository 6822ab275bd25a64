"""What a DiT is trained on and how, one function each. `recap train dit NAME key=value` calls NAME."""

from __future__ import annotations

from typing import Literal

from recipes.data import Mix
from recipes.dit.model import Net, Size
from recipes.dit.objective import Objective, Predict
from recipes.dit.train import Training
from recipes.training import Precision, best_precision


def recap_dit(
    *,
    version: str,
    images: str,
    size: Size = "B",
    patch: int = 4,
    p_original: float = 0.1,
    latents: str = "latents",
    features: str = "text_features",
    context: int = 77,
    text_width: int = 768,
    px: int = 32,
    channels: int = 4,
    kind: Literal["diffusion", "flow"] = "diffusion",
    predict: Predict | None = None,
    min_snr: float | None = None,
    shift: float = 1.0,
    samples: int = 650_000 * 2048,
    batch: int = 2048,
    lr: float = 1e-4,
    optimizer: Literal["adamw", "muon"] = "adamw",
    precision: Precision = "bf16",
    subset: str | None = None,
    min_found: float = 0.99,
    compile: bool = False,
    sharded: bool = False,
    workers: int = 8,
    tensorboard: bool = False,
    seed: int = 0,
) -> Training:
    """The paper's (arXiv 2406.08478, section 6): DiT-B/4 on latents of Stable Diffusion's VAE at 256 px, 32 a
    side: 650,000 steps of 2,048 at a rate of 1e-4, moving average 0.9999. What it leaves open is assumed: the
    text by CLIP ViT-L/14, 77 tokens of 768; no text for a sample in ten. With Recap-CLIP: context=128. Both
    are stages of the run `images`: Latents and TextFeatures. `kind=flow` (with `shift`), `min_snr=5` and
    `optimizer=muon` are newer. Unless told, a diffusion predicts the noise, a flow its velocity.
    """
    learned = kind == "diffusion"
    predict = predict or ("noise" if learned else "velocity")
    return Training(
        name="recap_dit", version=version, images=images, latents=latents, features=features, seed=seed,
        net=Net(
            size=size, patch=patch, px=px, channels=channels, sigma=learned, context=context,
            text_width=text_width,
        ),
        objective=Objective(kind=kind, predict=predict, learned_sigma=learned, min_snr=min_snr, shift=shift),
        samples=samples, batch=batch, lr=lr, optimizer=optimizer, mix=Mix(p_original=p_original, drop=0.1),
        precision=precision, compile=compile, sharded=sharded, workers=workers, tensorboard=tensorboard,
        subset=subset, min_found=min_found,
    )  # fmt: skip


def demo(
    *,
    version: str = "runs/demo-published",
    images: str = "runs/demo",
    p_original: float = 0.0,
    encoder: str = "",
    size: Size = "P",
    px: int = 32,
    patch: int = 4,
    kind: Literal["flow", "diffusion"] = "flow",
    predict: Predict = "clean",
    samples: int = 20_000,
    batch: int = 64,
    lr: float = 4e-3,
    optimizer: Literal["adamw", "muon"] = "muon",
    precision: Precision | None = None,
    min_found: float = 0.9,
    workers: int = 1,
    tensorboard: bool = False,
    seed: int = 0,
) -> Training:
    """The demo's, of 2M parameters, in pixels: a rectified flow that predicts the clean picture. The text is
    read by two layers of its own, with the tokens of the demo's tiny CLIP, or behind a frozen `encoder`.

    So little training is to learn what is where before it learns fine detail: times are moved to the noise,
    and its velocity's loss is divided by the time but by no less than a half. Muon, for in a
    probe by AdamW the text told the model nothing for the first 3,000 samples.
    """
    flow = kind == "flow"
    clip = "recipes/demo/weights/clip"
    return Training(
        name="demo", version=version, images=images, encoder=encoder, tokenizer="" if encoder else clip,
        net=Net(
            size=size, patch=patch, px=px, channels=3, sigma=not flow, context=80, text_width=128,
            text_layers=2, vocabulary=0 if encoder else 1024,
        ),
        objective=Objective(
            kind=kind, predict=predict, learned_sigma=not flow, floor=0.5, shift=3.0 if flow else 1.0
        ),
        samples=samples, batch=batch, lr=lr, optimizer=optimizer, warmup=samples // 20, cosine=True,
        ema=0.995, mix=Mix(p_original=p_original, drop=0.1), min_found=min_found, workers=workers,
        precision=precision or best_precision(), save_every=500, tensorboard=tensorboard, seed=seed,
    )  # fmt: skip
