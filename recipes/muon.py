"""Muon (Jordan et al. 2024): a matrix moves by its momentum made orthogonal, everything else by AdamW.

The step of a matrix has the size that AdamW's usually has, so that one rate serves both (arXiv 2502.16982).
torch's own has no AdamW beside it and computes in bfloat16: on a CPU without that, twenty times as long.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
STEPS = 5
MOMENTUM = 0.95
SIZE = 0.2  # root mean square of AdamW's step, in rates


class Muon(torch.optim.AdamW):
    """`matrices` are (M, N); `others` of any shape."""

    def __init__(
        self, matrices: Iterable[torch.Tensor], others: Iterable[torch.Tensor], *, lr: float,
        betas: tuple[float, float], eps: float, weight_decay: float,
    ) -> None:  # fmt: skip
        groups: list[dict[str, Any]] = [{"params": [*others]}, {"params": [*matrices], "orthogonal": True}]
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Takes the gradients of matrices away: AdamW passes over them."""
        assert closure is None
        for group in self.param_groups:
            if group.get("orthogonal"):
                for matrix in group["params"]:
                    self._move(matrix, group["lr"], group["weight_decay"])
        super().step()

    def _move(self, matrix: torch.Tensor, rate: float, decay: float) -> None:
        gradient, matrix.grad = matrix.grad, None
        if gradient is None:
            return
        state = self.state[matrix]
        if not state:
            state.update(step=torch.zeros(()), momentum=torch.zeros_like(matrix))  # AdamW asks for a step
        momentum = state["momentum"].mul_(MOMENTUM).add_(gradient)
        ahead = gradient + MOMENTUM * momentum  # Nesterov's
        matrix.mul_(1 - rate * decay)
        matrix.add_(orthogonal(ahead), alpha=-rate * SIZE * math.sqrt(max(matrix.shape)))


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """(M, N) with about the same singular vectors, and singular values about 1 (from 0.7 to 1.2)."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).float()
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(STEPS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if tall else x).to(matrix.dtype)
