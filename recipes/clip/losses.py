"""What a step minimises, and its gradient.

B samples of a rank, N of all ranks, E wide vectors, T tokens. Every loss is the mean over the samples of all
ranks that are ok; a rank computes its own share of it times the ranks, whose mean is then the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F

from recipes.clip.model import Trained
from recipes.training import Precision, computing

Loss = Literal["clip", "siglip"]
Contrast = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int], torch.Tensor]


def softmax(
    image_BE: torch.Tensor, text_BE: torch.Tensor, heads_2: torch.Tensor, ok_B: torch.Tensor,
    rank: int = 0, ranks: int = 1,
) -> torch.Tensor:  # fmt: skip
    """CLIP's loss: of this rank's images among all texts, and of its texts among all images, as open_clip's
    with local loss and gathered features. Samples that are not ok are nobody's.
    """
    images_NE, texts_NE, ok_N = _of_all(image_BE, ranks), _of_all(text_BE, ranks), _flags(ok_B, ranks)
    labels_B = torch.arange(len(ok_B), device=ok_B.device) + len(ok_B) * rank
    labels_B = labels_B.masked_fill(~ok_B, -100)
    no = torch.zeros(len(ok_N), device=ok_N.device).masked_fill(~ok_N, -1e9)  # finite: all may be so
    scale = heads_2[0]
    losses = (
        F.cross_entropy(scale * image_BE @ texts_NE.T + no, labels_B, reduction="sum", ignore_index=-100)
        + F.cross_entropy(scale * text_BE @ images_NE.T + no, labels_B, reduction="sum", ignore_index=-100)
    ) / 2
    return losses / ok_N.sum().clamp(min=1) * ranks


def sigmoid(
    image_BE: torch.Tensor, text_BE: torch.Tensor, heads_2: torch.Tensor, ok_B: torch.Tensor,
    rank: int = 0, ranks: int = 1,
) -> torch.Tensor:  # fmt: skip
    """SigLIP's loss (arXiv 2303.15343): each pair of an image and a text by itself."""
    texts_NE, ok_N = _of_all(text_BE, ranks), _flags(ok_B, ranks)
    logits_BN = heads_2[0] * image_BE @ texts_NE.T + heads_2[1]
    signs_BN = torch.full_like(logits_BN, -1.0)
    own = torch.arange(len(ok_B), device=ok_B.device)
    signs_BN[own, own + len(ok_B) * rank] = 1.0
    losses_BN = -F.logsigmoid(signs_BN * logits_BN) * (ok_B[:, None] & ok_N)
    return losses_BN.sum() / ok_N.sum().clamp(min=1) * ranks


CONTRASTS: dict[Loss, Contrast] = {"clip": softmax, "siglip": sigmoid}


def _of_all(vectors: torch.Tensor, ranks: int) -> torch.Tensor:
    return torch.cat(all_gather(vectors)) if ranks > 1 else vectors


def _flags(ok_B: torch.Tensor, ranks: int) -> torch.Tensor:
    if ranks == 1:
        return ok_B
    every = [torch.empty_like(ok_B) for _ in range(ranks)]
    dist.all_gather(every, ok_B)
    return torch.cat(every)


# --- a step -------------------------------------------------------------------------------------------------


class Step:
    """Losses and gradients of steps. With parts of `size` samples the vectors of all parts are computed
    first, then the gradient at them, then each part again with the random numbers that it had: the gradient
    is that of the whole (GradCache, arXiv 2101.06983).

    `captioning` is the weight of the loss of captions beside the contrastive one (CoCa, CLIPS), the mean over
    tokens; `padding` is the token that is none.
    """

    def __init__(
        self, module: torch.nn.Module, model: Trained, *, loss: Loss = "clip", captioning: float = 0.0,
        size: int | None = None, precision: Precision = "fp32", device: str = "cpu", rank: int = 0,
        ranks: int = 1,
    ) -> None:  # fmt: skip
        self.module, self.model, self.contrast = module, model, CONTRASTS[loss]
        self.captioning, self.size, self.precision, self.device = captioning, size, precision, device
        self.rank, self.ranks = rank, ranks

    def __call__(
        self,
        images: torch.Tensor,
        texts: torch.Tensor,
        ok: torch.Tensor,
        captions: torch.Tensor | None = None,
    ) -> float:
        """The loss, whose gradient is in the parameters then."""
        size = self.size or len(images)
        parts = [slice(start, start + size) for start in range(0, len(images), size)]
        share = self._share(captions, ok)
        if len(parts) == 1:
            image, text, heads, said = self._vectors(images, texts, captions)
            loss = self.contrast(image, text, heads, ok, self.rank, self.ranks) + share * (said * ok).sum()
            loss.backward()
            return self._mean(loss)
        states, found = [], []
        for part in parts:
            states.append(_random(self.device))
            with torch.no_grad():
                found.append(self._vectors(images[part], texts[part]))
        image, text = (torch.cat([vectors[n] for vectors in found]).requires_grad_() for n in range(2))
        heads = found[0][2].clone().requires_grad_()
        loss = self.contrast(image, text, heads, ok, self.rank, self.ranks)
        loss.backward()
        told = loss.detach()
        for number, (part, state) in enumerate(zip(parts, states, strict=True)):
            _restore(state, self.device)
            last = number == len(parts) - 1
            with nullcontext() if last else self.model.alone(self.module):
                again = self._vectors(
                    images[part], texts[part], captions if captions is None else captions[part]
                )
                of_captions = share * (again[3] * ok[part]).sum()
                whole = (again[0] * image.grad[part]).sum() + (again[1] * text.grad[part]).sum()  # type: ignore[index]
                assert heads.grad is not None
                # The temperature counts once.
                (whole + (again[2] * heads.grad).sum() * last + of_captions).backward()
                told = told + of_captions.detach()
        return self._mean(told)

    def _vectors(
        self, images: torch.Tensor, texts: torch.Tensor, captions: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        with computing(self.device, self.precision):
            return [found.float() for found in self.module(images, texts, captions)]

    def _share(self, captions: torch.Tensor | None, ok: torch.Tensor) -> float:
        """What a token's loss counts."""
        if captions is None:
            return 0.0
        tokens = self.model.counted(captions[ok]).sum()
        if self.ranks > 1:
            dist.all_reduce(tokens)
        return self.captioning * self.ranks / max(1, int(tokens))

    def _mean(self, loss: torch.Tensor) -> float:
        """Over the ranks."""
        loss = loss.detach().clone()
        if self.ranks > 1:
            dist.all_reduce(loss)
        return float(loss) / self.ranks


def _random(device: str) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.startswith("cuda") else [])]


def _restore(state: list[torch.Tensor], device: str) -> None:
    torch.set_rng_state(state[0])
    if device.startswith("cuda"):
        torch.cuda.set_rng_state(state[1], device)
