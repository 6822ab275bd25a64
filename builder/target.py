"""Where versions go: a folder or a repository of the Hub, behind one protocol.

my/folder                       my/folder/v1.2.0
hf://datasets/user/name         the tag v1.2.0 of user/name
either one followed by @v1.2.0  one version of it
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired, Protocol

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from pydantic import Field, NonNegativeInt
from typing_extensions import TypedDict

from builder.commit import lock, sync
from builder.core import Name, Recipe, from_json, sha256_file
from builder.errors import DamagedError, InputError, MovedError, VersionError, command

HUB = "hf://datasets/"
MANIFEST = "manifest.json"
VERSION = re.compile(r"(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)")
OURS = ("data/", "ledger/", "plots/")  # folders of a version: nothing that is not in its manifest may lie there
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


class Splits(TypedDict):
    train: NonNegativeInt
    preview: NonNegativeInt
    ledger: NonNegativeInt


class Manifest(TypedDict):
    """What a version promises. It may come from a stranger: its files are inside the version, and of the kinds that one has."""

    name: Name
    version: Annotated[str, Field(pattern=f"^{VERSION.pattern}$")]
    rows: Splits
    bytes: Splits
    content: NotRequired[_Label]
    made_with: NotRequired[dict[_Label, _Label]]
    made_on: NotRequired[dict[_Label, Annotated[list[_Label], Field(max_length=2)]]]
    files: dict[Annotated[str, Field(pattern=_NAMES)], File]


@dataclass(frozen=True)
class Staged:
    """A version that is ready to go. A file that a target holds already, by its sha256, may be absent from `folder`."""

    folder: Path
    version: str
    manifest: dict[str, Any]
    beside: list[str] | None = None  # versions whose tombstones it obeys: all that the target had

    def check_beside(self, versions: list[str]) -> None:
        """Raises:
        MovedError: the target has got another version since, which may have removed rows.
        """
        if self.beside is not None and (come := [version for version in versions if version not in self.beside]):
            raise MovedError(f"version {come[-1]} was published while {self.version} was put together", "type the same command again")

    @property
    def tag(self) -> str:
        return f"v{self.version}"

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


def split(place: str) -> tuple[str, str | None]:
    """`TARGET@v1.2.0` -> (TARGET, 1.2.0)."""
    target, _, version = place.rpartition("@v")
    return (target, version) if target and VERSION.fullmatch(version) else (place, None)


def check_named(place: str) -> None:
    """Raises:
    InputError: the name is empty, which would be the folder that somebody happens to be in.
    """
    if not place.strip():
        raise InputError("the target has no name", f"name a folder, or {HUB}user/name")


def target_of(text: str) -> Target:
    """The target that `text` names.

    Raises:
        InputError: an address that is neither a folder nor a Hub data set.
    """
    check_named(text)
    if text.startswith(HUB):
        from builder.hub import Hub

        return Hub(text.removeprefix(HUB))
    if "://" in text:
        raise InputError(f"{text} is no target", f"name a folder, or {HUB}user/name")
    return Folder(Path(text))


def version_files(place: str) -> tuple[AbstractFileSystem, str]:
    """File system and root of `TARGET@v1.2.0`, of the newest version of a target, or of a version's own folder."""
    text, version = split(place)
    check_named(text)
    if version is None and Path(text, MANIFEST).exists():
        return LocalFileSystem(), os.path.abspath(text)
    target = target_of(text)
    versions = target.versions()
    if not versions or (version and version not in versions):
        raise InputError(f"{text} has no version {version or ''}".rstrip(), f"it has: {', '.join(versions) or 'none'}")
    return target.files(version or versions[-1])


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


def open_version(place: str) -> Version:
    """The version that `place` names.

    Raises:
        InputError: there is none, or its manifest or its recipe is not what a version has.
    """
    return opened(*version_files(place))


def opened(fs: AbstractFileSystem, root: str) -> Version:
    """The version that lies at `root`. Raises as `open_version`."""
    recipe = Recipe.from_json(content(fs, root, "recipe.json"), f"{root}/recipe.json")
    return Version(fs, root, manifest_of(fs, root), recipe)


def manifest_of(fs: AbstractFileSystem, root: str) -> dict[str, Any]:
    manifest: dict[str, Any] = dict(from_json(Manifest, content(fs, root, MANIFEST), what=f"{root}/{MANIFEST}"))
    for name in (name for name, file in manifest["files"].items() if name.endswith(".parquet") and "rows" not in file):
        raise InputError(f"{root}/{MANIFEST} cannot be used: files.{name} has no rows", "get it again from where it was published")
    return manifest


def content(fs: AbstractFileSystem, root: str, name: str) -> bytes:
    """All of a small file of a version.

    Raises:
        InputError: it is missing, or no regular file inside the version.
    """
    if isinstance(fs, LocalFileSystem) and not is_inside(root, name):
        reason = "is no regular file of this folder" if os.path.lexists(f"{root}/{name}") else "is missing"
        raise InputError(f"{root}/{name} {reason}", "get it from a copy, or delete what is left of that version")
    try:
        read: bytes = fs.cat_file(f"{root}/{name}")
    except FileNotFoundError as error:
        raise InputError(f"{root}/{name} is missing", "get it from a copy, or delete what is left of that version") from error
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


class Folder:
    """Versions as folders.

        TARGET/v0.1.0/    README.md, recipe.json, stats.json, manifest.json, plots/, data/, ledger/
        TARGET/latest     symbolic link to the newest

    A version is put together under a name that nobody loads, verified there, and moved into place by one rename.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def versions(self) -> list[str]:
        names = [path.name[1:] for path in self.path.glob("v*.*.*") if VERSION.fullmatch(path.name[1:]) and path.is_dir()]
        return sorted(names, key=by_number)

    def files(self, version: str) -> tuple[AbstractFileSystem, str]:
        return LocalFileSystem(), os.path.abspath(self.path / f"v{version}")

    def how_to_delete(self, version: str) -> str:
        return command("rm", "-rf", self.path / f"v{version}")  # its files are read-only

    def publish(self, staged: Staged, *, dry_run: bool = False, rebase: bool = False) -> Published:
        """Raises:
        VersionError: the version exists with other bytes, or what was staged is not what the manifest promises.
        """
        final, rows = self.path / staged.tag, staged.manifest["rows"]["train"]
        self.path.mkdir(parents=True, exist_ok=True)
        with lock(self.path / ".lock", f"another publish is at work in {self.path}", "wait for it, then type the same command again"):
            for leftover in self.path.glob(".staging-*"):
                shutil.rmtree(leftover)
            if final.exists():
                if content(LocalFileSystem(), str(final), MANIFEST) != (staged.folder / MANIFEST).read_bytes():
                    raise VersionError(
                        f"{final} exists and holds other bytes; a version never changes",
                        f"publish under a new one: --version {next_version(self.versions())}",
                    )
                self._point_at_latest()
                return Published(str(final), rows, False)
            if dry_run:
                size = sum(size for _, size in staged.promised().values())
                return Published(str(final), rows, False, plan={"files": len(staged.promised()), "bytes": size})
            staged.check_beside(self.versions())
            if (latest := self.path / "latest").exists() and not latest.is_symlink():
                raise InputError(f"{latest} is there, and no link to a version", "move it away: it is where the newest version is found")
            staging = self.path / f".staging-{staged.tag}"
            held = {} if all((staged.folder / name).exists() for name in staged.files) else self._held()
            for name, (sha256, size) in staged.promised().items():
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                copies = [staged.folder / name] if (staged.folder / name).exists() else held.get(sha256, [])
                if not any(_link_if_whole(copy, staging / name, sha256, size) for copy in copies):
                    if copies:
                        raise DamagedError(f"{copies[0]} is not what the manifest says: it was changed", "get it from a copy, or make it again")
                    raise DamagedError(
                        f"no version in {self.path} holds {name} any more", f"see what is left: {command('recap', 'verify', self.path)}"
                    )
            for path in sorted(staging.rglob("*"), reverse=True):
                if path.is_file():
                    path.chmod(0o444)
                sync(path)
            os.rename(staging, final)
            self._point_at_latest()
        return Published(str(final), rows, True)

    def _point_at_latest(self) -> None:
        part = self.path / ".latest.part"
        part.unlink(missing_ok=True)
        part.symlink_to(f"v{self.versions()[-1]}")
        os.replace(part, self.path / "latest")
        sync(self.path)

    def _held(self) -> dict[str, list[Path]]:
        """sha256 -> files that ought to have it, of what the versions hold, newest first."""
        held: dict[str, list[Path]] = {}
        for version in reversed(self.versions()):
            fs, root = self.files(version)
            for name, file in manifest_of(fs, root)["files"].items():
                if is_inside(root, name):
                    held.setdefault(file["sha256"], []).append(Path(root, name))
        return held


def _link_if_whole(source: Path, target: Path, sha256: str, size: int) -> bool:
    target.unlink(missing_ok=True)
    link(source, target)
    return target.stat().st_size == size and sha256_file(target) == sha256


def link(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
