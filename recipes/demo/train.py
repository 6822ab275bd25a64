"""Trains the demo's captioner and CLIP from scratch on scenes of the procedural world.

    python -m recipes.demo.train            # all, into recipes/demo/weights; HOURS on 2 cores
    python -m recipes.demo.train kinds      # the captioner's stage 3 alone, on the captioner that lies there
    python -m recipes.demo.train clip       # CLIP alone, on the captioner that lies there

The captioner is trained in LLaVA's two stages: (1) feature alignment on short captions, plain format; (2)
detailed captions in the chat format. Nothing comes pretrained here, so stage 1 also trains the ViT and the
decoder, and stage 2 keeps the ViT frozen, as LLaVA does. Stage 3 goes on with the prompts of every kind of
caption, as builder/captions asks them. CLIP's image tower starts from the captioner's ViT.
"""

from __future__ import annotations

import io
import math
import random
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoProcessor, LlavaForConditionalGeneration

from builder.captions import kinds
from builder.captions.kinds import RECAP_V1, Kind
from builder.captions.vllm import Prompt
from recipes.demo import models, world

Batch = dict[str, torch.Tensor]
LossOf = Callable[[Batch], torch.Tensor]


@dataclass(frozen=True)
class Phase:
    """One run of AdamW with warm-up and cosine to zero; `scenes` starts at seed `first_seed`."""

    name: str
    steps: int
    batch: int
    lr: float
    first_seed: int


STAGE_1 = Phase("captioner stage 1", steps=3000, batch=64, lr=1.5e-3, first_seed=1_000_000)
STAGE_2 = Phase("captioner stage 2", steps=800, batch=64, lr=1.0e-3, first_seed=2_000_000)
STAGE_2_AGAIN = Phase("captioner stage 2, second cycle", steps=700, batch=64, lr=0.8e-3, first_seed=2_500_000)
STAGE_3 = Phase("captioner stage 3: every kind's prompt", 1600, batch=64, lr=1.0e-3, first_seed=4_000_000)
CONTRASTIVE = Phase("clip", steps=300, batch=256, lr=1.0e-3, first_seed=3_000_000)


def pixels(image: Image.Image) -> np.ndarray:
    """float32 (3, 64, 64), resized and normalised as the saved processors do."""
    small = image.resize((models.IMAGE_PX, models.IMAGE_PX), Image.Resampling.BICUBIC)
    scaled = (np.asarray(small, np.float32) / 255 - np.array(models.MEAN, np.float32)) / np.array(
        models.STD, np.float32
    )
    return scaled.transpose(2, 0, 1)


def picture(scene: world.Scene, rng: random.Random) -> Image.Image:
    """The scene as a downloader would have it: at some size, mostly through JPEG."""
    image = world.draw(scene, rng.choice((96, 128, 192)))
    return Image.open(io.BytesIO(world.jpeg(image, rng.randint(80, 95)))) if rng.random() < 0.7 else image


def padded(rows: Sequence[Sequence[float]], value: float) -> torch.Tensor:
    """Rows of one length, padded on the right."""
    table = torch.full((len(rows), max(map(len, rows))), value)
    for row, ids in enumerate(rows):
        table[row, : len(ids)] = torch.tensor(ids)
    return table


class Batches(IterableDataset[Batch]):
    """Batches of one phase, in the order of the seeds."""

    def __init__(self, phase: Phase, tokenizer: Tokenizer):
        self.phase, self.tokenizer = phase, tokenizer
        self.ids: dict[str, int] = {token: tokenizer.token_to_id(token) or 0 for token in models.SPECIAL}

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.phase.steps):
            first = self.phase.first_seed + step * self.phase.batch
            images, texts = [], []
            for seed in range(first, first + self.phase.batch):
                rng, scene = random.Random(~seed), world.scene(seed)
                images.append(pixels(picture(scene, rng)))
                texts.append(self.text(scene, rng))
            yield {
                "pixel_values": torch.from_numpy(np.stack(images)),
                "input_ids": padded([ids for ids, _ in texts], self.ids["<pad>"]),
                "labels": padded([[-100] * prompt + ids[prompt:] for ids, prompt in texts], -100),
            }

    def text(self, scene: world.Scene, rng: random.Random) -> tuple[list[int], int]:
        """Token ids, and how many of them belong to the prompt."""
        encode = lambda text: self.tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
        bos, eot, end = self.ids["<|begin_of_text|>"], self.ids["<|eot_id|>"], self.ids["<|end_of_text|>"]
        image = [self.ids["<image>"]] * (models.IMAGE_PX // models.PATCH_PX) ** 2
        # Mostly descriptions; some alt text, so that originals can be scored too.
        if self.phase is CONTRASTIVE:
            text = world.describe(scene, rng) if rng.random() < 0.7 else world.alt_text(scene, rng)
            return [bos, *encode(text)[: models.CLIP_CONTEXT - 2], end], 0
        if self.phase is STAGE_1:
            prompt = [bos, *image, *encode("\n")]
            return [*prompt, *encode(world.terse(scene)), eot], len(prompt)
        head, tail = PROMPT_V1.split("<image>")
        prompt = [*encode(head), *image, *encode(tail)]
        return [*prompt, *encode(world.describe(scene, rng)), eot], len(prompt)


PROMPT_V1 = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<image>\n"
    f"{RECAP_V1.prompt}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)


def optimise(
    phase: Phase, module: torch.nn.Module, batches: IterableDataset[Any], loss_of: LossOf, device: str
) -> None:
    """Train the parameters of `module` that require a gradient. A batch may be a list of parts; their losses
    add up to the batch's.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=phase.lr, betas=(0.9, 0.98), weight_decay=0.02)
    warm = max(1, phase.steps // 30)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda k: min(1, (k + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1, k / phase.steps)))
    )
    start, seen = time.monotonic(), 0
    for step, batch in enumerate(DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=4), 1):
        said = 0.0
        for part in batch if isinstance(batch, list) else [batch]:
            part = {name: tensor.to(device) for name, tensor in part.items()}
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(part)
            loss.backward()
            said += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        seen += phase.batch
        if step % 50 == 0 or step == phase.steps:
            rate = seen / (time.monotonic() - start)
            print(
                f"{phase.name} {step}/{phase.steps} loss {said:.3f} {rate:.0f} scenes/s",
                file=sys.stderr,
                flush=True,
            )


def train_captioner(device: str) -> None:
    torch.manual_seed(0)
    tokenizer = models.train_tokenizer()
    model = models.captioner(tokenizer).to(device)
    model.set_attn_implementation("eager")

    def loss(batch: Batch) -> torch.Tensor:
        labels_BT = batch["labels"]
        first = int((labels_BT != -100).any(0).nonzero()[0])  # nothing before is predicted: images and prompt
        mask_BT = batch["input_ids"] != tokenizer.token_to_id("<pad>")
        keep = labels_BT.shape[1] - first + 1
        logits_BTV = model(
            pixel_values=batch["pixel_values"],
            input_ids=batch["input_ids"],
            attention_mask=mask_BT,
            logits_to_keep=keep,
        ).logits
        return torch.nn.functional.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1).float(), labels_BT[:, first:].flatten()
        )

    optimise(STAGE_1, model, Batches(STAGE_1, tokenizer), loss, device)
    model.model.vision_tower.requires_grad_(False)
    optimise(STAGE_2, model, Batches(STAGE_2, tokenizer), loss, device)
    optimise(STAGE_2_AGAIN, model, Batches(STAGE_2_AGAIN, tokenizer), loss, device)
    models.save_captioner(model, tokenizer, models.CAPTIONER)


# --- stage 3 ------------------------------------------------------------------------------------------------

JUDGE = kinds.judge("re_caption", "demo")
LESSONS: dict[Kind, tuple[float, float]] = {  # share of the examples, and how much a token of a reply counts
    RECAP_V1: (0.35, 1.0),
    kinds.RECAP_V2: (0.06, 1.0),
    kinds.VEC: (0.05, 1.0),
    kinds.SHORT: (0.02, 1.0),
    kinds.NGUYEN: (0.01, 1.0),
    kinds.LONG: (0.02, 1.0),
    kinds.VECAP: (0.11, 1.0),
    kinds.CAPSFUSION: (0.04, 1.0),
    kinds.STRUCTURED: (0.10, 1.0),
    JUDGE: (0.24, 4.0),  # one of a rating's tokens says something
}
MAX_MODEL_LEN = 768  # the demo's setting


def lesson(kind: Kind, scene: world.Scene, rng: random.Random) -> tuple[dict[str, str], str]:
    """What the prompt of a kind quotes, and the reply that is right."""
    if kind == JUDGE:
        caption = world.flawed(scene, rng)
        return {"re_caption": caption}, f"Rating: {world.rating(scene, caption)}"
    if kind == kinds.STRUCTURED:
        return {}, world.structured(scene)
    if kind in (kinds.VEC, kinds.SHORT, kinds.NGUYEN):
        return {}, world.short(scene, rng)
    if kind in (RECAP_V1, kinds.LONG):
        return {}, world.describe(scene, rng)
    seen = world.scene(rng.getrandbits(39)) if rng.random() < 0.15 else scene  # alt text is often of another
    alt = world.alt_text(seen, rng) if rng.random() < 0.95 else ""
    if kind == kinds.RECAP_V2:
        return {"org_caption": alt}, world.describe(scene, rng)
    short = world.short(scene, rng)
    return {"org_caption": alt, "vec_caption": short, "short_caption": short}, world.fuse(alt, short)


class Asked:
    """Prompts as the engine makes them of a captioner's folder, with a token for each patch of a picture."""

    def __init__(self, folder: Path = models.CAPTIONER) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.tokenizer = self.processor.tokenizer
        self.image = int(self.tokenizer.convert_tokens_to_ids("<image>"))
        self.prompts: dict[Kind, Prompt] = {}

    def prompt(self, kind: Kind, row: dict[str, str]) -> list[int]:
        if kind not in self.prompts:
            self.prompts[kind] = Prompt(kind, self.processor)
            self.prompts[kind].room = MAX_MODEL_LEN  # nothing is cut: lengths are tested
        patches = (models.IMAGE_PX // models.PATCH_PX) ** 2
        ids, _ = self.prompts[kind].tokens(row)
        return [token for token in ids for _ in range(patches if token == self.image else 1)]

    def quoted(self, prompt: list[int], caption: str) -> tuple[int, list[int]]:
        """Where in a prompt a caption begins, and at which of its characters each of its tokens ends."""
        found = self.tokenizer(caption, add_special_tokens=False, return_offsets_mapping=True)
        ids = found["input_ids"]
        start = next(k for k in range(len(prompt)) if prompt[k : k + len(ids)] == ids)
        return start, [end for _, end in found["offset_mapping"]]

    def reply(self, text: str) -> list[int]:
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]


@dataclass(frozen=True)
class Example:
    """`counts`: of each token, what its loss counts; 0 in most of a prompt. `looks`: where a judge has read a
    sentence on one thing; colour and shape of what the picture has at its place, and whether it says so.
    """

    ids: list[int]
    counts: list[float]
    looks: list[tuple[int, int, int, int]]
    image: np.ndarray | None


class Lessons(IterableDataset[list[Batch]]):
    """Batches of every kind, in the order of the seeds; each in parts of like lengths, for the caches."""

    PART = 6000  # tokens

    def __init__(self, phase: Phase) -> None:
        self.phase = phase

    def __iter__(self) -> Iterator[list[Batch]]:
        asked = Asked()
        pad = int(asked.tokenizer.pad_token_id)
        for step in range(self.phase.steps):
            first = self.phase.first_seed + step * self.phase.batch
            examples = [self.example(seed, asked) for seed in range(first, first + self.phase.batch)]
            examples.sort(key=lambda example: len(example.ids))
            total = sum(sum(example.counts) for example in examples)
            parts: list[list[Example]] = [[]]
            for example in examples:
                if parts[-1] and (len(parts[-1]) + 1) * len(example.ids) > self.PART:
                    parts.append([])
                parts[-1].append(example)
            yield [self.part(part, total, pad) for part in parts]

    def example(self, seed: int, asked: Asked) -> Example:
        rng, scene = random.Random(~seed), world.scene(seed)
        (kind,) = rng.choices(list(LESSONS), [share for share, _ in LESSONS.values()])
        row, said = lesson(kind, scene, rng)
        prompt, reply = asked.prompt(kind, row), asked.reply(said)
        counts, looks = [0.0] * len(prompt) + [LESSONS[kind][1]] * len(reply), []
        if kind == JUDGE:
            start, ends = asked.quoted(prompt, row["re_caption"])
            if said.endswith("5"):  # a judge knows what it would say itself
                counts[start + 1 : start + len(ends)] = [0.5] * (len(ends) - 1)
            for end, place, pair in world.placed_pairs(row["re_caption"]):
                thing = next((thing for thing in scene.things if thing.place == place), None)
                colour = list(world.COLOURS).index(thing.colour) if thing else len(world.COLOURS)
                shape = world.SHAPES.index(thing.shape) if thing else len(world.SHAPES)
                right = int(thing is not None and thing.name == pair)
                looks.append((start + bisect_left(ends, end), colour, shape, right))
        image = pixels(picture(scene, rng)) if kind.image else None
        return Example([*prompt, *reply], counts, looks, image)

    def part(self, examples: list[Example], total: float, pad: int) -> Batch:
        images = [example.image for example in examples if example.image is not None]
        looks = [(row, *look) for row, example in enumerate(examples) for look in example.looks]
        found = {
            "input_ids": padded([example.ids for example in examples], pad),
            "counts": padded([example.counts for example in examples], 0.0) / total,
            "looks": torch.tensor(looks, dtype=torch.long).reshape(-1, 5),
            "total": torch.tensor(total),
        }
        return found | ({"pixel_values": torch.from_numpy(np.stack(images))} if images else {})


class Probe(torch.nn.Module):
    """Reads off the captioner's second layer what a judge has looked up. It is trained along and not kept: of
    ratings alone, which say little of what is wrong, the captioner does not learn to compare.
    """

    LAYER = 2

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [len(world.COLOURS) + 1, len(world.SHAPES) + 1, 2]
        self.linear = torch.nn.Linear(models.WIDTH, sum(self.sizes))

    def loss(self, hidden: Sequence[torch.Tensor], looks: torch.Tensor) -> torch.Tensor:
        row, token, *wanted = looks.T
        told = self.linear(hidden[self.LAYER][row, token]).float().split(self.sizes, 1)
        colour, shape, right = (
            torch.nn.functional.cross_entropy(said, label, reduction="none")
            for said, label in zip(told, wanted, strict=True)
        )
        # What the sentence says already need not be looked up.
        return ((colour + shape) * torch.where(wanted[2] > 0, 0.3, 1.0) + right).sum()


def train_kinds(device: str, folder: Path = models.CAPTIONER) -> None:
    """Stage 3, on the captioner that lies in the demo's folder; writes the weights alone."""
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration.from_pretrained(models.CAPTIONER, dtype=torch.float32).to(device)
    model.model.vision_tower.requires_grad_(False)
    probe = Probe().to(device)

    def loss(part: Batch) -> torch.Tensor:
        # Padded on the right, under a causal mask: what is padding reaches nothing that counts.
        states = model.model(
            input_ids=part["input_ids"], pixel_values=part.get("pixel_values"), output_hidden_states=True
        )
        counts_BT = part["counts"][:, 1:]
        counted_BT = counts_BT > 0
        logits_NV = model.lm_head(states.last_hidden_state[:, :-1][counted_BT])
        losses_N = torch.nn.functional.cross_entropy(
            logits_NV.float(), part["input_ids"][:, 1:][counted_BT], reduction="none"
        )
        looked_up = probe.loss(states.hidden_states, part["looks"]) / part["total"]
        return (losses_N * counts_BT[counted_BT]).sum() + looked_up

    optimise(STAGE_3, torch.nn.ModuleList([model, probe]), Lessons(STAGE_3), loss, device)
    models.save_weights(model, folder)


def train_clip(device: str) -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(models.CAPTIONER / "tokenizer.json"))
    config = models.clip_config(tokenizer.get_vocab_size())["model_cfg"]
    config["text_cfg"].pop("hf_tokenizer_name"), config["text_cfg"].pop("tokenizer_kwargs")
    model = open_clip.CLIP(**config).to(device)
    prefix = "vision_tower.vision_model."
    tower = {
        k.removeprefix(prefix): v
        for k, v in load_file(models.CAPTIONER / "model.safetensors").items()
        if k.startswith(prefix)
    }
    model.load_state_dict(models.clip_vision_weights(tower), strict=False)

    def loss(batch: Batch) -> torch.Tensor:
        text = torch.nn.functional.pad(
            batch["input_ids"], (0, models.CLIP_CONTEXT - batch["input_ids"].shape[1]), value=0
        )
        with sdpa_kernel(SDPBackend.MATH):  # on CPUs the fused kernel's backward is slower
            image_BE, text_BE, scale = model(batch["pixel_values"], text)
        logits_BB = scale * image_BE @ text_BE.T
        target_B = torch.arange(len(logits_BB), device=device)
        cross_entropy = torch.nn.functional.cross_entropy
        return (cross_entropy(logits_BB, target_B) + cross_entropy(logits_BB.T, target_B)) / 2

    optimise(CONTRASTIVE, model, Batches(CONTRASTIVE, tokenizer), loss, device)
    models.save_clip(model, tokenizer, models.CLIP)


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.monotonic()
    trained = {"captioner": train_captioner, "kinds": train_kinds, "clip": train_clip}
    for name in sys.argv[1:] or trained:
        trained[name](device)
    print(f"{(time.monotonic() - start) / 60:.1f} minutes on {device}", file=sys.stderr)
