"""Prompts of a file, in the layouts that there are.

.txt and others     one a line
.json               COCO's captions_*.json: of each image, by its id, the first caption
.parquet            a column, such as `caption` or `recaption` of Recap-COCO-30K
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from builder.errors import InputError
from builder.files import read_file, read_lines
from builder.typed import from_json

SEED = 0


def read(path: Path, *, column: str = "caption", number: int | None = None) -> list[str]:
    """All of them, or `number` rows that are sampled at random (the same of every column), in the file's
    order; of both those that are empty are left out.

    Raises:
        InputError: the file is not what it should be, or has too few.
    """
    if path.suffix == ".parquet":
        found: Sequence[str | None] = _column(path, column)
    elif path.suffix == ".json":
        found = _coco(path)
    elif path.suffix in (".csv", ".tsv", ".jsonl"):
        hint = "name a text file with one a line, COCO's captions_*.json, or a parquet file"
        raise InputError(f"{path} is no file of prompts alone", hint)
    else:
        found = [line for line in read_lines(path) if line.strip()]
    if number is not None:
        if not 1 <= number <= len(found):
            reason = f"{path} has {len(found):,} prompts, {number:,} are wanted"
            raise InputError(reason, f"ask for 1 to {len(found):,}")
        found = [found[place] for place in sorted(random.Random(SEED).sample(range(len(found)), number))]
    return [stripped for text in found if (stripped := (text or "").strip())]


def _column(path: Path, column: str) -> list[str | None]:
    try:
        names = pq.read_schema(path).names
        table = pq.read_table(path, columns=[column]) if column in names else None
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{path} cannot be read: {error}", "get it again") from error
    if table is None:
        raise InputError(f"{path} has no column {column}", f"there are: {', '.join(names)}")
    return [None if text is None else str(text) for text in table[column].to_pylist()]


def _coco(path: Path) -> list[str | None]:
    about = from_json(dict[str, Any], read_file(path), what=str(path))
    try:
        rows = sorted((row["image_id"], row["id"], row["caption"]) for row in about["annotations"])
        first = {image: caption for image, _, caption in reversed(rows)}
        return [first[image] and str(first[image]) for image in sorted(first)]
    except (KeyError, TypeError) as error:
        reason = f"{path} has not COCO's captions: {type(error).__name__} {error}"
        raise InputError(reason, "name captions_val2014.json, a text file, or a parquet file") from error
