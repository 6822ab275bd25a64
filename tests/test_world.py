"""The procedural world: a scene is its seed's, and its description is exact."""

from __future__ import annotations

import random

from recipes.demo import train, world


def test_a_scene_is_a_function_of_its_seed() -> None:
    assert world.scene(5) == world.scene(5)
    assert world.draw(world.scene(5), 64).tobytes() == world.draw(world.scene(5), 64).tobytes()
    assert len({world.describe(world.scene(seed), random.Random(0)) for seed in range(2000)}) > 1990


def test_descriptions_name_every_pair_and_no_other() -> None:
    for seed in range(2000):
        scene = world.scene(seed)
        text = world.describe(scene, random.Random(seed))
        assert world.named_pairs(text) == scene.pairs
        assert text.endswith(".")
        assert world.named_pairs(world.terse(scene)) == scene.pairs


def test_the_relation_holds_in_the_picture() -> None:
    for seed in range(300):
        scene = world.scene(seed)
        if len(scene.things) < 2:
            continue
        first, last = scene.things[0], scene.things[-1]
        text = world.describe(scene, random.Random(seed))
        if first.place // 3 == last.place // 3:
            assert first.place % 3 < last.place % 3
            assert f"to the left of the {last.name}" in text or f"to the right of the {first.name}" in text
        else:
            assert first.place // 3 < last.place // 3
            assert f"above the {last.name}" in text or f"below the {first.name}" in text


def test_pictures_show_the_colours_that_are_described() -> None:
    for seed in range(100):
        scene = world.scene(seed)
        image = world.draw(scene, 192)
        for thing in scene.things:
            colours = image.getcolors(192 * 192) or []
            assert sum(count for count, colour in colours if colour == world.COLOURS[thing.colour]) > 100, (
                seed,
                thing,
            )


def test_alt_text_is_as_bad_as_the_webs() -> None:
    texts = [world.alt_text(world.scene(seed), random.Random(seed)) for seed in range(3000)]
    for sign in ("Free Shipping", "IMG_", "\\xc2\\xae", "画像", "schönes", "jolie"):
        assert 5 < sum(sign in text for text in texts) < 600, sign
    assert 20 < texts.count("") < 120
    useful = sum(bool(world.named_pairs(text) & world.scene(seed).pairs) for seed, text in enumerate(texts))
    assert 0.6 < useful / len(texts) < 0.9


def test_training_never_sees_a_held_out_scene() -> None:
    last = max(
        phase.first_seed + phase.steps * phase.batch
        for phase in (train.STAGE_1, train.STAGE_2, train.STAGE_2_AGAIN, train.STAGE_3, train.CONTRASTIVE)
    )
    assert last < world.HELD_OUT  # scenes that another one's alt text is of are of 39 bits
