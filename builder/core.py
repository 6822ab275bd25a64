"""The nouns: Recipe, Stage, Task, Status, Record. Read this first.

A recipe lists its stages. A stage *is* its settings, one frozen dataclass; a worker opens it once and then turns one
shard after another into files. A task is one shard's work order. Its record, written last, is what makes it done.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import json
import math
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_type_hints

import charset_normalizer
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from builder.errors import InputError, RecipeError, UserError, command

Json = Any
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^\w[\w.-]{0,99}$")]
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
        names = sorted(
            (p for p in self.inputs if p.startswith(f"{stage}/") and not p.startswith(f"{stage}/survey")),
            key=by_shard,
        )
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

    @property
    def journal(self) -> Path:
        """What a stage may write down before it has finished; it goes when the record is there."""
        return self.folder / f"{self.name}.journal"


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
    once: ClassVar[tuple[str, ...]] = ()  # settings of one command, which a recipe.json does not keep

    @property
    def shards_per_task(self) -> int:
        """How many source shards one task covers."""
        return 1

    def settings(self) -> dict[str, Json]:
        """What enters the key. Paths do not: a model folder, say, enters by its content."""
        return {name: value for name, value in asdict(self).items() if name not in ("workers", *self.once)}

    def portable(self) -> Stage:
        """The same settings without this machine's directories, as they are published."""
        names = {
            name: Path(value).name
            for name in self.paths
            if (value := getattr(self, name)) and Path(value).is_absolute()
        }
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

    def makes_captions(self) -> tuple[str, ...]:
        """Caption columns that it adds."""
        return ()

    def names_captions(self) -> tuple[str, ...]:
        """Caption columns that its settings name; a stage before it makes each."""
        return ()

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
        # Through the types once, so that 5 and 5.0 for a float are one setting and have one key.
        stages = tuple(parse(type(stage), asdict(stage), what=f"stage {stage.name}") for stage in self.stages)
        object.__setattr__(self, "stages", stages)
        hints = get_type_hints(type(self), include_extras=True)
        for about in hints.keys() - {"stages"}:
            object.__setattr__(
                self, about, parse(hints[about], getattr(self, about), what=f"recipe: {about}")
            )
        names = [stage.name for stage in stages]
        for name in (name for name in names if names.count(name) > 1):
            raise RecipeError(f"recipe {self.name} has two stages '{name}'", "leave one of them out")
        made = ["org_caption"]
        for stage in stages:
            for missing in (name for name in stage.names_captions() if name not in made):
                reason = f"stage {stage.name} names the caption '{missing}', which no stage before it makes"
                raise RecipeError(reason, f"there are: {', '.join(made)}")
            made += stage.makes_captions()

    def check_order(self) -> None:
        """Raises:
        RecipeError: there are no stages, or one reads what does not stand before it.
        """
        if not self.stages:
            raise RecipeError(f"recipe {self.name} has no stages", "Recipe(name, (Source(...), ...))")
        for number, stage in enumerate(self.stages):
            before = {earlier.name for earlier in self.stages[:number]}
            for missing in (name for name in (*stage.reads, *stage.surveys) if name not in before):
                reason = f"recipe {self.name}: stage {stage.name} reads stage '{missing}', which does not stand before it"
                raise RecipeError(reason, "put it there")

    def stage(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise RecipeError(
            f"recipe {self.name} has no stage '{name}'",
            f"its stages: {', '.join(s.name for s in self.stages)}",
        )

    def to_json(self) -> str:
        """The resolved recipe, one setting a line, so that two of them can be compared."""
        stages = [
            {"stage": type(s).__name__.lower(), **{k: v for k, v in asdict(s).items() if k not in s.once}}
            for s in self.stages
        ]
        about = {
            "name": self.name,
            "title": self.title,
            "license": self.license,
            "description": self.description,
        }
        # Left out where there is none: a recipe.json from before there were any stays as it is.
        source = {"source": asdict(self.source)} if self.source else {}
        return json.dumps({**about, **source, "stages": stages}, indent=2, ensure_ascii=False) + "\n"

    def portable(self) -> Recipe:
        """The recipe as it is published."""
        return replace(self, stages=tuple(stage.portable() for stage in self.stages))

    @classmethod
    def from_json(cls, text: str | bytes, what: str = "recipe.json") -> Recipe:
        """The recipe that `to_json` wrote. `what` is what an error calls it.

        Only stages of the package `builder` are loaded: a recipe.json may come from anybody.
        """
        hint = "recap build writes one into its run"
        try:
            data = _adapter(dict[str, Any]).validate_json(text)
            written = parse(list[dict[str, Any]], data.pop("stages"), what="stages")
            stages = tuple(_stage_from_json(dict(stage)) for stage in written)
            return cls(stages=stages, **data)
        except ValidationError as error:
            raise RecipeError(f"{what}: not a recipe.json: {_first(error)}", hint) from error
        except UserError as error:
            raise RecipeError(f"{what}: not a recipe.json: {error.message}", error.hint) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RecipeError(f"{what}: not a recipe.json: {type(error).__name__}: {error}", hint) from error


def _stage_from_json(data: dict[str, Json]) -> Stage:
    """A stage by the name of its type; before 2026-11-26 a recipe.json named its type by an import path, `builder.source:Source`."""
    given = str(data.pop("stage"))
    named = given.rpartition(":")[2].lower()
    with suppress(ImportError):
        if named.isidentifier():
            importlib.import_module(f"builder.stages.{named}")
    found = [kind for kind in _stage_types(Stage) if kind.__name__.lower() == named]
    if not found:
        raise RecipeError(
            f"recipe.json names a stage '{given:.200}', which is not part of recapkit",
            "give the recipe as my_file.py:function",
        )
    return parse(found[-1], data, what=f"stage {found[-1].name}")


def _stage_types(kind: type[Stage]) -> Iterator[type[Stage]]:
    for one in kind.__subclasses__():
        yield one
        yield from _stage_types(one)


def parse(kind: type[T], value: Json, *, what: str) -> T:
    """`value`, from JSON or from a command line's string, as a `kind`.

    Raises:
        RecipeError: with the field and what was expected there.
    """
    try:
        checked: T = _adapter(kind).validate_python(value)
        return checked
    except ValidationError as error:
        raise RecipeError(f"{what}: {_first(error)}") from error


def from_json(kind: type[T], text: str | bytes, *, what: str) -> T:
    """JSON that may come from anybody, as a `kind`.

    Raises:
        InputError: with what was expected, and where.
    """
    try:
        checked: T = _adapter(kind).validate_json(text)
        return checked
    except ValidationError as error:
        raise InputError(
            f"{what} cannot be used: {_first(error)}", "get it again from where it was published"
        ) from error


_adapters: dict[Any, TypeAdapter[Any]] = {}


def _adapter(kind: Any) -> TypeAdapter[Any]:
    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind]


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, in one line."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part)[:80] for part in first["loc"][:5])
    if first["type"] == "json_invalid":  # of a file that is no JSON nothing is told: it may be any file
        return str(first["msg"])[:200]
    got = repr(first["input"])
    return f"{place + ': ' if place else ''}{first['msg'][:200]} (got {got if len(got) <= 80 else got[:77] + '...'})"


_OUTPUT = re.compile(r"\w+/\w[\w.-]*")  # relative to the run


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
            record: Record = _adapter(cls).validate_json(read_file(path))
        except ValidationError:
            return None  # cut off by a crash of the machine
        except InputError:
            if path.exists():
                raise
            return None
        if record.outputs.keys() != record.bytes.keys() or not all(map(_OUTPUT.fullmatch, record.outputs)):
            return None
        return replace(record, versions=_one_of_each(json.dumps(record.versions)))


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


def sha256_known(path: Path) -> str:
    """As `sha256_file`, of a file that is asked about for every shard: read again when its size or time has changed."""
    stat = path.stat()
    return _sha256_of(path, stat.st_size, stat.st_mtime_ns)


@cache
def _sha256_of(path: Path, _bytes: int, _mtime_ns: int) -> str:
    return sha256_file(path)


def write_parquet(table: pa.Table, path: Path, *, row_group_size: int = 10_000) -> None:
    """The one way to write rows: zstd, page index, no clock, so that the same rows are the same bytes.

    Pages end where the content says so: a changed row changes the bytes around it, not all that follow.
    """
    pq.write_table(
        table,
        path,
        compression="zstd",
        write_page_index=True,
        row_group_size=row_group_size,
        use_content_defined_chunking=True,
    )


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
    data = read_file(path)
    try:
        return data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        encoding = encoding_of(data)
        hint = f"convert it: {command('iconv', '-f', encoding, '-t', 'utf-8', path)} > FILE"
        raise InputError(f"{path} is not UTF-8; it looks like {encoding}", hint) from None


def read_file(path: Path) -> bytes:
    """All of a file.

    Raises:
        InputError: it is not there, or is no regular file: a pipe would be waited for.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path} is no regular file", "name a file")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", "name a file that is there") from error


def matching(fs: AbstractFileSystem, path: str) -> list[str]:
    """Regular files that a file's name, a folder or a pattern names, hidden ones not. What is there is no pattern, nor is how a path begins."""
    if fs.isdir(path):
        found = fs.find(path)
    elif fs.exists(path):
        found = [path]
    else:
        there, rest = path, ""
        while there and not fs.exists(there):
            there, slash, last = there.rpartition("/")
            rest = f"{slash}{last}{rest}"
        found = fs.glob(glob.escape(there) + rest)
    return [
        name
        for name in found
        if fs.isfile(name) and (name == path or not name.rpartition("/")[2].startswith("."))
    ]


def finite(data: Any) -> Any:
    """JSON data without what JSON has no number for: a mean over nothing, or over somebody's NaN."""
    if isinstance(data, dict):
        return {name: finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def encoding_of(data: bytes) -> str:
    """Which encoding bytes that are not UTF-8 look like."""
    best = charset_normalizer.from_bytes(data[:100_000]).best()
    return best.encoding if best else "an unknown one"
