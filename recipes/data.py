"""What a training sees: samples in an order that resumes anywhere, each with a text that is drawn for it.

Which text a sample has, how its picture is cropped and when it comes are pure functions of (seed, epoch, uid)
and of (seed, epoch, number): of no worker, rank, batch size or platform, and of nothing that came before. So
a training that goes on at sample N sees what it would have seen.

Every sample comes once an epoch. The shards of an epoch are shuffled, so many of them at a time are a pool,
and the samples of a pool are shuffled: what is read lies in a few files, what is held is the rows of a pool.
"""

from __future__ import annotations

import io
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from hashlib import blake2b
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, get_worker_info

from builder.errors import InputError, UserError
from builder.stages.imagetar import NO_PICTURE
from recipes.join import ORIGINAL, Joined

POOL = 8  # shards whose samples are shuffled together
AHEAD = 2  # batches that a worker makes before the first of them is asked for
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


def drawn(*what: object) -> float:
    """A number in [0, 1) for this (seed, epoch, uid, purpose), the same on every machine."""
    digest = blake2b("/".join(map(str, what)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


# --- which text ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mix:
    """Which text a sample has.

    `p_original` is the probability of the original caption, drawn anew each epoch (p of the paper, arXiv
    2406.08478); otherwise a caption is drawn by `captions`, column -> weight. `concat` is the paper's other
    way, `original, caption`; `one_sentence` gives a random sentence of a caption that is not the original, as
    CLIPS does (arXiv 2411.16828). Where a text is null or empty another one takes its place: a caption by the
    order of the weights given, then the original. `drop` is the probability of no text at all, as
    classifier-free guidance wants it.
    """

    captions: Mapping[str, float] = field(default_factory=lambda: {"re_caption": 1.0})
    p_original: float = 0.0
    concat: bool = False
    one_sentence: bool = False
    drop: float = 0.0

    def __post_init__(self) -> None:
        for name in ("p_original", "drop"):
            if not 0 <= getattr(self, name) <= 1:
                reason = f"{name}={getattr(self, name):g} is no probability"
                raise InputError(reason, "give a number from 0 to 1")
        weights = list(self.captions.values())
        if any(not 0 <= weight < float("inf") for weight in weights) or (
            not sum(weights) and self.p_original < 1
        ):
            given = ", ".join(f"{name}={weight:g}" for name, weight in self.captions.items())
            raise InputError(f"the captions' weights are {given or 'none'}", "give at least one above 0")

    def text(self, row: Mapping[str, Any], seed: int, epoch: int) -> str:
        """`row` has uid, caption (what a subset wants, or None) and a text or None for each column."""
        at = seed, epoch, row["uid"]
        return ", ".join(self._part(row, name, at) for name in self.columns(row, seed, epoch))

    def columns(self, row: Mapping[str, Any], seed: int, epoch: int) -> list[str]:
        """Those whose texts, one behind the other, are a sample's; none where it has no text."""
        at = seed, epoch, row["uid"]
        if self.drop and drawn(*at, "drop") < self.drop:
            return []
        if row.get("caption"):
            chosen = str(row["caption"]).split("+")
        elif drawn(*at, "original") < self.p_original:
            chosen = [ORIGINAL]
        else:
            caption = self._caption(drawn(*at, "caption"))
            chosen = [ORIGINAL, caption] if self.concat else [caption]
        known = dict.fromkeys((*chosen, *self.captions, ORIGINAL))
        there = [name for name in known if (row.get(name) or "").strip()]
        return [name for name in there if name in chosen] or there[:1]

    def drawn_from(self) -> list[str]:
        """The columns that texts are drawn from; of the others only where one of these has none."""
        captions = [name for name, weight in self.captions.items() if weight and self.p_original < 1]
        originals = [ORIGINAL] if self.p_original or self.concat else []
        return list(dict.fromkeys([*originals, *captions]))

    def has_text(self, row: Mapping[str, Any]) -> bool:
        """In any column that a sample's text may come from."""
        return any((row.get(name) or "").strip() for name in (*self.captions, ORIGINAL))

    def caption(self, row: Mapping[str, Any]) -> str:
        """The whole of the first caption that there is, by the order of the weights: what a decoder is to
        say.
        """
        return next(filter(None, ((row.get(name) or "").strip() for name in self.captions)), "")

    def _caption(self, number: float) -> str:
        ends = list(accumulate(self.captions.values()))
        names = list(self.captions)
        return next(
            (name for name, end in zip(names, ends, strict=True) if number * ends[-1] < end), names[-1]
        )

    def _part(self, row: Mapping[str, Any], name: str, at: tuple[object, ...]) -> str:
        text = (row.get(name) or "").strip()
        if not self.one_sentence or name == ORIGINAL:
            return text
        sentences = _SENTENCE.split(text)
        return sentences[int(drawn(*at, "sentence") * len(sentences))]


# --- in which order -----------------------------------------------------------------------------------------


class Order:
    """Which sample is number N of a training. `rows` are those of each shard."""

    def __init__(self, rows: Sequence[int], seed: int, pool: int = POOL) -> None:
        self.rows, self.seed, self.pool, self.total = rows, seed, pool, sum(rows)
        if not self.total:
            raise InputError("there is no sample to train on", "look at what was joined")
        self._shards = lru_cache(2)(self._shards_of)
        self._samples = lru_cache(2)(self._samples_of)

    def at(self, number: int) -> tuple[int, int, int]:
        """(epoch, shard, row) of sample `number`, counted from the first epoch's first."""
        epoch, place = divmod(number, self.total)
        _, ends = self._shards(epoch)
        pool = int(np.searchsorted(ends, place, side="right"))
        shard, row = self._samples(epoch, pool)[place - (int(ends[pool - 1]) if pool else 0)]
        return epoch, int(shard), int(row)

    def _shards_of(self, epoch: int) -> tuple[Any, Any]:
        """The epoch's shards in their order, and where each pool of them ends."""
        shards = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(self.rows))
        sizes = np.array(self.rows)[shards]
        return shards, np.cumsum(np.add.reduceat(sizes, np.arange(0, len(sizes), self.pool)))

    def _samples_of(self, epoch: int, pool: int) -> Any:
        """(N, 2) shard and row of a pool's samples in their order."""
        shards = self._shards(epoch)[0][pool * self.pool : (pool + 1) * self.pool]
        pairs = [np.stack([np.full(self.rows[s], s), np.arange(self.rows[s])], 1) for s in shards]
        chance = np.random.Generator(np.random.PCG64([self.seed, epoch, pool, 1]))
        return chance.permutation(np.concatenate(pairs))


# --- samples and batches ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latent:
    """How what a VAE made of an image, float16, becomes (C, px, px)."""

    channels: int
    px: int
    dtype: ClassVar[torch.dtype] = torch.float16

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.px, self.px

    def of(self, latent: bytes, _: tuple[object, ...]) -> Any:
        return np.frombuffer(latent, np.float16).reshape(self.shape)

    def channels_first(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels."""


@dataclass(frozen=True)
class Picture:
    """How an image becomes (px, px, 3) uint8. `area` is the least share of it that a crop keeps: 1 squashes
    the whole of it, 0.4 is CLIPA's inception crop. `centre` takes the square in its middle. `draft` reads a
    JPEG at a half, a quarter or an eighth where its crop is that much larger than `px` (Pillow's draft mode):
    the same crop by another filter, in less time.
    """

    px: int
    area: float = 1.0
    centre: bool = False
    draft: bool = False
    dtype: ClassVar[torch.dtype] = torch.uint8

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.px, self.px, 3

    def of(self, image: bytes, at: tuple[object, ...]) -> Any:
        """Raises:
        OSError: it is no image.
        """
        opened: Image.Image = Image.open(io.BytesIO(image))
        box = self._box(opened.width, opened.height, at)
        if self.draft:
            box = self._smaller(opened, box)
        if opened.mode != "RGB":
            opened = opened.convert("RGB")
        return np.asarray(opened.resize(self.shape[:2], Image.Resampling.BILINEAR, box=box))  # with antialias

    def channels_first(self, pictures: torch.Tensor) -> torch.Tensor:
        """As they lie in memory."""
        return pictures.permute(0, 3, 1, 2)

    def _smaller(self, opened: Image.Image, box: Box) -> Box:
        """Have a JPEG read as small as its crop allows; gives the crop in what will be read."""
        times = min(box[2] - box[0], box[3] - box[1]) / self.px
        scale = next((scale for scale in (8, 4, 2) if times >= scale), 1)
        if scale == 1 or not opened.draft(None, (opened.width // scale, opened.height // scale)):
            return box
        left, top, right, bottom = (edge / scale for edge in box)
        return left, top, right, bottom

    def _box(self, width: int, height: int, at: tuple[object, ...]) -> Box:
        """torchvision's RandomResizedCrop, with ratios from 3/4 to 4/3; ten tries, then the whole."""
        if self.centre:
            side = min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            return left, top, left + side, top + side
        if self.area == 1:
            return 0, 0, width, height
        for attempt in range(10):
            share, tall, x, y = (drawn(*at, "crop", attempt, n) for n in range(4))
            area = width * height * (self.area + share * (1 - self.area))
            ratio = (3 / 4) ** (1 - 2 * tall)
            w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if 0 < w <= width and 0 < h <= height:
                left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
                return left, top, left + w, top + h
        return 0, 0, width, height


@dataclass(frozen=True)
class Batch:
    """`images` (B, 3, px, px) uint8, or latents; `texts` (..., B, T) int64, or features (B, T, F) float16, 0
    behind a text's last; `ok` (B) is False where an image cannot be decoded, whose pixels are 0, or, of so
    many as are `textless`, its row has no text at all; `cut` counts texts that are longer than the context.
    `captions` (B, C) are for a decoder.
    """

    uids: list[str]
    images: torch.Tensor
    texts: torch.Tensor
    ok: torch.Tensor
    cut: int
    captions: torch.Tensor | None = None
    textless: int = 0

    def pin_memory(self) -> Batch:
        images, texts, ok = (tensor.pin_memory() for tensor in (self.images, self.texts, self.ok))
        captions = None if self.captions is None else self.captions.pin_memory()
        return replace(self, images=images, texts=texts, ok=ok, captions=captions)


Tokenize = Callable[[list[str]], tuple[torch.Tensor, int]]
"""Texts -> their tokens (B, T), or (2, B, T) with a mask, and how many texts were cut."""
Rows = list[tuple[dict[str, Any], int]]
"""Of a batch, and of which epoch each is."""


class Pairs(Dataset[Batch | UserError]):
    """Batches of image and text by their first sample's number; see `batches`."""

    def __init__(
        self, joined: Joined, mix: Mix, picture: Picture | Latent, tokenize: Tokenize | None, *, seed: int,
        batch: int, captions: Tokenize | None = None,
    ) -> None:  # fmt: skip
        """Where features of texts were joined, none is tokenized."""
        self.joined, self.mix, self.picture, self.tokenize = joined, mix, picture, tokenize
        self.captions = captions
        self.seed, self.batch = seed, batch
        self.order = Order(joined.rows, seed)
        self._tables = lru_cache(2 * POOL)(partial(_columns, joined))
        self._file = lru_cache(4 * POOL)(_File)
        self._room: deque[torch.Tensor] = deque()

    def __getitem__(self, number: int) -> Batch | UserError:
        """A user's error comes as it is: raised in a worker it would come as text, hint and all lost."""
        try:
            return self.at(number)
        except UserError as error:
            return error

    def at(self, number: int) -> Batch:
        rows: Rows = []
        ok, textless = [], 0
        images = self._room_of_a_batch()
        pixels = images.numpy()
        for sample in range(number, number + self.batch):
            epoch, shard, place = self.order.at(sample)
            row = {name: column[place].as_py() for name, column in self._tables(shard).items()}
            rows.append((row, epoch))
            image = self._file(row["file"]).read(row["start"], row["bytes"])
            try:
                pixels[sample - number] = self.picture.of(image, (self.seed, epoch, row["uid"]))
            except NO_PICTURE:  # counted by whoever trains
                pixels[sample - number] = 0
                ok.append(False)
            else:
                ok.append(self.mix.has_text(row))
                textless += not ok[-1]
        texts, cut = self._texts(rows)
        captions = self.captions([self.mix.caption(row) for row, _ in rows])[0] if self.captions else None
        uids = [row["uid"] for row, _ in rows]
        images = self.picture.channels_first(images)
        return Batch(uids, images, texts, torch.tensor(ok), cut, captions, textless)

    def _texts(self, rows: Rows) -> tuple[torch.Tensor, int]:
        if self.tokenize:
            return self.tokenize([self.mix.text(row, self.seed, epoch) for row, epoch in rows])
        about, cut = self.joined.features, 0
        assert about is not None
        width, where = about["width"], []
        for row, epoch in rows:
            start, tokens = about["start"], about["empty"]
            for name in self.mix.columns(row, self.seed, epoch):  # one: of two together there are none
                start, tokens = row[f"{name}_start"], row[f"{name}_tokens"]
                cut += row[f"{name}_cut"]
            where.append((row["text_file"], start, tokens))
        longest = min(in_sixteens(max(tokens for _, _, tokens in where)), about["context"])
        features_BTF = torch.zeros(len(rows), longest, width, dtype=torch.float16)
        for place, (file, start, tokens) in enumerate(where):
            data = bytearray(self._file(file).read(start, tokens * 2 * width))
            features_BTF[place, :tokens] = torch.frombuffer(data, dtype=torch.float16).view(tokens, width)
        return features_BTF, cut

    def _room_of_a_batch(self) -> torch.Tensor:
        """Where its images go. What a worker process shares is written again and again, for new pages cost
        more than copies. A batch is begun when the one AHEAD before it is taken.
        """
        shape = self.batch, *self.picture.shape
        if get_worker_info() is None:
            return torch.empty(shape, dtype=self.picture.dtype)
        if len(self._room) < AHEAD + 1:
            self._room.append(torch.zeros(shape, dtype=self.picture.dtype).share_memory_())
        self._room.rotate()
        return self._room[0]


class _File:
    """An open file, read at any place; closed when nobody has it."""

    def __init__(self, path: str) -> None:
        """Raises:
        InputError: the file has gone since it was joined.
        """
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            hint = "put it back, or delete the training's folder joined/ to look anew where images are"
            raise InputError(f"{path} is gone, which was joined", hint) from error

    def read(self, start: int, size: int) -> bytes:
        return os.pread(self.descriptor, size, start)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def in_sixteens(tokens: int) -> int:
    """To which length texts are filled up: each is compiled anew."""
    return -(-tokens // 16) * 16


def _columns(joined: Joined, shard: int) -> dict[str, pa.Array]:
    table = joined.shard(shard).combine_chunks()
    return {name: table[name].chunk(0) for name in table.column_names}


def batches(
    pairs: Pairs, *, start: int, samples: int, workers: int, rank: int = 0, ranks: int = 1
) -> Iterator[Batch]:
    """A rank's part of every step from sample `start` up to `samples`; `pairs.batch` is one rank's.

    A step's samples are the next `ranks * pairs.batch`, whatever the number of ranks. With `workers`, a
    batch's images are there until the next batch is asked for: a copy of them would be of what is used once.
    """
    step = ranks * pairs.batch
    firsts = range(start + rank * pairs.batch, samples - step + 1 + rank * pairs.batch, step)
    loader = DataLoader(
        pairs, batch_size=None, sampler=firsts, num_workers=workers,
        prefetch_factor=AHEAD if workers else None, pin_memory=torch.cuda.is_available(),
        multiprocessing_context="fork" if workers else None,  # whatever a program has made its own default
    )  # fmt: skip
    # Kept, or the memory of each batch is mapped anew, as it is when they are pinned.
    mapped = deque[torch.Tensor](maxlen=workers * (AHEAD + 1))
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        if not batch.images.is_pinned():
            mapped.append(batch.images)
        yield batch
