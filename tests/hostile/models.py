"""Model folders with something wrong in them: told before any shard, and already by the plan."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conftest import CAPTIONER, CLIP
from hostile.case import Case, Place, Situation, of_datacomp
from hostile.settings import no_shard

CONFIG = json.loads((CAPTIONER / "config.json").read_text())
CLIP_CONFIG = json.loads((CLIP / "open_clip_config.json").read_text())
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "vocab_size": 50257,
    "n_ctx": 1024,
}
PICKLE = b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94."


def weights(folder: Path, name: str) -> bytes:
    return (folder / name).read_bytes()


def of_captioner() -> Iterator[Case]:
    name, good = "model.safetensors", weights(CAPTIONER, "model.safetensors")
    cases: list[tuple[str, dict[str, Any], Place | tuple[Place, ...]]] = [
        ("no config.json", {"config__json": None}, "config.json"),
        ("config.json is no JSON", {"config__json": b"{'a': 1}"}, "config.json"),
        ("config.json is cut off", {"config__json": weights(CAPTIONER, "config.json")[:200]}, "config.json"),
        ("config.json is a list", {"config__json": []}, "config.json"),
        ("config.json is an empty object", {"config__json": {}}, "config.json"),
        ("config.json is nested 10,000 deep", {"config__json": b"[" * 10_000 + b"]" * 10_000}, "config.json"),
        ("config.json is not UTF-8", {"config__json": b'{"model_type": "llava\xe9"}'}, "config.json"),
        ("config.json is GPT-2's", {"config__json": GPT2}, "config.json"),
        ("config.json has no text model", {"config__json": {k: v for k, v in CONFIG.items() if k != "text_config"}}, "config.json"),
        ("no tokenizer", {"tokenizer__json": None}, "tokenizer.json"),
        ("tokenizer.json is cut off", {"tokenizer__json": weights(CAPTIONER, "tokenizer.json")[:20_000]}, "tokenizer.json"),
        ("tokenizer.json is a list", {"tokenizer__json": []}, "tokenizer.json"),
        ("tokenizer.json is another JSON", {"tokenizer__json": {"version": "1.0"}}, "tokenizer.json"),
        ("no processor", {"processor_config__json": None}, "processor_config.json"),
        ("processor_config.json is cut off", {"processor_config__json": b'{"image_processor": {'}, "processor_config.json"),
        ("processor_config.json is a list", {"processor_config__json": []}, "processor_config.json"),
        ("no chat template", {"chat_template__jinja": None}, "chat_template"),
        ("a chat template that is none", {"chat_template__jinja": b"{% for message in %}{{"}, "chat_template"),
        ("tokenizer_config.json is cut off", {"tokenizer_config__json": b'{"bos_token": '}, "tokenizer_config.json"),
        ("no weights", {"model__safetensors": None}, either_weights()),
        ("weights are empty", {"model__safetensors": b""}, name),
        ("weights are cut off", {"model__safetensors": good[: len(good) // 2]}, name),
        ("weights have a byte too many", {"model__safetensors": good + b"\0"}, name),
        ("weights have a header longer than the file", {"model__safetensors": struct.pack("<Q", 1 << 60) + good[8:]}, name),
        ("weights have a header that is no JSON", {"model__safetensors": struct.pack("<Q", 4) + b"[[[[" + good}, name),
        ("weights are a page that says 404", {"model__safetensors": b"<!DOCTYPE html><html>404</html>"}, name),
        ("weights are a pickle", {"model__safetensors": None, "pytorch_model__bin": PICKLE}, "pytorch_model.bin"),
        ("weights are a pickle by another name", {"model__safetensors": PICKLE}, name),
        ("weights are of many files, one is missing",
         {"model__safetensors": None, "model__safetensors__index__json": {"metadata": {}, "weight_map": {"x": "model-00001-of-00002.safetensors"}}},
         "model-00001-of-00002.safetensors"),
        ("weights are of many files elsewhere",
         {"model__safetensors": None, "model__safetensors__index__json": {"metadata": {}, "weight_map": {"x": "../../etc/passwd"}}},
         "model.safetensors.index.json"),
        ("weights are of many files, no list of them", {"model__safetensors": None, "model__safetensors__index__json": []},
         "model.safetensors.index.json"),
    ]  # fmt: skip
    for what, damage, place in cases:
        yield Case(f"captioner: {what}", planned(damage), place, real=what == "config.json is GPT-2's")
        if what in ("weights are cut off", "config.json is a list", "no chat template"):
            yield Case(f"captioner: {what}, built", planned(damage, command="build"), place, also=no_shard)


def either_weights() -> Place:
    import re

    return re.compile("safetensors|weights")


def of_clip() -> Iterator[Case]:
    name, good, config = (
        "open_clip_model.safetensors",
        weights(CLIP, "open_clip_model.safetensors"),
        "open_clip_config.json",
    )
    cases: list[tuple[str, dict[str, Any], Place | tuple[Place, ...]]] = [
        ("no configuration", {"open_clip_config__json": None}, config),
        ("the configuration is cut off", {"open_clip_config__json": weights(CLIP, config)[:100]}, config),
        ("the configuration is a list", {"open_clip_config__json": []}, config),
        ("the configuration is an empty object", {"open_clip_config__json": {}}, config),
        ("the configuration has no model", {"open_clip_config__json": {"preprocess_cfg": {}}}, config),
        (
            "the configuration has a model that is a list",
            {"open_clip_config__json": CLIP_CONFIG | {"model_cfg": []}},
            config,
        ),
        ("no weights", {"open_clip_model__safetensors": None}, "open_clip_model.safetensors"),
        ("weights are empty", {"open_clip_model__safetensors": b""}, name),
        ("weights are cut off", {"open_clip_model__safetensors": good[: len(good) // 2]}, name),
        (
            "weights have a header longer than the file",
            {"open_clip_model__safetensors": struct.pack("<Q", 1 << 60) + good[8:]},
            name,
        ),
        (
            "weights are a page that says 404",
            {"open_clip_model__safetensors": b"<!DOCTYPE html><html>404</html>"},
            name,
        ),
        (
            "weights are a pickle",
            {"open_clip_model__safetensors": None, "open_clip_pytorch_model__bin": PICKLE},
            "open_clip_pytorch_model.bin",
        ),
        ("weights are a pickle by another name", {"open_clip_model__safetensors": PICKLE}, name),
    ]
    for what, damage, place in cases:
        yield Case(f"clip: {what}", planned(damage, of="clip"), place)
        if what in ("weights are cut off", "the configuration is a list"):
            yield Case(
                f"clip: {what}, built", planned(damage, of="clip", command="build"), place, also=no_shard
            )


def planned(
    damage: dict[str, Any], of: str = "captioner", command: str = "plan"
) -> Callable[[Situation], list[object]]:
    return lambda s: of_datacomp(
        command, s, **{of: s.captioner(**damage) if of == "captioner" else s.clip(**damage)}
    )


def names() -> Iterator[Case]:
    def fifo(s: Situation) -> Path:
        folder = s.captioner(config__json=None)
        os.mkfifo(folder / "config.json")
        return folder

    def loop(s: Situation) -> Path:
        (s.here / "model").symlink_to("model")
        return s.here / "model"

    def empty(s: Situation) -> Path:
        (s.here / "model").mkdir()
        return s.here / "model"

    def folder_for_weights(s: Situation) -> Path:
        folder = s.captioner(model__safetensors=None)
        (folder / "model.safetensors").mkdir()
        return folder

    cases: list[tuple[str, Callable[[Situation], object], str]] = [
        ("a folder that is not there", lambda s: s.here / "nowhere", "nowhere"),
        ("a folder near here that is not there", lambda s: "./nowhere", "nowhere"),
        ("one word that is no folder", lambda s: "nowhere", "nowhere"),
        ("an empty name", lambda s: "", "model"),
        ("a Hub id without a revision", lambda s: "user/name", "user/name"),
        ("a Hub id with a branch", lambda s: "user/name@main", "user/name"),
        ("a Hub id with an empty revision", lambda s: "user/name@", "user/name"),
        ("a Hub id of three parts", lambda s: "a/b/c@0123456789", "a/b/c"),
        ("a Hub id of odd characters", lambda s: "us er/na\x1b[31mme@0123456789", "me@0123456789"),
        ("a Hub id with dots", lambda s: "../name@0123456789", "../name"),
        ("a file", lambda s: s.file("model.bin", b"x"), "model.bin"),
        ("an empty folder", empty, "config.json"),
        ("a link to itself", loop, "model"),
        ("config.json is a FIFO", fifo, "config.json"),
        ("weights are a folder", folder_for_weights, "model.safetensors"),
    ]
    for of in ("captioner", "clip"):
        for what, make, place in cases:
            if of == "clip" and what not in (
                "a folder that is not there",
                "a Hub id without a revision",
                "a file",
                "a link to itself",
            ):
                continue
            yield Case(
                f"{of}: {what}", lambda s, make=make, of=of: of_datacomp("plan", s, **{of: make(s)}), place
            )
    yield Case(
        "clip: a captioner's folder",
        lambda s: of_datacomp("plan", s, clip=CAPTIONER),
        ("captioner", "open_clip_config.json"),
    )
    yield Case(
        "captioner: a CLIP's folder",
        lambda s: of_datacomp("plan", s, captioner=CLIP),
        ("clip", "config.json"),
    )


def cases() -> Iterator[Case]:
    yield from of_captioner()
    yield from of_clip()
    yield from names()
