"""Download stage, URLs/s, over bare img2dataset on the same URL list, threads, processes and resizing.

    python benchmarks/download.py

Both are timed whole, from the metadata to the closed tars, starting their processes included. The web is a
process of its own that answers from memory; both sides share the cores with it.
"""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from common import keep, ratio

from builder import run as runs
from builder.stages.download import Download
from recipes import datasets
from recipes.demo import world

URLS, PICTURES, PORT, THREADS, TURNS = 5000, 200, 8654, 64, 3


def pictures() -> list[bytes]:
    return [world.jpeg(world.draw(world.scene(seed), 512)) for seed in range(PICTURES)]


def serve(ready: Any) -> None:
    from aiohttp import web

    bodies = pictures()

    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=bodies[int(request.match_info["n"]) % PICTURES], content_type="image/jpeg")

    async def run() -> None:
        app = web.Application()
        app.router.add_get("/{n}.jpg", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", PORT, backlog=1024).start()
        ready.set()
        await asyncio.Event().wait()

    asyncio.run(run())


def main() -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    server = context.Process(target=serve, args=(ready,), daemon=True)
    server.start()
    hashes = [hashlib.sha256(body).hexdigest() for body in pictures()]
    ready.wait()
    with tempfile.TemporaryDirectory() as folder:
        metadata = Path(folder, "metadata.parquet")
        rows = [
            {
                "uid": f"{n:032x}",
                "url": f"http://127.0.0.1:{PORT}/{n}.jpg",
                "text": f"picture {n}",
                "sha256": hashes[n % PICTURES],
            }
            for n in range(URLS)
        ]
        pq.write_table(pa.Table.from_pylist(rows), metadata)
        results: dict[str, dict[str, Any]] = {}
        for processes in (1, 2):
            ours, bare = [], []
            for turn in range(TURNS):
                for who in ("ours", "bare") if turn % 2 else ("bare", "ours"):
                    out = Path(folder, f"{who}-{processes}-{turn}")
                    start = time.perf_counter()
                    done = (recap if who == "ours" else img2dataset)(metadata, out, processes)
                    (ours if who == "ours" else bare).append(done / (time.perf_counter() - start))
            results[f"{processes}_processes"] = ratio(ours, bare)
        keep("download", {"unit": "URLs/s", "urls": URLS, "threads": THREADS, **results})


def recap(metadata: Path, out: Path, processes: int) -> int:
    recipe = datasets.recap_datacomp_1b(
        metadata=str(metadata), captioner="none/none@0000000", clip="none/none@0000000", rows_per_shard=1000
    )
    source, _, *_ = recipe.stages
    download = Download(image_px=256, allow_private=("127.0.0.1/32",), concurrency=THREADS, workers=processes)
    runs.build(replace(recipe, stages=(source, download)), out)
    return runs.plan(replace(recipe, stages=(source, download)), out)["download"].shards()[0].rows["ok"] * (
        URLS // 1000
    )


def img2dataset(metadata: Path, out: Path, processes: int) -> int:
    from img2dataset import download

    download(
        url_list=str(metadata), output_folder=str(out), input_format="parquet", url_col="url",
        caption_col="text", save_additional_columns=["uid"], output_format="webdataset", image_size=256,
        resize_mode="keep_ratio_largest", resize_only_if_bigger=True, processes_count=processes,
        thread_count=THREADS, number_sample_per_shard=1000, retries=2, compute_hash="sha256",
        verify_hash=["sha256", "sha256"], disallowed_header_directives=["noai"], timeout=20,
    )  # fmt: skip
    return sum(
        pq.read_table(path, columns=["status"]).column("status").to_pylist().count("success")
        for path in out.glob("*.parquet")
    )


if __name__ == "__main__":
    main()
