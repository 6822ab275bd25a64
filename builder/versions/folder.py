"""Versions as folders."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from builder.errors import DamagedError, InputError, VersionError, command
from builder.files import lock, sha256_file, sync
from builder.versions.version import (
    MANIFEST,
    VERSION,
    Published,
    Staged,
    by_number,
    content,
    is_inside,
    manifest_of,
    next_version,
)


class Folder:
    """Versions as folders.

        TARGET/v0.1.0/    README.md, recipe.json, stats.json, manifest.json, plots/, data/, ledger/
        TARGET/latest     symbolic link to the newest

    A version is put together under a name that nobody loads, verified there, and moved into place by one
    rename.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def versions(self) -> list[str]:
        found = (path.name[1:] for path in self.path.glob("v*.*.*") if path.is_dir())
        return sorted((version for version in found if VERSION.fullmatch(version)), key=by_number)

    def files(self, version: str) -> tuple[AbstractFileSystem, str]:
        return LocalFileSystem(), os.path.abspath(self.path / f"v{version}")

    def how_to_delete(self, version: str) -> str:
        return command("rm", "-rf", self.path / f"v{version}")  # its files are read-only

    def publish(self, staged: Staged, *, dry_run: bool = False, rebase: bool = False) -> Published:
        """Raises:
        VersionError: the version exists with other bytes, or what was staged is not as the manifest says.
        """
        final, rows = self.path / staged.tag, staged.rows
        self.path.mkdir(parents=True, exist_ok=True)
        busy = f"another publish is at work in {self.path}"
        with lock(self.path / ".lock", busy, "wait for it, then type the same command again"):
            for leftover in self.path.glob(".staging-*"):
                shutil.rmtree(leftover)
            if final.exists():
                there = content(LocalFileSystem(), str(final), MANIFEST)
                if there != (staged.folder / MANIFEST).read_bytes():
                    hint = f"publish under a new one: --version {next_version(self.versions())}"
                    raise VersionError(f"{final} exists and holds other bytes; a version never changes", hint)
                self._point_at_latest()
                return Published(str(final), rows, False)
            if dry_run:
                size = sum(size for _, size in staged.promised().values())
                plan = {"files": len(staged.promised()), "bytes": size}
                return Published(str(final), rows, False, plan=plan)
            staged.check_beside(self.versions())
            if (latest := self.path / "latest").exists() and not latest.is_symlink():
                hint = "move it away: it is where the newest version is found"
                raise InputError(f"{latest} is there, and no link to a version", hint)
            staging = self.path / f".staging-{staged.tag}"
            held = {} if all((staged.folder / name).exists() for name in staged.files) else self._held()
            for name, (sha256, size) in staged.promised().items():
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                copies = [staged.folder / name] if (staged.folder / name).exists() else held.get(sha256, [])
                if not any(_link_if_whole(copy, staging / name, sha256, size) for copy in copies):
                    if copies:
                        reason = f"{copies[0]} is not what the manifest says: it was changed"
                        raise DamagedError(reason, "get it from a copy, or make it again")
                    hint = f"see what is left: {command('recap', 'verify', self.path)}"
                    raise DamagedError(f"no version in {self.path} holds {name} any more", hint)
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
