"""Build recipes, one function an artifact. `recap build NAME key=value` calls the function NAME with these parameters."""

from __future__ import annotations

from builder.caption import RECAPTION_V1, Caption, CaptionSpec
from builder.core import Recipe
from builder.dedup import Dedup
from builder.download import Download
from builder.score import Score
from builder.select import Select
from builder.source import Source

DEMO_CAPTIONER = "recipes/demo/weights/captioner"
DEMO_CLIP = "recipes/demo/weights/clip"


def demo(*, web: str = "runs/demo-web", rows_per_shard: int = 200, short: bool = False) -> Recipe:
    """The embedded default: 2,000 rows of a procedural world behind a small faulty web, and two tiny models trained on it.

    `short` adds a second caption column, cut at 24 tokens.
    """
    second = (CaptionSpec(name="short_caption", max_tokens=24),) if short else ()
    return Recipe(
        name="demo",
        title="recapkit demo",
        license="cc0-1.0",
        description="Pictures of a procedural world, recaptioned by a LLaVA-LLaMA3 of 1.9M parameters trained from scratch.",
        stages=(
            Source(files=f"{web}/metadata", rows_per_shard=rows_per_shard),
            Download(image_px=128, timeout_s=5, allow_private=("127.0.0.1/32",)),
            Dedup(),
            Caption(model=DEMO_CAPTIONER, specs=(RECAPTION_V1, *second), dtype="float32", max_model_len=512, kv_cache_gib=1),
            Score(model=DEMO_CLIP),
            Select(captions=tuple(spec.name for spec in second)),
        ),
    )


def recap_datacomp_1b(
    *,
    metadata: str,
    captioner: str,
    clip: str,
    rows_per_shard: int = 10_000,
    image_px: int = 512,
    verify_sha256: bool = True,
    allow_private: tuple[str, ...] = (),
    dtype: str = "auto",
) -> Recipe:
    """Recap-DataComp-1B's line (arXiv 2406.08478) over any DataComp-like metadata: download as DataComp does, recaption v1, CLIP scores.

    `captioner` is a LLaVA-LLaMA3 checkpoint and `clip` an open_clip one: folders, or Hub ids with a pinned revision.
    """
    return Recipe(
        name="recap_datacomp_1b",
        title="Recaptioned DataComp",
        description="DataComp images recaptioned with a LLaVA-1.5 on LLaMA-3, after What If We Recaption Billions of Web Images with LLaMA-3?",
        stages=(
            Source(files=metadata, rows_per_shard=rows_per_shard),
            Download(image_px=image_px, verify_sha256=verify_sha256, allow_private=allow_private),
            Dedup(),
            Caption(model=captioner, dtype=dtype),
            Score(model=clip),
            Select(),
        ),
    )
