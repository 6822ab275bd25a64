"""Caption stage, images/s, over a plain script: read the tars, decode with Pillow, `LLM.generate` on all.

    python benchmarks/caption.py            # 10 minutes or less on 2 cores

Both use one engine, in turns, so that loading and the machine's moods fall on both alike.
"""

from __future__ import annotations

import tarfile
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from common import keep, ratio

from builder import run as runs
from builder.captions.vllm import Engine
from builder.commit import working
from builder.core import Task
from builder.stages.caption import Caption, Captioning
from recipes import datasets
from recipes.demo import web

ROWS, TURNS = 1200, 5
SHARDS = (200, ROWS)  # rows a shard: the next one is begun while the engine finishes one


def plain(engine: Engine, tars: list[Path]) -> int:
    from PIL import Image

    prompts = []
    for path in tars:
        with tarfile.open(path) as tar:
            for member in (member for member in tar if member.name.endswith(".jpg")):
                picture = Image.open(tar.extractfile(member)).convert("RGB")
                prompts.append(engine.prompt(picture, {})[0])
    return len(engine.llm.generate(prompts, engine.sampling, use_tqdm=False))


def stage(settings: Caption, engine: Engine, run: runs.Run, tasks: list[Task]) -> int:
    """As a worker does it, which has the next task at hand before its time."""
    work, number = Captioning(settings, engine), 0
    with ExitStack() as stack:
        ready = [stack.enter_context(working(run.store, task)) for task in tasks]
        following = iter(ready[1:])
        work.next_task = lambda: next(following, None)
        for task in ready:
            number += work(task)["ok"]
            run.store.delete(task.journal)  # as the commit does
    return number


def tasks_of(place: Path, site: Path, rows_per_shard: int) -> tuple[runs.Run, list[Task]]:
    """Caption tasks of a run that is built as far as that."""
    recipe = datasets.demo(web=str(site), rows_per_shard=rows_per_shard)
    runs.build(replace(recipe, stages=recipe.stages[:3]), place)
    run = runs.Run(runs.Run.open(place).store, replace(recipe, stages=recipe.stages[:4]))
    return run, [task for block in run.plan().blocks() for task in block.stages["re_caption"].todo.values()]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder, "web")
        web.make(site, rows=ROWS, port=8653)
        with web.serve(site, 8653):
            by_size = {size: tasks_of(Path(folder, f"run-{size}"), site, size) for size in SHARDS}
        run, _ = by_size[ROWS]
        settings = run.recipe.stage("re_caption")
        assert isinstance(settings, Caption)
        engine = Engine(settings)
        tars = [run.local(name) for name in run.files("download", ".tar")]
        rates: dict[str, list[float]] = {"bare": [], **{f"shards_of_{size}": [] for size in SHARDS}}
        plain(engine, tars)  # warm
        for turn in range(TURNS):
            for who in list(rates) if turn % 2 else list(reversed(rates)):
                start = time.perf_counter()
                number = (
                    plain(engine, tars)
                    if who == "bare"
                    else stage(settings, engine, *by_size[int(who.rpartition("_")[2])])
                )
                rates[who].append(number / (time.perf_counter() - start))
        compared = {who: ratio(found, rates["bare"]) for who, found in rates.items() if who != "bare"}
        keep("caption", {"unit": "images/s", "images": number, **compared})
        engine.close()


if __name__ == "__main__":
    main()
