"""What a training would take: steps, operations, hours of GPUs, disk.

operations of a token in a block = 24 width^2 + 4 tokens width, multiplications and additions; backwards takes
twice as many
hours = operations / (operations a second of a GPU * utilisation)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from builder.errors import InputError
from recipes.training import KEPT


@dataclass(frozen=True)
class Phase:
    """Of a training: `flops` are those of one of its samples, forwards and backwards."""

    px: int
    steps: int
    batch: int
    flops: float


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


def planned(
    phases: Sequence[Phase], parameters: int, *, copies: int, tflops: float, utilisation: float,
    price: float | None,
) -> Plan:  # fmt: skip
    """On GPUs of `tflops` at this precision, of which `utilisation` is reached; `price` is of an hour of one.
    A checkpoint holds `copies` of the parameters, of four bytes each.

    Raises:
        InputError: no share of a GPU.
    """
    if not 0 < utilisation <= 1:
        reason = f"utilisation={utilisation:g} is no share"
        raise InputError(reason, "give a number from 0 to 1, such as 0.35")
    lines = []
    for phase in phases:
        samples = phase.steps * phase.batch
        flops = samples * phase.flops
        hours = flops / (tflops * 1e12 * utilisation) / 3600
        lines.append(Line(phase.px, samples, phase.steps, flops, hours))
    hours = sum(line.gpu_hours for line in lines)
    return Plan(
        tuple(lines), parameters, sum(line.flops for line in lines), hours,
        None if price is None else hours * price, copies * 4 * parameters * (KEPT + 1) / 2**30,
        f"{tflops:g} TFLOPS a GPU, {100 * utilisation:g} % of it used",
    )  # fmt: skip


def in_blocks(tokens: int, width: int, layers: int) -> float:
    """Forwards, of a sample of so many tokens."""
    return layers * tokens * (24 * width**2 + 4 * tokens * width)
