"""What a version is: its manifest, what of it may be read, and what a target does with it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired, Protocol

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from pydantic import Field, NonNegativeInt
from typing_extensions import TypedDict

from builder.core import Name, Recipe
from builder.errors import InputError, MovedError, VersionError
from builder.files import sha256_file
from builder.typed import from_json

HUB = "hf://datasets/"
MANIFEST = "manifest.json"
VERSION = re.compile(r"(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)")
# Folders of a version: nothing that is not in its manifest may lie there.
OURS = ("data/", "ledger/", "plots/")
_NAMES = (
    r"^(README\.md|(recipe|stats|croissant)\.json|tombstones\.parquet|plots/\w[\w.-]*"
    r"|data/(train|preview)-[0-9]{5,}-of-[0-9]{5,}\.parquet|ledger/train-[0-9]{5,}-of-[0-9]{5,}\.parquet)$"
)
_Label = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.+ -]{1,200}$")]


class File(TypedDict):
    """Of a version; `rows` where it is a parquet file."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: NonNegativeInt
    rows: NotRequired[NonNegativeInt]


class Batch(TypedDict):
    files: NonNegativeInt
    rows: NonNegativeInt


class Splits(TypedDict):
    train: NonNegativeInt
    preview: NonNegativeInt
    ledger: NonNegativeInt


class Manifest(TypedDict):
    """What a version promises.

    It may come from a stranger: its files are inside the version, and of the kinds that one has.
    """

    name: Name
    version: Annotated[str, Field(pattern=f"^{VERSION.pattern}$")]
    rows: Splits
    bytes: Splits
    content: NotRequired[_Label]
    made_with: NotRequired[dict[_Label, _Label]]
    batches: NotRequired[list[Batch]]  # of the metadata, in the order in which they came
    made_on: NotRequired[dict[_Label, Annotated[list[_Label], Field(max_length=2)]]]
    files: dict[Annotated[str, Field(pattern=_NAMES)], File]


@dataclass(frozen=True)
class Staged:
    """A version that is ready to go. A file that a target has, by its sha256, may be absent from `folder`."""

    folder: Path
    version: str
    manifest: dict[str, Any]
    beside: list[str] | None = None  # versions whose tombstones it obeys: all that the target had

    def check_beside(self, versions: list[str]) -> None:
        """Raises:
        MovedError: the target has got another version since, which may have removed rows.
        """
        come = [] if self.beside is None else [known for known in versions if known not in self.beside]
        if come:
            reason = f"version {come[-1]} was published while {self.version} was put together"
            raise MovedError(reason, "type the same command again")

    @property
    def tag(self) -> str:
        return f"v{self.version}"

    @property
    def rows(self) -> int:
        """Of a data set; a model has none."""
        return int(self.manifest.get("rows", {}).get("train", 0))

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Path -> sha256 and bytes of every file of the version but the manifest itself."""
        files: dict[str, dict[str, Any]] = self.manifest["files"]
        return files

    def promised(self) -> dict[str, tuple[str, int]]:
        """Path -> (sha256, bytes) of every file of the version."""
        manifest = self.folder / MANIFEST
        own = {MANIFEST: (sha256_file(manifest), manifest.stat().st_size)}
        return {name: (file["sha256"], file["bytes"]) for name, file in self.files.items()} | own


@dataclass(frozen=True)
class Published:
    """Where a version lies, whether this call put it there, and what that took."""

    place: str
    rows: int
    new: bool
    commit: str = ""
    plan: dict[str, Any] = field(default_factory=dict)  # files, bytes, commits and calls of a dry run


class Target(Protocol):
    def versions(self) -> list[str]:
        """Versions there, oldest first, as `1.2.0`."""

    def files(self, version: str) -> tuple[AbstractFileSystem, str]:
        """A file system and the root of a version in it."""

    def publish(self, staged: Staged, *, dry_run: bool = False, rebase: bool = False) -> Published:
        """Make the version visible, whole, once. Doing it again finishes it or says that it is done."""

    def how_to_delete(self, version: str) -> str:
        """The command that deletes a version for good."""


@dataclass(frozen=True)
class Version:
    """A version that was opened: its manifest and its recipe can be used."""

    fs: AbstractFileSystem
    root: str
    manifest: dict[str, Any]
    recipe: Recipe

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def read(self, name: str) -> bytes:
        return content(self.fs, self.root, name)


def opened(fs: AbstractFileSystem, root: str) -> Version:
    """The version that lies at `root`. Raises as `open_version`."""
    recipe = Recipe.from_json(content(fs, root, "recipe.json"), f"{root}/recipe.json")
    return Version(fs, root, manifest_of(fs, root), recipe)


def manifest_of(fs: AbstractFileSystem, root: str) -> dict[str, Any]:
    path = f"{root}/{MANIFEST}"
    manifest: dict[str, Any] = dict(from_json(Manifest, content(fs, root, MANIFEST), what=path))
    for name, file in manifest["files"].items():
        if name.endswith(".parquet") and "rows" not in file:
            reason = f"{path} cannot be used: files.{name} has no rows"
            raise InputError(reason, "get it again from where it was published")
    return manifest


def content(fs: AbstractFileSystem, root: str, name: str) -> bytes:
    """All of a small file of a version.

    Raises:
        InputError: it is missing, or no regular file inside the version.
    """
    hint = "get it from a copy, or delete what is left of that version"
    if isinstance(fs, LocalFileSystem) and not is_inside(root, name):
        reason = "is no regular file of this folder" if os.path.lexists(f"{root}/{name}") else "is missing"
        raise InputError(f"{root}/{name} {reason}", hint)
    try:
        read: bytes = fs.cat_file(f"{root}/{name}")
    except FileNotFoundError as error:
        raise InputError(f"{root}/{name} is missing", hint) from error
    return read


def is_inside(root: str, name: str) -> bool:
    """Is it a regular file below `root`, neither a link nor behind one?"""
    path = os.path.join(os.path.realpath(root), name)
    return os.path.realpath(path) == path and os.path.isfile(path)


def check_version(version: str) -> None:
    if not VERSION.fullmatch(version):
        raise VersionError(f"'{version}' is not a version", "for example --version 0.1.0")


def by_number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def next_version(versions: list[str]) -> str:
    """The first free patch version after the newest one."""
    major, minor, patch = by_number(versions[-1])
    return f"{major}.{minor}.{patch + 1}"
