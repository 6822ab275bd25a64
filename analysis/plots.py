"""Histograms of statistics, original against recaption, readable in print."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PLOTS = {"length_histogram": ("words", 4, "words in the caption"), "cosine_histogram": ("cosine", 0.02, "cosine of image and caption")}
_STYLE = {"org_caption": ("original", "#9a9a9a"), "re_caption": ("recaption", "#1f5fa8")}


def draw(report: Mapping[str, Any], folder: Path) -> list[str]:
    """Write one PNG a histogram; the same statistics give the same bytes. Returns their names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = []
    for query, (column, width, label) in PLOTS.items():
        figure, axes = pyplot.subplots(figsize=(5, 2.8), layout="constrained")
        for caption, (name, colour) in _STYLE.items():
            rows = [row for row in report[query]["rows"] if row["caption"] == caption]
            axes.bar([row[column] for row in rows], [row["captions"] for row in rows], width, align="edge", label=name, color=colour, alpha=0.75)
        axes.set(xlabel=label, ylabel="captions")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(folder / f"{query}.png", dpi=144, metadata={"Software": None})
        pyplot.close(figure)
        names.append(f"{query}.png")
    return names
