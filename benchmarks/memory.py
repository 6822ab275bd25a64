"""Resident memory of `recap build` as shards grow in number: 10, 100 and 1,000 shards of 100 rows.

    python benchmarks/memory.py             # half an hour on 2 cores

Every stage runs for real; captions are cut at 4 tokens so that the largest build ends today. Sampled five
times a second over the whole process tree: the peak of the parent, and of the largest worker of each stage.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from common import ROOT, keep

from recipes.demo import web

PORT = 8655
RECIPE = """
from dataclasses import replace
from builder.stages.caption import Caption
from builder.core import Recipe
from recipes import datasets

def short(*, web: str) -> Recipe:
    recipe = datasets.demo(web=web, rows_per_shard=100)
    stages = [replace(s, max_tokens=4) if isinstance(s, Caption) else s for s in recipe.stages]
    return replace(recipe, stages=tuple(stages))
"""


def peak(folder: Path, shards: int) -> dict[str, float]:
    site, run = folder / f"web-{shards}", folder / f"run-{shards}"
    web.make(site, rows=100 * shards, port=PORT)
    (folder / "short.py").write_text(RECIPE)
    start = time.monotonic()
    with web.serve(site, PORT):
        process = subprocess.Popen(
            [sys.executable, "-m", "builder.cli", "build", f"{folder}/short.py:short", f"web={site}",
             "--run", str(run), "download.timeout_s=0.5"],
            cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        tree, parent, worker = psutil.Process(process.pid), 0, 0
        while process.poll() is None:
            try:
                parent = max(parent, tree.memory_info().rss)
                worker = max([worker, *(child.memory_info().rss for child in tree.children(recursive=True))])
            except psutil.NoSuchProcess:
                pass
            time.sleep(0.2)
    assert process.returncode == 0, process.returncode
    return {
        "parent_mib": round(parent / 2**20, 1),
        "largest_worker_mib": round(worker / 2**20, 1),
        "seconds": round(time.monotonic() - start),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        keep(
            "memory",
            {
                "rows_per_shard": 100,
                "shards": {number: peak(Path(folder), number) for number in (10, 100, 1000)},
            },
        )


if __name__ == "__main__":
    main()
