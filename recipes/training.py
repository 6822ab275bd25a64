"""What every training has: settings that stay, checkpoints that are whole, a log, processes.

OUT/training.json                      the settings
OUT/latest                             the newest checkpoint
OUT/step-000000001200/                 a checkpoint after so many samples: the model, and what else goes on
OUT/log.jsonl                          a line a report
OUT/tensorboard/                       where it is asked for
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from builder.errors import InputError, telling_of_a_full_disk
from builder.files import lock, sync, write_atomically
from recipes.data import Batch, Mix, Pairs, batches
from recipes.join import ORIGINAL, Joined, join, read

Say = Callable[[str], None]
Tensors = dict[str, torch.Tensor]
Precision = Literal["fp32", "bf16"]
REPORT_S = 10.0
KEPT = 2  # checkpoints
BY_CONTENT = ("version", "images")  # settings that may be named anew, where what they name is the same
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


# --- processes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is, and its device; as torchrun tells them."""

    rank: int
    ranks: int
    device: str
    waiting: Any = None  # a group that waits as long as a join takes

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        if self.ranks > 1:
            dist.barrier(group=self.waiting)


ALONE = Ranks(0, 1, "cpu")


def this_process() -> Ranks:
    """One that waits for no other."""
    told = os.environ if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else {}
    rank, ranks = int(told.get("RANK", 0)), int(told.get("WORLD_SIZE", 1))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        torch.cuda.set_device(device)
    return Ranks(rank, ranks, device)


@contextmanager
def processes() -> Iterator[Ranks]:
    """This one of those that train together."""
    this = this_process()
    if this.ranks == 1:
        yield this
        return
    dist.init_process_group("gloo" if this.device == "cpu" else "nccl")
    try:
        yield replace(this, waiting=dist.new_group(backend="gloo", timeout=timedelta(days=7)))
    finally:
        dist.destroy_process_group()


@contextmanager
def alone_in(out: Path, ranks: Ranks) -> Iterator[None]:
    """A folder is trained in by one training at a time.

    Raises:
        InputError: another one is at it.
    """
    if not ranks.is_first:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    busy = f"another process trains in {out}"
    with ExitStack() as stack:
        with suppress(NotImplementedError):  # a file system without locks
            hint = "wait until it has ended, or train into another folder: --out"
            stack.enter_context(lock(out / ".lock", busy, hint))
        yield


def spread(
    model: torch.nn.Module, blocks: Iterable[torch.nn.Module], ranks: Ranks, *, sharded: bool,
    whole: Iterable[torch.nn.Parameter] = (),
) -> torch.nn.Module:  # fmt: skip
    """The model as it is trained on all devices: a copy on each (DDP), or sharded block by block (FSDP2) but
    for the parameters that stay `whole`.
    """
    if ranks.ranks == 1:
        return model
    if not sharded:
        return DistributedDataParallel(model)
    mesh = init_device_mesh(ranks.device.partition(":")[0], (ranks.ranks,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=set(whole))
    return model


def best_precision() -> Precision:
    """bf16 where this machine computes in it: on a CPU that does not a training takes six times as long."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    has = torch.cpu.get_capabilities()
    return "bf16" if has.get("avx512_bf16") or has.get("amx_bf16") else "fp32"


@contextmanager
def computing(device: str, precision: Precision) -> Iterator[None]:
    kind = device.partition(":")[0]
    # On CPUs the fused kernel's backward is slower: 96 samples a second against 149, of the demo's CLIP.
    attention = sdpa_kernel(SDPBackend.MATH) if kind == "cpu" else nullcontext()
    with attention, torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16"):
        yield


def norm_of_gradient(model: torch.nn.Module) -> float:
    """Over all devices."""
    found: Any = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return float(whole_tensor(found))


def whole_tensor(tensor: Any) -> torch.Tensor:
    """Of one that may be sharded; asked on all processes."""
    found = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    assert isinstance(found, torch.Tensor)
    return found


# --- settings -----------------------------------------------------------------------------------------------


def at_least(training: Any, least: Mapping[str, float]) -> None:
    """Raises:
    InputError: a setting is less, or no number.
    """
    for name, low in least.items():
        if (value := getattr(training, name)) is not None and not low <= value < math.inf:
            raise InputError(f"{name}={value} is no number of {low} or more", f"give {low} or more")


def settle(training: Any, out: Path, free: tuple[str, ...], ranks: Ranks) -> None:
    """A folder is one training's; settings that are `free` change nothing, or little that matters.

    Raises:
        InputError: another training's folder.
    """
    about = json.dumps(asdict(training), indent=2) + "\n"
    path = out / "training.json"
    if path.exists():
        before, now = json.loads(path.read_text()), json.loads(about)
        before = _filled(training, before)
        # Also in which order captions are named: it decides what is drawn.
        differ = [name for name in now if name not in free and not _same(before.get(name), now[name])]
        if differ:
            name, was = differ[0], before.get(differ[0])
            hint = f"give {name}={was}, or " if isinstance(was, str | int | float) else ""
            raise InputError(
                f"{out} holds another training: {name} was {was}", f"{hint}train into another folder: --out"
            )
    ranks.wait()
    if ranks.is_first and not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(path, about)
    ranks.wait()


def _filled(training: Any, before: Mapping[str, Any]) -> dict[str, Any]:
    """What was written of a dataclass: a setting that came later was as it is unless given."""
    found = {}
    for one in fields(training):
        now = getattr(training, one.name)
        if one.name in before:
            was = before[one.name]
            found[one.name] = _filled(now, was) if is_dataclass(now) and isinstance(was, dict) else was
        elif one.default is not MISSING:
            found[one.name] = json.loads(json.dumps(one.default))
    return found


def _same(before: Any, now: Any) -> bool:
    """Mappings in the same order too."""
    return before == now and json.dumps(before) == json.dumps(now)


def _settle_data(about: Mapping[str, Any], out: Path) -> None:
    """What a training reads stays: a version that is not named by its number, and files, may change.

    Raises:
        InputError: there is a checkpoint, of other data.
    """
    path, now = out / "data.json", json.loads(json.dumps(about))
    if latest(out)[1] and path.exists():
        before = json.loads(path.read_text())
        if differ := [name for name in before if name in now and before[name] != now[name]]:
            was, is_ = before.get(differ[0]), now[differ[0]]
            reason = f"{out} was trained on other data: {differ[0]} was {was}, and is {is_}"
            raise InputError(reason, "name that version by its number, or train into another folder: --out")
    write_atomically(path, json.dumps(now, indent=1) + "\n")


def joined_in(
    out: Path,
    ranks: Ranks,
    *,
    version: str,
    images: str,
    mix: Mix,
    subset: str | None,
    min_found: float,
    about: Callable[[Joined], Mapping[str, Any]],
    also: Sequence[str] = (),
    latents: str = "",
    features: str = "",
) -> Joined:
    """The join in a training's folder: the first process joins, the others read what it wrote. `about` is
    what the training reads, by content; of the columns `also` some row has a text, as of those that texts are
    drawn from.

    Raises:
        InputError: it is not what it read before, or cannot be joined. The join of before stays.
    """
    names = tuple(name for name in mix.captions if name != ORIGINAL)
    if ranks.is_first:
        chosen = Path(subset) if subset else None
        with telling_of_a_full_disk(out):
            join(
                version, images, out / "joined", captions=names, subset=chosen, min_found=min_found,
                latents=latents, features=features, filled=[*mix.drawn_from(), *also],
                accept=lambda joined: _settle_data(about(joined), out),
            )  # fmt: skip
            _named_anew(out / "training.json", {"version": version, "images": images})
    ranks.wait()
    found = read(out / "joined")
    assert found is not None
    return found


def _named_anew(path: Path, places: Mapping[str, str]) -> None:
    """Where its data lies now, of a training that goes on by its settings."""
    before = json.loads(path.read_text())
    if before != before | places:
        write_atomically(path, json.dumps(before | places, indent=2) + "\n")


# --- checkpoints --------------------------------------------------------------------------------------------


def latest(out: Path) -> tuple[int, Path | None]:
    """The next sample, and the last checkpoint."""
    found = sorted(out.glob("step-*"))
    return (int(found[-1].name.partition("-")[2]), found[-1]) if found else (0, None)


def tensors_in(path: Path) -> Tensors:
    """Of a checkpoint.

    Raises:
        InputError: the file is damaged, or gone.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        reason = f"{path} is damaged: {str(error).splitlines()[0]}"
        raise InputError(reason, f"rm -r {path.parent}: it goes on from the checkpoint before") from error


def checkpoint(out: Path, sample: int, write: Callable[[Path], None]) -> Path:
    """A checkpoint, whole or not at all; those before the last two go.

    Raises:
        InputError: the disk is full. The checkpoints of before stay.
    """
    there, part = out / f"step-{sample:012d}", out / ".step"
    shutil.rmtree(part, ignore_errors=True)
    try:
        with telling_of_a_full_disk(out):
            write(part)
            for file in part.iterdir():
                sync(file)
            sync(part)
            os.replace(part, there)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    link = out / ".latest"
    link.unlink(missing_ok=True)
    link.symlink_to(there.name)
    os.replace(link, out / "latest")
    sync(out)
    for old in sorted(out.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)
    return there


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Tensors, Tensors]:
    """The weights, and the optimizer's state as `parameter/kind`, on the first process; called on all."""
    moments: Any = get_optimizer_state_dict(model, optimizer, options=_WHOLE).get("state", {})
    flat = {f"{name}/{kind}": tensor for name, found in moments.items() for kind, tensor in found.items()}
    weights = get_model_state_dict(model, options=_WHOLE)
    return _contiguous(weights), _contiguous(flat)


def _contiguous(tensors: Mapping[str, Any]) -> Tensors:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def load_moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer, flat: Tensors) -> None:
    """What `state_of` told of the optimizer."""
    state: Any = get_optimizer_state_dict(model, optimizer)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in flat.items():
        parameter, _, kind = name.rpartition("/")
        found.setdefault(parameter, {})[kind] = tensor
    whole: Any = {"state": found, "param_groups": state["param_groups"]}
    set_optimizer_state_dict(model, optimizer, whole, options=StateDictOptions(full_state_dict=True))


# --- steps --------------------------------------------------------------------------------------------------


class Options(Protocol):
    """Of a training, what its steps ask for."""

    @property
    def workers(self) -> int: ...
    @property
    def save_every(self) -> int: ...
    @property
    def tensorboard(self) -> bool: ...


def warmed(peak: float, step: int, warm: int) -> float:
    """A rate that has risen evenly to its peak after `warm` steps."""
    return peak * min(1.0, (step + 1) / warm) if warm else peak


def cosine(peak: float, step: int, warm: int, steps: int) -> float:
    """As `warmed`, and then falling to 0 at the last of `steps`."""
    if step < warm:
        return warmed(peak, step, warm)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def run_steps(
    training: Options, pairs: Pairs, step: Callable[[Batch, int], float], *, model: torch.nn.Module,
    optimizer: torch.optim.Optimizer, rate: Callable[[int], float], after: Callable[[], None],
    save: Callable[[int], Path], sample: int, first: int, last: int, total: int, out: Path,
    there: Path | None, say: Say, ranks: Ranks, about: Callable[[], Mapping[str, float]] = dict,
) -> Path:  # fmt: skip
    """From `sample` up to `last`, steps that are counted from sample `first`; gives the last checkpoint.

    `step` gives the loss of a batch whose first sample, of all ranks, it is told, and leaves its gradient in
    `model`; `after` is called when the optimizer has made its step; `about` is told beside loss and rate.

    Raises:
        InputError: the loss or its gradient is no number.
    """
    size = pairs.batch * ranks.ranks
    steps = (last - first) // size
    report = Report(out, say, sample, total, tensorboard=training.tensorboard) if ranks.is_first else None
    seen = Seen()
    for batch in batches(
        pairs, start=sample, samples=last, workers=training.workers, rank=ranks.rank, ranks=ranks.ranks
    ):
        at = (sample - first) // size
        lr = rate(at)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = step(batch, sample)
        for found in (loss, norm_of_gradient(model)):
            if not math.isfinite(found):
                raise unhealthy(out, found, sample, batch.uids, there, ranks.rank)
        optimizer.step()
        optimizer.zero_grad()
        after()
        sample += size
        seen.add(batch, ranks)
        if report:
            told = {"loss": round(loss, 6), "lr": lr}
            report.step(sample, lambda: {**told, **about(), **seen.about()})  # noqa: B023 - asked at once
        if at + 1 == steps or (at + 1) % training.save_every == 0:
            there = save(sample)
    assert there is not None
    return there


# --- what is said -------------------------------------------------------------------------------------------


def shorten_log(out: Path, sample: int) -> None:
    """To what was said up to the checkpoint: what came after is done, and said, again."""
    path = out / "log.jsonl"
    if path.exists():
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        write_atomically(path, "".join(line for line in lines if json.loads(line)["sample"] <= sample))


class Seen:
    """Of all processes' samples since the training began or went on."""

    def __init__(self) -> None:
        self.numbers = [0, 0, 0, 0]

    def add(self, batch: Batch, ranks: Ranks) -> None:
        failed = int((~batch.ok).sum()) - batch.textless
        numbers = [len(batch.uids), batch.cut, failed, batch.textless]
        if ranks.ranks > 1:
            of_all = torch.tensor(numbers, device=ranks.device)
            dist.all_reduce(of_all)
            numbers = of_all.tolist()
        self.numbers = [a + b for a, b in zip(self.numbers, numbers, strict=True)]

    def about(self) -> dict[str, float]:
        texts, cut, failed, textless = self.numbers
        return {
            "undecodable": failed, "without_text": textless, "cut_percent": round(100 * cut / texts, 2),
        }  # fmt: skip


class Report:
    """A line now and then, for whoever watches and for the log. Of the first process alone."""

    def __init__(self, out: Path, say: Say, sample: int, total: int, *, tensorboard: bool = False) -> None:
        self.path, self.say, self.total = out / "log.jsonl", say, total
        self.begun, self.first, self.said = time.monotonic(), sample, 0.0
        self.board = _board(out) if tensorboard else None

    def step(self, sample: int, about: Callable[[], Mapping[str, float]]) -> None:
        """`about`: what is told beside the rate; asked where something is told."""
        seconds = time.monotonic() - self.begun
        if seconds - self.said < REPORT_S and sample < self.total:
            return
        self.said = seconds
        rate = (sample - self.first) / seconds
        line = {"sample": sample, **about(), "samples_per_s": round(rate, 1)}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.board:
            for name, value in line.items():
                self.board.add_scalar(name, value, sample)
            self.board.flush()
        told = ", ".join(
            f"{name} {_short(value)}" for name, value in line.items() if name != "sample" and value
        )
        left = (self.total - sample) / rate / 60
        self.say(f"{sample:,} of {self.total:,} samples, {told}, {left:.1f} min left")


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _board(out: Path) -> Any:
    with of_the_extra():
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(str(out / "tensorboard"))


@contextmanager
def of_the_extra() -> Iterator[None]:
    """What is imported is installed with recapkit[train].

    Raises:
        InputError: it is not.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed", "pip install 'recapkit[train]'") from error


def unhealthy(
    out: Path, loss: float, sample: int, uids: list[str], there: Path | None, rank: int
) -> InputError:
    """Of a loss, or a gradient, that is no number: which samples of this process it was of."""
    path = out / f"unhealthy-{rank}.json"
    write_atomically(path, json.dumps({"sample": sample, "loss": str(loss), "uids": uids}, indent=1) + "\n")
    return InputError(
        f"the loss or its gradient is {loss} in the step of sample {sample:,}: {len(uids)} uids, in {path}",
        f"lower lr, or leave them out, into another folder; the last checkpoint is {there or 'none'}",
    )
