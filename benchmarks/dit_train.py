"""Training a DiT: samples a second of our loop beside the same model in a plain loop with no data, and beside
diffusers' PixArt transformer of the same width, depth and tokens in a plain loop; in turns.

    python benchmarks/dit_train.py [--model P] [--patch 4] [--batch 64] [--steps 30] [--precision fp32]
    python benchmarks/dit_train.py --pictures        # JPEGs and captions in the place of latents and features

Start-up is not in it: the rate is of the steps after the first fifth. Latents are 4 x 32 x 32, features 77
tokens of 768 of which 60 are there, both random. On a GPU: --model B --batch 256 --steps 60 --precision bf16
--tflops 989, and --model XL --patch 2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from clip_train import CLIP, made
from common import ROOT, keep

sys.path.insert(0, str(ROOT))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from builder.machine import gpus
from builder.stages import latents, tensors, textfeatures
from recipes import training
from recipes.dit import train as loop
from recipes.dit.model import SIZES, DiT, Net
from recipes.dit.objective import Objective
from recipes.dit.plan import forward_flops
from recipes.dit.train import Step, Training
from recipes.join import Audit, Joined
from recipes.training import ALONE, computing

WARM = 0.2  # of the steps, not counted
ROWS, TOKENS = 2048, 60
PIXART = "PixArt"


def encoded(folder: Path, rows: int) -> Path:
    """Latents and features as their stages write them, joined."""
    chance = np.random.default_rng(0)
    shape, about = (4, 32, 32), {"vae": "none", "px": "256", "factor": "1"}
    with tensors.write(folder / "latents", latents.TENSOR, shape, about) as file:
        for _ in range(rows):
            file.write(chance.standard_normal((1, *shape)))
    with tensors.write(folder / "features", textfeatures.TENSOR, (768,), {}) as file:
        for _ in range(rows):
            file.write(chance.standard_normal((TOKENS, 768)))
    first, a_latent, a_text = 8 + tensors.HEADER, 2 * 4 * 32 * 32, 2 * 768 * TOKENS
    table = {
        "uid": [f"{n:032x}" for n in range(rows)], "sha256": ["0" * 64] * rows,
        "file": [str(folder / "latents")] * rows, "start": [first + n * a_latent for n in range(rows)],
        "bytes": [a_latent] * rows, "caption": pa.array([None] * rows, pa.string()),
        "org_caption": ["a text"] * rows, "re_caption": ["a text"] * rows,
        "text_file": [str(folder / "features")] * rows,
    }  # fmt: skip
    for name in ("org_caption", "re_caption"):
        table |= {
            f"{name}_start": [first + n * a_text for n in range(rows)], f"{name}_tokens": [TOKENS] * rows,
            f"{name}_cut": [False] * rows,
        }  # fmt: skip
    (folder / "joined").mkdir()
    pq.write_table(pa.table(table), folder / "joined" / "00000.parquet")
    return folder / "joined"


def chosen(about: dict[str, Any]) -> Training:
    texts = {"features": "f"} if about["latents"] else {"tokenizer": str(ROOT / CLIP)}
    return Training(
        name="benchmark", version="", images="", net=Net(**about["net"]), objective=Objective(),
        samples=about["steps"] * about["batch"], batch=about["batch"], precision=about["precision"],
        workers=about["workers"],
        compile=about["compile"], save_every=10**9, latents="l" if about["latents"] else "", **texts,
    )  # fmt: skip


def ours(about: dict[str, Any]) -> float:
    training.REPORT_S = 0.0
    rows = about["rows"]
    of = json.dumps({"version": {"name": "benchmark", "version": "0", "files": {}}})
    joined = Joined(
        Path(about["joined"]), (rows,), ("org_caption", "re_caption"), Audit(rows, rows, 0, rows, 0), of,
        {"shape": [4, 32, 32]} if about["latents"] else None,
        {"context": 77, "width": 768, "empty": 1, "start": 8 + tensors.HEADER} if about["latents"] else None,
    )  # fmt: skip
    loop.joined_in = lambda *_, **__: joined
    times: list[float] = []  # of the join, then of each step
    with tempfile.TemporaryDirectory() as out:
        loop.train(chosen(about), Path(out), say=lambda _: times.append(time.monotonic()))
    steps, warm = about["steps"], int(about["steps"] * WARM)
    return (steps - warm - 1) * float(about["batch"]) / (times[-1] - times[1 + warm])


def bare(about: dict[str, Any]) -> float:
    """The same model and optimizer: one batch that is there."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    one = chosen(about)
    model = DiT(one.net).to(device).train()
    if one.compile:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    from diffusers.training_utils import EMAModel

    average = EMAModel(model.parameters(), decay=one.ema, foreach=True)
    size = one.batch
    if about["latents"]:
        clean = torch.randn(size, 4, 32, 32, device=device)
        texts: torch.Tensor = torch.zeros(size, 77, 768, device=device)
        texts[:, :TOKENS] = 1.0
        mask = texts.any(-1)[:, :64]
        texts = texts[:, :64]
    else:
        clean = torch.randn(size, 3, one.net.px, one.net.px, device=device)
        mask = (torch.arange(64, device=device) < TOKENS)[None].expand(size, -1)
        texts = mask.long() * 5
    objective, step = one.objective, Step(one.objective, model, precision=one.precision, seed=0, ranks=ALONE)
    noise = torch.randn_like(clean)

    def once() -> None:
        time_B = objective.times(torch.randn(size, device=device))
        noisy = objective.noisy(clean, noise, time_B)
        with computing(device, step.precision):
            out = model(noisy, time_B, texts, mask)
        objective.loss(out.float(), clean, noise, noisy, time_B).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.step(model.parameters())

    return timed(once, about, device)


def pixart(about: dict[str, Any]) -> float:
    """diffusers' model: adaLN-single, cross-attention, learned variance."""
    from diffusers import PixArtTransformer2DModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    net, size = Net(**about["net"]), about["batch"]
    blocks, width, heads = SIZES[net.size]
    model = PixArtTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, num_layers=blocks, sample_size=net.px,
        patch_size=net.patch, in_channels=4, out_channels=8, cross_attention_dim=width,
        caption_channels=net.text_width, use_additional_conditions=False,
    ).to(device).train()  # fmt: skip
    if about["compile"]:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    clean = torch.randn(size, 4, net.px, net.px, device=device)
    texts, mask = torch.randn(size, 64, net.text_width, device=device), torch.ones(size, 64, device=device)
    mask[:, TOKENS:] = 0

    def once() -> None:
        time_B = torch.randint(0, 1000, (size,), device=device)
        with computing(device, about["precision"]):
            out = model(
                clean, encoder_hidden_states=texts, timestep=time_B, encoder_attention_mask=mask,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample  # fmt: skip
        (out.float()[:, :4] - clean).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return timed(once, about, device)


def timed(once: Callable[[], None], about: dict[str, Any], device: str) -> float:
    warm = int(about["steps"] * WARM)
    for _ in range(warm + 1):
        once()
    if device == "cuda":
        torch.cuda.synchronize()
    begun, steps = time.monotonic(), about["steps"] - warm - 1
    for _ in range(steps):
        once()
    if device == "cuda":
        torch.cuda.synchronize()
    return steps * float(about["batch"]) / (time.monotonic() - begun)


LOOPS = {"ours": ours, "bare": bare, PIXART: pixart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="P", choices=list(SIZES))
    parser.add_argument("--patch", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--pictures", action="store_true", help="As the demo trains.")
    parser.add_argument("--tflops", type=float, help="Of the GPU at this precision, without sparsity.")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, about = arguments.one
        print(LOOPS[name](json.loads(about)))
        return
    text = {"context": 80, "text_width": 128, "text_layers": 2, "vocabulary": 1024}
    net = {"size": arguments.model, "patch": arguments.patch, "px": 32}
    net |= (
        {"channels": 3, **text} if arguments.pictures else {"channels": 4, "context": 77, "text_width": 768}
    )
    about = {
        "net": net, "batch": arguments.batch, "steps": arguments.steps, "precision": arguments.precision,
        "workers": arguments.workers, "compile": arguments.compile, "latents": not arguments.pictures,
        "rows": ROWS,
    }  # fmt: skip
    names = [name for name in LOOPS if name != PIXART or not arguments.pictures]
    rates: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        about["joined"] = str(made(folder, ROWS, 128)[0] if arguments.pictures else encoded(folder, ROWS))
        for turn in range(arguments.turns):
            for name in names if turn % 2 == 0 else names[::-1]:
                command = [sys.executable, __file__, "--one", name, json.dumps(about)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                rates[name].append(round(float(done.stdout.splitlines()[-1]), 1))
                print(name, rates[name][-1], flush=True)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    read = replace(Net(**net), context=64)  # type: ignore[arg-type]  # of 60 tokens, in sixteens
    flops = 3 * forward_flops(read)
    used = medians["ours"] * flops / 1e12
    name = f"dit_train_{arguments.model}{arguments.patch}_{arguments.precision}"
    name += "_pictures" * arguments.pictures + "_compiled" * arguments.compile
    keep(name, {
        **{k: about[k] for k in ("net", "batch", "precision", "compile")},
        "device": torch.cuda.get_device_name() if gpus() else "cpu", "samples_per_s": rates,
        "ratio_median": {n: round(medians["ours"] / medians[n], 3) for n in names[1:]},
        "tflops_used": round(used, 3),
        **({"utilisation": round(used / arguments.tflops, 3)} if arguments.tflops else {}),
    })  # fmt: skip


if __name__ == "__main__":
    main()
