"""SugarCrepe (arXiv 2306.14610): a caption of COCO, or the same with something added, replaced or swapped.

A folder of add_att.json, add_obj.json, ...: {number: {filename, caption, negative_caption}}; images are
COCO's val2017. 7 kinds, 7,511 choices.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from builder.files import read_file
from builder.typed import from_json
from recipes.evaluate.choices import Choice, there
from recipes.evaluate.model import Picture, inside


def sugarcrepe(folder: Path, images: Path) -> list[Choice]:
    class Item(BaseModel):
        filename: str
        caption: str
        negative_caption: str

    found = []
    for path in sorted(folder.glob("*.json")):
        for item in from_json(dict[str, Item], read_file(path), what=str(path)).values():
            picture = Picture(str(inside(images, item.filename)))
            found.append(Choice(picture, item.caption, item.negative_caption, path.stem))
    return there(found, folder)
