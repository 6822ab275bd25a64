"""Which model: a folder, or a Hub id with its revision pinned."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from typing_extensions import TypedDict

from builder.errors import InputError
from builder.files import read_file, sha256_file
from builder.typed import from_json

CHECKOUT = Path(__file__).parent.parent


def model_folder(model: str) -> Path | None:
    """The folder that `model` names, from here or from the checkout's root; None for a Hub id."""
    for folder in (Path(model), CHECKOUT / model):
        if folder.is_dir():
            return folder
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        hint = "name a folder, or a Hub model with its revision: user/name@0123abc"
        raise InputError(f"there is no model folder {model}", hint)
    return None


def hub_model(model: str) -> tuple[str, str]:
    """(repository, revision) of `user/name@revision`.

    Raises:
        InputError: no revision; what a branch holds may change between two shards of one run.
    """
    name, _, revision = model.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII):
        raise InputError(
            f"model {model} is neither a folder nor a Hub id",
            "name a folder, or a Hub model with its revision: user/name@0123abc",
        )
    if not re.fullmatch(r"[0-9a-f]{7,40}", revision):
        hint = f"add the commit: {name}@<40 hex digits>, from its page's history"
        raise InputError(f"model {name} has no pinned revision", hint)
    return name, revision


def fetched(model: str) -> Path:
    """Its folder; one from the Hub is downloaded."""
    folder = model_folder(model)
    if folder is None:
        from huggingface_hub import snapshot_download

        repository, revision = hub_model(model)
        folder = Path(snapshot_download(repository, revision=revision))
    return folder


def identity(model: str) -> str:
    """What enters a key: the content of a folder, or id and revision."""
    folder = model_folder(model)
    return _folder_sha256(folder) if folder else "@".join(hub_model(model))


@cache
def _folder_sha256(folder: Path) -> str:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    lines = [f"{path.relative_to(folder)} {sha256_file(path)}" for path in files]
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


_CONFIGS = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)


class _Index(TypedDict):
    weight_map: dict[str, str]


def has_chat_template(folder: Path) -> bool:
    """In a file of its own, or in that of the tokenizer or the processor.

    Raises:
        InputError: it is none.
    """
    if (own := folder / "chat_template.jinja").exists():
        try:
            jinja2.Environment().parse(read_file(own).decode())
        except (jinja2.TemplateError, UnicodeDecodeError) as error:
            raise InputError(f"{own} is no template: {error}", "copy it again") from error
        return True
    if (folder / "chat_template.json").exists():
        return True
    configs = (folder / name for name in ("tokenizer_config.json", "processor_config.json"))
    return any(
        "chat_template" in from_json(dict[str, Any], read_file(path), what=str(path))
        for path in configs
        if path.exists()
    )


def check_files(folder: Path) -> None:
    """Look whether weights and tokenizer are whole, without loading them.

    Raises:
        InputError: names the file.
    """
    weights = sorted(folder.glob("*.safetensors"))
    for path in (folder / name for name in _CONFIGS if (folder / name).exists()):
        from_json(dict[str, Any], read_file(path), what=str(path))
    if (index := folder / "model.safetensors.index.json").exists():
        listed = from_json(_Index, read_file(index), what=str(index))["weight_map"].values()
        for missing in sorted(set(listed) - {path.name for path in weights}):
            raise InputError(f"{index} names {missing}, which is not in the folder", "copy it into it")
    elif not weights:
        pickles = ", ".join(path.name for path in folder.glob("*.bin"))
        code = f"; {pickles} may run code" if pickles else ""
        reason = f"model folder {folder} has no weights as *.safetensors{code}"
        raise InputError(reason, "copy model.safetensors, or open_clip_model.safetensors, into it")
    elif len(weights) > 1 and not (folder / "model.safetensors").exists():
        reason = f"model folder {folder} has {len(weights)} files of weights and no {index.name}"
        raise InputError(reason, "copy it into it")
    for path in weights:
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} is damaged: {str(error).splitlines()[0]}", "copy it again") from error
    if (path := folder / "tokenizer.json").exists():
        read_tokenizer(path)


def read_tokenizer(path: Path) -> Tokenizer:
    """Raises:
    InputError: it is none.
    """
    data = read_file(path)
    try:
        return Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises no narrower one
        reason = f"{path} is no tokenizer: {str(error).splitlines()[0][:200]}"
        raise InputError(reason, "give a model's tokenizer.json") from error
