"""The nouns: Recipe, Stage, Task, Status, Record. Read this first.

A recipe lists its stages. A stage *is* its settings, one frozen dataclass; a worker opens it once and then
turns one shard after another into files. A task is one shard's work order. Its record, written last, is what
makes it done. A thousand shards are a block; what only the whole run can answer is a `Question`, asked block
by block.
"""

from __future__ import annotations

import builtins
import hashlib
import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from enum import StrEnum
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_type_hints

from pydantic import ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError

from builder.errors import RecipeError, UserError
from builder.store import Store
from builder.typed import first_error, parse

Json = Any
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^\w[\w.-]{0,99}$")]
Identifier = Annotated[str, Field(pattern=r"^[a-zA-Z][a-zA-Z0-9_]{0,62}$")]
Work = Callable[["Task"], Mapping[str, int]]
"""Does one task: writes its outputs and returns the number of rows by status."""

FOLDERS = ("uids", "claimed", "measured", "versions", "card", "logs")  # of a run, besides stages'
_STAGE_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9_]{0,62}")
RUN = "run"  # stands for a block in the names of what is of the whole run
DIGITS = 8  # of a key, in the names of the outputs
_KEY_DIGITS = re.compile(f"[0-9a-f]{{{DIGITS}}}")


class Status(StrEnum):
    """How far a row came. Closed: every source row has exactly one at every stage."""

    OK = "ok"
    INVALID_URL = "invalid_url"  # not http(s), no host, or not a URL at all
    DEAD_LINK = "dead_link"  # the server says no: 4xx, or the name does not resolve
    UNAVAILABLE = "unavailable"  # 429, 5xx or a broken connection, still after the retries
    TIMEOUT = "timeout"
    BLOCKED = "blocked"  # leads to an address that is not public
    OPTED_OUT = "opted_out"  # X-Robots-Tag: noai and its like
    TOO_LARGE = "too_large"  # bytes, or pixels before decoding
    HASH_MISMATCH = "hash_mismatch"  # another image than the one in the metadata
    UNDECODABLE = "undecodable"
    DUPLICATE_IMAGE = "duplicate_image"  # one image behind many URLs: a placeholder
    REMOVED = "removed"  # a tombstone names it: somebody asked for its removal
    CAPTION_FAILED = "caption_failed"


TRANSPORT = (Status.TIMEOUT, Status.UNAVAILABLE)  # what another day, or a better line, may change


@dataclass(frozen=True)
class Resources:
    """What one worker of a stage takes: cores while it works, GPUs (or a share of one) and memory while it is
    there.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    memory_gib: float = 0.0


@dataclass(frozen=True)
class Task:
    """One work order: what to read, the key that its record will carry and, in a worker, where to write.

    Objects of the run have names, `<stage>/<block>/<shard>.<digits of the key><suffix>`; a worker finds them
    in `files`.
    """

    stage: str
    block: str  # its number, `00003`, or `run`
    name: str  # the shard's number, `00042`, or what else the task is for
    key: str
    inputs: Mapping[str, str] = field(default_factory=dict)  # objects of the run -> sha256
    outside: Mapping[str, str] = field(default_factory=dict)  # what else the outputs depend on -> sha256
    settings: Mapping[str, Json] = field(default_factory=dict)  # for the record: what made the key what it is
    attempt: int = 0  # how often rows of it were done again on purpose
    again: tuple[str, ...] = ()  # statuses of rows to do again; the other rows are taken from `earlier`
    earlier: Mapping[str, str] = field(default_factory=dict)  # its outputs of before -> sha256, if known
    hints: tuple[str, ...] = ()  # objects that may save work and do not change what is published
    files: Mapping[str, Path] = field(default_factory=dict)  # object -> where it can be read
    scratch: Path = Path()  # where outputs are written; it goes when the task is done
    counts: dict[str, int] = field(default_factory=dict)  # what the work counts besides rows by status
    loading: list[float] = field(default_factory=list)  # seconds that it took to load what others use too
    store: Store | None = None  # for what outlives a crash before the task is done: its journal

    def input(self, stage: str, suffix: str = ".parquet") -> Path:
        """The only input from `stage` that ends in `suffix`."""
        (path,) = self.all_inputs(stage, suffix)
        return path

    def all_inputs(self, stage: str, suffix: str = ".parquet") -> list[Path]:
        """Inputs from `stage` in the order of their shards."""
        found = (Object.parse(name) for name in self.inputs)
        chosen = [one for one in found if one.stage == stage and one.suffix == suffix]
        return [self.files[one.name] for one in sorted(chosen, key=Object.order)]

    def output(self, suffix: str = ".parquet") -> Path:
        """Where to write; it becomes an object at the commit."""
        return self.scratch / f"out{suffix}"

    def object(self, suffix: str) -> str:
        """The name of an output."""
        both = f"{self.key} {self.attempt}"
        digits = hashlib.sha256(both.encode()).hexdigest() if self.attempt else self.key
        return f"{self.folder}/{self.name}.{digits[:DIGITS]}{suffix}"

    @property
    def folder(self) -> str:
        return f"{self.stage}/{self.block}"

    @property
    def journal(self) -> str:
        """What a stage writes down before it has finished; it goes when the record is there."""
        return f"{self.folder}/{self.name}.journal"

    @property
    def failure(self) -> str:
        """Why it could not be done, until it can."""
        return f"{self.folder}/{self.name}.failed"


@dataclass(frozen=True)
class Object:
    """The parts of an object's name; those of the first version have neither block nor digits."""

    name: str
    stage: str
    shard: str
    suffix: str

    @staticmethod
    @lru_cache(maxsize=1 << 16)  # a block's names are asked about by every stage that reads them
    def parse(name: str) -> Object:
        stage, _, rest = name.partition("/")
        shard, dot, suffix = rest.rpartition("/")[2].partition(".")
        digits, more, after = suffix.partition(".")
        if more and _KEY_DIGITS.fullmatch(digits):
            suffix = after
        return Object(name, stage, shard, dot + suffix)

    def order(self) -> tuple[int, str]:
        """By the shard's number, beyond 99999 too."""
        return len(self.shard), self.shard

    def plain(self) -> str:
        """Without block and digits: what it is, whichever key made it."""
        return f"{self.stage}/{self.shard}{self.suffix}"


Workers = Annotated[str, Field(pattern=r"^[1-9]\d{0,6}(-[1-9]\d{0,6})?$")] | PositiveInt | None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Settings of one step of the line. Subclasses add fields, give `name` its default and override what they
    need.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # an unknown setting in a recipe.json is an error

    version: ClassVar[int] = 1  # raise it when the same settings give other bytes, a changed default included
    effort: ClassVar[tuple[str, ...]] = ()  # settings that say how hard to try, and change no output
    once: ClassVar[tuple[str, ...]] = ()  # settings of one command, which a recipe.json does not keep
    paths: ClassVar[tuple[str, ...]] = ()  # settings that may name a place on this machine
    libraries: ClassVar[tuple[str, ...]] = ("pyarrow",)  # whose versions the record keeps
    costly: ClassVar[bool] = False  # finished shards are not done again without being asked for
    groups: ClassVar[bool] = False  # a task covers `shards_per_task` shards
    # Its work takes the next task before it is done with one: executors set its `next_task`, which gives one
    # or None, and `is_loaded`, to be told False before it loads what may be too large, and then True.
    ahead: ClassVar[bool] = False
    remembers: ClassVar[bool] = False  # its tasks get their outputs of before, whatever key they had
    hint: ClassVar[str] = ""  # a question whose answer from the blocks that are there already saves work

    name: str
    # Of a build, not of the artifact: workers on all machines, at most, `8`, or between two numbers, `1-64`;
    # as many as they have room for unless given.
    workers: Workers = None

    def reads(self) -> tuple[str, ...]:
        """Stages whose outputs of the same shards are inputs: all of them, `download`, or one,
        `download.parquet`.
        """
        return ()

    def asks(self) -> tuple[Question, ...]:
        """Questions over the whole run whose answers are inputs of every shard."""
        return ()

    @property
    def shards_per_task(self) -> int:
        """How many source shards one task covers; a task never reaches over the end of a block."""
        return 1

    def settings(self) -> dict[str, Json]:
        """What enters the key: settings that shape the output, where they differ from their defaults.

        Paths do not: a model folder, say, enters by its content.
        """
        left_out = {"name", "workers", *self.effort, *self.once}
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in left_out and getattr(self, name) != self.default(name)
        }

    @classmethod
    def default(cls, setting: str) -> Json:
        (found,) = (f for f in fields(cls) if f.name == setting)
        if found.default_factory is not MISSING:
            return found.default_factory()
        return found.default

    @classmethod
    def from_before(cls, data: dict[str, Json]) -> dict[str, Json]:
        """Settings that a recipe.json of before means, where its defaults were others."""
        return data

    def portable(self) -> Stage:
        """The same settings without this machine's directories, as they are published."""
        values = {name: getattr(self, name) for name in self.paths}
        names: dict[str, Json] = {
            name: Path(value).name for name, value in values.items() if value and Path(value).is_absolute()
        }
        return replace(self, workers=None, **names)

    def num_workers(self) -> int:
        """Worker processes on one machine, at most."""
        return 1

    def bounds(self) -> tuple[int, float]:
        """Workers on all machines, at least while there may be work for them, and at most."""
        least, _, most = str(self.workers or "inf").rpartition("-")
        return int(least or 0), float(most)

    def likely_workers(self) -> int:
        """Of a build that is not there: as many as the user has set, or as this machine would have."""
        most = self.bounds()[1]
        return max(1, int(most) if most < float("inf") else self.num_workers())

    def resources(self) -> Resources:
        """What one worker takes."""
        return Resources()

    def after(self, earlier: tuple[Stage, ...]) -> Stage:
        """The stage in its place: what it learns from the stages before it, filled in."""
        return self

    def makes_captions(self) -> tuple[str, ...]:
        """Caption columns that it adds."""
        return ()

    def makes_ratings(self) -> tuple[str, ...]:
        """Columns of numbers, about captions, that it adds."""
        return ()

    def makes_scores(self) -> tuple[str, ...]:
        """Captions of which it adds a cosine."""
        return ()

    def warns(self, counts: Mapping[str, int]) -> list[str]:
        """What a user should be told of what it counted in a build."""
        return []

    def shares(self) -> Json:
        """What a worker of it has loaded: one worker does all stages of which this is the same; None: its own
        alone.
        """
        return None

    def names_captions(self) -> tuple[str, ...]:
        """Caption columns that its settings name; a stage before it makes each."""
        return ()

    def check(self) -> None:
        """Look for what would fail hours later: a missing file, a setting that its library does not know.

        Raises:
            UserError: says what to change.
        """

    def open(self) -> AbstractContextManager[Work]:
        """Load what the work needs, once per worker."""
        raise NotImplementedError

    def open_with(self, others: Sequence[Stage]) -> AbstractContextManager[Work]:
        """The same for others too, which share what it loads."""
        return self.open()


@dataclass(frozen=True, kw_only=True)
class Question(Stage):
    """What only the whole run can answer: a part for every block of `of`'s outputs, and one answer from the
    parts.

    Rows that came later do not change the answer to earlier ones: there is an answer for every batch of
    metadata, from the parts up to it.
    """

    of: str

    def part(self, task: Task) -> Mapping[str, int]:
        """One block: `task` has its shards' outputs of `of`."""
        raise NotImplementedError

    def answer(self, task: Task) -> Mapping[str, int]:
        """`task` has the parts. Memory is bounded whatever their number."""
        raise NotImplementedError

    @contextmanager
    def open(self) -> Iterator[Work]:
        yield lambda task: self.answer(task) if task.block == RUN else self.part(task)


@dataclass(frozen=True)
class SourceSet:
    """The data set whose URLs and alt text are recaptioned. `url` is the page that states its licence."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    url: str
    license: str  # an id of the Hub; `unknown`: none is stated; `other`: one that the Hub has no id for
    citation: str = ""


@dataclass(frozen=True)
class Recipe:
    """What makes a named artifact: its stages in order, and what its card says of it."""

    name: Name
    stages: tuple[Stage, ...]
    title: str = ""
    license: str = "unknown"  # of the captions and the metadata: an id of the Hub, stated and not guessed
    description: str = ""
    source: SourceSet | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.stages, list | tuple) or not all(
            isinstance(stage, Stage) for stage in self.stages
        ):
            raise RecipeError(
                f"recipe {self.name}: stages are a tuple of stages, not {self.stages!r:.80}",
                "Recipe(name, (Source(...), ...))",
            )
        stages: tuple[Stage, ...] = ()
        made = ["org_caption"]
        for given in self.stages:
            # Through the types once, so that 5 and 5.0 for a float are one setting and have one key.
            stage = parse(type(given), asdict(given), what=f"stage {given.name}").after(stages)
            if not _STAGE_NAME.fullmatch(stage.name) or stage.name in FOLDERS:
                reason = f"recipe {self.name} has a stage '{stage.name:.80}', which cannot be a folder's name"
                raise RecipeError(reason, "letters, digits and _, and none of " + ", ".join(FOLDERS))
            if stage.name in (earlier.name for earlier in stages):
                reason = f"recipe {self.name} has two stages '{stage.name}'"
                raise RecipeError(reason, "leave one of them out")
            for missing in (name for name in stage.names_captions() if name not in made):
                reason = f"stage {stage.name} names the caption '{missing}', which no stage before it makes"
                raise RecipeError(reason, f"there are: {', '.join(made)}")
            made += stage.makes_captions()
            stages += (stage,)
        object.__setattr__(self, "stages", stages)
        hints = get_type_hints(type(self), include_extras=True)
        for about in hints.keys() - {"stages"}:
            value = parse(hints[about], getattr(self, about), what=f"recipe: {about}")
            object.__setattr__(self, about, value)

    def check_order(self) -> None:
        """Raises:
        RecipeError: there are no stages, or one reads what does not stand before it.
        """
        if not self.stages:
            raise RecipeError(f"recipe {self.name} has no stages", "Recipe(name, (Source(...), ...))")
        before: set[str] = set()
        for stage in self.stages:
            asked = (question.of for question in stage.asks())
            read = (name.partition(".")[0] for name in stage.reads())
            for missing in (name for name in (*read, *asked) if name not in before):
                reason = f"stage {stage.name} reads stage '{missing}', which does not stand before it"
                raise RecipeError(f"recipe {self.name}: {reason}", "put it there")
            before.add(stage.name)

    def stage(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        there = ", ".join(stage.name for stage in self.stages)
        raise RecipeError(f"recipe {self.name} has no stage '{name}'", f"its stages: {there}")

    def captions(self) -> tuple[str, ...]:
        """The caption columns that its stages make, in order."""
        return tuple(name for stage in self.stages for name in stage.makes_captions())

    def to_json(self) -> str:
        """The resolved recipe, one setting a line, so that two of them can be compared."""
        stages = []
        for stage in self.stages:
            settings = {name: value for name, value in asdict(stage).items() if name not in stage.once}
            stages.append({"stage": type(stage).__name__.lower(), **settings})
        about = {n: getattr(self, n) for n in ("name", "title", "license", "description")}
        # Left out where there is none: a recipe.json from before there were any stays as it is.
        source = {"source": asdict(self.source)} if self.source else {}
        return json.dumps({**about, **source, "stages": stages}, indent=2, ensure_ascii=False) + "\n"

    def portable(self) -> Recipe:
        """The recipe as it is published."""
        return replace(self, stages=tuple(stage.portable() for stage in self.stages))

    @classmethod
    def from_json(cls, text: str | bytes, what: str = "recipe.json") -> Recipe:
        """The recipe that `to_json` wrote. `what` is what an error calls it.

        A stage is found by the name of its type among those of builder/stages and those that the user has
        loaded: a recipe.json may come from anybody, and imports nothing of theirs.
        """
        hint = "recap build writes one into its run"
        try:
            data = TypeAdapter(dict[str, Any]).validate_json(text)
            written = parse(list[dict[str, Any]], data.pop("stages"), what="stages")
            stages = tuple(stage for one in written for stage in _stages_from_json(dict(one)))
            return cls(stages=stages, **data)
        except ValidationError as error:
            raise RecipeError(f"{what}: not a recipe.json: {first_error(error)}", hint) from error
        except UserError as error:
            raise RecipeError(f"{what}: not a recipe.json: {error.message}", error.hint) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"{what}: not a recipe.json: {type(error).__name__}: {error}"
            raise RecipeError(reason, hint) from error


def _stages_from_json(data: dict[str, Json]) -> list[Stage]:
    """The stage that `data` names; several for what the first version had in one."""
    given = str(data.pop("stage"))
    named = given.rpartition(":")[2].lower()  # the first version named a type by its import path
    with suppress(ImportError):
        if named.isidentifier():
            importlib.import_module(f"builder.stages.{named}")
    kinds = (kind for kind in _subclasses(Stage) if not issubclass(kind, Question))
    found = [kind for kind in kinds if kind.__name__.lower() == named]
    if not found:
        raise RecipeError(
            f"recipe.json names a stage '{given:.200}', which is not part of recapkit",
            "give the recipe as my_file.py:function",
        )
    specs = parse(list[dict[str, Any]], data.pop("specs"), what="specs") if "specs" in data else [{}]
    data = found[-1].from_before(data)
    return [parse(found[-1], data | spec, what=f"stage {named}") for spec in specs]


def _subclasses(kind: type[Stage]) -> Iterator[type[Stage]]:
    for one in kind.__subclasses__():
        yield one
        yield from _subclasses(one)


_OUTPUT = re.compile(r"\w+/(\w+/)?\w[\w.-]*")  # relative to the run


@dataclass(frozen=True)
class Record:
    """A task's commit record, written last. No record, or another key: not done. What older ones lack has a
    default.
    """

    key: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)  # object -> sha256
    bytes: Mapping[str, int] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)  # status -> rows
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    day: str = ""  # of the commit, UTC
    settings: Mapping[str, Json] = field(default_factory=dict)  # that the key was made of
    outside: Mapping[str, str] = field(default_factory=dict)  # inputs that are not objects of the run
    attempt: int = 0  # how often rows were done again on purpose
    dropped: tuple[str, ...] = ()  # outputs that were deleted on purpose
    counts: Mapping[str, int] = field(default_factory=dict)  # what was counted besides rows
    lease: int = 0  # number of the lease of the build that committed it

    @classmethod
    def from_json(cls, data: str | builtins.bytes) -> Record | None:
        """None where it is none: cut off by a crash of the machine, or a name that leads elsewhere."""
        try:
            record = _RECORD.validate_json(data)
        except ValidationError:
            return None
        if record.outputs.keys() != record.bytes.keys() or not all(map(_OUTPUT.fullmatch, record.outputs)):
            return None
        return record

    def to_json(self) -> str:
        """Without what is empty."""
        kept = {name: value for name, value in vars(self).items() if value or name == "key"}
        return json.dumps(kept, indent=1)

    def output(self, suffix: str) -> str:
        """The object whose name ends so."""
        return next(name for name in self.outputs if Object.parse(name).suffix == suffix)


_RECORD = TypeAdapter(Record)


def task_key(
    stage: Stage,
    name: str,
    inputs: Mapping[str, str],
    outside: Mapping[str, str],
    settings: Mapping[str, Json],
) -> str:
    """sha256 of stage, its version and settings, and input hashes: all that the outputs depend on.

    Of an input counts what it is, not which key made it: where a stage is done again and its bytes are the
    same, what follows is not.
    """
    plain = sorted((Object.parse(input_).plain(), sha256) for input_, sha256 in inputs.items())
    parts = [stage.name, stage.version, name, settings, plain, sorted(outside.items())]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def versions(libraries: tuple[str, ...]) -> dict[str, str]:
    """Versions of those distributions that are installed: vLLM comes under one of two names."""
    found = {name: _version_of(name) for name in ("recapkit", *libraries)}
    return {name: version for name, version in found.items() if version}


@cache
def _version_of(library: str) -> str | None:
    with suppress(PackageNotFoundError):
        return installed_version(library)
    return None
