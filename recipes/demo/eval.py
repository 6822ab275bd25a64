"""Measures the demo's models on held-out scenes and prints what came out.

    python -m recipes.demo.eval             # 500 scenes, a minute on 2 cores
    python -m recipes.demo.eval --json

Captioner: share of the (colour, shape) pairs of a scene that its caption names, and of the named ones that
are not there; captions that end in a whole sentence. CLIP: recall at 1 among 500 recaption-style captions
(exact descriptions), and mean cosines of recaptions and of alt text. The pictures go through JPEG and through
the same stages as in a build.
"""

from __future__ import annotations

import json
import random
from typing import Any

import click

from builder.captions.asking import Request
from builder.captions.vllm import Engine
from builder.stages.caption import Caption
from builder.stages.clip import Clip
from builder.stages.score import Score
from recipes.datasets import demo
from recipes.demo import world

FIRST_SEED = world.HELD_OUT + 900_000_000  # far from the demo's own scenes


def captioner_quality(num_scenes: int = 500) -> tuple[dict[str, Any], list[str]]:
    """Statistics, and the captions."""
    settings = demo().stage("re_caption")
    assert isinstance(settings, Caption)
    engine = Engine(settings)
    scenes = [world.scene(FIRST_SEED + n) for n in range(num_scenes)]
    replies = engine.replies(
        settings,
        (Request(str(n), world.jpeg(world.draw(scene, 128), 95)) for n, scene in enumerate(scenes)),
    )
    found = {int(n): reply for n, reply in replies.items()}
    engine.close()
    there = named = right = whole = stopped = 0
    for n, scene in enumerate(scenes):
        pairs = world.named_pairs(found[n].text.strip())
        there, named, right = there + len(scene.pairs), named + len(pairs), right + len(pairs & scene.pairs)
        whole += found[n].text.strip().endswith(".")
        stopped += found[n].finish_reason == "stop"
    return {
        "scenes": num_scenes,
        "pairs_named_percent": round(100 * right / there, 2),
        "named_but_not_there_percent": round(100 * (named - right) / max(named, 1), 2),
        "whole_sentences_percent": round(100 * whole / num_scenes, 2),
        "stopped_percent": round(100 * stopped / num_scenes, 2),
    }, [found[n].text.strip() for n in range(num_scenes)]


def clip_quality(recaptions: list[str]) -> dict[str, Any]:
    """Recall at 1 in both directions, and mean cosines."""
    settings = demo().stage("score")
    assert isinstance(settings, Score)
    clip = Clip(settings.model)
    scenes = [world.scene(FIRST_SEED + n) for n in range(len(recaptions))]
    image_NE = clip.images([clip.preprocess(world.draw(scene, 128)) for scene in scenes])
    exact_NE, _ = clip.texts([world.describe(scene, random.Random(scene.seed)) for scene in scenes])
    recaption_NE, _ = clip.texts(recaptions)
    alt_NE, _ = clip.texts([world.alt_text(scene, random.Random(scene.seed)) for scene in scenes])
    nearest = (image_NE @ exact_NE.T).cpu()
    target = list(range(len(scenes)))
    return {
        "captions": len(scenes),
        "image_to_text_recall_at_1_percent": round(
            100 * sum(a == b for a, b in zip(nearest.argmax(1).tolist(), target, strict=True)) / len(scenes),
            2,
        ),
        "text_to_image_recall_at_1_percent": round(
            100 * sum(a == b for a, b in zip(nearest.argmax(0).tolist(), target, strict=True)) / len(scenes),
            2,
        ),
        "mean_cosine_recaption": round(float((image_NE * recaption_NE).sum(1).mean()), 4),
        "mean_cosine_alt_text": round(float((image_NE * alt_NE).sum(1).mean()), 4),
    }


@click.command(help=__doc__)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(as_json: bool) -> None:
    captioner, captions = captioner_quality()
    result = {"captioner": captioner, "clip": clip_quality(captions)}
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    for model, numbers in result.items():
        for name, value in numbers.items():
            click.echo(f"{model:<10} {name:<36} {value:>8}")


if __name__ == "__main__":
    main()
