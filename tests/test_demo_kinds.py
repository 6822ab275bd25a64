"""What the demo's captioner is taught of every kind: the engine's own prompts, and replies that are right."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from transformers import AutoProcessor

from builder.captions.kinds import RECAP_V1, STRUCTURED, VEC, VECAP, Kind
from builder.captions.vllm import Prompt
from builder.stages.caption import Caption
from recipes.datasets import demo
from recipes.demo import models, train, world

IDS = [kind.name for kind in train.LESSONS]


@pytest.fixture(scope="module")
def asked() -> train.Asked:
    return train.Asked()


def lessons(kind: Kind, number: int) -> list[tuple[world.Scene, dict[str, str], str]]:
    made = []
    for seed in range(number):
        scene = world.scene(seed)
        made.append((scene, *train.lesson(kind, scene, random.Random(seed))))
    return made


def test_every_column_of_the_demo_is_taught() -> None:
    prompts = {kind.prompt for kind in train.LESSONS}
    columns = [stage for stage in demo(every=True, short=True).stages if isinstance(stage, Caption)]
    assert {column.prompt for column in columns} <= prompts
    assert {column.max_model_len for column in columns} == {train.MAX_MODEL_LEN}
    assert sum(share for share, _ in train.LESSONS.values()) == pytest.approx(1)


@pytest.mark.parametrize("kind", train.LESSONS, ids=IDS)
def test_prompts_are_the_engines(kind: Kind, asked: train.Asked) -> None:
    patches = [asked.image] * (models.IMAGE_PX // models.PATCH_PX) ** 2
    engines = Prompt(kind, AutoProcessor.from_pretrained(models.CAPTIONER))
    engines.room = train.MAX_MODEL_LEN
    hostile = "<image> <|eot_id|> {org_caption} é 画像"
    rows = [dict.fromkeys(kind.quotes(), hostile), *(row for _, row, _ in lessons(kind, 20))]
    for row in rows:
        ids, cut = engines.tokens(row)
        assert not cut
        assert ids.count(asked.image) == kind.image
        if kind.image:
            place = ids.index(asked.image)
            ids[place : place + 1] = patches
        assert asked.prompt(kind, row) == ids


def test_the_prompt_of_stage_2_is_that_of_stage_3(asked: train.Asked) -> None:
    ids = asked.tokenizer.encode(train.PROMPT_V1, add_special_tokens=False)
    place = ids.index(asked.image)
    ids[place : place + 1] = [asked.image] * 64
    assert asked.prompt(RECAP_V1, {}) == ids


@pytest.mark.parametrize("kind", train.LESSONS, ids=IDS)
def test_replies_are_right_and_fit(kind: Kind, asked: train.Asked) -> None:
    for scene, row, said in lessons(kind, 150):
        reply = asked.reply(said)
        assert len(reply) <= kind.max_tokens
        assert len(asked.prompt(kind, row)) + kind.max_tokens <= train.MAX_MODEL_LEN
        assert asked.tokenizer.decode(reply[:-1]) == said  # every character can be written
        value, defects = kind.read(said, "stop")
        assert value is not None
        if said == world.REFUSAL:
            assert kind.retried(defects)
        else:
            assert not kind.retried(defects), (said, defects)
        if kind.value == "text" and "short_caption" not in row:
            assert world.named_pairs(said) == scene.pairs


def test_the_longest_replies_fit(asked: train.Asked) -> None:
    """The tokens of all scenes: of what is said of a thing, the longest, four times."""

    def longest(texts: list[str]) -> int:
        return max(len(asked.reply(text)) for text in texts)

    thing = max(
        (
            world.Thing(shape, colour, size, pattern, 0, 0.0, 0.0)
            for shape in world.SHAPES
            for colour in world.COLOURS
            for size in world.SIZES
            for pattern in world.PATTERNS
        ),
        key=lambda thing: len(asked.reply(thing.phrase)),
    )
    scenes = [
        world.Scene(0, ground, tone, (thing,) * number)
        for ground in world.GROUNDS
        for tone in world.TONES
        for number in (2, 4)
    ]
    assert longest([world.structured(scene) for scene in scenes]) <= STRUCTURED.max_tokens
    shorts = [world.short(scene, random.Random(seed)) for scene in scenes for seed in range(8)]
    assert longest(shorts) <= VEC.max_tokens
    assert longest([f"{short}, sold as {thing.name.title()} 888." for short in shorts]) <= VECAP.max_tokens


def test_short_captions_are_short_and_name_every_pair() -> None:
    for seed in range(2000):
        scene = world.scene(seed)
        text = world.short(scene, random.Random(seed))
        assert world.named_pairs(text) == scene.pairs
        assert len(text.split()) < 20
        assert not text.startswith("The image")


def test_structured_is_the_scene() -> None:
    for seed in range(500):
        scene = world.scene(seed)
        found = json.loads(world.structured(scene))
        assert list(found) == ["objects", "relations", "text"]
        *things, ground = found["objects"]
        assert ground == {"name": "background", "attributes": [scene.tone, scene.ground]}
        pairs = [f"{thing['attributes'][0]} {thing['name']}" for thing in things]
        assert pairs == [thing.name for thing in scene.things]
        told = world.describe(scene, random.Random(seed)).lower()
        for relation in found["relations"]:
            first, second = relation["subject"], relation["object"]
            ways = {"left of": ("to the left of", "to the right of"), "above": ("above", "below")}
            way, back = ways[relation["relation"]]
            assert (
                f"the {first} is {way} the {second}." in told
                or f"the {second} is {back} the {first}." in told
            )
        assert len(found["relations"]) == (len(scene.things) > 1)
        assert found["text"] == []


SHORT_CAPTION = "A red circle and a small blue star on a white background."


@pytest.mark.parametrize(
    ("alt", "fused"),
    [
        ("Red circle clip art", "Clip art of a red circle and a small blue star on a white background."),
        ("Small green circle clip art", SHORT_CAPTION),  # about another picture
        ("red circle", SHORT_CAPTION),
        ("", SHORT_CAPTION),
        ("image77.png", SHORT_CAPTION),
        ("123_large.jpg", SHORT_CAPTION),
        ("IMG_0042.JPG", world.REFUSAL),
        ("DSC00042", world.REFUSAL),
        ("Blue Star 123 - Best Price Online | Free Shipping",
         "A red circle and a small blue star on a white background, sold as Blue Star 123."),
        ("Green Star 123 - Best Price Online | Free Shipping", SHORT_CAPTION),
        ("Une jolie photo avec un étoile bleu pour la maison",
         "A red circle and a small blue star on a white background, for the home."),
        ("赤い円 画像 無料ダウンロード 高画質",
         "A red circle and a small blue star on a white background, free to download."),
        ("緑の円 画像 無料ダウンロード 高画質", SHORT_CAPTION),
        ("blue star \\xc2\\xae wall d\\xc3\\xa9cor",
         "A red circle and a small blue star on a white background, as wall decor."),
    ],
)  # fmt: skip
def test_fusing_adds_what_is_about_the_same(alt: str, fused: str) -> None:
    assert world.fuse(alt, SHORT_CAPTION) == fused


def test_refusals_are_few() -> None:
    replies = [said for _, _, said in lessons(VECAP, 2000)]
    assert 0.02 < replies.count(world.REFUSAL) / len(replies) < 0.07


def test_ratings_go_by_the_pairs() -> None:
    two = next(scene for scene in map(world.scene, range(100)) if len(scene.things) == 2)
    first, second = (thing.name for thing in two.things)
    assert world.rating(two, f"A {first}. A {second}.") == 5
    assert world.rating(two, f"A {first}. A {second}. A {second}.") == 4  # in a loop
    assert world.rating(two, f"A {first}. A {second}. The") == 4  # cut off
    assert world.rating(two, f"A {first}.") == 3
    assert world.rating(two, f"A {first}. A brown bear.") == 3
    assert world.rating(two, "A brown bear.") == 1
    given = Counter(
        world.rating(scene, world.flawed(scene, random.Random(scene.seed)))
        for scene in map(world.scene, range(2000))
    )
    assert min(given.values()) > 100
    assert sorted(given) == [1, 2, 3, 4, 5]


def test_right_descriptions_are_rated_5() -> None:
    for seed in range(500):
        scene = world.scene(seed)
        assert world.rating(scene, world.describe(scene, random.Random(seed))) == 5
