"""What a training of a DiT would take (recipes/plan.py): beside its blocks what reads the text in each, and
what the time makes of it. Encoding ahead is not in it: that is a stage of the run.
"""

from __future__ import annotations

import torch

from recipes.dit.model import FREQUENCIES, SIZES, DiT, Net
from recipes.dit.train import Training
from recipes.plan import Phase, Plan, in_blocks, planned

COPIES = 4  # in a checkpoint: the average, the weights, and two moments


def plan(training: Training, *, tflops: float, utilisation: float, price: float | None = None) -> Plan:
    """See `planned`. Raises as that does."""
    phase = Phase(training.net.px, training.steps, training.batch, 3 * forward_flops(training.net))
    weights = parameters(training.net)
    return planned([phase], weights, copies=COPIES, tflops=tflops, utilisation=utilisation, price=price)


def parameters(net: Net) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DiT(net).parameters())


def forward_flops(net: Net) -> float:
    """Of one sample, forwards, of a text as long as the context."""
    return picture_flops(net) + text_flops(net)


def picture_flops(net: Net) -> float:
    """Of a sample of a model that reads no text: DiT's own."""
    layers, width, _ = SIZES[net.size]
    patches = (net.px // net.patch) ** 2
    ends = 2 * net.patch**2 * net.channels * width * patches * (3 if net.sigma else 2)
    times = 2 * FREQUENCIES * width + 2 * width**2 + layers * 12 * width**2 + 4 * width**2
    return in_blocks(patches, width, layers) + ends + times


def text_flops(net: Net) -> float:
    """Of what reads the text, and of an encoder that is trained beside it."""
    layers, width, _ = SIZES[net.size]
    patches = (net.px // net.patch) ** 2
    looks = 4 * width**2 * (patches + net.context) + 4 * patches * net.context * width
    encoder = in_blocks(net.context, net.text_width, net.text_layers)
    return layers * looks + 2 * net.context * net.text_width * width + encoder
