"""What a training of a CLIP would take (recipes/plan.py): also of an image its patches', of a decoder what it
looks at and says. With steps in parts (GradCache) the first pass is made twice.
"""

from __future__ import annotations

import torch

from recipes.clip import model as clip
from recipes.clip.model import TEXT, VISION, Decoder, Towers
from recipes.clip.train import Training
from recipes.plan import Phase, Plan, in_blocks, planned


def plan(training: Training, *, tflops: float, utilisation: float, price: float | None = None) -> Plan:
    """See `planned`. Raises as that does."""
    parts = training.micro is not None and training.micro < max(phase.batch for phase in training.phases)
    passes = 4 if parts else 3
    phases = [
        Phase(one.px, one.steps, one.batch, passes * forward_flops(training.towers, one.px))
        for one in training.phases
    ]
    weights = parameters(training.towers, training.phases[-1].px)
    return planned(phases, weights, copies=3, tflops=tflops, utilisation=utilisation, price=price)


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
    image = in_blocks(seen, width, layers) + 2 * 3 * towers.patch**2 * width * patches
    text = in_blocks(towers.context, text_width, text_layers)
    if not towers.decoder_layers:
        return image + text
    vocabulary = towers.config(px)["model_cfg"]["text_cfg"]["vocab_size"]
    length = towers.decoder_context - 1
    looks = length * (4 * text_width**2 + 4 * (seen - 1) * text_width) + (seen - 1) * 4 * text_width**2
    decoder = in_blocks(length, text_width, towers.decoder_layers) + towers.decoder_layers * looks
    decoder += 2 * (seen - 1) * width * text_width + 2 * length * text_width * vocabulary
    return image + text + decoder
