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
from builder.core import Task, task_key
from builder.stages.caption import Caption, Engine
from builder.stages.imagetar import images
from recipes import datasets
from recipes.demo import web

ROWS, TURNS = 1200, 5
SHARDS = (200, ROWS)  # rows a shard: the engine drains at the end of each


def plain(engine: Engine, tars: list[Path]) -> int:
    from PIL import Image

    prompts = []
    for tar in tars:
        for _, image in images(tar):
            picture = Image.open(io.BytesIO(image)).convert("RGB")
            prompts.append(engine.prompt(engine.specs[0], picture, {})[0])
    return len(engine.llm.generate(prompts, engine.sampling["re_caption"], use_tqdm=False))


def stage(settings: Caption, engine: Engine, tasks: list[Task]) -> int:
    number = 0
    for task in tasks:
        number += settings.caption(engine, task)["ok"]
        task.journal.unlink()  # as the commit does
    return number


def tasks_of(run: Path, site: Path, rows_per_shard: int) -> tuple[Caption, list[Task]]:
    """Caption tasks of a run that is built as far as that."""
    recipe = datasets.demo(web=str(site), rows_per_shard=rows_per_shard)
    runs.build(replace(recipe, stages=recipe.stages[:3]), run)
    settings = recipe.stage("caption")
    assert isinstance(settings, Caption)
    (run / "caption").mkdir()
    found = runs.plan(recipe, run)["caption"].todo
    return settings, [replace(task, key=task_key(settings, task.inputs, task.name)) for task in found]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder, "web")
        web.make(site, rows=ROWS, port=8653)
        with web.serve(site, 8653):
            by_size = {size: tasks_of(Path(folder, f"run-{size}"), site, size) for size in SHARDS}
        settings, whole = by_size[ROWS]
        engine = Engine(settings)
        tars = [task.input("download", ".tar") for task in whole]
        rates: dict[str, list[float]] = {"bare": [], **{f"shards_of_{size}": [] for size in SHARDS}}
        plain(engine, tars)  # warm
        for turn in range(TURNS):
            for who in list(rates) if turn % 2 else list(reversed(rates)):
                start = time.perf_counter()
                number = (
                    plain(engine, tars)
                    if who == "bare"
                    else stage(settings, engine, by_size[int(who.rpartition("_")[2])][1])
                )
                rates[who].append(number / (time.perf_counter() - start))
        compared = {who: ratio(found, rates["bare"]) for who, found in rates.items() if who != "bare"}
        keep("caption", {"unit": "images/s", "images": number, **compared})
        engine.close()


if __name__ == "__main__":
    main()
