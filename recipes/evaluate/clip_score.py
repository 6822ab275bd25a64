"""CLIP score (Hessel et al., arXiv 2104.08718, without the factor of 2.5): the mean over pictures of 100
times the cosine of picture and prompt, where it is above 0.
"""

from __future__ import annotations

import numpy as np

from recipes.evaluate.drawings import Drawings
from recipes.evaluate.model import Model, known_as
from recipes.evaluate.results import Result, metric


def clip_score(model: Model, benchmark: str, drawings: Drawings) -> Result:
    """How many prompts are longer than the model's context, and so seen in part, is told."""
    images_NE, _ = model.images(drawings.pictures)
    texts_NE, cut = model.read(drawings.prompts)
    hits_N = np.einsum("ne,ne->n", images_NE, texts_NE).clip(min=0)
    counts = {"pictures": len(drawings.prompts)}
    found = (metric("CLIP score", hits_N),)
    protocol = f"CLIP score by {known_as(model.name)}; {drawings.how}"
    return Result(benchmark, protocol, drawings.name, counts, found, main="CLIP score", cut=cut)
