"""GenEval's checks, on objects that are known, and with a detector."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CLIP
from PIL import Image
from test_drawings import a_folder

from builder.errors import InputError
from recipes.demo import world
from recipes.demo.world import Scene, Thing
from recipes.evaluate import benchmarks
from recipes.evaluate.geneval import Asked, Colours, Object, positions, read, wrong
from recipes.evaluate.model import Model


@pytest.fixture(scope="module")
def clip() -> Model:
    return Model(str(CLIP))


def at(x: float, y: float, name: str = "star", score: float = 0.95, side: float = 20) -> Object:
    return Object(name, score, (x - side / 2, y - side / 2, x + side / 2, y + side / 2))


def test_positions_are_those_of_middles_that_are_apart() -> None:
    one = at(50, 50)
    assert positions(at(20, 50), one) == {"left of"}
    assert positions(at(80, 52), one) == {"right of"}
    assert positions(at(50, 20), one) == {"above"}
    assert positions(at(52, 90), one) == {"below"}
    assert positions(at(20, 20), one) == {"left of", "above"}
    assert positions(at(53, 48), one) == set()  # within a tenth of both sizes


STAR = {"class": "star", "count": 1}


def cup(where: str) -> dict[str, object]:
    return {"class": "cup", "count": 1, "position": [where, 0]}


@pytest.mark.parametrize(
    ("include", "exclude", "tag", "said"),
    [
        ([STAR | {"count": 2}], [], "single_object", None),
        ([STAR | {"count": 2}], [], "counting", "1 of 2 star"),  # one is not sure enough to count
        ([STAR | {"count": 2}], [STAR | {"count": 2}], "x", "2 star, fewer than 2"),
        ([{"class": "ring", "count": 1}], [], "single_object", "0 of 1 ring"),
        ([STAR, cup("below")], [], "position", None),
        ([STAR, cup("above")], [], "position", "cup is not above star"),
    ],
)
def test_what_is_wrong_is_told(
    include: list[dict[str, Any]], exclude: list[dict[str, Any]], tag: str, said: str | None, clip: Model
) -> None:
    objects = [at(30, 30), at(70, 30, score=0.5), at(30, 80, "cup"), at(50, 50, "ring", score=0.2)]
    found = wrong(Image.new("RGB", (100, 100)), Asked(tag, "p", include, exclude), objects, Colours(clip))
    assert (found or "").startswith(said or "") if said else found is None


def test_colours_are_told_from_an_objects_box(clip: Model) -> None:
    red, blue = (Thing("circle", name, "large", "plain", at, 0, 0) for name, at in (("red", 0), ("blue", 8)))
    image = world.draw(Scene(0, world.GROUNDS[0], "white", (red, blue)), 96)
    boxes = [at(16, 16, "circle", side=30), at(80, 80, "circle", side=30)]
    colours = Colours(clip)
    assert colours(image, boxes) == ["red", "blue"]
    beyond = Object("circle", 0.9, (70.2, 70.2, 190, 190))  # what is not in the picture is no colour
    assert colours(image, [beyond]) == ["blue"]
    red_one = {"class": "circle", "count": 1, "color": "red"}
    assert wrong(image, Asked("colors", "p", [red_one], []), boxes[:1], colours) is None
    two = Asked("colors", "p", [red_one | {"count": 2}], [])
    assert wrong(image, two, boxes, colours) == "circle is red, blue, not red"


def a_detector(folder: Path) -> Path:
    """A tiny one of random weights, of two classes."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=[32, 32],
        patch_size=8, num_detection_tokens=5, id2label={0: "star", 1: "cup"},
    )  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(folder)
    YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_a_detector_looks_at_every_picture(tmp_path: Path) -> None:
    detector = a_detector(tmp_path / "detector")
    lines = [
        {"tag": "single_object", "include": [{"class": "star", "count": 1}], "prompt": "a photo of a star"},
        {"tag": "counting", "include": [{"class": "cup", "count": 9}], "exclude": [], "prompt": "nine cups"},
    ]
    path = tmp_path / "metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = [str(line["prompt"]) for line in lines]
    images = [Image.effect_noise((64, 64), 90).convert("RGB")] * 2
    drawn = a_folder(tmp_path / "drawn", images, texts)
    one = benchmarks.geneval(metadata=str(path), detector=str(detector), clip=str(CLIP), pictures=1)
    (found,) = one.run(one.subject(str(drawn)))
    assert [metric.name for metric in found.metrics] == ["mean over tags", "counting", "single_object"]
    assert found.value("counting") == 0
    assert found.samples == {"pictures": 2}
    assert "as GenEval, 1 a prompt" in found.protocol
    two = benchmarks.geneval(metadata=str(path), detector=str(detector), clip=str(CLIP), pictures=2)
    twice = a_folder(tmp_path / "twice", images * 2, [text for text in texts for _ in range(2)])
    (found,) = two.run(two.subject(str(twice)))
    assert (found.samples, found.metrics[0].of) == ({"pictures": 4}, [2, 2])  # of a prompt they are one unit
    path.write_text(json.dumps(asdict(Asked("x", "nine cups", [{"class": "computer mouse"}], []))) + "\n")
    with pytest.raises(InputError, match="does not know 'mouse'"):  # as COCO has it
        benchmarks.geneval(metadata=str(path), detector=str(detector), clip=str(CLIP))


def test_what_is_no_benchmark_is_told(tmp_path: Path) -> None:
    path = tmp_path / "metadata.jsonl"
    ours = {"tag": "x", "prompt": "p", "include": [{"class": "cup"}]}
    for text, said in (
        ("", "has no prompts"),
        ('{"tag": "x"}', "line 1 has not tag, prompt, include"),
        (json.dumps(ours | {"exclude": [{"class": "cup"}]}), "line 1 has not tag, prompt, include"),
        (json.dumps(ours | {"include": [{"class": "cup", "position": ["above", 0]}]}), "an object before it"),
    ):
        path.write_text(text + "\n")
        with pytest.raises(InputError, match=said):
            read(path)
    path.write_text('{"tag": "x", "prompt": "p", "include": []}\n')
    with pytest.raises(InputError, match=r"has no config\.json"):
        benchmarks.geneval(metadata=str(path), detector=str(tmp_path), clip=str(CLIP))
