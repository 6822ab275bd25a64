"""Draw pictures from texts.

    OUT/sample.json           of which model and how; another's folder is refused
    OUT/prompts.jsonl         a line a picture: its file, text and seed
    OUT/000000.png            in the order of the texts; what is there is not drawn again

A picture is a function of the model, its text and seed, and how it is drawn: the noise that it begins with,
and what is added on the way, are drawn from its own seed. A folder's batches are all of the same size, filled
up, so that with the same device and versions any part of its pictures comes out bit for bit. Of several
processes, as torchrun starts them, each draws its share.

Guidance g is without text + g (with text - without); of all channels, or, as DiT's code has it, of the first
three alone. Without any, g = 1, the model is asked once.
"""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from builder.errors import InputError
from builder.files import lock, read_file, sha256_file, write_atomically
from builder.model import identity, model_folder
from builder.stages.latents import Vae
from builder.stages.textfeatures import Encoder
from builder.typed import from_json, parse
from recipes.dit import model as dit
from recipes.dit.model import Words
from recipes.dit.objective import BETAS, TIMES, Objective
from recipes.training import REPORT_S, Say, of_the_extra, this_process

Sampler = Literal["ddpm", "dpm", "euler"]
SAMPLERS: dict[str, tuple[Sampler, ...]] = {"diffusion": ("ddpm", "dpm"), "flow": ("euler", "dpm")}
SETTINGS, PROMPTS = "sample.json", "prompts.jsonl"  # of a folder of pictures
FEW = 4  # texts
SETTLE_S = 60.0  # processes that draw together settle one after the other
SOON = 1e-3  # of a flow's time: the clean picture is as good as there


@dataclass(frozen=True, kw_only=True)
class How:
    """The paper's: 250 DDPM steps at guidance 10. A flow is drawn by `euler`; DPM-Solver++, `dpm`, draws both
    in few steps.
    """

    sampler: Sampler = "ddpm"
    steps: int = 250
    guidance: float = 10.0
    guided: Literal["all", "three"] = "all"
    seed: int = 0
    batch: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.guidance < float("inf"):
            reason = f"guidance={self.guidance:g} is below 0, or no number"
            raise InputError(reason, "give 1 for none, 10 as the paper")
        if not 1 <= self.steps <= TIMES or self.batch < 1:
            raise InputError(f"steps={self.steps}, batch={self.batch}", f"give 1 to {TIMES}, and 1 or more")
        if self.sampler == "ddpm" and self.steps == 1:
            raise InputError("ddpm in one step takes noise for a picture", "give more, or sampler=dpm")


class Drawer:
    """A model of `recap train dit` that draws."""

    def __init__(
        self, folder: Path, device: str | None = None, vae: str | None = None, encoder: str | None = None
    ) -> None:
        """Raises:
        InputError: it is none, or it denoises latents and `vae` is not the one that they are of, or reads
            features and `encoder` is not theirs.
        """
        with of_the_extra():
            import diffusers  # noqa: F401
        self.folder, self.device = folder, device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, about = dit.load(folder)
        latents, features = about.get("latents"), about.get("features")
        is_its = _is_its(folder, "draws latents", "vae", latents, vae)
        self.vae = Vae(str(vae)) if is_its else None
        encoder = encoder or _there((features or {}).get("model", ""))
        is_its = _is_its(folder, "reads features of texts", "encoder", features, encoder)
        precision = (features or {}).get("precision", "fp32")
        self.encoder = Encoder(str(encoder), model.net.context, precision) if is_its else None
        self.model = model.to(self.device)
        self.objective = parse(Objective, about["objective"], what=str(folder / dit.CONFIG))
        self.words = Words(folder / dit.TOKENIZER, model.net.context)

    def usual(self, **given: Any) -> How:
        """How it is drawn where nothing else is wanted: a flow in 50 steps at guidance 2."""
        usual: dict[str, Any] = {}
        if self.objective.kind == "flow":
            usual = {"sampler": "euler", "steps": 50, "guidance": 2.0}
        return How(**usual | {name: value for name, value in given.items() if value is not None})

    def check(self, texts: Sequence[str], how: How) -> None:
        """Raises:
        InputError: a text is longer than the context, or this sampler is not for this model.
        """
        known = SAMPLERS[self.objective.kind]
        if how.sampler not in known:
            reason = f"sampler={how.sampler} is not for a {self.objective.kind}"
            raise InputError(reason, f"there are: {', '.join(known)}")
        if how.sampler == "dpm" and how.steps == TIMES and self.objective.kind == "diffusion":
            raise InputError(f"sampler=dpm has no {TIMES} different times", f"give {TIMES - 1} or fewer")
        for start in range(0, len(texts), how.batch):
            some = texts[start : start + how.batch]
            if self._cut(some):
                text = next(text for text in some if self._cut([text]))
                reason = f"a text has more than the model's {self.model.net.context} tokens: {text[:60]}..."
                raise InputError(reason, "shorten it: what is cut would not be drawn")

    def _cut(self, texts: Sequence[str]) -> bool:
        """Is one of them?"""
        return any(self.encoder.tower.tokens(texts)[2]) if self.encoder else self.words(texts)[1] > 0

    @torch.no_grad()
    def draw(self, texts: Sequence[str], seeds: Sequence[int], how: How) -> list[Image.Image]:
        """At most `how.batch` pictures."""
        fill = how.batch - len(texts)
        chances = [torch.Generator().manual_seed(seed) for seed in (*seeds, *range(fill))]
        net, scheduler = self.model.net, self._scheduler(how)
        shape = (net.channels, net.px, net.px)
        x = torch.stack([torch.randn(shape, generator=chance) for chance in chances]).to(self.device)
        text, mask = self.features([*texts, *[""] * (fill + how.batch)])
        noise = {"generator": chances} if how.sampler == "ddpm" else {}
        for at, moment in zip(scheduler.timesteps, self._times(scheduler), strict=True):
            out = self._out(x, moment, text, mask, how)
            x = scheduler.step(out, at, x, **noise).prev_sample
        if self.vae:
            x = self.vae.decode(x)
        if not x.isfinite().all():
            hint = "draw with less guidance, or by another checkpoint"
            raise InputError(f"what {self.folder} draws is no number", hint)
        pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(one) for one in pixels[: len(texts)]]

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, F), the same at every step, and (B, T) where there are any."""
        if self.encoder:
            text = self.encoder.padded(texts)[0].float().to(self.device)
            mask_BT = text.any(-1)
        else:
            text, mask_BT = self.words(texts)[0].to(self.device)
            mask_BT = mask_BT.bool()
        return self.model.text(text, mask_BT) if self.model.text else text, mask_BT

    def _out(
        self, x: torch.Tensor, at: float, text: torch.Tensor, mask: torch.Tensor, how: How
    ) -> torch.Tensor:
        """With guidance; a flow's velocity. Behind the texts there are as many empty ones."""
        number, channels = len(x), self.model.net.channels
        guided = how.guidance != 1
        both = torch.cat([x, x]) if guided else x
        time_B = torch.full((len(both),), at, device=self.device)
        out = self.model(both, time_B, text[: len(both)], mask[: len(both)], encoded=True)
        if guided:
            with_text, without = out[:number], out[number:]
            told = without + how.guidance * (with_text - without)
            first = channels if how.guided == "all" else 3
            out = torch.cat([told[:, :first], with_text[:, first:]], 1)
        if self.objective.kind == "flow":
            floor = SOON if self.objective.predict == "clean" else None
            return self.objective.velocity(out, x, time_B[:number], floor=floor)
        return out[:, :channels] if how.sampler == "dpm" else out  # its steps have no variance

    def _scheduler(self, how: How) -> Any:
        """From the noisiest time to the clean picture, in even steps."""
        config = self.objective.scheduler.config
        scheduler: Any
        if how.sampler == "ddpm":
            scheduler = type(self.objective.scheduler).from_config(config)
        elif how.sampler == "euler":
            from diffusers import FlowMatchEulerDiscreteScheduler

            scheduler = FlowMatchEulerDiscreteScheduler(TIMES, shift=self.objective.shift)
            scheduler.set_timesteps(sigmas=np.linspace(1, 1 / how.steps, how.steps))
            return scheduler
        else:
            from diffusers import DPMSolverMultistepScheduler

            flow = {
                "prediction_type": "flow_prediction", "use_flow_sigmas": True,
                "flow_shift": self.objective.shift,
            }  # fmt: skip
            of = {"prediction_type": config["prediction_type"], "timestep_spacing": "linspace"}
            scheduler = DPMSolverMultistepScheduler(
                TIMES, *BETAS, **(flow if self.objective.kind == "flow" else of)
            )
        scheduler.set_timesteps(how.steps)
        if how.sampler == "dpm":
            scheduler.set_begin_index(0)  # else looked up by the time, which shifted times round to the same
        return scheduler

    def _times(self, scheduler: Any) -> list[float]:
        """Of each step the model's; a flow's are not rounded, as some schedulers' are."""
        if self.objective.kind == "flow":
            return [float(sigma) * TIMES for sigma in scheduler.sigmas[: len(scheduler.timesteps)]]
        return [float(time) for time in scheduler.timesteps]


def _there(model: str) -> str | None:
    """A folder that is still where it was; nothing is downloaded that was not asked for."""
    try:
        return model if model and model_folder(model) else None
    except InputError:
        return None


def _is_its(folder: Path, what: str, kind: str, about: dict[str, Any] | None, given: str | None) -> bool:
    """Whether a model needs a VAE, or an encoder, and this is the one.

    Raises:
        InputError: it is not given, or another one, or not needed.
    """
    if not about:
        if given:
            raise InputError(f"{folder} needs no {kind}", f"leave --{kind} out")
        return False
    if not given:
        raise InputError(f"{folder} {what}", f"name the model that made them: --{kind} FOLDER")
    if identity(given) != about[kind]:
        reason = f"{folder} {what} of another model than {given}"
        raise InputError(reason, f"name the one whose content is {about[kind]}")
    return True


def seeds_of(texts: Sequence[str], seed: int) -> list[int]:
    """Of each text its own; of one that comes again another."""
    earlier: Counter[str] = Counter()
    found = []
    for text in texts:
        digest = sha256(f"{seed}/{earlier[text]}/{text}".encode()).digest()
        found.append(int.from_bytes(digest[:7], "big"))
        earlier[text] += 1
    return found


def sample(
    model: Path, texts: Sequence[str], out: Path, *, vae: str | None = None, encoder: str | None = None,
    say: Say = print, **given: Any,
) -> How:  # fmt: skip
    """Draw what is not in the folder yet; `given` are settings of `How`. A model that denoises latents wants
    their `vae`, one that reads features of texts their `encoder`.

    Raises:
        InputError: the folder is of another model, of other texts, or drawn in another way.
    """
    if not texts:
        raise InputError("there are no texts to draw", "give some, or a file of them: --captions")
    texts = [text.strip() for text in texts]  # as a training has them
    model = model.resolve()  # `latest` may come to be another
    this = this_process()
    drawer = Drawer(model, this.device, vae=vae, encoder=encoder)
    if given.get("batch") is None:
        given["batch"] = _batch_of(out, len(texts))
    how = drawer.usual(**given)
    drawer.check(texts, how)
    seeds = seeds_of(texts, how.seed)
    names = [file_of(number) for number in range(len(texts))]
    lines = [
        json.dumps({"file": name, "prompt": text, "seed": seed}) + "\n"
        for name, text, seed in zip(names, texts, seeds, strict=True)
    ]
    out.mkdir(parents=True, exist_ok=True)
    busy, hint = f"another process settles {out}", "wait until it has ended"
    with ExitStack() as stack:
        with suppress(NotImplementedError):  # a file system without locks
            stack.enter_context(lock(out / ".lock", busy, hint, wait_s=SETTLE_S))
        _settle(out, {"model": sha256_file(model / dit.WEIGHTS), **asdict(how)}, lines)
    ours = range(this.rank, len(names), this.ranks)
    left = [number for number in ours if not (out / names[number]).exists()]
    begun, said = time.monotonic(), 0.0
    for start in range(0, len(left), how.batch):
        some = left[start : start + how.batch]
        pictures = drawer.draw([texts[n] for n in some], [seeds[n] for n in some], how)
        for number, picture in zip(some, pictures, strict=True):
            write_atomically(out / names[number], png(picture))
        seconds, done = time.monotonic() - begun, start + len(some)
        if seconds - said > REPORT_S or done == len(left):
            said = seconds
            say(f"{done:,} of {len(left):,} pictures, {done / seconds:.3g} a second")
    return how


def _batch_of(out: Path, texts: int) -> int:
    """That of the pictures which are there; of few texts few are filled up."""
    if (out / SETTINGS).exists():
        before = _settings(out).get("batch")
        return before if isinstance(before, int) else How.batch
    return How.batch if texts > FEW else FEW


def _settings(out: Path) -> dict[str, Any]:
    return from_json(dict[str, Any], (out / SETTINGS).read_bytes(), what=str(out / SETTINGS))


def file_of(number: int) -> str:
    return f"{number:06d}.png"


def _settle(out: Path, about: dict[str, Any], lines: list[str]) -> None:
    """More texts behind those that are there are welcome."""
    settings, prompts = out / SETTINGS, out / PROMPTS
    if settings.exists():
        before = _settings(out)
        if differ := [name for name in about if before.get(name) != about[name]]:
            reason = f"{out} holds others: {differ[0]} was {before.get(differ[0])}, is {about[differ[0]]}"
            raise InputError(reason, "draw into another folder: --out")
        was = read_file(prompts).decode().splitlines(keepends=True)
        if any(a != b for a, b in zip(was, lines, strict=False)):
            raise InputError(f"{out} holds pictures of other texts", "draw into another folder: --out")
        lines = max(was, lines, key=len)
    write_atomically(prompts, "".join(lines))
    write_atomically(settings, json.dumps(about, indent=1) + "\n")  # last: it is looked for first


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def grid(pictures: Sequence[Image.Image], columns: int, scale: int = 1) -> Image.Image:
    """In rows, a pixel apart."""
    px = pictures[0].width * scale
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (px + 1) - 1, rows * (px + 1) - 1), (255, 255, 255))
    for number, picture in enumerate(pictures):
        place = (number % columns * (px + 1), number // columns * (px + 1))
        sheet.paste(picture.resize((px, px), Image.Resampling.NEAREST), place)
    return sheet
