"""Drawing by a DiT: pictures a second of `recap sample`, files and all, over the model's calls alone, which
are two a step; in turns. The paper's way: DDPM, guidance 10.

    python benchmarks/dit_sample.py [--size P] [--patch 4] [--pictures 64] [--batch 32] [--steps 25,250]

The weights are random, and latents are not decoded. On a GPU: --size B --pictures 512 --batch 256, and
--size XL --patch 2.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from common import ROOT, keep, ratio
from safetensors.torch import save_file

from recipes.dit import model as dit
from recipes.dit.model import DiT, Net
from recipes.dit.objective import Objective
from recipes.dit.sample import Drawer, sample

WORDS = ROOT / "recipes" / "demo" / "weights" / "clip" / dit.TOKENIZER
TURNS = 3


def a_model(folder: Path, size: dit.Size, patch: int) -> Path:
    torch.manual_seed(0)
    net = Net(size=size, patch=patch, px=32, context=77, text_width=128, text_layers=1, vocabulary=1024)
    dit.describe(net, asdict(Objective()), WORDS, folder)
    save_file(DiT(net).state_dict(), folder / dit.WEIGHTS)
    return folder


def ours(model: Path, pictures: int, batch: int, steps: int) -> float:
    texts = [f"a red star, number {number}" for number in range(pictures)]
    with tempfile.TemporaryDirectory() as out:
        sample(model, texts[:1], Path(out, "first"), batch=batch, steps=2, say=lambda _: None)
        begun = time.monotonic()
        sample(model, texts, Path(out, "all"), batch=batch, steps=steps, say=lambda _: None)
        return pictures / (time.monotonic() - begun)


@torch.no_grad()
def bare(model: Path, pictures: int, batch: int, steps: int) -> float:
    drawer = Drawer(model)
    net = drawer.model.net
    x = torch.randn(2 * batch, net.channels, net.px, net.px, device=drawer.device)
    text, mask = drawer.features(["a red star, number 1"] * batch + [""] * batch)
    time_B = torch.full((2 * batch,), 500.0, device=drawer.device)

    def call() -> None:
        drawer.model(x, time_B, text, mask, encoded=True)

    call()
    if drawer.device != "cpu":
        torch.cuda.synchronize()
    begun = time.monotonic()
    for _ in range(steps * -(-pictures // batch)):
        call()
    if drawer.device != "cpu":
        torch.cuda.synchronize()
    return pictures / (time.monotonic() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size", default="P", choices=list(dit.SIZES))
    parser.add_argument("--patch", type=int, default=4)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", default="25,250")
    arguments = parser.parse_args()
    ways = {"ours": ours, "bare": bare}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        model = a_model(Path(folder), arguments.size, arguments.patch)
        for steps in map(int, arguments.steps.split(",")):
            rates: dict[str, list[float]] = {name: [] for name in ways}
            for turn in range(TURNS):
                for name in list(ways)[:: 1 if turn % 2 else -1]:
                    rates[name].append(ways[name](model, arguments.pictures, arguments.batch, steps))
            found[f"{steps} steps"] = ratio(rates["ours"], rates["bare"])
    about = {name: getattr(arguments, name) for name in ("size", "patch", "pictures", "batch")}
    keep(f"dit_sample_{arguments.size}{arguments.patch}", {**about, "pictures_per_s": found})


if __name__ == "__main__":
    main()
