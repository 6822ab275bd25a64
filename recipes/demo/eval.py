"""Measures the demo's models on held-out scenes and prints what came out.

    python -m recipes.demo.eval             # MINUTES on 2 cores
    python -m recipes.demo.eval --json

Captioner: share of the (colour, shape) pairs of a scene that its caption names, and of the named ones that
are not there; captions that end in a whole sentence; 500 scenes. Every other kind of caption, 300 scenes:
first replies that are good by the kind's own checks, and what else matters of it; captions that a prompt
quotes are the captioner's own, those to be judged are `world.flawed`. CLIP: recall at 1 among 500
recaption-style captions (exact descriptions), and mean cosines of recaptions and of alt text. The pictures go
through JPEG and through the same stages as in a build.
"""

from __future__ import annotations

import json
import random
from typing import Any

import click

from builder.captions import kinds
from builder.captions.asking import Request
from builder.captions.kinds import Kind
from builder.captions.vllm import Engine
from builder.stages.caption import Caption
from builder.stages.clip import Clip
from builder.stages.score import Score
from recipes.datasets import demo
from recipes.demo import train, world

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


def kinds_quality(num_scenes: int = 300) -> dict[str, dict[str, Any]]:
    """For each kind besides `RECAP_V1`, statistics of first replies."""
    asked = [kind for kind in train.LESSONS if kind != kinds.RECAP_V1]
    settings = demo().stage("re_caption")
    assert isinstance(settings, Caption)
    given = {name: getattr(settings, name) for name in ("model", "dtype", "max_model_len", "kv_cache_gib")}
    columns = {kind: Caption.of(kind, **given) for kind in asked}
    engine = Engine(*columns.values())
    scenes = [world.scene(FIRST_SEED + 10_000 + n) for n in range(num_scenes)]
    rows: list[dict[str, Any]] = [
        {
            "org_caption": world.alt_text(scene, random.Random(scene.seed)),
            "re_caption": world.flawed(scene, random.Random(~scene.seed)),
        }
        for scene in scenes
    ]
    found: dict[str, dict[str, Any]] = {}
    for kind, column in columns.items():
        replies = engine.replies(
            column,
            (
                Request(str(n), world.jpeg(world.draw(scene, 128), 95) if kind.image else None, row)
                for n, (scene, row) in enumerate(zip(scenes, rows, strict=True))
            ),
        )
        values, good = [], 0
        for n, row in enumerate(rows):
            reply = replies[str(n)]
            value, defects = kind.read(reply.text, reply.finish_reason)
            good += value is not None and not kind.retried(defects)
            values.append(value)
            row[kind.name] = value or ""
        found[kind.name] = {"replies": num_scenes, "good_percent": _percent(good, num_scenes)}
        found[kind.name] |= _of_kind(kind, scenes, rows, values)
    engine.close()
    return found


def _percent(part: float, whole: float) -> float:
    return round(100 * part / max(whole, 1), 2)


def _of_kind(
    kind: Kind, scenes: list[world.Scene], rows: list[dict[str, Any]], values: list[str | int | None]
) -> dict[str, Any]:
    if kind.value == "rating":
        return _of_ratings(
            [(world.rating(scene, row["re_caption"]), value)
             for scene, row, value in zip(scenes, rows, values, strict=True) if isinstance(value, int)]
        )  # fmt: skip
    texts = [str(value or "") for value in values]
    if not kind.image:
        return _of_fused(scenes, texts, rows, [row[kind.quotes()[-1]] for row in rows])
    named = [_pairs_of_json(text) if kind.value == "json" else world.named_pairs(text) for text in texts]
    right = sum(len(pairs & scene.pairs) for pairs, scene in zip(named, scenes, strict=True))
    said = sum(map(len, named))
    statistics = {
        "pairs_named_percent": _percent(right, sum(len(scene.pairs) for scene in scenes)),
        "named_but_not_there_percent": _percent(said - right, said),
    }
    if kind.value == "json":
        exact = sum(text == world.structured(scene) for text, scene in zip(texts, scenes, strict=True))
        statistics["exact_percent"] = _percent(exact, len(scenes))
    return statistics


def _pairs_of_json(text: str) -> frozenset[str]:
    things = json.loads(text or "{}").get("objects", [])
    return frozenset(f"{colour} {thing['name']}" for thing in things for colour in thing["attributes"]
                     if colour in world.COLOURS)  # fmt: skip


def _of_ratings(ratings: list[tuple[int, int]]) -> dict[str, Any]:
    """Of (truth, what the judge says)."""

    def mean(said: list[int]) -> float:
        return round(sum(said) / max(len(said), 1), 3)

    return {
        "mean_absolute_error": mean([abs(truth - said) for truth, said in ratings]),
        "exact_percent": _percent(sum(truth == said for truth, said in ratings), len(ratings)),
        **{f"mean_rating_where_truth_is_{n}": mean([said for truth, said in ratings if truth == n])
           for n in range(1, 6)},
    }  # fmt: skip


def _of_fused(
    scenes: list[world.Scene], texts: list[str], rows: list[dict[str, Any]], shorts: list[str]
) -> dict[str, Any]:
    """`shorts` are the short captions that were in the prompts."""
    right = [world.fuse(row["org_caption"], short) for row, short in zip(rows, shorts, strict=True)]
    fused = [
        world.named_pairs(text) == scene.pairs
        for text, scene in zip(texts, scenes, strict=True)
        if text != world.REFUSAL
    ]
    added = [
        text == wanted
        for text, wanted, short in zip(texts, right, shorts, strict=True)
        if wanted not in (short, world.REFUSAL)
    ]
    return {
        "refused_percent": _percent(texts.count(world.REFUSAL), len(texts)),
        "to_be_refused_percent": _percent(right.count(world.REFUSAL), len(texts)),
        "fused_naming_the_pairs_percent": _percent(sum(fused), len(fused)),
        "to_be_added_to_percent": _percent(len(added), len(texts)),
        "exact_of_these_percent": _percent(sum(added), len(added)),
        "exact_percent": _percent(sum(map(str.__eq__, texts, right)), len(texts)),
    }


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
    result = {"captioner": captioner, **kinds_quality(), "clip": clip_quality(captions)}
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    width = max(map(len, result))
    for what, numbers in result.items():
        for name, value in numbers.items():
            click.echo(f"{what:<{width}} {name:<36} {value:>8}")


if __name__ == "__main__":
    main()
