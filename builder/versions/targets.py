"""Where versions go: a folder or a repository of the Hub, behind one protocol.

my/folder                       my/folder/v1.2.0
hf://datasets/user/name         the tag v1.2.0 of user/name
either one followed by @v1.2.0  one version of it
"""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from builder import tombstones
from builder.errors import InputError
from builder.versions.folder import Folder
from builder.versions.version import HUB, MANIFEST, VERSION, Target, Version, content, manifest_of, opened


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
        from builder.versions.hub import Hub  # with the Hub's client, which takes its time to load

        return Hub(text.removeprefix(HUB))
    if "://" in text:
        raise InputError(f"{text} is no target", f"name a folder, or {HUB}user/name")
    return Folder(Path(text))


def version_files(place: str) -> tuple[AbstractFileSystem, str]:
    """File system and root of `TARGET@v1.2.0`, of a target's newest version, or of a version's own folder."""
    text, version = split(place)
    check_named(text)
    if version is None and Path(text, MANIFEST).exists():
        return LocalFileSystem(), os.path.abspath(text)
    target = target_of(text)
    versions = target.versions()
    if not versions or (version and version not in versions):
        reason = f"{text} has no version {version or ''}".rstrip()
        raise InputError(reason, f"it has: {', '.join(versions) or 'none'}")
    return target.files(version or versions[-1])


def open_version(place: str) -> Version:
    """The version that `place` names.

    Raises:
        InputError: there is none, or its manifest or its recipe is not what a version has.
    """
    return opened(*version_files(place))


def removed_from(target: Target, version: str) -> pa.Table:
    """What `version` of a target may not hold: what any version removed or, if it is there, what it did."""
    versions = target.versions()
    found = [tombstones.table({})]
    for known in [version] if version in versions else versions:
        fs, root = target.files(known)
        if tombstones.FILE in manifest_of(fs, root)["files"]:  # versions of before there were any have none
            found.append(tombstones.read(content(fs, root, tombstones.FILE), f"{root}/{tombstones.FILE}"))
    return tombstones.merged(*found)
