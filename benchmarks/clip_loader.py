"""A training's samples: a second, beside bare decoding and resizing on the same cores; memory over an epoch.

    python benchmarks/clip_loader.py [--px 224] [--source-px 512] [--seconds 6] [--turns 9]
    python benchmarks/clip_loader.py --memory 1000000      # an epoch of so many in 100 simulated shards

Bare is what a process does that reads the same files and decodes, crops and resizes them with Pillow, as many
processes as there are workers. The loader also draws texts, tokenizes and puts batches together; `draft` is
the loader that reads JPEGs at a half or less where that is enough.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from common import ROOT, keep
from PIL import Image

sys.path.insert(0, str(ROOT))

from recipes.clip.model import Tokenizer
from recipes.data import Mix, Pairs, Picture, batches
from recipes.demo import world
from recipes.join import Audit, Joined

CLIP = ROOT / "recipes/demo/weights/clip"
FILES = 400
TEXT = "The image shows two objects on a mint background. A small red star sits at the top left."


def joined(folder: Path, shards: int, rows: int, source_px: int) -> Joined:
    """Rows of few pictures, again and again, one behind the other in a file."""
    from random import Random

    path, places, start = folder / "pictures", [], 0
    if not path.exists():
        noise = np.random.default_rng(0)
        with open(path, "wb") as file:
            for n in range(FILES):
                image = np.asarray(world.draw(world.scene(world.HELD_OUT + n), source_px), np.int16)
                grain = noise.integers(-12, 13, image.shape, np.int16)  # photos are not as smooth as scenes
                data = world.jpeg(Image.fromarray((image + grain).clip(0, 255).astype(np.uint8)), 90)
                places.append((start, len(data)))
                file.write(data)
                start += len(data)
        (folder / "places.json").write_text(json.dumps(places))
    places = json.loads((folder / "places.json").read_text())
    for shard in range(shards):
        chance = Random(shard)
        chosen = [places[chance.randrange(len(places))] for _ in range(rows)]
        table = {
            "uid": [f"{shard * rows + n:032x}" for n in range(rows)], "sha256": ["0" * 64] * rows,
            "file": [str(path)] * rows, "start": [p[0] for p in chosen], "bytes": [p[1] for p in chosen],
            "caption": pa.nulls(rows, pa.string()), "org_caption": ["a red star"] * rows,
            "re_caption": [TEXT] * rows,
        }  # fmt: skip
        pq.write_table(pa.table(table), folder / f"{shard:05d}.parquet")
    audit = Audit(shards * rows, shards * rows, 0, shards * rows, 0)
    return Joined(folder, (rows,) * shards, ("org_caption", "re_caption"), audit, "")


def bare(path: str, places: list[tuple[int, int]], px: int, seconds: float, done: object) -> None:
    file = os.open(path, os.O_RDONLY)
    number, end = 0, time.monotonic() + seconds
    chance = np.random.default_rng(os.getpid())
    while time.monotonic() < end:
        start, size = places[chance.integers(len(places))]  # in no order, as the loader
        image = Image.open(io.BytesIO(os.pread(file, size, start)))
        side = chance.uniform(0.65, 1)
        box = (0, 0, image.width * side, image.height * side)
        np.array(image.resize((px, px), Image.Resampling.BILINEAR, box=box))
        number += 1
    done.put(number)  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--px", type=int, default=224)
    parser.add_argument("--source-px", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--memory", type=int, metavar="SAMPLES")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as text:
        if arguments.memory:
            memory(Path(text), arguments.memory, arguments.workers)
        else:
            rate(Path(text), arguments)


def rate(folder: Path, arguments: argparse.Namespace) -> None:
    data = joined(folder, 8, 5000, arguments.source_px)
    places = json.loads((folder / "places.json").read_text())
    names = "loader", "bare", "draft"
    rates: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(arguments.turns):
        for name in names if turn % 2 == 0 else names[::-1]:
            if name == "bare":
                context = multiprocessing.get_context("fork")
                given = str(folder / "pictures"), places, arguments.px, arguments.seconds
                done = context.Queue()
                those = [
                    context.Process(target=bare, args=(*given, done))
                    for _ in range(arguments.workers)
                ]  # fmt: skip
                for one in those:
                    one.start()
                rates[name].append(round(sum(done.get() for _ in those) / arguments.seconds, 1))
                for one in those:
                    one.join()
            else:
                pairs = Pairs(
                    data,
                    Mix(p_original=0.5),
                    Picture(arguments.px, 0.4, draft=name == "draft"),
                    Tokenizer(CLIP),
                    seed=turn,
                    batch=64,
                )
                loader = batches(pairs, start=0, samples=10**9, workers=arguments.workers)
                for _ in range(2 * arguments.workers + 2):
                    next(loader)  # what workers begin with
                begun, number = time.monotonic(), 0
                while time.monotonic() - begun < arguments.seconds:
                    number += len(next(loader).uids)
                rates[name].append(round(number / (time.monotonic() - begun), 1))
                del loader
            print(name, rates[name][-1], flush=True)
    per_core = statistics.median(rates["loader"]) / arguments.workers
    ratios = {
        name: statistics.median(ours / bare for ours, bare in zip(rates[name], rates["bare"], strict=True))
        for name in ("loader", "draft")
    }
    keep("clip_loader" if arguments.px == 224 else f"clip_loader_{arguments.px}", {
        "px": arguments.px, "source_px": arguments.source_px, "workers": arguments.workers,
        "samples_per_s": rates,
        "ratio_median": round(ratios["loader"], 3), "ratio_median_draft": round(ratios["draft"], 3),
        "cores_for_1000_samples_per_s": round(1000 / per_core, 1),
    })  # fmt: skip


def memory(folder: Path, samples: int, workers: int) -> None:
    """Of this process and its workers, after every tenth of an epoch. Pictures are small: it is of rows."""
    data = joined(folder, 100, samples // 100, 32)
    pairs = Pairs(data, Mix(p_original=0.5), Picture(16, 0.4), Tokenizer(CLIP), seed=0, batch=500)
    tenths: list[int] = []
    begun, seen = time.monotonic(), 0
    for batch in batches(pairs, start=0, samples=samples, workers=workers):
        seen += len(batch.uids)
        if seen * 10 // samples > len(tenths):
            here = psutil.Process()
            mib = sum(process.memory_info().rss for process in (here, *here.children(True))) / 2**20
            tenths.append(round(mib))
            print(seen, tenths[-1], flush=True)
    keep("clip_loader_memory", {
        "samples": samples, "shards": 100, "workers": workers, "mib_by_tenth": tenths,
        "samples_per_s": round(samples / (time.monotonic() - begun), 1),
    })  # fmt: skip


if __name__ == "__main__":
    main()
