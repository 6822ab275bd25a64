"""Which model: a folder, or a Hub id with its revision pinned."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from builder.core import sha256_file
from builder.errors import InputError

CHECKOUT = Path(__file__).parent.parent


def model_folder(model: str) -> Path | None:
    """The folder that `model` names, from here or from the checkout's root; None for a Hub id."""
    for folder in (Path(model), CHECKOUT / model):
        if folder.is_dir():
            return folder
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise InputError(f"there is no model folder {model}", "name a folder, or a Hub model with its revision: user/name@0123abc")
    return None


def hub_model(model: str) -> tuple[str, str]:
    """(repository, revision) of `user/name@revision`.

    Raises:
        InputError: no revision; what a branch holds may change between two shards of one run.
    """
    name, _, revision = model.partition("@")
    if len(revision) < 7:
        raise InputError(f"model {name} has no pinned revision", f"add the commit: {name}@<40 hex digits>, from its page's history")
    return name, revision


def identity(model: str) -> str:
    """What enters a key: the content of a folder, or id and revision."""
    folder = model_folder(model)
    return _folder_sha256(folder) if folder else "@".join(hub_model(model))


@cache
def _folder_sha256(folder: Path) -> str:
    lines = [f"{path.relative_to(folder)} {sha256_file(path)}" for path in sorted(folder.rglob("*")) if path.is_file()]
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()
