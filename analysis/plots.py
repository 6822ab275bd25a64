"""Histograms of statistics, original against recaption, readable in print."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis.report import caption_names, rows

PLOTS = {
    "length_histogram": ("words", 4, "words in the caption"),
    "cosine_histogram": ("cosine", 0.02, "cosine of image and caption"),
}
_STYLE = {"org_caption": ("original", "#9a9a9a"), "re_caption": ("recaption", "#1f5fa8")}
_MORE = ("#b3541e", "#3d7a3d", "#6d4c9f", "#8a6d1b")  # further captions, in the order of the table


def draw(report: Mapping[str, Any], folder: Path) -> None:
    """Write one PNG a histogram; the same statistics give the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for query, (column, width, label) in PLOTS.items():
        if not rows(report, query):
            continue
        figure, axes = pyplot.subplots(figsize=(5, 2.8), layout="constrained")
        others = [name for name in caption_names(report) if name not in _STYLE]
        for caption, (name, colour) in (
            _STYLE | {name: (name, colour) for name, colour in zip(others, _MORE, strict=False)}
        ).items():
            bins = [row for row in rows(report, query) if row["caption"] == caption]
            if not bins:
                continue
            axes.bar(
                [row[column] for row in bins],
                [row["captions"] for row in bins],
                width,
                align="edge",
                label=name,
                color=colour,
                alpha=0.75,
            )
        axes.set(xlabel=label, ylabel="captions")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(folder / f"{query}.png", dpi=144, metadata={"Software": None})
        pyplot.close(figure)
