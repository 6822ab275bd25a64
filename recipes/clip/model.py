"""CLIP's two towers in the paper's sizes, as open_clip has them, in a folder that open_clip loads.

A model folder holds open_clip_config.json, the tokenizer and, once there are any, the weights:
`open_clip.create_model_and_transforms("local-dir:FOLDER")`.

The shapes are those of the published Recap-CLIP (CLIPA's): sine-cosine positions, no norm before the vision
blocks, the mean of its patches; a text is [CLS] and its tokens, cut at the context and padded up to it, with
neither causal nor padding mask, and the last position is its vector.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from builder.errors import InputError
from builder.model import model_folder
from builder.stages.clip import Tokens
from recipes.training import at_least

Size = Literal["P", "N", "T", "S", "B", "L", "H"]
# layers, width, heads: table 4's small, base, large and huge; pico, nano and tiny are the demo's.
VISION = {
    "P": (2, 64, 2), "N": (3, 96, 3), "T": (4, 128, 4),
    "S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "H": (32, 1280, 16),
}  # fmt: skip
TEXT = {
    "P": (1, 64, 2), "N": (2, 96, 3), "T": (3, 128, 4),
    "S": (12, 384, 6), "B": (12, 512, 8), "L": (12, 768, 12), "H": (24, 1024, 16),
}  # fmt: skip
# of both towers, by the vision tower's size
EMBED = {"P": 64, "N": 96, "T": 128, "S": 384, "B": 512, "L": 768, "H": 1024}
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
MAX_SCALE = math.log(100)
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


@dataclass(frozen=True, kw_only=True)
class Towers:
    """`tokenizer` is a folder with a tokenizer.json: the paper's is bert-base-uncased. `keep` is the share of
    an image's patches that a training step sees (FLIP, CLIPA). `sigmoid` begins with SigLIP's temperature and
    bias. A decoder of captions is trained beside them, and is no part of the model that comes out.
    """

    vision: Size = "B"
    text: Size = "B"
    patch: int = 16
    context: int = 128
    tokenizer: str
    keep: float = 1.0
    sigmoid: bool = False
    decoder_layers: int = 0
    decoder_context: int = 128

    def __post_init__(self) -> None:
        at_least(self, {"patch": 1, "context": 1, "decoder_layers": 0, "decoder_context": 2})
        if not 0 < self.keep <= 1:
            raise InputError(
                f"keep={self.keep:g} is no share of the patches", "give a number above 0, up to 1"
            )

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
                **({"init_logit_scale": math.log(10), "init_logit_bias": -10} if self.sigmoid else {}),
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


class Decoder(torch.nn.Module):
    """Writes a caption from an image's patches, as CLIPS's and CoCa's decoders do (arXiv 2411.16828)."""

    def __init__(self, towers: Towers, vocabulary: int) -> None:
        super().__init__()
        _, width, heads = TEXT[towers.text]
        self.tokens = torch.nn.Embedding(vocabulary, width)
        self.places = torch.nn.Parameter(torch.randn(towers.decoder_context, width) * 0.01)
        self.patches = torch.nn.Linear(VISION[towers.vision][1], width)
        layer = torch.nn.TransformerDecoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        norm = torch.nn.LayerNorm(width)
        self.blocks = torch.nn.TransformerDecoder(layer, towers.decoder_layers, norm)
        torch.nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, patches_BPW: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
        """(B, T - 1) of each token but the first the loss."""
        length = tokens_BT.shape[1] - 1
        seen = self.tokens(tokens_BT[:, :-1]) + self.places[:length]
        mask = torch.nn.Transformer.generate_square_subsequent_mask(length, tokens_BT.device, seen.dtype)
        said = self.blocks(seen, self.patches(patches_BPW), tgt_mask=mask, tgt_is_causal=True)
        logits = said @ self.tokens.weight.T.to(said.dtype)
        return torch.nn.functional.cross_entropy(
            logits.float().transpose(1, 2), tokens_BT[:, 1:], reduction="none"
        )


class Trained(torch.nn.Module):
    """What is trained: a CLIP, and the decoder beside it, if any. `padding` is the token that is none."""

    def __init__(self, clip: Any, decoder: Decoder | None = None, padding: int = 0) -> None:
        super().__init__()
        self.clip, self.decoder, self.padding = clip, decoder, padding

    def forward(
        self, images: torch.Tensor, texts: torch.Tensor, captions: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, E) unit vectors of images and of texts; temperature and bias; (B) the losses of captions."""
        clip = self.clip
        clip.visual.output_tokens = captions is not None
        found = clip.visual(images)
        image = torch.nn.functional.normalize(found if captions is None else found[0], dim=-1)
        text = clip.encode_text(texts, normalize=True)
        scale = clip.logit_scale.exp()
        heads = torch.stack([scale, torch.zeros_like(scale) if clip.logit_bias is None else clip.logit_bias])
        if captions is None:
            return image, text, heads, torch.zeros(len(images), device=image.device)
        assert self.decoder is not None
        losses = self.decoder(found[1], captions) * self.counted(captions)
        return image, text, heads, losses.sum(1)

    def counted(self, captions: torch.Tensor) -> torch.Tensor:
        """(B, T - 1) which tokens are to be said."""
        return captions[:, 1:] != self.padding

    def alone(self, module: torch.nn.Module) -> AbstractContextManager[Any]:
        """Gradients stay on their rank for a while. `module` is this one as it is trained."""
        if hasattr(module, "no_sync"):
            return module.no_sync()  # type: ignore[operator]
        return _unsynchronized(module) if hasattr(module, "set_requires_gradient_sync") else nullcontext()

    @torch.no_grad()
    def bound(self) -> None:
        """The temperature is at most 100, as CLIP's."""
        self.clip.logit_scale.clamp_(0, MAX_SCALE)


@contextmanager
def _unsynchronized(module: Any) -> Iterator[None]:
    module.set_requires_gradient_sync(False)
    yield
    module.set_requires_gradient_sync(True)


def describe(towers: Towers, config: dict[str, Any], folder: Path) -> None:
    """A model's folder, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    for name in TOKENIZER:
        if (towers.folder() / name).exists():
            shutil.copyfile(towers.folder() / name, folder / name)


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return config


def save(state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Weights, beside what `describe` wrote."""
    save_file(dict(state), folder / WEIGHTS, metadata={"format": "pt"})


def weights(folder: Path, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Those in a model's folder, for a model of the same towers, perhaps for images of another size: their
    positions are a function of the size, and are the model's.

    Raises:
        InputError: they are of other towers.
    """
    try:
        state = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        hint = "copy it again; of a training, rm -r its folder: it goes on from the checkpoint before"
        raise InputError(f"{folder / WEIGHTS} cannot be read: {error}", hint) from error
    position = "visual.positional_embedding"
    ours: Mapping[str, torch.Tensor] = model.state_dict()
    if position in state and state[position].shape != ours[position].shape:
        state[position] = ours[position]
    differ = [name for name in ours if name not in state or state[name].shape != ours[name].shape]
    if differ or len(state) != len(ours):
        name = (differ or sorted(state.keys() - ours.keys()))[0]
        there, here = (tuple(t[name].shape) if name in t else "missing" for t in (state, ours))
        hint = "train into another folder, or with the settings of before"
        raise InputError(f"{folder} holds a model of another shape: {name} is {there}, not {here}", hint)
    return state


class Tokenizer:
    """Texts -> (B, context) tokens, and how many of the texts are longer than that. The context is the
    model's unless given. Made in each worker process, when there is something to do.
    """

    def __init__(self, folder: Path, context: int | None = None) -> None:
        self.folder, self.given = folder, context
        self.tokenize: Tokens | None = None

    def padding(self) -> int:
        """The token that follows a text."""
        return int(self([""])[0][0, -1])

    def __call__(self, texts: list[str]) -> tuple[torch.Tensor, int]:
        if self.tokenize is None:
            tokenizer: Any = open_clip.get_tokenizer(f"local-dir:{self.folder}")
            self.tokenize = Tokens(tokenizer, self.given or int(tokenizer.context_length))
        tokens, cut = self.tokenize(texts)
        return tokens, int(cut.sum())
