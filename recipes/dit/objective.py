"""What a step minimises: a picture is mixed with noise, and the model is to tell them apart.

    diffusion   x = sqrt(a_t) picture + sqrt(1 - a_t) noise, a thousand times t, linear betas, and the learned
                variance of DiT (arXiv 2102.09672), as the paper's
    flow        x = (1 - s) picture + s noise, and the velocity noise - picture (rectified flow, arXiv
                2209.03003), times of a logit-normal distribution (arXiv 2403.03206)

B samples, C channels, P pixels a side. A loss is (B), the mean over a sample's pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from builder.errors import InputError

Predict = Literal["noise", "velocity", "clean"]
TIMES = 1000
BETAS = (1e-4, 0.02, "linear")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """`predict`: what comes out of the model; the loss is on the velocity in a flow, else on that itself.
    `learned_sigma` has the model predict the variance too (diffusion alone). `min_snr` bounds the weights by
    signal to noise (arXiv 2303.09556: 5). `floor` is the least time that a flow's prediction of the clean
    picture is divided by, and the most of the picture for one of noise. `shift` moves a flow's times to the
    noise: a s / (1 + (a - 1) s), in training and in sampling (arXiv 2403.03206: 3 for large pictures).
    """

    kind: Literal["diffusion", "flow"] = "diffusion"
    predict: Predict = "noise"
    learned_sigma: bool = True
    min_snr: float | None = None
    floor: float = 0.05
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.kind == "flow" and (self.learned_sigma or self.min_snr is not None):
            reason = "a flow has neither learned_sigma nor min_snr"
            raise InputError(reason, "give learned_sigma=false and no min_snr, or kind=diffusion")
        if not 0 < self.shift < math.inf or (self.shift != 1 and self.kind != "flow"):
            raise InputError(f"shift={self.shift:g}", "give one above 0, and of a diffusion none")
        if not 0 < self.floor <= 1 or (self.min_snr is not None and self.min_snr <= 0):
            raise InputError("floor is a time above 0, at most 1, min_snr is above 0", "give 0.05, and 5")

    @cached_property
    def scheduler(self) -> Any:
        """diffusers', which knows the betas."""
        from diffusers import DDPMScheduler

        kinds = {"noise": "epsilon", "velocity": "v_prediction", "clean": "sample"}
        return DDPMScheduler(
            TIMES, *BETAS, clip_sample=False, prediction_type=kinds[self.predict],
            timestep_spacing="linspace",
            variance_type="learned_range" if self.learned_sigma else "fixed_small",
        )  # fmt: skip

    def times(self, normal_B: torch.Tensor) -> torch.Tensor:
        """(B) from standard normal numbers: in a flow 1000 s, else whole ones from 0 to 999."""
        if self.kind == "flow":
            return torch.sigmoid(normal_B + math.log(self.shift)) * TIMES
        even_B = 0.5 * (1 + torch.erf(normal_B / math.sqrt(2)))
        return (even_B * TIMES).long().clamp(0, TIMES - 1)

    def noisy(self, clean: torch.Tensor, noise: torch.Tensor, time_B: torch.Tensor) -> torch.Tensor:
        if self.kind == "flow":
            s = _wide(time_B / TIMES)
            return (1 - s) * clean + s * noise
        return torch.as_tensor(self.scheduler.add_noise(clean, noise, time_B))

    def loss(
        self, out: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor, noisy: torch.Tensor,
        time_B: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        if self.kind == "flow":
            right = {"clean": clean, "noise": noise}.get(self.predict, noise - clean)
            apart = self.velocity(out, noisy, time_B) - self.velocity(right, noisy, time_B)
            return _mean(apart.square())
        channels = clean.shape[1]
        mean, sigma = out[:, :channels], out[:, channels:]
        wanted = {"noise": noise, "clean": clean}.get(self.predict)
        if wanted is None:
            wanted = self.scheduler.get_velocity(clean, noise, time_B)
        loss = _mean((mean - wanted).square()) * self._weight(time_B)
        if self.learned_sigma:
            loss = loss + self.bound(mean.detach(), sigma, clean, noisy, time_B)
        return loss

    def velocity(
        self, out: torch.Tensor, noisy: torch.Tensor, time_B: torch.Tensor, floor: float | None = None
    ) -> torch.Tensor:
        """A flow's, from what is predicted."""
        s = _wide(time_B / TIMES)
        if self.predict == "clean":
            return (noisy - out) / s.clamp(min=floor or self.floor)
        if self.predict == "noise":
            return (out - noisy) / (1 - s).clamp(min=floor or self.floor)
        return out

    def _weight(self, time_B: torch.Tensor) -> torch.Tensor | float:
        if self.min_snr is None:
            return 1.0
        from diffusers.training_utils import compute_snr

        snr_B = torch.as_tensor(compute_snr(self.scheduler, time_B))
        least_B = snr_B.clamp(max=self.min_snr)
        return {"noise": least_B / snr_B, "clean": least_B, "velocity": least_B / (snr_B + 1)}[self.predict]

    def bound(
        self, mean: torch.Tensor, sigma: torch.Tensor, clean: torch.Tensor, noisy: torch.Tensor,
        time_B: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """(B) what learns the variance: the divergence in bits of the step back from the one that knows the
        picture, and at time 0 what the picture costs, in 256 values a channel. The mean learns nothing of it.
        """
        a_T, beta_T = (
            tensor.to(clean.device) for tensor in (self.scheduler.alphas_cumprod, self.scheduler.betas)
        )
        before_T = torch.cat([a_T.new_ones(1), a_T[:-1]])
        a, before, beta = (_wide(tensor[time_B]) for tensor in (a_T, before_T, beta_T))
        least_T = beta_T * (1 - before_T) / (1 - a_T)
        least_T = torch.cat([least_T[1:2], least_T[1:]])  # DiT's: of time 0 that of time 1
        low, high = _wide(least_T[time_B]).log(), beta.log()
        share = (sigma + 1) / 2
        log_variance = share * high + (1 - share) * low
        guess = {
            "noise": (noisy - (1 - a).sqrt() * mean) / a.sqrt(),
            "clean": mean,
            "velocity": a.sqrt() * noisy - (1 - a).sqrt() * mean,
        }[self.predict]
        true_mean, our_mean = (
            beta * before.sqrt() / (1 - a) * x + (1 - beta).sqrt() * (1 - before) / (1 - a) * noisy
            for x in (clean, guess)
        )
        apart = (true_mean - our_mean).square()
        divergence = 0.5 * (
            log_variance - low - 1 + torch.exp(low - log_variance) + apart * torch.exp(-log_variance)
        )
        cost = -_log_likelihood(clean, our_mean, log_variance)
        return torch.where(time_B == 0, _mean(cost), _mean(divergence)) / math.log(2)


def _log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Of values from -1 to 1 in 256 steps, under a normal distribution."""
    narrow = torch.exp(-0.5 * log_variance)
    above, below = (_under(narrow * (x - mean + step)) for step in (1 / 255, -1 / 255))
    inside = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return inside.clamp(min=1e-12).log()


def _under(x: torch.Tensor) -> torch.Tensor:
    """The normal distribution, approximately, as DiT has it."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _wide(x_B: torch.Tensor) -> torch.Tensor:
    return x_B.float().view(-1, 1, 1, 1)


def _mean(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).mean(1)
