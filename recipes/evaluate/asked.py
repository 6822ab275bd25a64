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
from recipes.evaluate.results import Result, metric

LEAST_PX = 128  # smaller pictures are shown larger: what a demo's captioner has learned on


def rated(benchmark: str, drawings: Drawings, judge: Caption) -> Result:
    """The mean rating. A picture that gets none, for the model says something else or nothing, is counted
    and left out; of prompts that were cut to fit a part was judged.

    Raises:
        InputError: none gets one.
    """
    replies = said(drawings, judge)
    texts = [reply.text.strip() for reply in replies]
    ratings = [judge.read(text, "stop")[0] for text in texts]
    found = [rating for rating in ratings if isinstance(rating, int)]
    if not found:
        reason = f"{judge.model} rated none of {len(texts):,} pictures: it said {texts[0][:60]!r}"
        raise InputError(reason, "judge by a model that follows instructions")
    cut = sum(reply.prompt_cut for reply in replies)
    counts = {"pictures": len(texts), "without a rating": len(texts) - len(found), "prompts cut": cut}
    by = f"rating of 1 to 5 by {judge.model}; {drawings.how}"
    metrics = (metric("rating", [rating / 100 for rating in found]),)
    return Result(benchmark, by, drawings.name, counts, metrics, main="rating")


def read_back(benchmark: str, drawings: Drawings, scenes: Sequence[Scene], captioner: Caption) -> Result:
    """Of the (colour, shape) pairs of the scenes, those that a captioner of this world names."""
    named = [world.named_pairs(reply.text) for reply in said(drawings, captioner)]
    wanted = [scene.pairs for scene in scenes]
    both = list(zip(wanted, named, strict=True))
    found = [metric("pairs", [len(a & b) for a, b in both], list(map(len, wanted)))]
    if any(named):
        found.append(metric("named, not asked", [len(b - a) for a, b in both], list(map(len, named))))
    how = f"read by the captioner {captioner.model}; {drawings.how}"
    return Result(benchmark, how, drawings.name, {"pictures": len(scenes)}, tuple(found), main="pairs")


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
