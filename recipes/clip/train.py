"""Train a CLIP on a version: read from top to bottom.

    torchrun --nproc-per-node 8 -m builder.cli train clip ...     # one process a GPU

What a training is, is one `Training`; what it has come to is in its folder (recipes/training.py), beside
joined/, which row's image lies where (recipes/join.py). A checkpoint is a model folder of open_clip.

A step is a pure function of the weights, the optimizer and the number of its first sample: samples, texts and
crops are (recipes/data.py), and so is what is drawn in the model. On a CPU a training that was killed goes on
to the same losses, bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from builder.errors import InputError
from builder.files import sha256_file
from recipes.clip import card
from recipes.clip import model as clip
from recipes.clip.losses import Loss, Step
from recipes.clip.model import Decoder, Tokenizer, Towers, Trained
from recipes.data import Batch, Mix, Pairs, Picture, drawn
from recipes.join import Joined
from recipes.training import (
    BY_CONTENT,
    Precision,
    Ranks,
    Say,
    alone_in,
    at_least,
    checkpoint,
    cosine,
    joined_in,
    latest,
    load_moments,
    processes,
    run_steps,
    settle,
    shorten_log,
    spread,
    state_of,
    tensors_in,
)

FREE = ("workers", "save_every", "micro", "tensorboard", "compile", "sharded", "min_found")
MOMENTS = "training.tensors"  # of a checkpoint: the optimizer's, and the decoder; as safetensors


@dataclass(frozen=True, kw_only=True)
class Phase:
    """So many `samples` at `px`, in steps of `batch`. `lr` is per 256 samples of a step, as CLIPA states it;
    it rises over `warmup` samples and falls to 0 by a cosine.
    """

    px: int
    samples: int
    warmup: int
    batch: int
    lr: float

    def __post_init__(self) -> None:
        at_least(self, {"px": 1, "warmup": 0, "lr": 0})
        if not 0 < self.batch <= self.samples:
            reason = f"a phase of {self.samples:,} samples has no step of {self.batch:,}"
            raise InputError(reason, "give more samples, or a smaller batch")

    @property
    def steps(self) -> int:
        return self.samples // self.batch

    def rate(self, step: int) -> float:
        peak, warm = self.lr * self.batch / 256, self.warmup // self.batch
        return cosine(peak, step, warm, self.steps)


@dataclass(frozen=True, kw_only=True)
class Training:
    """The paper's pre-training and fine-tuning are two phases. `micro` is how many samples of a step a device
    computes at a time (GradCache), all of them unless given; `start` a model folder of the same towers to
    begin with; `captioning` the weight of the loss of captions (CLIPS: 2). `sharded` spreads weights and
    optimizer over the devices (FSDP2). `area` and `draft` are recipes/data.py's Picture's.
    """

    name: str
    version: str
    images: str
    towers: Towers
    phases: tuple[Phase, ...]
    mix: Mix = field(default_factory=Mix)
    subset: str | None = None
    min_found: float = 0.99
    start: str | None = None
    area: float = 0.4
    draft: bool = False
    loss: Loss = "clip"
    captioning: float = 0.0
    weight_decay: float = 0.2
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6
    precision: Precision = "bf16"
    micro: int | None = None
    seed: int = 0
    workers: int = 1
    save_every: int = 1000  # steps
    tensorboard: bool = False
    compile: bool = False
    sharded: bool = False

    def __post_init__(self) -> None:
        least = {"workers": 0, "save_every": 1, "seed": 0, "captioning": 0, "micro": 1, "min_found": 0}
        at_least(self, least)
        if not self.phases:
            raise InputError("a training of no phase", "give it one")
        if not 0 < self.area <= 1:
            raise InputError(f"area={self.area:g} is no share of a picture", "give a number above 0, up to 1")
        if bool(self.captioning) != bool(self.towers.decoder_layers):
            reason = "a decoder and the weight of its loss go together"
            raise InputError(reason, "give decoder_layers and captioning")

    def first(self, number: int) -> int:
        """The first sample of a phase."""
        return sum(phase.steps * phase.batch for phase in self.phases[:number])


def train(training: Training, out: Path, say: Say = print) -> Path:
    """Train, or go on where it stopped; gives the last checkpoint, a model folder.

    Raises:
        InputError: something is not as it should be, the loss is no number, or the disk is full.
    """
    with processes() as ranks, alone_in(out, ranks):
        if wrong := [phase.batch for phase in training.phases if phase.batch % ranks.ranks]:
            reason = f"a step of {wrong[0]} samples on {ranks.ranks} devices"
            raise InputError(reason, "make it a multiple of them")
        settle(training, out, (*FREE, *BY_CONTENT), ranks)
        joined = joined_in(
            out, ranks, version=training.version, images=training.images, mix=training.mix,
            subset=training.subset, min_found=training.min_found, about=partial(_data, training),
            also=list(training.mix.captions)[:1] if training.captioning else (),
        )  # fmt: skip
        if ranks.is_first:
            say(f"{joined.audit}")
        sample, there = latest(out)
        if ranks.is_first:
            shorten_log(out, sample)
        for number in range(len(training.phases)):
            if sample < training.first(number + 1):
                sample, there = _phase(training, number, joined, out, sample, there, say, ranks)
        assert there is not None
        return there


def _data(training: Training, joined: Joined) -> dict[str, Any]:
    """What a training reads, by content."""
    start = Path(training.start) / clip.WEIGHTS if training.start else None
    if start and not start.is_file():
        raise InputError(f"{start} is missing", "start= names a model folder of the same towers")
    tokenizer = training.towers.folder() / "tokenizer.json"
    return joined.about() | {
        "tokenizer": sha256_file(tokenizer), "start": sha256_file(start) if start else None,
    }  # fmt: skip


def _phase(
    training: Training, number: int, joined: Joined, out: Path, sample: int, there: Path | None, say: Say,
    ranks: Ranks,
) -> tuple[int, Path]:  # fmt: skip
    """Go on with a phase from `sample` to its end; gives the next one's first sample, and the checkpoint."""
    phase, first = training.phases[number], training.first(number)
    config, folder = training.towers.config(phase.px), out / "model"
    if ranks.is_first:
        clip.describe(training.towers, config, folder)
    ranks.wait()
    torch.manual_seed(training.seed)
    model = _model(training, config, folder, there).to(ranks.device).train()
    blocks = [*model.clip.visual.transformer.resblocks, *model.clip.transformer.resblocks]
    blocks += model.decoder.blocks.layers if model.decoder else []
    module = spread(model, blocks, ranks, sharded=training.sharded, whole=_heads(model))
    if training.compile:
        module.compile()
    optimizer = _optimizer(training, model)
    if there is not None and sample > first:
        moments = tensors_in(there / MOMENTS)
        load_moments(model, optimizer, {n: t for n, t in moments.items() if not n.startswith("decoder:")})
    of = Step(
        module, model, loss=training.loss, captioning=training.captioning, size=training.micro,
        precision=training.precision, device=ranks.device, rank=ranks.rank, ranks=ranks.ranks,
    )  # fmt: skip
    pairs = Pairs(
        joined, training.mix, Picture(phase.px, training.area, draft=training.draft), Tokenizer(folder),
        seed=training.seed, batch=phase.batch // ranks.ranks,
        captions=Tokenizer(folder, training.towers.decoder_context) if model.decoder else None,
    )  # fmt: skip
    pixels = [torch.tensor(clip.IMAGENET[n], device=ranks.device).view(3, 1, 1) for n in ("mean", "std")]

    def step(batch: Batch, sample: int) -> float:
        torch.manual_seed(int(drawn(training.seed, sample, ranks.rank) * 2**53))
        images = (batch.images.to(ranks.device).float() / 255 - pixels[0]) / pixels[1]
        captions = None if batch.captions is None else batch.captions.to(ranks.device)
        loss = of(images, batch.texts.to(ranks.device), batch.ok.to(ranks.device), captions)
        if training.sharded:
            _mean_of_heads(model, ranks)
        return loss

    def about() -> dict[str, float]:
        return {"scale": round(float(model.clip.logit_scale.detach().exp()), 3)}

    last = first + phase.steps * phase.batch
    there = run_steps(
        training, pairs, step, model=model, optimizer=optimizer, rate=phase.rate, after=model.bound,
        save=lambda sample: _save(training, joined, out, model, optimizer, sample, ranks), about=about,
        sample=sample, first=first, last=last, total=training.first(len(training.phases)), out=out,
        there=there, say=say, ranks=ranks,
    )  # fmt: skip
    return last, there


# --- the model, on one device or many -----------------------------------------------------------------------


def _model(training: Training, config: dict[str, Any], folder: Path, there: Path | None) -> Trained:
    """Fresh, as `start` is, or as it was in the checkpoint `there`."""
    made: Any = clip.make(config)
    decoder = None
    if training.towers.decoder_layers:
        decoder = Decoder(training.towers, config["model_cfg"]["text_cfg"]["vocab_size"])
    begun = there or (Path(training.start) if training.start else None)
    if begun:
        made.load_state_dict(clip.weights(begun, made))
    if there and decoder:
        moments = tensors_in(there / MOMENTS)
        own = {n.partition(":")[2]: t for n, t in moments.items() if n.startswith("decoder:")}
        decoder.load_state_dict(own)
    return Trained(made, decoder, Tokenizer(folder).padding() if decoder else 0)


def _heads(model: Trained) -> list[torch.nn.Parameter]:
    """Numbers, which cannot be sharded."""
    return [head for head in (model.clip.logit_scale, model.clip.logit_bias) if head is not None]


def _mean_of_heads(model: Trained, ranks: Ranks) -> None:
    for head in _heads(model) if ranks.ranks > 1 else []:
        assert head.grad is not None
        dist.all_reduce(head.grad)
        head.grad /= ranks.ranks


def _optimizer(training: Training, model: Trained) -> torch.optim.AdamW:
    """Without decay of what has one dimension: norms, biases, the temperature."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=training.betas, eps=training.eps, fused=True)


def _save(
    training: Training, joined: Joined, out: Path, model: Trained, optimizer: torch.optim.AdamW, sample: int,
    ranks: Ranks,
) -> Path:  # fmt: skip
    weights, moments = state_of(model, optimizer)

    def write(folder: Path) -> None:
        clip.describe(training.towers, clip.read_config(out / "model"), folder)
        clip.save({n.removeprefix("clip."): t for n, t in weights.items() if n.startswith("clip.")}, folder)
        own = {
            f"decoder:{n.removeprefix('decoder.')}": t for n, t in weights.items() if n.startswith("decoder.")
        }
        save_file(moments | own, folder / MOMENTS)
        (folder / "README.md").write_text(card.of(training, joined, sample))

    if ranks.is_first:
        checkpoint(out, sample, write)
    ranks.wait()
    return out / f"step-{sample:012d}"
