"""Train a CLIP on a version: read from top to bottom.

    python -m torch.distributed.run --nproc-per-node 8 -m builder.cli train clip ...     # one process a GPU

What a training is, is one `Training`; what it has come to is in its folder:

    OUT/training.json                      the settings
    OUT/joined/                            which row's image lies where (recipes/join.py)
    OUT/latest                             the newest checkpoint
    OUT/step-000000001200/                 a checkpoint: a model folder of open_clip, and what else goes on:
        training.safetensors, state.json   the optimizer, and the number of the next sample
    OUT/log.jsonl                          loss, rate and temperature, a line a report

A step is a pure function of the weights, the optimizer and the number of its first sample: samples, texts and
crops are (recipes/data.py), and so is what is drawn in the model. On a CPU a training that was killed goes on
to the same losses, bit by bit.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from builder.errors import InputError
from builder.files import sync, write_atomically
from recipes.clip import model as clip
from recipes.clip.model import Towers
from recipes.data import Batch, Mix, Pairs, Picture, batches, drawn
from recipes.join import ORIGINAL, join

Say = Callable[[str], None]
MAX_SCALE = math.log(100)
REPORT_S = 10.0


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

    @property
    def steps(self) -> int:
        return self.samples // self.batch

    def rate(self, step: int) -> float:
        peak, warm = self.lr * self.batch / 256, self.warmup // self.batch
        if step < warm:
            return peak * (step + 1) / warm
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


@dataclass(frozen=True, kw_only=True)
class Training:
    """The paper's pre-training and fine-tuning are two phases; `micro` is how many samples of a step a device
    computes at a time (GradCache, arXiv 2101.06983), all of them unless given.
    """

    name: str
    version: str
    images: str
    towers: Towers
    phases: tuple[Phase, ...]
    mix: Mix = field(default_factory=Mix)
    subset: str | None = None
    min_found: float = 0.99
    area: float = 0.4
    weight_decay: float = 0.2
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6
    precision: Literal["fp32", "bf16"] = "bf16"
    micro: int | None = None
    seed: int = 0
    workers: int = 1
    save_every: int = 1000  # steps

    def first(self, number: int) -> int:
        """The first sample of a phase."""
        return sum(phase.steps * phase.batch for phase in self.phases[:number])


def train(training: Training, out: Path, say: Say = print) -> Path:
    """Train, or go on where it stopped; gives the last checkpoint, a model folder.

    Raises:
        InputError: something is not as it should be, or the loss is no number.
    """
    with _processes() as (rank, ranks, device):
        _settle(training, out, rank)
        names = tuple(name for name in training.mix.captions if name != ORIGINAL)
        subset = Path(training.subset) if training.subset else None
        for number in range(ranks):  # the first one joins, the others find it done
            if number == rank:
                joined = join(
                    training.version, training.images, out / "joined",
                    captions=names, subset=subset, min_found=training.min_found,
                )  # fmt: skip
            _wait(ranks)
        if rank == 0:
            say(f"{joined.audit}")
        sample, there = _latest(out)
        if rank == 0:
            _shorten_log(out, sample)
        for number in range(len(training.phases)):
            if sample < training.first(number + 1):
                sample, there = _phase(training, number, joined, out, sample, there, say, device, rank, ranks)
        assert there is not None
        return there


def _phase(
    training: Training, number: int, joined: Any, out: Path, sample: int, there: Path | None, say: Say,
    device: str, rank: int, ranks: int,
) -> tuple[int, Path]:  # fmt: skip
    """Go on with a phase from `sample` to its end; gives the next one's first sample, and the checkpoint."""
    phase, first = training.phases[number], training.first(number)
    if phase.batch % ranks:
        raise InputError(f"a step of {phase.batch} samples on {ranks} devices", "make it a multiple of them")
    torch.manual_seed(training.seed)
    folder = out / "model"
    config = training.towers.config(phase.px)
    if rank == 0:
        clip.describe(training.towers, config, folder)
    _wait(ranks)
    model: Any = clip.make(config)
    if there is not None:
        clip.load(model, there)
    model.to(device).train()
    optimizer = _optimizer(training, model)
    if there is not None and sample > first:
        _load_optimizer(optimizer, model, there)
    module = DistributedDataParallel(model) if ranks > 1 else model
    pairs = Pairs(
        joined, training.mix, Picture(phase.px, training.area), clip.tokenizer(folder),
        seed=training.seed, batch=phase.batch // ranks,
    )  # fmt: skip
    pixels = [torch.tensor(clip.IMAGENET[name], device=device).view(3, 1, 1) for name in ("mean", "std")]
    last = first + phase.steps * phase.batch
    report = _Report(out, say if rank == 0 else _nothing, sample, training.first(len(training.phases)))
    for batch in batches(pairs, start=sample, samples=last, workers=training.workers, rank=rank, ranks=ranks):
        step = (sample - first) // phase.batch
        for group in optimizer.param_groups:
            group["lr"] = phase.rate(step)
        torch.manual_seed(int(drawn(training.seed, sample, rank) * 2**53))
        images = (batch.images.to(device).float() / 255 - pixels[0]) / pixels[1]
        texts, ok = batch.texts.to(device), batch.ok.to(device)
        size = training.micro or len(images)
        loss = gradients(module, images, texts, ok, size, training.precision, device, rank, ranks)
        if not math.isfinite(loss):
            raise InputError(
                f"the loss is {loss} at sample {sample}, uids {batch.uids[0]} to {batch.uids[-1]}",
                f"lower the learning rate; the last checkpoint is {there or 'none'}",
            )
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, MAX_SCALE)
        sample += phase.batch
        report.step(sample, batch, loss, phase.rate(step), float(model.logit_scale.detach().exp()))
        if step + 1 == phase.steps or (step + 1) % training.save_every == 0:
            if rank == 0:
                there = _save(out, folder, model, optimizer, sample)
            _wait(ranks)
            there = out / f"step-{sample:012d}"
    assert there is not None
    return sample, there


# --- a step -------------------------------------------------------------------------------------------------


def gradients(
    module: torch.nn.Module, images: torch.Tensor, texts: torch.Tensor, ok: torch.Tensor, size: int,
    precision: str, device: str, rank: int = 0, ranks: int = 1,
) -> float:  # fmt: skip
    """The loss of a step, whose gradient is in the parameters then. With parts of `size` samples the vectors
    of all parts are computed first, then the gradient at them, then each part again with the random numbers
    that it had (GradCache).
    """
    parts = [slice(start, start + size) for start in range(0, len(images), size)]
    if len(parts) == 1:
        image, text, scale = _vectors(module, images, texts, precision, device)
        loss = contrastive(image, text, scale, ok, rank, ranks)
        loss.backward()
        return _mean(loss, ranks)
    states, found = [], []
    for part in parts:
        states.append(_random(device))
        with torch.no_grad():
            found.append(_vectors(module, images[part], texts[part], precision, device))
    image, text = (torch.cat([vectors[n] for vectors in found]).requires_grad_() for n in range(2))
    scale = found[0][2].clone().requires_grad_()
    loss = contrastive(image, text, scale, ok, rank, ranks)
    loss.backward()
    for number, (part, state) in enumerate(zip(parts, states, strict=True)):
        _restore(state, device)
        is_last = number == len(parts) - 1
        waits = nullcontext() if is_last or ranks == 1 else module.no_sync()  # type: ignore[operator]
        with waits:
            again, words, its_scale = _vectors(module, images[part], texts[part], precision, device)
            whole = (again * image.grad[part]).sum() + (words * text.grad[part]).sum()  # type: ignore[index]
            assert scale.grad is not None
            (whole + its_scale * scale.grad * is_last).backward()  # the temperature counts once
    return _mean(loss, ranks)


def _mean(loss: torch.Tensor, ranks: int) -> float:
    """Over the ranks."""
    loss = loss.detach().clone()
    if ranks > 1:
        dist.all_reduce(loss)
    return float(loss) / ranks


def _vectors(
    module: torch.nn.Module, images: torch.Tensor, texts: torch.Tensor, precision: str, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=precision == "bf16"):
        image, text, scale = module(images, texts)[:3]
    return image.float(), text.float(), scale.float()


def contrastive(
    image_BE: torch.Tensor, text_BE: torch.Tensor, scale: torch.Tensor, ok_B: torch.Tensor,
    rank: int = 0, ranks: int = 1,
) -> torch.Tensor:  # fmt: skip
    """CLIP's loss: of this rank's images among all texts, and of its texts among all images, as open_clip's
    with local loss and gathered features. Samples that are not ok are nobody's.
    """
    images_NE, texts_NE, ok_N = image_BE, text_BE, ok_B
    if ranks > 1:
        images_NE, texts_NE = torch.cat(all_gather(image_BE)), torch.cat(all_gather(text_BE))
        every = [torch.empty_like(ok_B) for _ in range(ranks)]
        dist.all_gather(every, ok_B)
        ok_N = torch.cat(every)
    labels_B = torch.arange(len(ok_B), device=ok_B.device) + len(ok_B) * rank
    labels_B = labels_B.masked_fill(~ok_B, -100)
    no = torch.zeros(len(ok_N), device=ok_N.device).masked_fill(~ok_N, -torch.inf)
    losses = (
        F.cross_entropy(scale * image_BE @ texts_NE.T + no, labels_B, reduction="sum", ignore_index=-100)
        + F.cross_entropy(scale * text_BE @ images_NE.T + no, labels_B, reduction="sum", ignore_index=-100)
    ) / 2
    return losses / ok_N.sum().clamp(min=1) * ranks


def _random(device: str) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.startswith("cuda") else [])]


def _restore(state: list[torch.Tensor], device: str) -> None:
    torch.set_rng_state(state[0])
    if device.startswith("cuda"):
        torch.cuda.set_rng_state(state[1], device)


def _optimizer(training: Training, model: torch.nn.Module) -> torch.optim.AdamW:
    """Without decay of what has one dimension: norms, biases, the temperature."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=training.betas, eps=training.eps)


# --- what it has come to ------------------------------------------------------------------------------------


def _save(out: Path, folder: Path, model: torch.nn.Module, optimizer: torch.optim.AdamW, sample: int) -> Path:
    """A checkpoint, whole or not at all; those before the last two go."""
    there, part = out / f"step-{sample:012d}", out / ".step"
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(folder, part)
    clip.save(model, part)
    state = {}
    for name, parameter in model.named_parameters():
        for kind, tensor in optimizer.state.get(parameter, {}).items():
            state[f"{kind}/{name}"] = tensor.detach().cpu().contiguous()
    save_file(state, part / "training.safetensors")
    (part / "state.json").write_text(json.dumps({"sample": sample}))
    for file in part.iterdir():
        sync(file)
    os.replace(part, there)
    link = out / ".latest"
    link.unlink(missing_ok=True)
    link.symlink_to(there.name)
    os.replace(link, out / "latest")
    sync(out)
    for old in sorted(out.glob("step-*"))[:-2]:
        shutil.rmtree(old)
    return there


def _shorten_log(out: Path, sample: int) -> None:
    """To what was said up to the checkpoint: what came after is done, and said, again."""
    path = out / "log.jsonl"
    if path.exists():
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        write_atomically(path, "".join(line for line in lines if json.loads(line)["sample"] <= sample))


def _latest(out: Path) -> tuple[int, Path | None]:
    """The next sample, and the last checkpoint."""
    found = sorted(out.glob("step-*"))
    if not found:
        return 0, None
    return int(json.loads((found[-1] / "state.json").read_text())["sample"]), found[-1]


def _load_optimizer(optimizer: torch.optim.AdamW, model: torch.nn.Module, folder: Path) -> None:
    state = load_file(folder / "training.safetensors")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kinds = ("step", "exp_avg", "exp_avg_sq")
            found = {kind: state[f"{kind}/{name}"] for kind in kinds}
            optimizer.state[parameter] = {
                kind: tensor if kind == "step" else tensor.to(parameter.device)
                for kind, tensor in found.items()
            }


def _settle(training: Training, out: Path, rank: int) -> None:
    """Raises:
    InputError: another training's folder.
    """
    about = json.dumps(asdict(training), indent=2) + "\n"
    path = out / "training.json"
    if rank == 0 and not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(path, about)
    elif path.exists():
        before, now = json.loads(path.read_text()), json.loads(about)
        free = ("workers", "save_every", "micro")  # change nothing, or little that matters
        differ = [name for name in now if name not in free and before.get(name) != now[name]]
        if differ:
            reason = f"{out} holds another training: {differ[0]} was {before.get(differ[0])}"
            raise InputError(reason, "train into another folder: --out")


class _Report:
    """A line now and then, for whoever watches and for the log."""

    def __init__(self, out: Path, say: Say, sample: int, total: int) -> None:
        self.path, self.say, self.total = out / "log.jsonl", say, total
        self.begun, self.first, self.said = time.monotonic(), sample, 0.0
        self.failed = self.cut = self.texts = 0

    def step(self, sample: int, batch: Batch, loss: float, lr: float, scale: float) -> None:
        self.failed += int((~batch.ok).sum())
        self.cut, self.texts = self.cut + batch.cut, self.texts + len(batch.uids)
        seconds = time.monotonic() - self.begun
        if seconds - self.said < REPORT_S and sample < self.total:
            return
        self.said = seconds
        rate = (sample - self.first) / seconds
        line: Mapping[str, Any] = {
            "sample": sample, "loss": round(loss, 6), "lr": lr, "scale": round(scale, 3),
            "samples_per_s": round(rate, 1), "undecodable": self.failed,
            "cut_percent": round(100 * self.cut / self.texts, 2),
        }  # fmt: skip
        if self.say is not _nothing:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        left = (self.total - sample) / rate
        bad = f", {self.failed:,} images cannot be decoded" if self.failed else ""
        self.say(
            f"{sample:,} of {self.total:,} samples, loss {loss:.3f}, lr {lr:.2e}, scale {scale:.1f}, "
            f"{rate:,.0f}/s, {left / 60:.1f} min left{bad}"
        )


def _nothing(_: str) -> None:
    """Said by another rank."""


@contextmanager
def _processes() -> Iterator[tuple[int, int, str]]:
    """(rank, ranks, device), as torchrun tells them."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        torch.cuda.set_device(device)
    if ranks == 1:
        yield rank, ranks, device
        return
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    try:
        yield rank, ranks, device
    finally:
        dist.destroy_process_group()


def _wait(ranks: int) -> None:
    if ranks > 1:
        dist.barrier()
