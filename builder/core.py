"""The nouns: Recipe, Stage, Task, Status, Record. Read this first.

A recipe lists its stages. A stage *is* its settings, one frozen dataclass; a worker opens it once and then turns one
shard after another into files. A task is one shard's work order. Its record, written last, is what makes it done.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ConfigDict, TypeAdapter, ValidationError

from builder.errors import InputError, RecipeError

Json = Any
T = TypeVar("T")
Work = Callable[["Task"], Mapping[str, int]]
"""Does one task: writes its outputs and returns the number of rows by status."""


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


def by_shard(name: str) -> tuple[int, str]:
    """Sorts `00042` and `download/00042.tar` by the shard's number, beyond 99999 too."""
    return len(name.rpartition("/")[2].partition(".")[0]), name


@dataclass(frozen=True)
class Task:
    """One shard's work order: what to read, where to write, and the key that its record will carry.

    `inputs` maps paths relative to the run directory, or names of outside files, to their sha256.
    """

    run: Path
    stage: str
    name: str  # the shard's number, `00042`, or `survey`
    key: str
    inputs: Mapping[str, str] = field(default_factory=dict)

    def input(self, stage: str, suffix: str = ".parquet") -> Path:
        """The only input from `stage` that ends in `suffix`."""
        (path,) = self.all_inputs(stage, suffix)
        return path

    def all_inputs(self, stage: str, suffix: str = ".parquet") -> list[Path]:
        """Inputs from `stage` in the order of their shards; a stage's survey is not among them."""
        names = sorted((p for p in self.inputs if p.startswith(f"{stage}/") and not p.startswith(f"{stage}/survey")), key=by_shard)
        return [self.run / name for name in names if name.partition(".")[2] == suffix.lstrip(".")]

    def output(self, suffix: str = ".parquet") -> Path:
        """Where to write; it gets its real name at the commit."""
        return self.folder / f".{self.name}{suffix}.part"

    @property
    def folder(self) -> Path:
        return self.run / self.stage

    @property
    def record(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def failure(self) -> Path:
        return self.folder / f"{self.name}.failed"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Settings of one step of the line. Subclasses add fields and override what they need."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # an unknown setting in a recipe.json is an error

    name: ClassVar[str]
    version: ClassVar[int] = 1  # raise it when the same settings give other bytes
    reads: ClassVar[tuple[str, ...]] = ()  # stages whose outputs of the same shard are this one's inputs
    surveys: ClassVar[tuple[str, ...]] = ()  # stages whose outputs of all shards the survey reads
    libraries: ClassVar[tuple[str, ...]] = ("pyarrow",)  # whose versions the record keeps
    paths: ClassVar[tuple[str, ...]] = ()  # settings that may name a place on this machine

    @property
    def shards_per_task(self) -> int:
        """How many source shards one task covers."""
        return 1

    def settings(self) -> dict[str, Json]:
        """What enters the key. Paths do not: a model folder, say, enters by its content."""
        return {name: value for name, value in asdict(self).items() if name not in ("workers",)}

    def portable(self) -> Stage:
        """The same settings without this machine's directories, as they are published."""
        names = {name: Path(value).name for name in self.paths if (value := getattr(self, name)) and Path(value).is_absolute()}
        return replace(self, **names)

    def num_workers(self) -> int:
        """Worker processes on one machine."""
        return 1

    def has_survey(self) -> bool:
        return bool(self.surveys)

    def survey_inputs(self, run: Path) -> dict[str, str]:
        """What the survey depends on besides the outputs of the stages in `surveys`: name -> sha256."""
        return {}

    def shard_inputs(self, run: Path, index: int) -> dict[str, str] | None:
        """What a shard depends on where that is not outputs of earlier stages: name -> sha256."""
        return None

    def check(self) -> None:
        """Look for what would fail hours later: a file that is not there, a setting that its library does not know.

        Raises:
            UserError: says what to change.
        """

    def survey(self, task: Task) -> Mapping[str, int]:
        """One pass over the whole run before the shards, committed as a task of its own; its outputs are inputs of every shard."""
        raise NotImplementedError

    def open(self) -> AbstractContextManager[Work]:
        """Load what the work needs, once per worker."""
        raise NotImplementedError


@dataclass(frozen=True)
class Recipe:
    """What makes a named artifact: its stages in order, and what its card says of it."""

    name: str
    stages: tuple[Stage, ...]
    title: str = ""
    license: str = "cc-by-4.0"
    description: str = ""

    def __post_init__(self) -> None:
        # Through the types once, so that 5 and 5.0 for a float are one setting and have one key.
        stages = tuple(parse(type(stage), asdict(stage), what=f"stage {stage.name}") for stage in self.stages)
        object.__setattr__(self, "stages", stages)

    def stage(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise RecipeError(f"recipe {self.name} has no stage '{name}'", f"its stages: {', '.join(s.name for s in self.stages)}")

    def to_json(self) -> str:
        """The resolved recipe, one setting a line, so that two of them can be compared."""
        stages = [{"stage": f"{type(s).__module__}:{type(s).__qualname__}", **asdict(s)} for s in self.stages]
        about = {"name": self.name, "title": self.title, "license": self.license, "description": self.description}
        return json.dumps({**about, "stages": stages}, indent=2, ensure_ascii=False) + "\n"

    def portable(self) -> Recipe:
        """The recipe as it is published."""
        return replace(self, stages=tuple(stage.portable() for stage in self.stages))

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe that `to_json` wrote.

        Only stages of the package `builder` are loaded: a recipe.json may come from anybody.
        """
        try:
            data = json.loads(text)
            stages = tuple(_stage_from_json(stage) for stage in data.pop("stages"))
            return cls(stages=stages, **data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RecipeError(f"not a recipe.json: {error}") from error


def _stage_from_json(data: dict[str, Json]) -> Stage:
    module, _, name = data.pop("stage").partition(":")
    if not module.startswith("builder.") and module not in sys.modules:  # a module that the user named is there already
        raise RecipeError(f"recipe.json names a stage of '{module}', which is not part of recapkit", "give the recipe as my_file.py:function")
    try:
        stage_type = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise RecipeError(f"recipe.json names '{module}:{name}': {error}") from error
    if not (isinstance(stage_type, type) and issubclass(stage_type, Stage)):
        raise RecipeError(f"recipe.json names '{module}:{name}', which is not a stage")
    return parse(stage_type, data, what=f"stage {stage_type.name}")


def parse(kind: type[T], value: Json, *, what: str) -> T:
    """`value`, from JSON or from a command line's string, as a `kind`.

    Raises:
        RecipeError: with the field and what was expected there.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"{what}: {place + ': ' if place else ''}{first['msg']} (got {first['input']!r})") from error


@dataclass(frozen=True)
class Record:
    """A task's commit record: `<stage>/<name>.json`, written last. No record, or another key: not done."""

    key: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]  # path relative to the run -> sha256
    bytes: Mapping[str, int]
    rows: Mapping[str, int]  # status -> rows
    seconds: float
    versions: Mapping[str, str]
    day: str = ""  # of the commit, UTC

    @classmethod
    def read(cls, path: Path) -> Record | None:
        try:
            record = cls(**json.loads(path.read_bytes()))
            return replace(record, versions=_one_of_each(json.dumps(record.versions)))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            return None  # cut off by a crash of the machine: not done


@cache
def _one_of_each(versions: str) -> Mapping[str, str]:
    """Records of a stage name the same versions: one object for all of them."""
    parsed: Mapping[str, str] = json.loads(versions)
    return parsed


def task_key(stage: Stage, inputs: Mapping[str, str], name: str) -> str:
    """sha256 of stage name, stage version, settings and input hashes: all that the outputs depend on."""
    parts = [stage.name, stage.version, name, stage.settings(), dict(sorted(inputs.items()))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def versions(libraries: tuple[str, ...]) -> dict[str, str]:
    """Versions of those distributions that are installed: vLLM comes under one of two names."""
    found = {}
    for name in ("recapkit", *libraries):
        with suppress(PackageNotFoundError):
            found[name] = installed_version(name)
    return found


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_parquet(table: pa.Table, path: Path, *, row_group_size: int = 10_000) -> None:
    """The one way to write rows: zstd, page index, no clock, so that the same rows are the same bytes.

    Pages end where the content says so: a changed row changes the bytes around it, not all that follow.
    """
    pq.write_table(table, path, compression="zstd", write_page_index=True, row_group_size=row_group_size, use_content_defined_chunking=True)


def read_rows(path: Path, columns: list[str] | None = None, *, batch: int = 1024) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file as dicts, with bounded memory."""
    with pq.ParquetFile(path) as file:
        for part in file.iter_batches(batch, columns=columns):
            yield from part.to_pylist()


def read_lines(path: Path) -> list[str]:
    """Of a text file that a user gives.

    Raises:
        InputError: it is not there, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}", "give a text file, UTF-8, one value a line") from error
