"""What a DiT is trained on and how, one function each. `recap train dit NAME key=value` calls NAME."""

from __future__ import annotations

from typing import Literal

from recipes.data import Mix
from recipes.dit.model import Net, Size
from recipes.dit.objective import Objective, Predict
from recipes.dit.train import Training
from recipes.training import Precision, best_precision


def demo(
    *,
    version: str = "runs/demo-published",
    images: str = "runs/demo",
    p_original: float = 0.0,
    size: Size = "P",
    px: int = 32,
    patch: int = 4,
    kind: Literal["flow", "diffusion"] = "flow",
    predict: Predict = "clean",
    samples: int = 30_000,
    batch: int = 64,
    lr: float = 1e-3,
    precision: Precision | None = None,
    workers: int = 1,
    tensorboard: bool = False,
    seed: int = 0,
) -> Training:
    """The demo's, of 2M parameters, in pixels, with a text encoder of its own: a rectified flow that predicts
    the clean picture.
    """
    learned = kind == "diffusion"
    return Training(
        name="demo", version=version, images=images, tokenizer="recipes/demo/weights/clip", seed=seed,
        net=Net(
            size=size, patch=patch, px=px, channels=3, sigma=learned, context=80, text_width=128,
            text_layers=2, vocabulary=1024,
        ),
        objective=Objective(kind=kind, predict=predict, learned_sigma=learned),
        samples=samples, batch=batch, lr=lr, warmup=samples // 20, cosine=True, ema=0.999,
        mix=Mix(p_original=p_original, drop=0.1), min_found=0.9, precision=precision or best_precision(),
        workers=workers, save_every=200, tensorboard=tensorboard,
    )  # fmt: skip
