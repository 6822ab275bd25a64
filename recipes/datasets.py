"""Build recipes, one function an artifact. `recap build NAME key=value` calls NAME with these parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from builder.captions import kinds
from builder.core import Recipe, SourceSet, Stage
from builder.errors import RecipeError
from builder.stages.best import Best
from builder.stages.caption import Caption
from builder.stages.dedup import Dedup
from builder.stages.download import Download
from builder.stages.embed import Embed
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


def demo(
    *, web: str = "runs/demo-web", rows_per_shard: int = 200, short: bool = False, every: bool = False
) -> Recipe:
    """The embedded default: a procedural world behind a small faulty web, and two tiny models trained on it.

    It has 2,000 rows. `every` adds columns of the other kinds: alt-text-conditioned, VeCLIP's two, a
    structured one and a judge's score, all by the one captioner. `short` adds a second column, cut at 24
    tokens.
    """

    def column(kind: kinds.Kind) -> Caption:
        return Caption.of(kind, model=DEMO_CAPTIONER, dtype="float32", max_model_len=768, kv_cache_gib=1)

    columns = [kinds.RECAP_V1]
    if every:
        columns += [
            kinds.RECAP_V2,
            kinds.VEC,
            kinds.VECAP,
            kinds.STRUCTURED,
            kinds.judge("re_caption", "demo"),
        ]
    if short:
        columns.append(replace(kinds.RECAP_V1, name="short_caption", max_tokens=24))
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
            *map(column, columns),
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
    download = Download(image_px=image_px, verify_sha256=verify_sha256, allow_private=allow_private)
    return _line(
        "recap_datacomp_1b",
        "recaptioned with a LLaVA-1.5 on LLaMA-3, after "
        "What If We Recaption Billions of Web Images with LLaMA-3?",
        (Caption(model=captioner, dtype=dtype), Score(model=clip)),  # type: ignore[arg-type]  # checked there
        Source(files=metadata, rows_per_shard=rows_per_shard), download, source_set, license,
    )  # fmt: skip


def recap_datacomp_1b_v2(
    *, metadata: str, captioner: str, clip: str, source_set: str = "", license: str = ""
) -> Recipe:
    """Recap-DataComp-1B with the column of its second release: `re_caption`, and
    `re_caption_condition_diverse_topk`, which knows the alt text and is drawn from the 20 likeliest tokens
    (prompt and number are ours: the authors published neither). One captioner makes both.
    """
    captions = (Caption.of(kind, model=captioner) for kind in (kinds.RECAP_V1, kinds.RECAP_V2))
    return _line(
        "recap_datacomp_1b_v2",
        "recaptioned with a LLaVA-1.5 on LLaMA-3, without and with their alt text, after "
        "What If We Recaption Billions of Web Images with LLaMA-3?",
        (*captions, Score(model=clip)), Source(files=metadata), Download(), source_set, license,
    )  # fmt: skip


def vecap(
    *, metadata: str, captioner: str, clip: str, fuser: str = "", source_set: str = "", license: str = ""
) -> Recipe:
    """VeCLIP (arXiv 2310.07699): `vec_caption`, a short visual caption; `re_caption`, its fusion with the alt
    text by `fuser`, a language model (the captioner where none is given), or the alt text where that refuses.
    """
    return _line(
        "vecap",
        "with short captions fused with their alt text, after "
        "VeCLIP: Improving CLIP Training via Visual-enriched Captions",
        (
            Caption.of(kinds.VEC, model=captioner),
            Caption.of(kinds.VECAP, name="re_caption", model=fuser or captioner),
            Score(model=clip),
        ),
        Source(files=metadata), Download(), source_set, license,
    )  # fmt: skip


def capsfusion(
    *, metadata: str, captioner: str, fuser: str, clip: str, source_set: str = "", license: str = ""
) -> Recipe:
    """CapsFusion (arXiv 2310.20550): `short_caption` of the image, and `re_caption`, its fusion with the alt
    text by `fuser`, a language model that sees no image.
    """
    return _line(
        "capsfusion",
        "with captions fused with their alt text, after CapsFusion: Rethinking Image-Text Data at Scale",
        (
            Caption.of(kinds.SHORT, model=captioner),
            Caption.of(kinds.CAPSFUSION, name="re_caption", model=fuser),
            Score(model=clip),
        ),
        Source(files=metadata), Download(), source_set, license,
    )  # fmt: skip


def nguyen_blip2_style(
    *, metadata: str, captioner: str, clip: str, source_set: str = "", license: str = ""
) -> Recipe:
    """ "Improving multimodal datasets with image captioning" (arXiv 2307.10350): `caption_t050` to
    `caption_t150`, drawn at four temperatures, each with its cosine; `re_caption`, of each row the nearest.
    """
    made = [kinds.nguyen(temperature) for temperature in kinds.NGUYEN_TEMPERATURES]
    return _line(
        "nguyen_blip2_style",
        "captioned at four temperatures, after Improving multimodal datasets with image captioning",
        (
            *(Caption.of(kind, model=captioner, otherwise=kinds.NULL) for kind in made),
            Embed(model=clip),
            Score(model=clip),
            Best(of=tuple(kind.name for kind in made)),
        ),
        Source(files=metadata), Download(), source_set, license,
    )  # fmt: skip


def _line(
    name: str,
    how: str,
    captions: Iterable[Stage],
    source: Source,
    download: Download,
    source_set: str,
    license: str,
) -> Recipe:
    """Raises:
    RecipeError: there is no such source set.
    """
    if source_set and source_set not in SOURCE_SETS:
        raise RecipeError(f"there is no source set '{source_set}'", f"there are: {', '.join(SOURCE_SETS)}")
    about = SOURCE_SETS.get(source_set)
    images = about.name if about else "Web"
    return Recipe(
        name=name,
        title=f"Recaptioned {images} images",
        license=license or (about.license if about else "unknown"),
        description=f"{images} images {how}",
        source=about,
        stages=(source, download, Dedup(), *captions, Select()),
    )
