"""Where versions go: a folder or a repository of the Hub, behind one protocol.

my/folder                       my/folder/v1.2.0
hf://datasets/user/name         the tag v1.2.0 of user/name
either one followed by @v1.2.0  one version of it
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from builder.commit import lock, sync
from builder.core import sha256_file
from builder.errors import InputError, VersionError

HUB = "hf://datasets/"
MANIFEST = "manifest.json"
VERSION = re.compile(r"\d+\.\d+\.\d+", re.ASCII)
OURS = ("data/", "ledger/", "plots/")  # folders of a version: nothing that is not in its manifest may lie there


@dataclass(frozen=True)
class Staged:
    """A version that is ready to go. A file that a target holds already, by its sha256, may be absent from `folder`."""

    folder: Path
    version: str
    manifest: dict[str, Any]

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


def target_of(text: str) -> Target:
    """The target that `text` names.

    Raises:
        InputError: an address that is neither a folder nor a Hub data set.
    """
    if text.startswith(HUB):
        from builder.hub import Hub

        return Hub(text.removeprefix(HUB))
    if "://" in text:
        raise InputError(f"{text} is no target", f"name a folder, or {HUB}user/name")
    return Folder(Path(text))


def version_files(place: str) -> tuple[AbstractFileSystem, str]:
    """File system and root of `TARGET@v1.2.0`, of the newest version of a target, or of a version's own folder."""
    text, version = split(place)
    if version is None and Path(text, MANIFEST).exists():
        return LocalFileSystem(), os.path.abspath(text)
    target = target_of(text)
    versions = target.versions()
    if not versions or (version and version not in versions):
        raise InputError(f"{text} has no version {version or ''}".rstrip(), f"it has: {', '.join(versions) or 'none'}")
    return target.files(version or versions[-1])


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
        names = [path.name[1:] for path in self.path.glob("v*.*.*") if VERSION.fullmatch(path.name[1:])]
        return sorted(names, key=by_number)

    def files(self, version: str) -> tuple[AbstractFileSystem, str]:
        return LocalFileSystem(), os.path.abspath(self.path / f"v{version}")

    def how_to_delete(self, version: str) -> str:
        return f"rm -r {self.path / f'v{version}'}"

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
                if (final / MANIFEST).read_bytes() != (staged.folder / MANIFEST).read_bytes():
                    raise VersionError(
                        f"{final} exists and holds other bytes; a version never changes",
                        f"publish under a new one: --version {next_version(self.versions())}",
                    )
                self._point_at_latest()
                return Published(str(final), rows, False)
            if dry_run:
                size = sum(size for _, size in staged.promised().values())
                return Published(str(final), rows, False, plan={"files": len(staged.promised()), "bytes": size})
            staging = self.path / f".staging-{staged.tag}"
            held = self._held()
            for name, (sha256, size) in staged.promised().items():
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                source = staged.folder / name
                link(source if source.exists() else held[sha256], staging / name)
                if sha256_file(staging / name) != sha256 or (staging / name).stat().st_size != size:
                    raise VersionError(f"{source} is not what the manifest says", "it was changed after it was built; type the same command again")
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

    def _held(self) -> dict[str, Path]:
        """sha256 -> file, of what the versions hold."""
        held: dict[str, Path] = {}
        for version in self.versions():
            folder = self.path / f"v{version}"
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            held |= {file["sha256"]: folder / name for name, file in manifest["files"].items()}
        return held


def link(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
