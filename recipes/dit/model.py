"""A Diffusion Transformer that reads text: DiT (arXiv 2212.09748), with cross-attention in every block.

From top to bottom: a picture becomes patches; a block attends to all of them, then to the text, then to each
alone; what a patch becomes is shifted, scaled and gated by the time. Gates and what leads out begin at zero:
at first a block changes nothing, and the output is zero.

Names end in shapes: B samples, C channels, P pixels or latents a side, N patches, W wide; T tokens of text, F
wide; H heads.

A model folder holds config.json, tokenizer.json and, once there are any, the weights.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from builder.errors import InputError
from builder.model import model_folder, read_tokenizer
from builder.typed import parse

Size = Literal["P", "N", "S", "B", "L", "XL"]
# blocks, width, heads: the paper's; pico and nano are the demo's.
SIZES = {
    "P": (4, 128, 4), "N": (6, 192, 6),
    "S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16),
}  # fmt: skip
FREQUENCIES = 256
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class Net:
    """`px` is of what is denoised: pixels, or latents of a VAE, of so many `channels`; with `sigma` the
    output has as many again. The text comes as `text_width` wide features of `context` tokens: of an encoder
    of its own, of so many `text_layers`, with a `vocabulary`; or of a frozen one, where so many layers, if
    any, that are trained beside it look at what that says.
    """

    size: Size = "B"
    patch: int = 4
    px: int = 32
    channels: int = 4
    sigma: bool = True
    context: int = 77
    text_width: int = 768
    text_layers: int = 0
    vocabulary: int = 0

    def __post_init__(self) -> None:
        least = min(self.px, self.patch, self.channels, self.context)
        if least < 1 or min(self.text_layers, self.vocabulary) < 0 or self.text_width % 32:
            reason = "px, patch, channels and context are 1 or more, text_layers and vocabulary 0 or more, "
            reason += "text_width a multiple of 32"
            raise InputError(reason, "give others")
        if self.px % self.patch:
            reason = f"{self.px} pixels are no whole number of patches of {self.patch}"
            raise InputError(reason, "give px a multiple of patch")
        if self.vocabulary and not self.text_layers:
            raise InputError("a text encoder of its own has layers", "give text_layers, or no vocabulary")


class DiT(nn.Module):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net
        blocks, width, heads = SIZES[net.size]
        self.text = TextEncoder(net) if net.text_layers else None
        self.text_in = nn.Linear(net.text_width, width)
        self.patches = nn.Conv2d(net.channels, width, net.patch, net.patch)
        self.places: torch.Tensor
        self.register_buffer("places", places(net.px // net.patch, width), persistent=False)
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.out = nn.Linear(width, net.patch**2 * net.channels * (2 if net.sigma else 1))
        self._begin()

    def forward(
        self, noisy_BCPP: torch.Tensor, time_B: torch.Tensor, text: torch.Tensor,
        mask_BT: torch.Tensor | None = None, *, encoded: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """(B, C or 2C, P, P). `time_B` goes from 0 to 1000. `text` is (B, T) tokens or (B, T, F) features,
        and `mask_BT` is False where there are none; `encoded` says that `text` has been through the net's own
        encoder.
        """
        text_BTF = text if encoded or self.text is None else self.text(text, mask_BT)
        text_BTW = self.text_in(text_BTF)
        x_BNW = self.patches(noisy_BCPP).flatten(2).transpose(1, 2) + self.places
        time_BW = self.time(frequencies(time_B))
        for block in self.blocks:
            x_BNW = block(x_BNW, time_BW, text_BTW, mask_BT)
        shift, scale = self.modulation(time_BW)[:, None].chunk(2, -1)
        return self._unpatched(self.out(self.norm(x_BNW) * (1 + scale) + shift))

    def _unpatched(self, x_BND: torch.Tensor) -> torch.Tensor:
        side, patch = self.net.px // self.net.patch, self.net.patch
        x = x_BND.view(len(x_BND), side, side, patch, patch, -1)
        return torch.einsum("bhwpqc->bchpwq", x).reshape(len(x), -1, self.net.px, self.net.px)

    def _begin(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patches.weight.data.flatten(1))
        nn.init.zeros_(self.patches.bias)  # type: ignore[arg-type]
        for layer in (self.time[0], self.time[2]):
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
        for block in self.blocks:
            assert isinstance(block, Block)
            for attention in (block.attention, block.read):  # as of one layer, in DiT
                nn.init.xavier_uniform_(attention.query.weight, math.sqrt(1 / 2))
                nn.init.xavier_uniform_(attention.key_value.weight, math.sqrt(3 / 4))
            nn.init.zeros_(block.modulation[1].weight)  # type: ignore[arg-type]
            nn.init.zeros_(block.read.out.weight)
        for layer in (self.modulation[1], self.out):
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]


class Block(nn.Module):
    """adaLN-Zero: shifts, scales and gates are the time's. What is read is added as it is (PixArt-alpha)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(3))
        self.attention = Attention(width, heads)
        self.read = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self, x_BNW: torch.Tensor, time_BW: torch.Tensor, text_BTW: torch.Tensor, mask_BT: torch.Tensor | None
    ) -> torch.Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(time_BW)[:, None].chunk(6, -1)
        seen = self.norms[0](x_BNW) * (1 + scale) + shift
        x_BNW = x_BNW + gate * self.attention(seen, seen)
        x_BNW = x_BNW + self.read(self.norms[1](x_BNW), text_BTW, mask_BT)
        return x_BNW + gate_mlp * self.mlp(self.norms[2](x_BNW) * (1 + scale_mlp) + shift_mlp)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x_BNW: torch.Tensor, of_BTW: torch.Tensor, mask_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        parts = (self.query(x_BNW), *self.key_value(of_BTW).chunk(2, -1))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mask = None if mask_BT is None else mask_BT[:, None, None]
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(found.transpose(1, 2).flatten(2))


class TextEncoder(nn.Module):
    """A small one, trained beside the rest: of tokens, or of what a frozen one says of them."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.tokens = nn.Embedding(net.vocabulary, net.text_width) if net.vocabulary else None
        self.places = nn.Parameter(torch.randn(net.context, net.text_width) * 0.02)
        if self.tokens:
            nn.init.normal_(self.tokens.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(
            net.text_width, net.text_width // 32, 4 * net.text_width, dropout=0.0, activation="gelu",
            batch_first=True, norm_first=True,
        )  # fmt: skip
        self.layers = nn.TransformerEncoder(
            layer, net.text_layers, nn.LayerNorm(net.text_width), enable_nested_tensor=False
        )

    def forward(self, text: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """(B, T, F) of (B, T) tokens, or of (B, T, F)."""
        text_BTF = self.tokens(text) if self.tokens else text
        found = self.layers(text_BTF + self.places[: text.shape[1]], src_key_padding_mask=~mask_BT)
        assert isinstance(found, torch.Tensor)
        return found


def frequencies(time_B: torch.Tensor) -> torch.Tensor:
    """(B, FREQUENCIES) cosines and sines, as DiT's."""
    half = FREQUENCIES // 2
    rates = torch.exp(-math.log(10_000) * torch.arange(half, device=time_B.device) / half)
    angles = time_B.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], -1)


def places(side: int, width: int) -> torch.Tensor:
    """(side * side, width): sines and cosines of the column, then of the row, as DiT's."""
    rates = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates
    one = torch.cat([angles.sin(), angles.cos()], 1)
    columns, rows = one.repeat(side, 1), one.repeat_interleave(side, 0)
    return torch.cat([columns, rows], 1).float()


# --- words, and a folder ------------------------------------------------------------------------------------


class Words:
    """Texts -> (2, B, T): their tokens, and 1 where there is one; and how many of the texts are longer than
    the context. Made in each worker process, when there is something to do.
    """

    def __init__(self, path: Path, context: int) -> None:
        self.path, self.context = path, context
        self.tokenizer: object = None

    def __call__(self, texts: Sequence[str]) -> tuple[torch.Tensor, int]:
        found = self._ids(texts)
        both = torch.zeros(2, len(found), self.context, dtype=torch.int64)
        both[1, :, 0] = 1  # of no text too: something is looked at
        for number, ids in enumerate(found):
            kept = ids if len(ids) <= self.context else [*ids[: self.context - 1], ids[-1]]
            both[0, number, : len(kept)] = torch.tensor(kept)
            both[1, number, : len(kept)] = 1
        return both, sum(len(ids) > self.context for ids in found)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        from tokenizers import Tokenizer

        if not isinstance(self.tokenizer, Tokenizer):
            self.tokenizer = Tokenizer.from_file(str(self.path))
            self.tokenizer.no_padding()
            self.tokenizer.no_truncation()
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]


def tokenizer(folder: str, vocabulary: int) -> Path:
    """The tokenizer in a folder.

    Raises:
        InputError: there is none, or one of more tokens.
    """
    found = model_folder(folder)
    if found is None or not (found / TOKENIZER).is_file():
        raise InputError(f"tokenizer={folder} has no {TOKENIZER}", "name a folder with one")
    number = read_tokenizer(found / TOKENIZER).get_vocab_size()
    if number > vocabulary:
        reason = f"tokenizer={folder} has {number:,} tokens, the model's vocabulary {vocabulary:,}"
        raise InputError(reason, f"give vocabulary={number}")
    return found / TOKENIZER


def describe(
    net: Net,
    objective: Mapping[str, Any],
    words: Path | None,
    folder: Path,
    latents: Mapping[str, Any] | None = None,
    features: Mapping[str, Any] | None = None,
) -> None:
    """A model's folder, without weights. `words`: the tokenizer, or `features`, what was read in the place of
    tokens; `latents`: what it denoises, if no pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = {"net": asdict(net), "objective": objective, "latents": latents, "features": features}
    (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n")
    if words:
        shutil.copyfile(words, folder / TOKENIZER)


def load(folder: Path) -> tuple[DiT, dict[str, Any]]:
    """A model, and what is said of it: the objective that it was trained for; latents that it denoises, if
    those are no pictures; features that it reads, if those are not its own.

    Raises:
        InputError: that is no model folder of `recap train dit`, or of another net.
    """
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
        if "objective" not in config:
            raise KeyError("objective")
        model = DiT(parse(Net, config["net"], what=f"{folder / CONFIG}"))
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = f"{folder} holds no DiT: {str(error).partition(chr(10))[0]}"
        raise InputError(
            reason, "name a checkpoint of recap train dit, such as runs/dit-demo/latest"
        ) from error
    return model.eval(), config
