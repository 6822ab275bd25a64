"""Table 3 of the paper (arXiv 2406.08478) in the demo's world: CLIPs trained on original captions, on
recaptions, and on mixtures of both.

    python -m recipes.clip.table3                     # docs/table3.md and .png; see there how long it takes
    python -m recipes.clip.table3 --seeds 1 --samples 5000 --arms 0.5,1 --out /tmp/little --docs /tmp/little

The captions are those of the real line: a demo of 12,000 rows is built and published first.
"""

from __future__ import annotations

import time
from pathlib import Path

import click

from builder.machine import Machine
from builder.shown import echo
from recipes.clip import trainings
from recipes.clip.train import Training
from recipes.study import Found, markdown, options, studied, write

# p_original -> IN1k top-1, COCO I2T and T2I R@1, Flickr I2T and T2I R@1: the paper's, ViT-B/16
PAPER = {
    "0": (36.0, 53.0, 34.1, 74.1, 53.5), "0.2": (62.5, 61.7, 41.4, 85.8, 65.7),
    "0.5": (67.2, 61.9, 42.7, 85.9, 66.7), "0.8": (69.2, 61.5, 42.2, 85.2, 66.9),
    "1": (69.7, 57.3, 37.7, 84.2, 63.0), "concat": (43.3, 57.8, 35.6, 80.2, 56.4),
}  # fmt: skip
ORIGINALS = "1"
SHOWN = (
    ("world, by descriptions", "I2T R@1"),
    ("world, by descriptions", "T2I R@1"),
    ("world, by alt text", "I2T R@1"),
    ("world, by alt text", "T2I R@1"),
    ("world, colour and shape", "top-1"),
)
PROMISED = 3.1  # points of retrieval over originals alone, that the paper's mixtures have at least


def training(arm: str, seed: int, version: Path, images: Path, samples: int) -> Training:
    return trainings.demo(
        version=str(version), images=str(images), samples=samples, seed=seed, workers=0,
        p_original=0.0 if arm == "concat" else float(arm), concat=arm == "concat",
    )  # fmt: skip


@click.command(help=__doc__)
@click.option("--arms", default=",".join(PAPER), show_default=True, help="p_original, or concat.")
@options("runs/table3")
def main(
    arms: str, seeds: int, rows: int, samples: int, scenes: int, version: Path | None, images: Path | None,
    port: int, out: Path, docs: Path,
) -> None:  # fmt: skip
    names = arms.split(",")
    begun, found = studied(training, names, seeds, rows, samples, scenes, version, images, port, out)
    minutes = (time.monotonic() - begun) / 60
    docs.mkdir(parents=True, exist_ok=True)
    command = f"python -m recipes.clip.table3 --arms {arms} --seeds {seeds} --rows {rows} --samples {samples}"
    write(docs / "table3.md", _told(found, names, command, minutes))
    _plot(found, names, docs / "table3.png")
    echo(str(docs / "table3.md"))


def _told(found: Found, names: list[str], command: str, minutes: float) -> str:
    head = ["p_original", *(f"{benchmark.removeprefix('world, ')}: {metric}" for benchmark, metric in SHOWN)]
    ours = [[arm, *(found.value(arm, *which) for which in SHOWN)] for arm in names]
    others = [arm for arm in names if arm != ORIGINALS] if ORIGINALS in names else []
    less = [[arm, *(found.difference(arm, ORIGINALS, *which) for which in SHOWN)] for arm in others]
    paper = [[arm, *PAPER[arm]] for arm in names if arm in PAPER]
    each = [[arm, *(", ".join(map(str, found.seeds(arm, *which))) for which in SHOWN)] for arm in names]
    return f"""# Originals, recaptions, or both: table 3 in the demo's world

`{command}`, {time.strftime("%Y-%m-%d")}, {round(Machine.here().cpus)} cores, {minutes:.0f} min (what lay
there before is not in it). R@1 and top-1 in percent, means over seeds; in brackets 95 % over draws of seeds
and of the benchmark's units. `p_original` is the probability that a sample's text is the original; concat is
both, one after the other.

{markdown([head, *ours])}

What is more than with originals alone, of the same draws:

{markdown([head, *less])}

{_verdict(found, others)}

The paper's (ViT-B/16, 2.56 billion samples of Recap-DataComp-1B):

{markdown([["p", "IN1k top-1", "COCO I2T R@1", "COCO T2I R@1", "Flickr I2T R@1", "Flickr T2I R@1"], *paper])}

![R@1 and top-1 by p_original](table3.png)

Each seed:

{markdown([head, *each])}
"""


def _verdict(found: Found, others: list[str]) -> str:
    """Whether what the paper found is found here."""
    lines = []
    for arm in (name for name in ("0.2", "0.5", "0.8") if name in others):
        for which in SHOWN[:2]:
            more = found.difference(arm, ORIGINALS, *which)
            agrees = "yes" if more.low > 0 and more.value >= PROMISED else "no"
            lines.append(f"- {arm}, {which[1]} by descriptions: {more} more than originals alone; "
                         f"at least {PROMISED} and outside the interval: **{agrees}**")  # fmt: skip
    if "0" in others:
        more = found.difference("0", ORIGINALS, *SHOWN[-1])
        agrees = "yes" if more.high < 0 else "no"
        lines.append(f"- recaptions alone hurt classification by short names: {more}: **{agrees}**")
    return "\n".join(["Does it agree with the paper?", "", *lines])


def _plot(found: Found, names: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ps = [arm for arm in names if arm != "concat"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for which in SHOWN:
        values = [found.value(arm, *which) for arm in ps]
        axes[0].errorbar(
            [float(arm) for arm in ps], [v.value for v in values],
            [[v.value - v.low for v in values], [v.high - v.value for v in values]],
            marker="o", capsize=3, label=": ".join((which[0].removeprefix("world, "), which[1])),
        )  # fmt: skip
    theirs = [arm for arm in PAPER if arm != "concat"]
    for place, name in ((1, "COCO: I2T R@1"), (2, "COCO: T2I R@1"), (0, "ImageNet: top-1")):
        axes[1].plot(
            [float(arm) for arm in theirs], [PAPER[arm][place] for arm in theirs], marker="o", label=name
        )
    for axis, title in zip(axes, ("the demo's world, 95 %", "the paper's, ViT-B/16"), strict=True):
        axis.set(title=title, xlabel="p_original", ylabel="percent", ylim=(0, 100))
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
