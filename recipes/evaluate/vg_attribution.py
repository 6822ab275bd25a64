"""VG-Attribution of ARO (arXiv 2210.01936): which of two things in a box has which attribute.

visual_genome_attribution.json: image_path, box, true_caption, false_caption, attributes; the mean over pairs
of attributes with at least 25 cases.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from builder.files import read_file
from builder.typed import from_json
from recipes.evaluate.choices import Choice, there
from recipes.evaluate.model import Picture, inside

FEWEST_CASES = 25  # of a pair of attributes


def vg_attribution(annotations: Path, images: Path) -> list[Choice]:
    class Item(BaseModel):
        image_path: str
        bbox_x: float
        bbox_y: float
        bbox_w: float
        bbox_h: float
        true_caption: str
        false_caption: str
        attributes: tuple[str, str]

    found = []
    for item in from_json(list[Item], read_file(annotations), what=str(annotations)):
        left, top = int(item.bbox_x), int(item.bbox_y)
        box = left, top, left + int(item.bbox_w), top + int(item.bbox_h)
        picture = Picture(str(inside(images, item.image_path)), box=box)
        found.append(Choice(picture, item.true_caption, item.false_caption, "_".join(item.attributes)))
    return there(found, annotations)
