"""What a training would take: steps, operations, hours of GPUs, disk.

operations of a token in a block = 24 width^2 + 4 tokens width, multiplications and additions; of an image
also its patches', of a decoder also what it looks at and says. Backwards takes twice as many; with steps in
parts (GradCache) the first pass is made twice.
hours = operations / (operations a second of a GPU * utilisation)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from builder.errors import InputError
from recipes.clip import model as clip
from recipes.clip.model import TEXT, VISION, Decoder, Towers
from recipes.clip.train import Training
from recipes.training import KEPT


@dataclass(frozen=True)
class Line:
    """Of a phase. `flops`: of all its samples."""

    px: int
    samples: int
    steps: int
    flops: float
    gpu_hours: float


@dataclass(frozen=True)
class Plan:
    """`checkpoint_gib`: what a training keeps of them, and one that is being written."""

    lines: tuple[Line, ...]
    parameters: int
    flops: float
    gpu_hours: float
    cost: float | None
    checkpoint_gib: float
    assumed: str


def plan(training: Training, *, tflops: float, utilisation: float, price: float | None = None) -> Plan:
    """On GPUs of `tflops` at this precision, of which `utilisation` is reached; `price` is of an hour of one.

    Raises:
        InputError: no share of a GPU.
    """
    if not 0 < utilisation <= 1:
        raise InputError(
            f"utilisation={utilisation:g} is no share", "give a number from 0 to 1, such as 0.35"
        )
    parts = training.micro is not None and training.micro < max(phase.batch for phase in training.phases)
    passes = 4 if parts else 3
    lines = []
    for phase in training.phases:
        samples = phase.steps * phase.batch
        flops = passes * samples * forward_flops(training.towers, phase.px)
        lines.append(
            Line(phase.px, samples, phase.steps, flops, flops / (tflops * 1e12 * utilisation) / 3600)
        )
    weights = parameters(training.towers, training.phases[-1].px)
    hours = sum(line.gpu_hours for line in lines)
    return Plan(
        tuple(lines), weights, sum(line.flops for line in lines), hours,
        None if price is None else hours * price, 3 * 4 * weights * (KEPT + 1) / 2**30,
        f"{tflops:g} TFLOPS a GPU, {100 * utilisation:g} % of it used",
    )  # fmt: skip


def parameters(towers: Towers, px: int) -> int:
    config = towers.config(px)
    with torch.device("meta"):
        modules = [clip.make(config)]
        if towers.decoder_layers:
            modules.append(Decoder(towers, config["model_cfg"]["text_cfg"]["vocab_size"]))
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def forward_flops(towers: Towers, px: int) -> float:
    """Of one sample, forwards."""
    layers, width, _ = VISION[towers.vision]
    text_layers, text_width, _ = TEXT[towers.text]
    patches = (px // towers.patch) ** 2
    seen = max(1, int(patches * towers.keep)) + 1
    image = _blocks(seen, width, layers) + 2 * 3 * towers.patch**2 * width * patches
    text = _blocks(towers.context, text_width, text_layers)
    if not towers.decoder_layers:
        return image + text
    vocabulary = towers.config(px)["model_cfg"]["text_cfg"]["vocab_size"]
    length = towers.decoder_context - 1
    looks = length * (4 * text_width**2 + 4 * (seen - 1) * text_width) + (seen - 1) * 4 * text_width**2
    decoder = _blocks(length, text_width, towers.decoder_layers) + towers.decoder_layers * looks
    decoder += 2 * (seen - 1) * width * text_width + 2 * length * text_width * vocabulary
    return image + text + decoder


def _blocks(tokens: int, width: int, layers: int) -> float:
    return layers * tokens * (24 * width**2 + 4 * tokens * width)
