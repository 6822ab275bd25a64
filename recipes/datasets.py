"""Build recipes, one function an artifact. `recap build NAME key=value` calls NAME with these parameters."""

from __future__ import annotations

from dataclasses import replace

from builder.core import Recipe, SourceSet
from builder.errors import RecipeError
from builder.stages.caption import Caption
from builder.stages.dedup import Dedup
from builder.stages.download import Download
from builder.stages.score import Score
from builder.stages.select import Select
from builder.stages.source import Source

DEMO_CAPTIONER = "recipes/demo/weights/captioner"
DEMO_CLIP = "recipes/demo/weights/clip"

# Source sets, with the licence that each states for its URLs and text; the images are their owners'.
SOURCE_SETS = {
    "datacomp": SourceSet(
        "DataComp", "https://www.datacomp.ai", "cc-by-4.0",
        "Gadre et al., DataComp: In search of the next generation of multimodal datasets, arXiv 2304.14108",
    ),
    "laion": SourceSet(  # LAION-400M and -5B; Re-LAION-5B states another licence
        "LAION-5B", "https://laion.ai/blog/laion-5b/", "cc-by-4.0",
        "Schuhmann et al., LAION-5B: An open large-scale dataset for training next generation image-text "
        "models, arXiv 2210.08402",
    ),
    "cc3m": SourceSet(  # Google's own terms: any purpose, acknowledgement appreciated
        "Conceptual Captions", "https://github.com/google-research-datasets/conceptual-captions", "other",
        "Sharma et al., Conceptual Captions: A Cleaned, Hypernymed, Image Alt-text Dataset For Automatic "
        "Image Captioning, ACL 2018",
    ),
    "capsfusion": SourceSet(  # its data card states none
        "CapsFusion-120M", "https://huggingface.co/datasets/BAAI/CapsFusion-120M", "unknown",
        "Yu et al., CapsFusion: Rethinking Image-Text Data at Scale, arXiv 2310.20550",
    ),
    "pixelprose": SourceSet(
        "PixelProse", "https://huggingface.co/datasets/tomg-group-umd/pixelprose", "cc-by-4.0",
        "Singla et al., From Pixels to Prose: A Large Dataset of Dense Image Captions, arXiv 2406.10328",
    ),
}  # fmt: skip


def demo(*, web: str = "runs/demo-web", rows_per_shard: int = 200, short: bool = False) -> Recipe:
    """The embedded default: a procedural world behind a small faulty web, and two tiny models trained on it.

    It has 2,000 rows. `short` adds a second caption column, cut at 24 tokens.
    """
    first = Caption(model=DEMO_CAPTIONER, dtype="float32", max_model_len=512, kv_cache_gib=1)
    second = (replace(first, name="short_caption", max_tokens=24),) if short else ()
    return Recipe(
        name="demo",
        title="recapkit demo",
        license="cc0-1.0",
        description="Pictures of a procedural world, "
        "recaptioned by a LLaVA-LLaMA3 of 1.9M parameters trained from scratch.",
        source=SourceSet("recapkit's procedural world (recipes/demo)", "", "cc0-1.0"),
        stages=(
            Source(files=f"{web}/metadata", rows_per_shard=rows_per_shard),
            Download(image_px=128, timeout_s=5, allow_private=("127.0.0.1/32",)),
            Dedup(),
            first,
            *second,
            Score(model=DEMO_CLIP),
            Select(),
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
    source_set: str = "",
    license: str = "",
) -> Recipe:
    """Recap-DataComp-1B's line (arXiv 2406.08478) over any DataComp-like metadata.

    That is: download as DataComp does, recaption v1, CLIP scores. `captioner` is a LLaVA-LLaMA3 checkpoint
    and `clip` an open_clip one: folders, or Hub ids with a pinned revision. `source_set` names the data set
    that the metadata belong to, one of `SOURCE_SETS`; `license` is that of the captions, the source set's
    where none is given. The card states both.

    Raises:
        RecipeError: there is no such source set.
    """
    if source_set and source_set not in SOURCE_SETS:
        raise RecipeError(f"there is no source set '{source_set}'", f"there are: {', '.join(SOURCE_SETS)}")
    source = SOURCE_SETS.get(source_set)
    images = source.name if source else "Web"
    paper = "What If We Recaption Billions of Web Images with LLaMA-3?"
    return Recipe(
        name="recap_datacomp_1b",
        title=f"Recaptioned {images} images",
        license=license or (source.license if source else "unknown"),
        description=f"{images} images recaptioned with a LLaVA-1.5 on LLaMA-3, after {paper}",
        source=source,
        stages=(
            Source(files=metadata, rows_per_shard=rows_per_shard),
            Download(image_px=image_px, verify_sha256=verify_sha256, allow_private=allow_private),
            Dedup(),
            Caption(model=captioner, dtype=dtype),  # type: ignore[arg-type]  # checked there
            Score(model=clip),
            Select(),
        ),
    )
