"""`recap demo`: the whole line once, with what came out of it printed at the end."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import click

from analysis import report
from analysis.report import caption_names
from builder import run as runs
from builder.errors import VersionError
from builder.executors.local import local
from builder.files import write_atomically
from builder.model import model_folder
from builder.versions.publish import publish
from recipes import datasets as recipes
from recipes.demo import web

SAMPLES = 25_000  # of each of the two trainings at the end: with fewer both know nothing yet
DESCRIBED = "world, by descriptions"
DRAWS = "recipes/demo/weights/dit"  # what was trained on recaptions of a larger demo


def demo(
    run: Path | str,
    *,
    rows: int,
    port: int,
    progress: runs.Progress,
    every: bool = False,
    train: bool = True,
    executor: runs.Executor = local,
) -> int:
    """Serve a small web, build, publish 0.1.0 next to the run, load it back, train on it. Returns the exit
    status.

    `every` is the recipe's: captions of every kind.
    """
    import datasets

    start = time.monotonic()
    near = run if isinstance(run, Path) else Path("runs", run.rstrip("/").rpartition("/")[2])
    site = near.with_name(f"{near.name}-web-{rows}-{port}")
    target = near.with_name(f"{near.name}-published")
    folder = line(run, site, target, rows=rows, port=port, every=every, executor=executor, progress=progress)
    if folder is None:
        return 1
    rows_there = datasets.load_dataset(str(folder), split="train")
    statistics = json.loads((folder / "stats.json").read_text(encoding="utf-8"))

    better = (r for r in rows_there if r["org_length"] and r["re_clip_score"] > r["org_clip_score"])
    row = next(better, rows_there[0])
    click.echo("\nOne row that came out:\n")
    captions = [name for name in caption_names(statistics) if name not in ("org_caption", "re_caption")]
    ratings = [line["judge"] for line in report.rows(statistics, "ratings")]
    shown = ("url", "org_caption", "re_caption", *captions, *ratings, "org_clip_score", "re_clip_score")
    width = max(15, *map(len, shown))
    for name in shown:
        value = row[name]
        click.echo(f"  {name:<{width}} {format(value, '.3f') if isinstance(value, float) else value}")
    click.echo(f"\nAll {len(rows_there)} of them, original against recaption:\n")
    head, lines = report.table(statistics)
    widths = [max(9, len(name)) for name in head[1:]]
    for label, *values in [head, *lines]:
        cells = (f"{value:>{width}}" for value, width in zip(values, widths, strict=True))
        click.echo(f"  {label:<34} {' '.join(cells)}")
    if found := [r for r in report.rows(statistics, "defects") if r["defect"]]:
        click.echo(
            "\nDefects of captions, in first replies, kept with a caption, and rows that failed of it:\n"
        )
        for r in found:
            numbers = f"{r['first']:>6} {r['kept']:>6} {r['failed']:>6}"
            click.echo(f"  {r['caption']:<34} {r['defect']:<12} {numbers}")
    click.echo("\nWhat became of every URL:\n")
    for r in statistics["rows_by_status"]["rows"]:
        click.echo(f"  {r['status']:<16} {r['rows']:>6} {r['percent']:>6} %")
    if train and "://" in str(run):
        click.echo(f"\nNothing is trained on it: the images of {run} are not on this machine.")
    elif train:
        _train(folder, run, near)
        _draw(near)
    models = "captioner=FOLDER_OR_HUB_ID@REVISION clip=FOLDER_OR_HUB_ID@REVISION"
    click.echo(
        f"""
Done in {time.monotonic() - start:.0f} s. Where it lies:

  {site}/metadata   URL parquet, as DataComp's
  {run}             the run: recap status {run}
  {folder}  the published version: README.md is its card

What to type next:

  recap train clip demo version={folder} images={run} p_original=0.5
  recap sample {DRAWS} "A large red star sits in the centre." --out drawn --grid
  recap sql {folder} "select org_caption, re_caption from published limit 5"
  python -c "import datasets; print(datasets.load_dataset('{folder}', split='train')[0])"
  recap build recap_datacomp_1b metadata='your/*.parquet' {models} --limit 1000
"""
    )
    return 0


def line(
    run: Path | str, site: Path, target: Path, *, rows: int, port: int, every: bool = False,
    executor: runs.Executor = local, progress: runs.Progress | None = None,
) -> Path | None:  # fmt: skip
    """Draw and serve a small web, build it, publish 0.1.0; where that lies, or None where shards failed."""
    if not (site / "truth.json").exists():
        click.echo(f"drawing {rows} pictures for a small web on {web.HOST}:{port}", err=True)
        web.make(site, rows=rows, port=port)
    with web.serve(site, port):
        recipe = recipes.demo(web=str(site), every=every)
        result = runs.build(recipe, run, executor=executor, progress=progress)
    for name, reason in result.failed.items():
        click.echo(f"failed: {name}: {reason}", err=True)
    if result.failed:
        return None
    try:
        return Path(publish(run, str(target), "0.1.0").place)
    except VersionError as error:
        raise VersionError(
            error.message, f"an older demo lies there; to begin afresh: rm -r {target}"
        ) from error


def _train(version: Path, run: Path | str, near: Path) -> None:
    """Two small CLIPs on what was published: of originals alone, and of originals and recaptions."""
    from recipes.clip import trainings
    from recipes.evaluate.benchmarks import demo as benchmark
    from recipes.study import run as study

    begun = time.monotonic()
    place = near.with_name(f"{near.name}-clip")
    of = partial(
        trainings.demo, version=str(version), images=str(run), samples=SAMPLES, workers=0, vision="P",
        text="P", lr=2e-3,
    )  # fmt: skip
    arms = {"originals only": [of(p_original=1.0)], "mixed": [of(p_original=0.5)]}
    scenes = partial(benchmark, folder=str(near.with_name("demo-benchmark")), scenes=300)
    click.echo("\nTwo small CLIPs, trained on original captions only and on both:\n")
    found = study(arms, scenes, "world-300", place, lambda _: None)
    for metric in ("T2I R@1", "T2I R@5", "I2T R@5"):
        told = ", ".join(f"{name} {found.value(name, DESCRIBED, metric).value:.1f} %" for name in arms)
        more = found.difference("mixed", "originals only", DESCRIBED, metric)
        click.echo(f"  {metric} by descriptions: {told}; {more} more")
    samples = f"{SAMPLES:,} samples each, 300 scenes that nothing was trained on"
    click.echo(
        f"\n  {samples}, {time.monotonic() - begun:.0f} s; with every p: python -m recipes.clip.table3"
    )


def _draw(near: Path) -> None:
    """What a DiT draws of descriptions of scenes that nothing was trained on: a grid, a scene above what was
    drawn of it.
    """
    from recipes.dit import sample
    from recipes.evaluate.drawings import Artist
    from recipes.evaluate.world_drawings import prompts, read_back, real

    begun, out = time.monotonic(), near.with_name(f"{near.name}-drawn")
    scenes, texts = prompts(12, "described")
    folder = model_folder(DRAWS)
    assert folder is not None
    drawings = Artist(str(folder), {"steps": 25, "batch": len(texts)}).drawn(texts, out)
    found = read_back("demo", drawings, scenes, "described")
    drawn = list(drawings.images())
    both = real(scenes, drawn[0].size), drawn
    rows = [pictures[start : start + 6] for start in (0, 6) for pictures in both]
    grid = sample.grid([picture for row in rows for picture in row], 6, scale=4)
    write_atomically(out / "grid.png", sample.png(grid))
    told = ", ".join(f"{name} {found.value(name):.0f} %" for name in ("pairs", "at their place", "colours"))
    click.echo(
        f"\nA DiT drew {len(texts)} scenes from their descriptions: {out / 'grid.png'}, each below its scene"
        f"\n\n  {told}, read back from the pictures; {time.monotonic() - begun:.0f} s"
    )
