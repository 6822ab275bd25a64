"""A vision-language model is asked about pictures that were drawn: how well they match their prompts, from 1
to 5, or, in the demo's world, what is in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from builder.captions.asking import Request
from builder.captions.replies import Reply
from builder.errors import InputError
from builder.stages.caption import Caption, engine_of
from recipes.demo import world
from recipes.demo.world import Scene
from recipes.evaluate.drawings import Drawings
from recipes.evaluate.model import known_as
from recipes.evaluate.results import Result, metric

LEAST_PX = 128  # smaller pictures are shown larger: what a demo's captioner has learned on


def rated(benchmark: str, drawings: Drawings, judge: Caption) -> Result:
    """The mean rating, and the share of pictures that get none, for the judge says something else or nothing,
    which are left out of it; of prompts that were cut to fit a part was judged.

    Raises:
        InputError: none gets one.
    """
    replies = said(drawings, judge)
    texts = [reply.text.strip() for reply in replies]
    ratings = [judge.read(text, "stop")[0] for text in texts]
    found = [rating if isinstance(rating, int) else 0 for rating in ratings]
    none = [float(not rating) for rating in found]
    if all(none):
        reason = f"{judge.model} rated none of {len(texts):,} pictures: it said {texts[0][:60]!r}"
        raise InputError(reason, "judge by a model that follows instructions")
    cut = sum(reply.prompt_cut for reply in replies)
    by = f"rating of 1 to 5 by {_named(judge)}; {drawings.how}"
    each = [rating / 100 for rating in found]
    metrics = (
        metric("rating", each, [1 - one for one in none], all_units=True), metric("without a rating", none),
    )  # fmt: skip
    return Result(benchmark, by, drawings.name, {"pictures": len(texts)}, metrics, main="rating", cut=cut)


def read_back(benchmark: str, drawings: Drawings, scenes: Sequence[Scene], captioner: Caption) -> Result:
    """Of the (colour, shape) pairs of the scenes, those that a captioner of this world names."""
    named = [world.named_pairs(reply.text) for reply in said(drawings, captioner)]
    wanted = [scene.pairs for scene in scenes]
    both = list(zip(wanted, named, strict=True))
    found = [metric("pairs", [len(a & b) for a, b in both], list(map(len, wanted)))]
    if any(named):
        others = [len(b - a) for a, b in both]
        found.append(metric("named, not asked", others, list(map(len, named)), all_units=True))
    how = f"read by the captioner {_named(captioner)}; {drawings.how}"
    return Result(benchmark, how, drawings.name, {"pictures": len(scenes)}, tuple(found), main="pairs")


def _named(kind: Caption) -> str:
    return f"{kind.model} at {kind.endpoint}" if kind.endpoint else known_as(kind.model)


def said(drawings: Drawings, kind: Caption) -> list[Reply]:
    """Of each picture, its prompt being the caption that the kind quotes.

    Raises:
        InputError: nothing of any of them.
    """
    requests = []
    for number, (image, prompt) in enumerate(zip(drawings.images(), drawings.prompts, strict=True)):
        larger = -(-LEAST_PX // image.width)
        shown = image.resize((image.width * larger, image.height * larger)) if larger > 1 else image
        row = dict.fromkeys(kind.quotes(), prompt)
        requests.append(Request(str(number), world.jpeg(shown, 95), row))
    with closing(engine_of([kind])) as engine:
        replies = engine.replies(kind, requests)
    found = [replies[str(number)] for number in range(len(requests))]
    if all(reply.error for reply in found):
        reason = f"{kind.model} said nothing of {len(found)} pictures: {found[0].error}"
        raise InputError(reason, "name a vision-language model, and an endpoint that is up")
    return found
