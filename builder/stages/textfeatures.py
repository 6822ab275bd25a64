"""text_features: what a frozen text encoder says of each token of the captions, kept, so that a DiT is
trained without it.

Reads   source, dedup, and every caption stage; no images.
Writes  `<shard>.safetensors`: `features`, (tokens, F) float16: first those of no text, then each caption's,
        as many as it has tokens; of which encoder is in its metadata. `<shard>.parquet`: uid, status, error,
        and of each caption NAME that is not empty NAME_start, its first token, NAME_tokens, NAME_cut and
        NAME_sha256, of the text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from builder.core import Count, Json, Resources, Stage, Status, Task, Work
from builder.errors import InputError, RecipeError
from builder.files import read_file, write_parquet
from builder.model import check_files, fetched, hub_model, identity, model_folder
from builder.stages import tensors
from builder.stages.clip import Tokens, clip_workers
from builder.stages.score import MAX_CHARACTERS, with_captions
from builder.typed import from_json

TENSOR = "features"
ORIGINAL = "org_caption"
LEAST = 3  # tokens: one of a text, between those that begin and end it
KINDS = {"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel", "t5": "T5EncoderModel"}
OPEN_CLIP = "open_clip_config.json"


@dataclass(frozen=True, kw_only=True)
class TextFeatures(Stage):
    """By one encoder: an open_clip model's text tower, or transformers' CLIP or T5, a folder or a Hub
    id@revision; texts are cut at `context` tokens.
    """

    effort: ClassVar[tuple[str, ...]] = ("batch",)
    libraries: ClassVar[tuple[str, ...]] = ("pyarrow", "open_clip_torch", "transformers", "torch", "numpy")
    paths: ClassVar[tuple[str, ...]] = ("model",)

    name: str = "text_features"
    model: str
    captions: tuple[str, ...] | None = None  # all that there are, the original first, unless given
    context: Count = 77
    batch: Count = 128
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        captions = self.captions or ()
        for name in (name for name in captions if captions.count(name) > 1):
            raise RecipeError(f"{self.name}.captions names '{name}' twice", "leave one of them out")
        if self.context < LEAST:
            raise RecipeError(f"{self.name}.context={self.context} holds no text", f"give {LEAST} or more")

    def after(self, earlier: tuple[Stage, ...]) -> Stage:
        made = (name for stage in earlier for name in stage.makes_captions())
        return replace(self, captions=(ORIGINAL, *made)) if self.captions is None else self

    def names_captions(self) -> tuple[str, ...]:
        return self.captions or ()

    def reads(self) -> tuple[str, ...]:
        return ("source", "dedup", *(name for name in self.names_captions() if name != ORIGINAL))

    def num_workers(self) -> int:
        return clip_workers()

    def resources(self) -> Resources:
        return Resources(gpus=0.25, memory_gib=4)

    def settings(self) -> dict[str, Json]:
        return super().settings() | {"model": identity(self.model)}

    def check(self) -> None:
        check_encoder(self.model)

    @contextmanager
    def open(self) -> Iterator[Work]:
        encoder = Encoder(self.model, self.context, self.precision)
        yield lambda task: self.encode(encoder, task)

    def encode(self, encoder: Encoder, task: Task) -> Mapping[str, int]:
        captions = self.names_captions()
        table = with_captions(task, captions)
        ok = [row for row in table if row["status"] == Status.OK]
        wanted = ((row, name) for row in ok for name in captions if (row[name] or "").strip())
        empty, _ = encoder.features([""])[0]
        about = {**encoder.about(), "empty": len(empty)}
        told = {name: str(value) for name, value in about.items()}
        with tensors.write(task.output(".safetensors"), TENSOR, (encoder.width,), told) as features:
            features.write(empty)
            while some := list(islice(wanted, self.batch)):
                found = encoder.features([row[name].strip()[:MAX_CHARACTERS] for row, name in some])
                for (row, name), (of, cut) in zip(some, found, strict=True):
                    row |= {f"{name}_start": features.number, f"{name}_tokens": len(of), f"{name}_cut": cut,
                            f"{name}_sha256": sha256(row[name].encode()).hexdigest()}  # fmt: skip
                    features.write(of)
        fields = [(name, pa.string()) for name in ("uid", "status", "error")]
        for name in captions:
            kinds = {"start": pa.int64(), "tokens": pa.int32(), "cut": pa.bool_(), "sha256": pa.string()}
            fields += [(f"{name}_{kind}", of) for kind, of in kinds.items()]
        write_parquet(pa.Table.from_pylist(table, pa.schema(fields)), task.output())
        return Counter(row["status"] for row in table)


def check_encoder(model: str) -> None:
    """Raises:
    InputError: it is none.
    """
    folder = model_folder(model)
    if folder is None:
        hub_model(model)
        return
    kind = _kind(folder)
    check_files(folder)
    words = (("tokenizer.json",), ("spiece.model",), ("vocab.json", "merges.txt"))
    if kind != "open_clip" and not any(all((folder / name).exists() for name in way) for way in words):
        hint = "copy tokenizer.json into it: of a checkpoint of diffusers it lies in the folder beside it"
        raise InputError(f"model folder {folder} has no tokenizer", hint)


def _kind(folder: Path) -> str:
    """open_clip, or a class of transformers."""
    if (folder / OPEN_CLIP).exists():
        return "open_clip"
    path, hint = folder / "config.json", "name a folder of an open_clip model, or of transformers' CLIP or T5"
    if not path.exists():
        raise InputError(f"model folder {folder} has neither {OPEN_CLIP} nor config.json", hint)
    kind = from_json(dict[str, Any], read_file(path), what=str(path)).get("model_type")
    if kind not in KINDS:
        raise InputError(f"{path} is of {kind or 'no model of transformers'}", hint)
    return KINDS[kind]


class Encoder:
    """A text encoder for inference: of a text its features, a vector a token."""

    def __init__(self, model: str, context: int, precision: str = "fp32", device: str = "") -> None:
        """Raises:
        InputError: it is none, or reads fewer tokens.
        """
        import torch

        folder = fetched(model)
        check_encoder(str(folder))
        if context < LEAST:
            raise InputError(f"context={context} holds no text", f"give {LEAST} or more")
        self.torch, self.context, self.identity, self.precision = torch, context, identity(model), precision
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        kind = _kind(folder)
        tower = _OpenClip(folder, context) if kind == "open_clip" else _Transformers(folder, context, kind)
        if tower.longest is not None and context > tower.longest:
            reason = f"context={context}, and {model} reads {tower.longest} tokens"
            raise InputError(reason, f"give {tower.longest} or fewer")
        self.tower = tower
        tower.model.to(self.device, dtype).eval()
        self.width = int(self.features(["a"])[0][0].shape[1])

    def about(self) -> dict[str, Json]:
        """What makes its features what they are."""
        return {"encoder": self.identity, "context": self.context, "precision": self.precision}

    def features(self, texts: Sequence[str]) -> list[tuple[Any, bool]]:
        """Of each text (tokens, F) float16, and whether it is longer than the context.

        Raises:
            InputError: they are not finite.
        """
        tokens_BT, lengths, cut = self.tower.tokens(texts)
        with self.torch.inference_mode():
            found_BTF = self.tower.features(tokens_BT.to(self.device), lengths).float()
        if not all(one[:length].isfinite().all() for one, length in zip(found_BTF, lengths, strict=True)):
            raise InputError(
                "the encoder's features are not finite: its weights are damaged", "copy them again"
            )
        found = found_BTF.clamp(-65504, 65504).half().cpu().numpy()
        kept = (one[:length] for one, length in zip(found, lengths, strict=True))
        return [(np.array(one), was) for one, was in zip(kept, cut, strict=True)]

    def padded(self, texts: Sequence[str], length: Callable[[int], int] | None = None) -> tuple[Any, int]:
        """(B, T, F) float16 features, 0 behind each text's, and how many texts are longer than the context. T
        is the context, or what `length` says of the longest text.
        """
        found = self.features(texts)
        longest = min(length(max(len(of) for of, _ in found)), self.context) if length else self.context
        features_BTF = self.torch.zeros(len(found), longest, self.width, dtype=self.torch.float16)
        for place, (of, _) in enumerate(found):
            features_BTF[place, : len(of)] = self.torch.from_numpy(of)
        return features_BTF, sum(cut for _, cut in found)


class _OpenClip:
    """The tower's last layer, after its norm: what it would pool."""

    def __init__(self, folder: Path, context: int) -> None:
        import open_clip

        self.model = open_clip.create_model(f"local-dir:{folder}")
        text = getattr(self.model, "text", self.model)
        if not hasattr(text, "ln_final") or getattr(text, "cls_emb", None) is not None:
            reason = f"the text tower of {folder} is not open_clip's own"
            raise InputError(reason, "name that tower's own folder, of transformers' CLIP or T5")
        self.longest: int | None = int(self.model.context_length)
        self.context, self.said = context, None
        text.ln_final.register_forward_hook(self._heard)
        tokenizer: Any = open_clip.get_tokenizer(f"local-dir:{folder}")
        inner: Any = getattr(tokenizer, "tokenizer", None)
        self.ends_as_it_pads = inner is not None and inner.pad_token_id == inner.eos_token_id
        self.pad = int(tokenizer([""], context_length=self.longest)[0, -1])
        self.read = Tokens(tokenizer, context)

    def _heard(self, _: Any, __: Any, out: Any) -> None:
        self.said = out

    def tokens(self, texts: Sequence[str]) -> tuple[Any, list[int], list[bool]]:
        from torch.nn.functional import pad

        tokens, cut = self.read(list(texts))
        is_text = tokens != self.pad
        last = self.context - is_text.flip(1).int().argmax(1)
        last[~is_text.any(1)] = 0
        lengths = (last + self.ends_as_it_pads).clamp(1, self.context)
        assert self.longest is not None
        filled = pad(tokens, (0, self.longest - self.context), value=self.pad)
        return filled, lengths.tolist(), cut.tolist()

    def features(self, tokens_BT: Any, _: list[int]) -> Any:
        self.model.encode_text(tokens_BT)
        return self.said


class _Transformers:
    def __init__(self, folder: Path, context: int, kind: str) -> None:
        import transformers

        self.model = getattr(transformers, kind).from_pretrained(folder, use_safetensors=True)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.longest = getattr(self.model.config, "max_position_embeddings", None)
        self.context = context

    def tokens(self, texts: Sequence[str]) -> tuple[Any, list[int], list[bool]]:
        found = self.tokenizer(
            list(texts), truncation=True, max_length=self.context, padding="max_length", return_tensors="pt"
        )
        lengths = [max(1, int(length)) for length in found["attention_mask"].sum(1)]
        return found["input_ids"], lengths, [
            length == self.context and self._is_cut(text)
            for text, length in zip(texts, lengths, strict=True)
        ]  # fmt: skip

    def _is_cut(self, text: str) -> bool:
        ids = self.tokenizer(text, truncation=True, max_length=self.context + 1)["input_ids"]
        return len(ids) > self.context

    def features(self, tokens_BT: Any, lengths: list[int]) -> Any:
        import torch

        mask = torch.arange(tokens_BT.shape[1]) < torch.tensor(lengths)[:, None]
        return self.model(input_ids=tokens_BT, attention_mask=mask.long().to(tokens_BT.device))[0]
