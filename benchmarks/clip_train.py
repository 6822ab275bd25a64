"""Training a CLIP: samples a second of our loop beside open_clip's, in turns, on the same files and model.

    python benchmarks/clip_train.py [--model demo|S|B] [--px 64] [--batch 64] [--steps 40] [--precision fp32]

Start-up is not in it: the rate is of the steps after the first fifth, as each loop tells it. open_clip_train
reads a CSV of files and captions, with as many workers. On a GPU: --model B --px 112 --batch 1024 --precision
bf16, which also tells the share of the GPU's operations that is used (--tflops).
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, keep

sys.path.insert(0, str(ROOT))

import torch

from builder.machine import gpus
from recipes import training
from recipes.clip import train as loop
from recipes.clip.model import Towers
from recipes.clip.plan import forward_flops
from recipes.clip.train import Phase, Training
from recipes.data import Mix
from recipes.demo import world
from recipes.join import Audit, Joined

CLIP = "recipes/demo/weights/clip"
WARM = 0.2  # of the steps, not counted


def made(folder: Path, number: int, px: int) -> tuple[Path, Path]:
    """Pictures with captions: a version beside its images, and open_clip's CSV."""
    import random

    import pyarrow as pa
    import pyarrow.parquet as pq

    from builder.files import sha256_file

    (folder / "images").mkdir()
    rows, lines = [], []
    for n in range(number):
        scene = world.scene(world.HELD_OUT + n)
        path = folder / "images" / f"{n:06d}.jpg"
        path.write_bytes(world.jpeg(world.draw(scene, max(128, px)), 90))
        text = world.describe(scene, random.Random(n))
        rows.append({
            "uid": f"{n:032x}", "sha256": sha256_file(path), "file": str(path), "start": 0,
            "bytes": path.stat().st_size, "caption": None, "org_caption": text, "re_caption": text,
        })  # fmt: skip
        lines.append((str(path), text))
    joined = folder / "joined"
    joined.mkdir()
    schema = pa.schema(
        [(name, pa.int64() if name in ("start", "bytes") else pa.string()) for name in rows[0]]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema), joined / "00000.parquet")
    with open(folder / "train.csv", "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("filepath", "title"), *lines])
    return joined, folder / "train.csv"


def ours(folder: Path, about: dict[str, Any], turn: int) -> float:
    out = folder / f"ours-{turn}"
    command = [sys.executable, __file__, "--ours", json.dumps({**about, "out": str(out)})]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(out)
    return float(done.stdout.splitlines()[-1])


def train_ours(about: dict[str, Any]) -> float:
    """In a process of its own; samples a second."""
    training.REPORT_S = 0.0
    number, steps, batch = about["number"], about["steps"], about["batch"]
    audit = Audit(number, number, 0, number, 0)
    of = json.dumps({"version": {"name": "benchmark", "version": "0", "files": {}}})
    joined = Joined(Path(about["joined"]), (number,), ("org_caption", "re_caption"), audit, of)
    loop.joined_in = lambda *_, **__: joined
    phase = Phase(px=about["px"], samples=number, warmup=0, batch=batch, lr=1e-5)
    chosen = Training(
        name="benchmark", version="", images="", towers=Towers(**about["towers"]), mix=Mix(p_original=1.0),
        phases=(phase,), precision=about["precision"], workers=about["workers"], area=0.9, save_every=10**9,
        compile=about["compile"],
    )  # fmt: skip
    times: list[float] = []  # of the join, then of each step
    loop.train(chosen, Path(about["out"]), say=lambda _: times.append(time.monotonic()))
    warm = int(steps * WARM)
    return (steps - warm - 1) * batch / (times[-1] - times[1 + warm])


def theirs(folder: Path, about: dict[str, Any], config: dict[str, Any], turn: int) -> float:
    """open_clip_train, 3.3: a line of its log a step has what that step took."""
    models = folder / "models"
    models.mkdir(exist_ok=True)
    (models / "ours.json").write_text(json.dumps(config))
    code = (
        "import sys, open_clip; open_clip.add_model_config(sys.argv.pop(1)); "
        "from open_clip_train.main import main; main(sys.argv[1:])"
    )
    steps, batch = int(about["steps"]), int(about["batch"])
    command = [
        sys.executable, "-c", code, str(models), "--model", "ours", "--train-data", str(folder / "train.csv"),
        "--dataset-type", "csv", "--csv-separator", "\t", "--batch-size", str(batch), "--epochs", "1",
        "--workers", str(about["workers"]), "--warmup", "0", "--lr", "1e-5", "--wd", "0.2",
        "--log-every-n-steps", "1", "--precision", "fp32" if about["precision"] == "fp32" else "amp_bf16",
        "--logs", str(folder / f"logs-{turn}"),
        "--name", "run", "--save-frequency", "0", "--local-loss", "--gather-with-grad",
        "--image-interpolation", "bilinear",
    ]  # fmt: skip
    if about["compile"]:
        command.append("--torchcompile")
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
    lines = re.findall(r"Batch \(t\): ([0-9.]+)", done.stdout + done.stderr)
    if len(lines) < steps:
        raise SystemExit(f"open_clip_train told {len(lines)} steps of {steps}:\n{done.stderr[-3000:]}")
    seconds = [float(line) for line in lines[int(steps * WARM) + 1 : steps]]
    return len(seconds) * batch / sum(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="demo", choices=["demo", "S", "B", "L"])
    parser.add_argument("--px", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tflops", type=float, help="Of the GPU at this precision, without sparsity.")
    parser.add_argument("--ours", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ours:
        print(train_ours(arguments.ours))
        return
    size = "T" if arguments.model == "demo" else arguments.model
    settings = {
        "vision": size, "text": size, "patch": 8 if size == "T" else 16, "context": 80,
        "tokenizer": str(ROOT / CLIP),
    }  # fmt: skip
    towers = Towers(**settings)
    config = towers.config(arguments.px)["model_cfg"]
    number = arguments.steps * arguments.batch
    about: dict[str, Any] = {
        "px": arguments.px, "batch": arguments.batch, "steps": arguments.steps, "towers": settings,
        "precision": arguments.precision, "workers": arguments.workers, "number": number,
        "compile": arguments.compile,
    }  # fmt: skip
    rates: dict[str, list[float]] = {"ours": [], "open_clip_train": []}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        joined, _ = made(folder, number, arguments.px)
        about["joined"] = str(joined)
        for turn in range(arguments.turns):
            for name in ("ours", "open_clip_train") if turn % 2 == 0 else ("open_clip_train", "ours"):
                rate = ours(folder, about, turn) if name == "ours" else theirs(folder, about, config, turn)
                rates[name].append(round(rate, 1))
                print(name, rates[name][-1], flush=True)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    flops = 3 * forward_flops(towers, arguments.px)
    used = medians["ours"] * flops / 1e12
    name = (
        f"clip_train_{arguments.model}_{arguments.px}_{arguments.precision}{'_compiled' * arguments.compile}"
    )
    keep(name, {
        "model": arguments.model, "px": arguments.px, "batch": arguments.batch,
        "precision": arguments.precision,
        "device": torch.cuda.get_device_name() if gpus() else "cpu", "samples_per_s": rates,
        "ratio_median": round(medians["ours"] / medians["open_clip_train"], 3),
        "tflops_used": {name: round(rate * flops / 1e12, 3) for name, rate in medians.items()},
        **({"utilisation": round(used / arguments.tflops, 3)} if arguments.tflops else {}),
    })  # fmt: skip


if __name__ == "__main__":
    main()
