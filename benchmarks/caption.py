"""The caption stage, images/s, against the engine alone and against a plain script, in turns with one engine.

    python benchmarks/caption.py                            # the demo's captioner; 15 minutes on 2 cores
    python benchmarks/caption.py --shape llava-llama3-8b    # dummy weights, 336 px, 60 tokens out: for a GPU
    python benchmarks/caption.py --stand-in                 # an engine that sleeps 14 ms an image: the feeder

(a) plain   reads the tars, decodes with Pillow, `LLM.generate` on all
(b) stage   `Captioning`, shard after shard, the next one at hand before its time
(c) ready   the engine alone: inputs made ready before the clock runs, as many in flight as in (b)

The images are crops of the photos in ../shared/data, 512 px, JPEG; scenes of the demo where they are absent.
`--photos`, `--turns`, `--feeders`, `--quantization fp8` and `--tokens` change what their names say.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
from common import ROOT, keep, ratio
from PIL import Image

from builder.captions.asking import Ready
from builder.captions.replies import Reply
from builder.captions.vllm import Engine
from builder.commit import working
from builder.core import Task
from builder.files import write_parquet
from builder.stages import download, source
from builder.stages.caption import Caption, Captioning
from builder.store import Folder
from recipes.datasets import DEMO_CAPTIONER

PHOTOS = ROOT.parent / "shared" / "data" / "coco-tiny"
SLEEP_S = 0.014
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bf16, dense, as NVIDIA states them

# --- images, shards and models ------------------------------------------------------------------------------


def pictures(number: int) -> Iterator[bytes]:
    """JPEGs, none like another: crops of photos, the longer side 512 px."""
    paths = sorted(path for kind in ("*.jpg", "*.jpeg") for path in PHOTOS.rglob(kind))
    rng = random.Random(0)
    for n in range(number):
        if paths:
            with Image.open(paths[n % len(paths)]) as photo:
                whole = photo.convert("RGB")
            width, height = (int(side * rng.uniform(0.8, 1)) for side in whole.size)
            left, top = rng.randint(0, whole.width - width), rng.randint(0, whole.height - height)
            picture = whole.crop((left, top, left + width, top + height))
        else:
            from recipes.demo import world

            picture = world.draw(world.scene(n), 512)
        scale = 512 / max(picture.size)
        picture = picture.resize([max(1, round(side * scale)) for side in picture.size])
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=95)
        yield file.getvalue()


def shards(store: Folder, images: Sequence[bytes], rows: int) -> list[Task]:
    """Caption tasks over downloads of these images, `rows` a shard."""
    tasks = []
    for number, start in enumerate(range(0, len(images), rows)):
        table, tar, name = [], io.BytesIO(), f"{number:05d}"
        with tarfile.open(fileobj=tar, mode="w") as archive:
            for n, image in enumerate(images[start : start + rows]):
                key = f"{number:05d}{n:04d}"
                about = tarfile.TarInfo(f"{key}.jpg")
                about.size = len(image)
                archive.addfile(about, io.BytesIO(image))
                sha256 = hashlib.sha256(image).hexdigest()
                row = {"uid": sha256[:32], "url": "http://h/", "org_caption": "", "key": key}
                table.append(row | {"status": "ok", "image_sha256": sha256})
        schemas = {"source": source.SCHEMA, "download": download.SCHEMA}
        schemas["dedup"] = pa.schema(dict.fromkeys(("uid", "status", "error"), pa.string()))
        inputs = {f"download/00000/{name}.00000000.tar": hashlib.sha256(tar.getvalue()).hexdigest()}
        for stage, schema in schemas.items():
            (store.root / stage / "00000").mkdir(parents=True, exist_ok=True)
            inputs[f"{stage}/00000/{name}.00000000.parquet"] = "0" * 64
            write_parquet(
                pa.Table.from_pylist(table, schema), store.root / stage / "00000" / f"{name}.00000000.parquet"
            )
        (store.root / "download" / "00000" / f"{name}.00000000.tar").write_bytes(tar.getvalue())
        tasks.append(Task("re_caption", "00000", name, f"{number:064d}", inputs))
    return tasks


SHAPES: dict[str, dict[str, Any]] = {
    # `vision`: width, inner width, layers, heads; `text`: the same, then heads of keys and values.
    "llava-llama3-8b": {
        "vision": (1024, 4096, 24, 16),
        "text": (4096, 14336, 32, 32, 8),
        "vocabulary": 128_320,
    },
    "tiny-336": {"vision": (64, 128, 2, 4), "text": (128, 256, 2, 4, 2), "vocabulary": 1024},
}


def shaped(folder: Path, name: str) -> dict[str, Any]:
    """A LLaVA of that shape, 336 px and patches of 14, without weights; its config."""
    shutil.copytree(ROOT / DEMO_CAPTIONER, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    shape = SHAPES[name]
    config = json.loads((folder / "config.json").read_text())
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    config["text_config"] |= dict(zip(names, shape["text"], strict=True))
    config["text_config"] |= {"vocab_size": shape["vocabulary"], "max_position_embeddings": 8192}
    config["text_config"]["head_dim"] = shape["text"][0] // shape["text"][3]
    config["vision_config"] |= dict(zip(names, shape["vision"], strict=False))
    config["vision_config"] |= {"image_size": 336, "patch_size": 14, "projection_dim": 768}
    config |= {"image_seq_length": 576, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    processor = json.loads((folder / "processor_config.json").read_text()) | {"patch_size": 14}
    processor["image_processor"] |= {
        "size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336},
    }  # fmt: skip
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")  # `load_format=dummy`
    return dict(config)


def flops(config: dict[str, Any], prompt: float, reply: float) -> float:
    """Of one image: two for each weight and token, and attention's products."""

    def of(part: dict[str, Any], tokens: float, layers: int, *, is_gated: bool) -> float:
        width, inner = part["hidden_size"], part["intermediate_size"]
        shared = part.get("num_key_value_heads", part["num_attention_heads"]) / part["num_attention_heads"]
        weights = width * width * (2 + 2 * shared) + (3 if is_gated else 2) * width * inner
        return layers * tokens * (2 * weights + 4 * tokens * width / (2 if is_gated else 1))

    vision, text = config["vision_config"], config["text_config"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    seeing = of(vision, patches + 1, vision["num_hidden_layers"] - 1, is_gated=False)
    projector = 2 * patches * text["hidden_size"] * (vision["hidden_size"] + text["hidden_size"])
    head = 2 * reply * text["hidden_size"] * text["vocab_size"]
    return seeing + projector + head + of(text, prompt + reply, text["num_hidden_layers"], is_gated=True)


# --- the three ----------------------------------------------------------------------------------------------


def plain(engine: Engine, kind: Caption, tars: Sequence[Path]) -> int:
    ids, _ = engine.prompt_of(kind).tokens({})
    prompts: list[Any] = []
    for path in tars:
        with tarfile.open(path) as tar:
            for member in (member for member in tar if member.name.endswith(".jpg")):
                file = tar.extractfile(member)
                assert file is not None
                picture = Image.open(file).convert("RGB")
                prompts.append({"prompt_token_ids": ids, "multi_modal_data": {"image": picture}})
    return len(engine.llm.generate(prompts, engine.params(kind.sampling("")), use_tqdm=False))


def stage(kind: Caption, engine: Engine, store: Folder, tasks: Sequence[Task]) -> int:
    """As a worker does it, which has the next task at hand before its time."""
    work, number = Captioning([kind], engine), 0
    with ExitStack() as stack:
        ready = [stack.enter_context(working(store, task)) for task in tasks]
        following = iter(ready[1:])
        work.next_task = lambda: next(following, None)
        for task in ready:
            number += sum(work(task).values())
            store.delete(task.journal)  # as the commit does
    return number


def made_ready(engine: Engine, kind: Caption, images: Sequence[bytes], turn: int) -> list[Any]:
    ids, _ = engine.prompt_of(kind).tokens({})
    found = []
    for n, image in enumerate(images):
        picture = Image.open(io.BytesIO(image)).convert("RGB")
        of_image = {"multi_modal_data": {"image": picture}, "multi_modal_uuids": {"image": [f"{turn} {n}"]}}
        found += engine.engine.renderer.render_cmpl([{"prompt_token_ids": ids, **of_image}])
    return found


def ready(engine: Engine, kind: Caption, inputs: list[Any]) -> int:
    params, name, number = engine.params(kind.sampling("")), 0, 0
    waiting = iter(inputs)
    in_engine = 0
    while True:
        while in_engine < kind.in_flight and (one := next(waiting, None)) is not None:
            engine.engine.add_request(f"ready {name}", one, params)
            name, in_engine = name + 1, in_engine + 1
        if not in_engine:
            return number
        done = sum(output.finished for output in engine.engine.step())
        number, in_engine = number + done, in_engine - done


class StandIn(Engine):
    """An engine with everything around it, which is done with what it was asked 14 ms after it was asked and
    done with what was asked before: as one that computes in a process of its own.
    """

    def __init__(self, *columns: Caption, **more: Any) -> None:
        super().__init__(*columns, **more)
        self.since: dict[str, float] = {}
        self.free_at = self.waited_for_work_s = 0.0

    def put(self, name: str, ready: Ready) -> None:
        self.since[name] = time.perf_counter()

    def step(self) -> Iterator[tuple[str, Reply]]:
        name, since = next(iter(self.since.items()))
        del self.since[name]
        self.waited_for_work_s += max(0.0, since - self.free_at)
        self.free_at = max(since, self.free_at) + SLEEP_S
        time.sleep(max(0.0, self.free_at - time.perf_counter()))
        yield name, Reply("A photo.", "stop", 60, key=self.asked[name][1].key)

    def abort(self, names: Sequence[str]) -> None:
        pass


# --- what is printed ----------------------------------------------------------------------------------------


def stand_in(options: argparse.Namespace, folder: Path, images: Sequence[bytes]) -> None:
    shaped(folder / "model", "tiny-336")
    found = {}
    for feeders in (0, 1, 2):
        kind = Caption(
            model=str(folder / "model"), dtype="float32", max_model_len=1024, kv_cache_gib=1, feeders=feeders,
            retries=0, in_flight=64,
        )  # fmt: skip
        engine = StandIn(kind, load_format="dummy")
        store = Folder(folder / f"run-{feeders}")
        tasks, shares, rates = shards(store, images, options.rows), [], []
        stage(kind, engine, store, tasks[:1])  # until the feeders are there
        for _ in range(options.turns):
            engine.waited_for_work_s, start = 0.0, time.perf_counter()
            engine.free_at = start
            number = stage(kind, engine, store, tasks)
            wall_s = time.perf_counter() - start
            shares.append(round(100 * engine.waited_for_work_s / wall_s, 2))
            rates.append(round(number / wall_s, 1))
        found[f"{feeders} feeders"] = {"waited_percent": shares, "images_per_s": rates}
        engine.close()
    keep("caption_stand_in", {"images": len(images), "sleep_ms": 1000 * SLEEP_S, **found})


def compare(options: argparse.Namespace, folder: Path, images: Sequence[bytes]) -> None:
    import torch

    more: dict[str, Any] = {}
    settings: dict[str, Any] = {
        "model": DEMO_CAPTIONER,
        "dtype": "float32",
        "max_model_len": 512,
        "kv_cache_gib": 1,
    }
    config = json.loads((ROOT / DEMO_CAPTIONER / "config.json").read_text())
    if options.shape != "tiny":
        config, more = shaped(folder / "model", options.shape), {"load_format": "dummy"}
        settings = {"model": str(folder / "model"), "dtype": "bfloat16", "max_model_len": 1024}
        settings |= {"min_tokens": options.tokens, "max_tokens": options.tokens}
    kind = Caption(
        **settings, retries=0, feeders=options.feeders, quantization=options.quantization,
        in_flight=options.in_flight,
    )  # fmt: skip
    engine = Engine(kind, **more)
    stepped = [0.0]
    step = engine.engine.step

    def timed() -> Any:
        start = time.perf_counter()
        try:
            return step()
        finally:
            stepped[0] += time.perf_counter() - start

    engine.engine.step = timed
    store = Folder(folder / "run")
    tasks = shards(store, images, options.rows)
    tars = sorted((store.root / "download").rglob("*.tar"))
    plain(engine, kind, tars[:1])  # warm
    rates: dict[str, list[float]] = {"plain": [], "stage": [], "ready": []}
    outside: list[float] = []
    for turn in range(options.turns):
        for who in list(rates) if turn % 2 else list(reversed(rates)):
            inputs = made_ready(engine, kind, images, turn) if who == "ready" else []
            stepped[0], start = 0.0, time.perf_counter()
            number = (
                plain(engine, kind, tars) if who == "plain"
                else stage(kind, engine, store, tasks) if who == "stage"
                else ready(engine, kind, inputs)
            )  # fmt: skip
            wall_s = time.perf_counter() - start
            rates[who].append(number / wall_s)
            if who == "stage":
                outside.append(round(100 * (1 - stepped[0] / wall_s), 2))
    tokens = [row["re_caption_num_tokens"] for row in replies(kind, engine, store, tasks[0])]
    reply = sum(tokens) / len(tokens)
    prompt = len(
        engine.engine.renderer.render_cmpl([request_of(engine, kind, images[0])])[0]["prompt_token_ids"]
    )
    of_image = flops(config, prompt, reply)
    best = max(rates["stage"])
    peak = next(
        (
            n
            for name, n in PEAK_FLOPS.items()
            if torch.cuda.is_available() and name in torch.cuda.get_device_name()
        ),
        None,
    )
    keep(
        "caption" if options.shape == "tiny" else f"caption_{options.shape}",
        {
            "unit": "images/s", "images": len(images), "rows_a_shard": options.rows,
            "feeders": kind.num_feeders(),
            "stage_over_plain": ratio(rates["stage"], rates["plain"]),
            "stage_over_ready": ratio(rates["stage"], rates["ready"]),
            "outside_the_engines_step_percent": outside,
            "tokens_of_a_prompt": prompt, "tokens_of_a_reply": round(reply, 1),
            "reply_tokens_per_s": round(best * reply, 1),
            "gflop_an_image": round(of_image / 1e9, 2), "tflops": round(best * of_image / 1e12, 3),
            "flop_utilisation_percent": round(100 * best * of_image / peak, 1) if peak else None,
        },
    )  # fmt: skip
    engine.close()


def request_of(engine: Engine, kind: Caption, image: bytes) -> dict[str, Any]:
    ids, _ = engine.prompt_of(kind).tokens({})
    return {
        "prompt_token_ids": ids,
        "multi_modal_data": {"image": Image.open(io.BytesIO(image)).convert("RGB")},
    }


def replies(kind: Caption, engine: Engine, store: Folder, task: Task) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    with working(store, task) as here:
        Captioning([kind], engine)(here)
        store.delete(here.journal)
        rows: list[dict[str, Any]] = pq.read_table(here.output()).to_pylist()
    return [row for row in rows if row["re_caption_num_tokens"]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=("tiny", *SHAPES), default="tiny")
    parser.add_argument("--stand-in", action="store_true")
    parser.add_argument("--photos", type=int, default=600)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--feeders", type=int)
    parser.add_argument("--quantization", choices=("", "fp8"), default="")
    options = parser.parse_args()
    images = list(pictures(options.photos))
    with tempfile.TemporaryDirectory() as folder:
        (stand_in if options.stand_in else compare)(options, Path(folder), images)


if __name__ == "__main__":
    main()
