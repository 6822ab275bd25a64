"""CLIP's two towers in the paper's sizes, as open_clip has them, in a folder that open_clip loads.

A model folder holds open_clip_config.json, the tokenizer and, once there are any, the weights:
`open_clip.create_model_and_transforms("local-dir:FOLDER")`.

The shapes are those of the published Recap-CLIP (CLIPA's): sine-cosine positions, no norm before the vision
blocks, the mean of its patches; a text is [CLS] and its tokens, cut at the context and padded up to it, with
neither causal nor padding mask, and the last position is its vector.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from safetensors.torch import load_file, save_file

from builder.errors import InputError
from builder.model import model_folder
from builder.stages.clip import cutter

Size = Literal["T", "S", "B", "L", "H"]
# layers, width, heads: table 4's small, base, large and huge; T is the demo's.
VISION = {"T": (4, 128, 4), "S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "H": (32, 1280, 16)}
TEXT = {"T": (3, 128, 4), "S": (12, 384, 6), "B": (12, 512, 8), "L": (12, 768, 12), "H": (24, 1024, 16)}
EMBED = {"T": 128, "S": 384, "B": 512, "L": 768, "H": 1024}  # of both towers, by the vision tower's size
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


@dataclass(frozen=True, kw_only=True)
class Towers:
    """`tokenizer` is a folder with a tokenizer.json: the paper's is bert-base-uncased. `keep` is the share of
    an image's patches that a training step sees (FLIP, CLIPA).
    """

    vision: Size = "B"
    text: Size = "B"
    patch: int = 16
    context: int = 128
    tokenizer: str
    keep: float = 1.0

    def config(self, px: int) -> dict[str, Any]:
        """open_clip's, for images of this size."""
        from transformers import AutoTokenizer

        layers, width, heads = VISION[self.vision]
        text_layers, text_width, text_heads = TEXT[self.text]
        tokenizer = AutoTokenizer.from_pretrained(self.folder())
        return {
            "model_cfg": {
                "embed_dim": EMBED[self.vision],
                "vision_cfg": {
                    "image_size": px, "layers": layers, "width": width, "head_width": width // heads,
                    "patch_size": self.patch, "no_ln_pre": True, "pool_type": "avg",
                    "final_ln_after_pool": True, "pos_embed_type": "sin_cos_2d",
                    "patch_dropout": 1 - self.keep,
                },
                "text_cfg": {
                    "context_length": self.context, "vocab_size": len(tokenizer), "width": text_width,
                    "heads": text_heads, "layers": text_layers, "pool_type": "last", "no_causal_mask": True,
                    "hf_tokenizer_name": self.tokenizer,
                    "tokenizer_kwargs": {"strip_sep_token": tokenizer.sep_token is not None},
                },
            },
            "preprocess_cfg": IMAGENET | {"interpolation": "bilinear", "resize_mode": "squash"},
        }  # fmt: skip

    def folder(self) -> Path:
        folder = model_folder(self.tokenizer)
        if folder is None or not (folder / "tokenizer.json").exists():
            hint = "give a folder with a tokenizer.json, for example a download of bert-base-uncased"
            raise InputError(f"tokenizer={self.tokenizer} is no folder with a tokenizer", hint)
        return folder


def make(config: dict[str, Any]) -> torch.nn.Module:
    """A fresh model. Seed torch before."""
    return open_clip.model.CLIP(**config["model_cfg"])


def describe(towers: Towers, config: dict[str, Any], folder: Path) -> None:
    """A model's folder, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    for name in TOKENIZER:
        if (towers.folder() / name).exists():
            shutil.copyfile(towers.folder() / name, folder / name)


def save(model: torch.nn.Module, folder: Path) -> None:
    """Its weights, beside what `describe` wrote."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def load(model: torch.nn.Module, folder: Path) -> None:
    """Weights of a model of the same towers, perhaps for images of another size: their positions are a
    function of the size, and stay.

    Raises:
        InputError: they are of other towers.
    """
    state = load_file(folder / WEIGHTS)
    position = "visual.positional_embedding"
    ours: Mapping[str, torch.Tensor] = model.state_dict()
    if state[position].shape != ours[position].shape:
        state[position] = ours[position]
    differ = [name for name in ours if name not in state or state[name].shape != ours[name].shape]
    if differ or len(state) != len(ours):
        name = (differ or sorted(state.keys() - ours.keys()))[0]
        there, here = (tuple(t[name].shape) if name in t else "missing" for t in (state, ours))
        hint = "train into another folder, or with the settings of before"
        raise InputError(f"{folder} holds a model of another shape: {name} is {there}, not {here}", hint)
    model.load_state_dict(state)


def tokenizer(folder: Path) -> Callable[[list[str]], tuple[torch.Tensor, int]]:
    """Texts -> (B, context) tokens, and how many of the texts are longer than that."""
    return _Tokenizer(folder)


class _Tokenizer:
    """Made in each worker process, when there is something to do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenize: Any = None

    def __call__(self, texts: list[str]) -> tuple[torch.Tensor, int]:
        if self.tokenize is None:
            self.tokenize = open_clip.get_tokenizer(f"local-dir:{self.folder}")
            self.context = int(self.tokenize.context_length)
            self.is_cut = cutter(self.tokenize, self.context)
        tokens = self.tokenize(texts, context_length=self.context + 1)
        cut = int(self.is_cut(tokens).sum())
        return (self.tokenize(texts, context_length=self.context) if cut else tokens[:, :-1]), cut
