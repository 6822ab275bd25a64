"""Prompts of a file, in the layouts that there are.

.txt and others     one a line
.json               COCO's captions_*.json: of each image, by its id, the first caption
.parquet            a column, such as `caption` or `recaption` of Recap-COCO-30K
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from builder.errors import InputError
from builder.files import read_file, read_lines
from builder.typed import from_json


def read(path: Path, *, column: str = "caption", number: int | None = None, seed: int = 0) -> list[str]:
    """All of them, or `number` that are drawn, in the file's order; empty ones are left out.

    Raises:
        InputError: the file is not what it should be, or has too few.
    """
    if path.suffix == ".parquet":
        found = _column(path, column)
    elif path.suffix == ".json":
        found = _coco(path)
    else:
        found = read_lines(path)
    texts = [stripped for text in found if (stripped := text.strip())]
    if number is None:
        return texts
    if number > len(texts):
        raise InputError(f"{path} has {len(texts):,} prompts, {number:,} are wanted", "ask for fewer")
    return [texts[place] for place in sorted(random.Random(seed).sample(range(len(texts)), number))]


def _column(path: Path, column: str) -> list[str]:
    try:
        names = pq.read_schema(path).names
        table = pq.read_table(path, columns=[column]) if column in names else None
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{path} cannot be read: {error}", "get it again") from error
    if table is None:
        raise InputError(f"{path} has no column {column}", f"there are: {', '.join(names)}")
    return [str(text) for text in table[column].to_pylist() if text]


def _coco(path: Path) -> list[str]:
    about = from_json(dict[str, Any], read_file(path), what=str(path))
    try:
        rows = sorted((row["image_id"], row["id"], row["caption"]) for row in about["annotations"])
        first = {image: caption for image, _, caption in reversed(rows)}
        return [str(first[image]) for image in sorted(first)]
    except (KeyError, TypeError) as error:
        reason = f"{path} has not COCO's captions: {type(error).__name__} {error}"
        raise InputError(reason, "name captions_val2014.json, a text file, or a parquet file") from error
