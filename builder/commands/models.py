"""Train, evaluate and publish models."""

from __future__ import annotations

import functools
import importlib
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from builder.commands.options import (
    as_json_option,
    dry_run_option,
    path_type,
    rebase_option,
    settings_argument,
    version_option,
)
from builder.errors import UserError, command
from builder.files import write_atomically
from builder.resolve import resolve_benchmark, resolve_training
from builder.shown import columns, echo, print_


@click.group()
def train() -> None:
    """Train a model on a published version."""


@train.command()
@click.argument("training")
@settings_argument
@click.option("--out", type=path_type, help="Folder of the training; runs/clip-TRAINING unless given.")
@as_json_option
def clip(training: str, settings: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """A CLIP: TRAINING is a function of recipes/clip/trainings.py, or my_file.py:function. The same command
    again goes on where it stopped.
    """
    _train("clip", training, settings, out, as_json)


@train.command()
@click.argument("training")
@settings_argument
@click.option("--out", type=path_type, help="Folder of the training; runs/dit-TRAINING unless given.")
@as_json_option
def dit(training: str, settings: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """A Diffusion Transformer: TRAINING is a function of recipes/dit/trainings.py, or my_file.py:function.
    The same command again goes on where it stopped.
    """
    _train("dit", training, settings, out, as_json)


def _train(what: str, training: str, settings: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    module = importlib.import_module(f"recipes.{what}.train")
    chosen: Any = resolve_training(what, training, settings, module.Training)
    out = out or Path("runs", f"{what}-{chosen.name}")
    there = module.train(chosen, out, say=functools.partial(echo, err=True))
    from recipes.training import this_process

    if this_process().is_first:
        print_({"model": str(there)}, as_json, f"{there}")


_DRAWING = (
    click.option("--vae", help="Of a model that draws latents: the folder or Hub id@revision of their VAE."),
    click.option("--encoder", help="Of a model that reads features of texts: their encoder, alike."),
    click.option("--sampler", type=click.Choice(["ddpm", "dpm", "euler"]), help="A flow: euler or dpm."),
    click.option("--steps", type=int, help="250 of a diffusion, 50 of a flow, unless given."),
    click.option("--guidance", type=float, help="10 of a diffusion, 2 of a flow, unless given; 1 is none."),
    click.option("--guided", type=click.Choice(["all", "three"]), help="Which channels guidance acts on."),
    click.option("--seed", type=int, help="Another one draws others; 0 unless given."),
)


def drawing_options(function: Any) -> Any:
    """How a model draws."""
    for option in reversed(_DRAWING):
        function = option(function)
    return function


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("prompt", nargs=-1)
@click.option(
    "--captions",
    type=path_type,
    help="A file of prompts behind those given: one a line, COCO's captions_*.json, or a parquet file.",
)
@click.option("--column", default="caption", show_default=True, help="Of a parquet file.")
@click.option(
    "--number", type=int, help="So many of the file's prompts, sampled at random; all unless given."
)
@click.option("--out", type=path_type, required=True, help="Folder of the pictures.")
@drawing_options
@click.option("--batch", type=int, help="Pictures at a time: 32, of few 4. It enters what is drawn.")
@click.option("--grid", is_flag=True, help="Also grid.png, of the first 36.")
@as_json_option
def sample(
    model: Path, prompt: tuple[str, ...], captions: Path | None, column: str, number: int | None, out: Path,
    grid: bool, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Draw each PROMPT with MODEL, a checkpoint of `recap train dit`. The same command again draws what is
    not there yet.
    """
    from PIL import Image

    from recipes.dit import prompts
    from recipes.dit import sample as samples
    from recipes.training import this_process

    this = this_process()
    if grid and this.ranks > 1:
        raise UserError("--grid while others draw too", "type it again when they are done, without torchrun")
    if number is not None and not captions:
        raise UserError("--number of which prompts?", "name a file of them: --captions FILE")
    texts = [*prompt, *(prompts.read(captions, column=column, number=number) if captions else ())]
    how = samples.sample(model, texts, out, say=functools.partial(echo, err=True), **given)
    if grid:
        some = [out / samples.file_of(number) for number in range(min(36, len(texts)))]
        sheet = samples.grid([Image.open(path) for path in some], columns=min(6, len(some)), scale=4)
        write_atomically(out / "grid.png", samples.png(sheet))
    if this.is_first:
        print_({"folder": str(out), "pictures": len(texts), **asdict(how)}, as_json, f"{out}")


def plan_training(
    what: str,
    training: str,
    settings: tuple[str, ...],
    tflops: float,
    utilisation: float,
    price: float | None,
    as_json: bool,
) -> None:
    """Of `recap plan WHAT:TRAINING`."""
    kind = importlib.import_module(f"recipes.{what}.train").Training
    chosen: Any = resolve_training(what, training, settings, kind)
    planning = importlib.import_module(f"recipes.{what}.plan")
    told = planning.plan(chosen, tflops=tflops, utilisation=utilisation, price=price)
    lines = [
        f"{line.samples:>15,} samples at {line.px} px: {line.steps:,} steps, {line.flops:.3g} operations, "
        f"{line.gpu_hours:,.1f} GPU hours"
        for line in told.lines
    ]
    cost = "" if told.cost is None else f", {told.cost:,.0f} in all"
    lines += [
        f"{told.gpu_hours:,.1f} GPU hours{cost}: {told.assumed}",
        f"{told.parameters:,} parameters; checkpoints take {told.checkpoint_gib:.1f} GiB of disk",
    ]
    print_(asdict(told), as_json, "\n".join(lines))


@click.command("eval")
@click.argument("model")
@click.argument("benchmark", nargs=-1, required=True, metavar="BENCHMARK [KEY=VALUE]...")
@click.option("--compare", is_flag=True, help="MODEL and BENCHMARK are two results.json.")
@click.option("--out", type=path_type, help="Write results.json there.")
@click.option(
    "--training",
    type=path_type,
    help="Folder of a training, whose images are looked for; the model's own if it has one.",
)
@drawing_options
@as_json_option
def evaluate(
    model: str,
    benchmark: tuple[str, ...],
    compare: bool,
    out: Path | None,
    training: Path | None,
    as_json: bool,
    **how: Any,
) -> None:
    """Evaluate MODEL on each BENCHMARK: a function of recipes/evaluate/benchmarks.py, or my_file.py:function,
    with its settings behind it. MODEL is a folder that open_clip loads or a Hub id@revision; of what draws, a
    checkpoint of recap train dit, or a folder of recap sample.
    """
    from recipes.evaluate import results

    if compare:
        if len(benchmark) != 1:
            raise UserError(
                "two results are compared", command("recap", "eval", "--compare", "a.json", "b.json")
            )
        ours, theirs = ({r.benchmark: r for r in results.read(Path(name))} for name in (model, benchmark[0]))
        rows = [
            {"benchmark": name, **row}
            for name in ours
            if name in theirs
            for row in results.compare(ours[name], theirs[name])
        ]
        if alone := sorted(ours.keys() ^ theirs.keys()):
            echo(f"only one of them has: {', '.join(alone)}", err=True)
        if not rows:
            raise UserError("they have no benchmark in common", f"{model} has: {', '.join(ours)}")
        print_(rows, as_json, columns(rows))
        return
    asked: list[tuple[str, list[str]]] = []
    for word in benchmark:
        if "=" not in word:
            asked.append((word, []))
        elif not asked:
            raise UserError(f"{word} is a setting of no benchmark", "name the benchmark first")
        else:
            asked[-1][1].append(word)
    names = [next((s for s in settings if s.startswith("name=")), name) for name, settings in asked]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{twice[0]} is asked twice", "give each a name of its own: name=...")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():  # better now than when all is computed
            raise UserError(f"{out} is a folder", "name a file: --out results.json")
        tempfile.TemporaryFile(dir=out.parent).close()
    from recipes.evaluate.benchmarks import Benchmark

    chosen = [resolve_benchmark(name, settings, Benchmark) for name, settings in asked]
    subjects = {one.of: one for one in chosen}
    given = {name: value for name, value in how.items() if value is not None}
    evaluated = {of: one.subject(model, training, **given) for of, one in subjects.items()}
    found = []
    for one in chosen:
        for result in one.results(evaluated[one.of]):
            found.append(result)
            echo(str(result), err=as_json)
            if out:
                results.write(found, out)
    if as_json:
        print_([asdict(result) for result in found], as_json, "")


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("target")
@version_option
@click.option("--results", type=path_type, help="What `recap eval` wrote: for the card.")
@dry_run_option
@rebase_option
@as_json_option
def push_model(
    model: Path, target: str, version: str, results: Path | None, dry_run: bool, rebase: bool, as_json: bool
) -> None:
    """Publish a model folder as a version in TARGET, a folder or hf://user/name: whole, verified, tagged."""
    from recipes.evaluate.results import read
    from recipes.push import push_model as push

    found = push(
        model, target, version, results=read(results) if results else (), dry_run=dry_run, rebase=rebase
    )
    said = "published" if found.new else "is there already, byte for byte; nothing to do"
    said = "would be published" if found.plan else said
    lines = [f"{found.place}: {said}", *(f"  {name:<16} {value}" for name, value in found.plan.items())]
    print_(vars(found), as_json, "\n".join(lines))
