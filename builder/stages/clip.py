"""An open_clip model for inference, and the images that it is to see."""

from __future__ import annotations

import io
import itertools
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from PIL import Image

from builder.core import Task
from builder.errors import InputError
from builder.files import read_file, read_rows
from builder.machine import gpus
from builder.model import check_files, fetched, hub_model, model_folder
from builder.stages.imagetar import images
from builder.typed import from_json

Precision = Literal["fp32", "fp16", "bf16", "pure_fp16", "pure_bf16"]


def pictures(
    clip: Clip, pool: ThreadPoolExecutor, task: Task, uids: Collection[str], ahead: int
) -> Iterator[Any]:
    """The images of these rows as the model takes them, in row order."""
    keys = {row["key"]: row["uid"] for row in read_rows(task.input("download"), ["key", "uid"])}
    jpgs = (jpg for key, jpg in images(task.input("download", ".tar")) if keys[key] in uids)
    return map_ahead(pool, clip.decode, jpgs, ahead)


def check_clip(model: str) -> None:
    """Raises:
    InputError: it is no open_clip model.
    """
    folder = model_folder(model)
    if folder is None:
        hub_model(model)
        return
    path, hint = folder / "open_clip_config.json", "name a folder in open_clip's local-dir layout"
    if not path.exists():
        raise InputError(f"model folder {folder} has no open_clip_config.json", hint)
    config = from_json(dict[str, Any], read_file(path), what=str(path))
    if not isinstance(config.get("model_cfg"), dict):
        raise InputError(f"{path} has no model_cfg", hint)
    check_files(folder)


def map_ahead(pool: ThreadPoolExecutor, function: Any, items: Iterator[Any], number: int) -> Iterator[Any]:
    """`map` over threads that stays at most `number` results ahead."""
    waiting = [pool.submit(function, item) for item in itertools.islice(items, number)]
    while waiting:
        yield waiting.pop(0).result()
        waiting += [pool.submit(function, item) for item in itertools.islice(items, 1)]


class Clip:
    """An open_clip model for inference: unit vectors of images and texts."""

    def __init__(self, model: str, precision: str = "fp32") -> None:
        import open_clip
        import torch

        check_clip(model)
        name = f"local-dir:{fetched(model)}"
        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        made = open_clip.create_model_from_pretrained(name, precision=precision, device=self.device)
        self.model, self.preprocess = made
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(name)
        self.context = int(self.model.context_length)
        self.tokens = Tokens(self.tokenizer, self.context)
        picture = self.preprocess(Image.new("RGB", (64, 64)))
        image_1E = self.images([picture])
        self.width = int(image_1E.shape[1])
        tried = image_1E.sum() + self.texts(["a photo"])[0].sum()
        if not tried.isfinite():
            reason = f"the vectors of model {model} are not finite: its weights are damaged"
            raise InputError(reason, "copy them again")

    def decode(self, jpg: bytes) -> Any:
        return self.preprocess(Image.open(io.BytesIO(jpg)).convert("RGB"))

    def images(self, pictures: list[Any]) -> Any:
        """(B, 3, H, W) pictures -> (B, E) unit vectors."""
        with self.torch.inference_mode():
            batch = self.torch.stack(pictures).to(self.device, next(self.model.parameters()).dtype)
            return self.model.encode_image(batch, normalize=True).float()

    def texts(self, texts: list[str]) -> tuple[Any, list[bool]]:
        """(B, E) unit vectors, and which texts are longer than the context."""
        tokens, cut = self.tokens(texts)
        with self.torch.inference_mode():
            return self.model.encode_text(tokens.to(self.device), normalize=True).float(), cut.tolist()


class Tokens:
    """Texts -> (B, context) tokens, and which of the texts (B) are longer than that; by a tokenizer of
    open_clip, once where none is.

    Of those the last of `context + 1` places is taken, or the one before, where a tokenizer takes the end
    token away.
    """

    def __init__(self, tokenizer: Any, context: int) -> None:
        self.tokenizer, self.context = tokenizer, context
        self.empty, full = tokenizer(["", "word " * 2 * context], context_length=context + 1)
        self.place = context if full[context] != self.empty[context] else context - 1
        self.of_transformers = _of_transformers(tokenizer)

    def __call__(self, texts: list[str]) -> tuple[Any, Any]:
        longer = self._read(texts, self.context + 1)
        cut = longer[:, self.place] != self.empty[self.place]
        return self._read(texts, self.context) if cut.any() else longer[:, :-1], cut

    def _read(self, texts: list[str], context: int) -> Any:
        """What open_clip does, without the masks that it has made, and tensors made number by number: 40 % of
        the time that a text takes.
        """
        if self.of_transformers is None:
            return self.tokenizer(texts, context_length=context)
        import torch

        cleaned = [self.tokenizer.clean_fn(text) for text in texts]
        found = self.of_transformers(
            cleaned, max_length=context, padding="max_length", truncation=True, return_attention_mask=False
        )
        tokens = torch.tensor(found["input_ids"])
        if self.tokenizer.strip_sep_token:
            tokens[tokens == self.of_transformers.sep_token_id] = 0
        return tokens


def _of_transformers(tokenizer: Any) -> Any:
    """The one in a tokenizer of open_clip, if that has one and does no more than clean its texts."""
    from open_clip.tokenizer import HFTokenizer

    is_plain = isinstance(tokenizer, HFTokenizer) and not tokenizer.tokenizer_mode
    return tokenizer.tokenizer if is_plain else None


def clip_workers() -> int:
    """On one machine: a captioner makes 45 images a second ready for it at best, and it takes some 300."""
    return max(1, -(-len(gpus()) // 4))
