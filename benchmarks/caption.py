"""Caption stage, images/s, over a plain script: read the tars, decode with Pillow, `LLM.generate` on the list.

    python benchmarks/caption.py            # 10 minutes or less on 2 cores

Both use one engine, in turns, so that loading and the machine's moods fall on both alike.
"""

from __future__ import annotations

import io
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from common import keep, ratio

from builder import run as runs
from builder.caption import Caption, Engine
from builder.core import Task, task_key
from builder.imagetar import images
from recipes import datasets
from recipes.demo import web

ROWS, TURNS = 1200, 5


def plain(engine: Engine, tars: list[Path]) -> int:
    from PIL import Image

    prompts = []
    for tar in tars:
        for _, image in images(tar):
            picture = Image.open(io.BytesIO(image)).convert("RGB")
            prompts.append(engine.prompt(engine.specs[0], picture, {}))
    return len(engine.llm.generate(prompts, engine.sampling["re_caption"], use_tqdm=False))


def stage(settings: Caption, engine: Engine, tasks: list[Task]) -> int:
    return sum(settings.caption(engine, task)["ok"] for task in tasks)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        site, run = Path(folder, "web"), Path(folder, "run")
        web.make(site, rows=ROWS, port=8653)
        recipe = datasets.demo(web=str(site), rows_per_shard=200)
        with web.serve(site, 8653):
            runs.build(replace(recipe, stages=recipe.stages[:3]), run)
        settings = recipe.stage("caption")
        assert isinstance(settings, Caption)
        plans = runs.plan(recipe, run)
        (run / "caption").mkdir()
        tasks = [replace(task, key=task_key(settings, task.inputs, task.name)) for task in plans["caption"].todo]
        engine = Engine(settings)
        ours, bare = [], []
        plain(engine, [tasks[0].input("download", ".tar")])  # warm
        for turn in range(TURNS):
            for who in ("ours", "bare") if turn % 2 else ("bare", "ours"):
                start = time.perf_counter()
                if who == "ours":
                    number = stage(settings, engine, tasks)
                    ours.append(number / (time.perf_counter() - start))
                else:
                    number = plain(engine, [task.input("download", ".tar") for task in tasks])
                    bare.append(number / (time.perf_counter() - start))
        keep("caption", {"unit": "images/s", "images": number, **ratio(ours, bare)})
        engine.close()


if __name__ == "__main__":
    main()
