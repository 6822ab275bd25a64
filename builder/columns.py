"""Names of published columns that are about a caption."""

from __future__ import annotations

PUBLISHED_BEFORE = ("re_caption_condition_diverse_topk",)  # Recap-DataComp-1B has columns for it
NOT_CAPTIONS = ("_finish_reason", "_defects", "_rejected")  # text about a caption
_PREFIXES = {"org_caption": "org", "re_caption": "re", PUBLISHED_BEFORE[0]: "re_condition"}


def prefix(caption: str) -> str:
    """What the names of its other published columns begin with."""
    return _PREFIXES.get(caption, caption)


def caption_of(before: str) -> str:
    """The caption whose columns begin so."""
    return next((caption for caption, known in _PREFIXES.items() if known == before), before)


def score_column(stage: str, caption: str) -> str:
    """The published cosine of a caption by a score stage: `clip` by the one that is called score, or where
    the caption's own stage has it.
    """
    return f"{prefix(caption)}_{'clip' if stage in ('score', caption) else stage}_score"
