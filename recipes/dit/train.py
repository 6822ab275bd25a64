"""Train a DiT on a version: read from top to bottom.

    torchrun --nproc-per-node 8 -m builder.cli train dit ...     # one process a GPU

What a training has is every training's (recipes/training.py), and so is what it sees (recipes/data.py). A
checkpoint is a model folder: its weights are the moving average, which is what draws; those that are trained
lie in training.tensors.

A step is a pure function of the weights, the optimizer and the number of its first sample: time and noise of
a sample too. On a CPU a training that was killed goes on to the same losses, bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from builder.errors import InputError
from builder.files import sha256_file
from builder.stages.textfeatures import Encoder
from recipes.data import Batch, Latent, Mix, Pairs, Picture, Tokenize, drawn, in_sixteens
from recipes.dit import model as dit
from recipes.dit.model import DiT, Net, Words
from recipes.dit.objective import Objective
from recipes.join import Joined
from recipes.muon import Muon
from recipes.training import (
    BY_CONTENT,
    Precision,
    Ranks,
    Say,
    alone_in,
    at_least,
    checkpoint,
    computing,
    cosine,
    joined_in,
    latest,
    load_moments,
    of_the_extra,
    processes,
    run_steps,
    settle,
    shorten_log,
    spread,
    state_of,
    tensors_in,
    warmed,
    whole_tensor,
)

FREE = ("workers", "save_every", "tensorboard", "compile", "sharded", "min_found")
# Muon's are matrices but for what is looked up, and what leads out.
NO_MATRICES = ("text.tokens.weight", "text.places", "out.weight")
MOMENTS = "training.tensors"  # of a checkpoint: weights and the optimizer's state; as safetensors


@dataclass(frozen=True, kw_only=True)
class Training:
    """So many `samples` in steps of `batch`, at a rate of `lr` that rises over `warmup` samples, and falls to
    0 by a cosine where that is wanted. `ema` is the decay of the moving average, which begins lower:
    (1 + n) / (10 + n) at step n. `optimizer` is the paper's AdamW, or Muon (recipes/muon.py). `sharded`
    spreads weights and optimizer over the devices (FSDP2). `latents` names the stage of the run `images`
    whose latents are denoised, in the place of pictures.

    Where the text's features come from is one of three: `tokenizer`, a folder with a tokenizer.json, for an
    encoder that is trained beside; `features`, the stage of the run that has those of a frozen one; or
    `encoder`, a frozen one that reads on the way, on the CPU, in the processes that load.
    """

    name: str
    version: str
    images: str
    net: Net
    objective: Objective
    samples: int
    batch: int
    lr: float = 1e-4
    warmup: int = 0
    cosine: bool = False
    mix: Mix = field(default_factory=lambda: Mix(drop=0.1))
    subset: str | None = None
    min_found: float = 0.99
    tokenizer: str = ""
    latents: str = ""
    features: str = ""
    encoder: str = ""
    ema: float = 0.9999
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    optimizer: Literal["adamw", "muon"] = "adamw"
    precision: Precision = "bf16"
    seed: int = 0
    workers: int = 1
    save_every: int = 1000  # steps
    tensorboard: bool = False
    compile: bool = False
    sharded: bool = False

    def __post_init__(self) -> None:
        least = {"workers": 0, "save_every": 1, "seed": 0, "warmup": 0, "batch": 1, "lr": 0, "min_found": 0}
        at_least(self, least)
        if self.batch > self.samples:
            reason = f"a training of {self.samples:,} samples has no step of {self.batch:,}"
            raise InputError(reason, "give more samples, or a smaller batch")
        if self.sharded and self.optimizer == "muon":
            raise InputError("muon moves whole matrices", "give optimizer=adamw, or leave sharded out")
        if not 0 <= self.ema < 1:
            raise InputError(
                f"ema={self.ema:g} is no decay", "give a number from 0 to below 1, such as 0.9999"
            )
        ways = [bool(way) for way in (self.tokenizer, self.features, self.encoder)]
        if sum(ways) != 1 or bool(self.net.vocabulary) != ways[0]:
            reason = "a training has a text encoder of its own, features of texts, or a frozen encoder"
            hint = "give text_layers, vocabulary and tokenizer, or features=STAGE, or encoder=MODEL"
            raise InputError(reason, hint)
        if self.net.channels != 3 and not self.latents:
            raise InputError("pictures have 3 channels", "give channels=3, or latents=STAGE")
        if self.features and (self.mix.concat or self.mix.one_sentence):
            reason = "features are of whole captions: there are none of a sentence, or of two together"
            raise InputError(reason, "give neither concat nor one_sentence")
        if self.net.sigma != (self.objective.kind == "diffusion" and self.objective.learned_sigma):
            reason = f"a net with sigma={self.net.sigma} and learned_sigma={self.objective.learned_sigma}"
            raise InputError(reason, "the output has a variance where one is learned, and nowhere else")

    @property
    def steps(self) -> int:
        return self.samples // self.batch

    def rate(self, step: int) -> float:
        warm = self.warmup // self.batch
        return cosine(self.lr, step, warm, self.steps) if self.cosine else warmed(self.lr, step, warm)


def train(training: Training, out: Path, say: Say = print) -> Path:
    """Train, or go on where it stopped; gives the last checkpoint, a model folder.

    Raises:
        InputError: something is not as it should be, the loss is no number, or the disk is full.
    """
    with processes() as ranks, alone_in(out, ranks):
        if training.batch % ranks.ranks:
            reason = f"a step of {training.batch} samples on {ranks.ranks} devices"
            raise InputError(reason, "make it a multiple of them")
        own = bool(training.tokenizer)
        words = dit.tokenizer(training.tokenizer, training.net.vocabulary) if own else None
        frozen = Frozen(training.encoder, training.net.context) if training.encoder else None
        with of_the_extra():
            import diffusers  # noqa: F401
        settle(training, out, (*FREE, *BY_CONTENT), ranks)

        def encoded(joined: Joined) -> Joined:
            return replace(joined, features=frozen.about()) if frozen else joined

        def about(joined: Joined) -> dict[str, Any]:
            _check_shapes(training.net, encoded(joined))
            return encoded(joined).about() | {"tokenizer": sha256_file(words) if words else None}

        joined = encoded(joined_in(
            out, ranks, version=training.version, images=training.images, mix=training.mix,
            subset=training.subset, min_found=training.min_found, latents=training.latents,
            features=training.features, about=about,
        ))  # fmt: skip
        if ranks.is_first:
            say(f"{joined.audit}")
        sample, there = latest(out)
        if ranks.is_first:
            shorten_log(out, sample)
        if sample < training.steps * training.batch:
            read = Words(words, training.net.context) if words else frozen
            there = _train(training, joined, words, read, out, sample, there, say, ranks)
        assert there is not None
        return there


class Frozen:
    """Texts -> (B, T, F) features of a frozen encoder, float16, 0 behind a text's, and how many of the texts
    are longer than the context. A worker process that is no copy of this one loads it anew.
    """

    def __init__(self, model: str, context: int) -> None:
        self.encoder = Encoder(model, context, device="cpu")
        self.given = model, context

    def __reduce__(self) -> tuple[type[Frozen], tuple[str, int]]:
        return Frozen, self.given

    def about(self) -> dict[str, Any]:
        """As of features that are joined."""
        return {**self.encoder.about(), "width": self.encoder.width}

    def __call__(self, texts: Sequence[str]) -> tuple[torch.Tensor, int]:
        return self.encoder.padded(texts, in_sixteens)


def _check_shapes(net: Net, joined: Joined) -> None:
    """Raises:
    InputError: latents or features are not what the net denoises, or reads.
    """
    if about := joined.latents:
        channels, px, _ = about["shape"]
        if (channels, px) != (net.channels, net.px):
            has = f"{net.channels} channels of {net.px}"
            reason = f"the latents are {channels} channels of {px} a side, the net denoises {has}"
            raise InputError(reason, f"give channels={channels} and px={px}")
    if about := joined.features:
        context, width = about["context"], about["width"]
        if (context, width) != (net.context, net.text_width):
            has = f"{net.context} of {net.text_width}"
            reason = f"the features are of {context} tokens, each {width} wide, the net reads {has}"
            raise InputError(reason, f"give context={context} and text_width={width}")


def _train(
    training: Training, joined: Joined, words: Path | None, read: Tokenize | None, out: Path, sample: int,
    there: Path | None, say: Say, ranks: Ranks,
) -> Path:  # fmt: skip
    from diffusers.training_utils import EMAModel

    torch.manual_seed(training.seed)
    model = DiT(training.net)
    if there is not None:
        known = tensors_in(there / MOMENTS)
        model.load_state_dict(_of("weights:", known))
    model = model.to(ranks.device).train()
    module = spread(model, model.blocks, ranks, sharded=training.sharded)
    if training.compile:
        module.compile()
    optimizer = _optimizer(training, model)
    average = EMAModel(model.parameters(), decay=training.ema, foreach=True)
    if there is not None:
        load_moments(model, optimizer, _of("moments:", known))
        del known
        _load_average(average, model, tensors_in(there / dit.WEIGHTS))
        average.optimization_step = sample // training.batch
    step = Step(training.objective, module, precision=training.precision, seed=training.seed, ranks=ranks)
    picture = (
        Latent(training.net.channels, training.net.px)
        if joined.latents
        else Picture(training.net.px, centre=True)
    )
    pairs = Pairs(
        joined, training.mix, picture, read, seed=training.seed, batch=training.batch // ranks.ranks,
    )  # fmt: skip
    total = training.steps * training.batch
    return run_steps(
        training, pairs, step, model=model, optimizer=optimizer, rate=training.rate,
        after=lambda: average.step(model.parameters()),
        save=lambda sample: _save(
            training, joined, words, out, model, optimizer, average, sample, ranks
        ),
        sample=sample, first=0, last=total, total=total, out=out, there=there, say=say, ranks=ranks,
    )  # fmt: skip


def _optimizer(training: Training, model: DiT) -> torch.optim.AdamW:
    settings: dict[str, Any] = {
        "lr": 0.0, "betas": training.betas, "eps": training.eps, "weight_decay": training.weight_decay,
    }  # fmt: skip
    if training.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), fused=True, **settings)
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2 and name not in NO_MATRICES}
    others = [p for name, p in model.named_parameters() if name not in matrices]
    return Muon(matrices.values(), others, **settings)


class Step:
    """A step's loss and its gradient, the mean over the samples of all ranks that are ok."""

    def __init__(
        self, objective: Objective, module: torch.nn.Module, *, precision: Precision, seed: int, ranks: Ranks
    ) -> None:
        self.objective, self.module, self.precision = objective, module, precision
        self.seed, self.ranks = seed, ranks

    def __call__(self, batch: Batch, sample: int) -> float:
        """`sample` is the step's first, of all ranks."""
        device = self.ranks.device
        clean = batch.images.to(device).float()
        if batch.images.dtype == torch.uint8:
            clean = clean / 127.5 - 1
        first = sample + self.ranks.rank * len(clean)
        noise, normal_B = noise_of(self.seed, first, clean.shape)
        noise, time_B = noise.to(device), self.objective.times(normal_B.to(device))
        noisy = self.objective.noisy(clean, noise, time_B)
        text, mask = _text(batch.texts, device)
        with computing(device, self.precision):
            out = self.module(noisy, time_B, text, mask)
        loss_B = self.objective.loss(out.float(), clean, noise, noisy, time_B)
        ok_B = batch.ok.to(device)
        number = ok_B.sum()
        if self.ranks.ranks > 1:
            dist.all_reduce(number)
        loss = (loss_B * ok_B).sum() / number.clamp(min=1) * self.ranks.ranks
        loss.backward()
        told = loss.detach().clone()
        if self.ranks.ranks > 1:
            dist.all_reduce(told)
        return float(told) / self.ranks.ranks


def _text(texts: torch.Tensor, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, T) or features (B, T, F), and (B, T) where there are any: as far as the longest goes, in
    sixteens.
    """
    if texts.is_floating_point():
        features_BTF = texts.to(device)
        return features_BTF.float(), features_BTF.view(torch.int16).any(-1)  # of halves it takes longer
    longest = in_sixteens(int(texts[1].sum(1).max()))
    tokens_BT, mask_BT = texts[:, :, :longest].to(device)
    return tokens_BT, mask_BT.bool()


def noise_of(seed: int, first: int, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Of samples from `first` on: (B, C, P, P) noise and (B) a number for the time, standard normal."""
    chance = torch.Generator()
    noise, normal_B = torch.empty(shape), torch.empty(shape[0])
    for place in range(shape[0]):
        chance.manual_seed(int(drawn(seed, first + place, "noise") * 2**53))
        torch.randn(shape[1:], generator=chance, out=noise[place])
        normal_B[place] = torch.randn((), generator=chance)
    return noise, normal_B


# --- checkpoints --------------------------------------------------------------------------------------------


def _of(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _load_average(average: Any, model: DiT, weights: Mapping[str, torch.Tensor]) -> None:
    for (name, parameter), shadow in zip(model.named_parameters(), average.shadow_params, strict=True):
        found = weights[name].to(parameter.device)
        if hasattr(parameter, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            sharded: Any = parameter
            found = distribute_tensor(found, sharded.device_mesh, sharded.placements)
        shadow.copy_(found)


def _save(
    training: Training, joined: Joined, words: Path | None, out: Path, model: DiT,
    optimizer: torch.optim.AdamW, average: Any, sample: int, ranks: Ranks,
) -> Path:  # fmt: skip
    weights, moments = state_of(model, optimizer)
    names = [name for name, _ in model.named_parameters()]
    drawing = {
        name: whole_tensor(shadow).detach().cpu().contiguous()
        for name, shadow in zip(names, average.shadow_params, strict=True)
    }

    def write(folder: Path) -> None:
        objective = asdict(training.objective)
        features = joined.features
        if training.encoder:
            features = {**(features or {}), "model": training.encoder}  # where a drawer looks for it
        dit.describe(training.net, objective, words, folder, joined.latents, features)
        save_file(drawing, folder / dit.WEIGHTS, metadata={"format": "pt"})
        kept = {f"weights:{n}": t for n, t in weights.items()} | {
            f"moments:{n}": t for n, t in moments.items()
        }
        save_file(kept, folder / MOMENTS)

    if ranks.is_first:
        checkpoint(out, sample, write)
    ranks.wait()
    return out / f"step-{sample:012d}"
