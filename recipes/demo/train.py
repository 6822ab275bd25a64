"""Trains the demo's captioner and CLIP from scratch on scenes of the procedural world.

    python -m recipes.demo.train            # both, into recipes/demo/weights; under an hour on 2 cores
    python -m recipes.demo.train clip       # CLIP alone, on the captioner that lies there

The captioner is trained in LLaVA's two stages: (1) feature alignment on short captions, plain format; (2)
detailed captions in the chat format. Nothing comes pretrained here, so stage 1 also trains the ViT and the
decoder, and stage 2 keeps the ViT frozen, as LLaVA does. CLIP's image tower starts from the captioner's ViT.
"""

from __future__ import annotations

import io
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, IterableDataset

from builder.captions.kinds import RECAP_V1
from recipes.demo import models, world


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


class Batches(IterableDataset[dict[str, torch.Tensor]]):
    """Batches of one phase, in the order of the seeds."""

    def __init__(self, phase: Phase, tokenizer: Tokenizer):
        self.phase, self.tokenizer = phase, tokenizer
        self.ids: dict[str, int] = {token: tokenizer.token_to_id(token) or 0 for token in models.SPECIAL}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for step in range(self.phase.steps):
            first = self.phase.first_seed + step * self.phase.batch
            images, texts = [], []
            for seed in range(first, first + self.phase.batch):
                rng, scene = random.Random(~seed), world.scene(seed)
                images.append(pixels(picture(scene, rng)))
                texts.append(self.text(scene, rng))
            width = max(len(ids) for ids, _ in texts)
            input_ids = torch.full((len(texts), width), self.ids["<pad>"])
            labels = torch.full((len(texts), width), -100)
            for row, (ids, prompt) in enumerate(texts):
                input_ids[row, : len(ids)] = torch.tensor(ids)
                labels[row, prompt : len(ids)] = torch.tensor(ids[prompt:])
            yield {
                "pixel_values": torch.from_numpy(np.stack(images)),
                "input_ids": input_ids,
                "labels": labels,
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


def optimise(phase: Phase, module: torch.nn.Module, tokenizer: Tokenizer, loss_of, device: str) -> None:  # type: ignore[no-untyped-def]
    """Train the parameters of `module` that require a gradient."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=phase.lr, betas=(0.9, 0.98), weight_decay=0.02)
    warm = max(1, phase.steps // 30)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda k: min(1, (k + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1, k / phase.steps)))
    )
    start, seen = time.monotonic(), 0
    for step, batch in enumerate(
        DataLoader(Batches(phase, tokenizer), batch_size=None, num_workers=1, prefetch_factor=4), 1
    ):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        # On CPUs the fused kernel's backward is slower.
        with torch.autocast(device, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        seen += phase.batch
        if step % 50 == 0 or step == phase.steps:
            rate = seen / (time.monotonic() - start)
            print(
                f"{phase.name} {step}/{phase.steps} loss {loss.item():.3f} {rate:.0f} scenes/s",
                file=sys.stderr,
                flush=True,
            )


def train_captioner(device: str) -> None:
    torch.manual_seed(0)
    tokenizer = models.train_tokenizer()
    model = models.captioner(tokenizer).to(device)
    model.set_attn_implementation("eager")

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
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

    optimise(STAGE_1, model, tokenizer, loss, device)
    model.model.vision_tower.requires_grad_(False)
    optimise(STAGE_2, model, tokenizer, loss, device)
    optimise(STAGE_2_AGAIN, model, tokenizer, loss, device)
    models.save_captioner(model, tokenizer, models.CAPTIONER)


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

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        text = torch.nn.functional.pad(
            batch["input_ids"], (0, models.CLIP_CONTEXT - batch["input_ids"].shape[1]), value=0
        )
        image_BE, text_BE, scale = model(batch["pixel_values"], text)
        logits_BB = scale * image_BE @ text_BE.T
        target_B = torch.arange(len(logits_BB), device=device)
        cross_entropy = torch.nn.functional.cross_entropy
        return (cross_entropy(logits_BB, target_B) + cross_entropy(logits_BB.T, target_B)) / 2

    optimise(CONTRASTIVE, model, tokenizer, loss, device)
    models.save_clip(model, tokenizer, models.CLIP)


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.monotonic()
    if sys.argv[1:] != ["clip"]:
        train_captioner(device)
    if sys.argv[1:] != ["captioner"]:
        train_clip(device)
    print(f"{(time.monotonic() - start) / 60:.1f} minutes on {device}", file=sys.stderr)
