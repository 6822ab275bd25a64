"""Models as versions, in the way of data sets: whole, verified, tagged, never changed.

A target is hf://user/name, where a version is a tag, or a folder: my/models/v1.0.0.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from builder.errors import InputError, command
from builder.files import sha256_file
from builder.stages.clip import Clip
from builder.versions.folder import Folder
from builder.versions.version import MANIFEST, VERSION, Published, Staged, Target
from recipes.clip.model import CONFIG, TOKENIZER, WEIGHTS, read_config
from recipes.evaluate.results import Result

HUB = "hf://"
FILES = (
    CONFIG, WEIGHTS, *TOKENIZER, "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja",
    "spiece.model", "tokenizer.model", "sentencepiece.bpe.model",
)  # fmt: skip


def push_model(
    model: Path, target: str, version: str, *, results: Sequence[Result] = (), dry_run: bool = False,
    rebase: bool = False,
) -> Published:  # fmt: skip
    """Publish a model folder; its card gets what `results` say.

    Raises:
        InputError: it is no model, its vectors are not finite, the results are another model's, or the target
            or the version is none.
    """
    if not VERSION.fullmatch(version):
        raise InputError(f"{version} is no version", "for example: --version 1.0.0")
    if not (model / WEIGHTS).exists():
        raise InputError(
            f"{model} has no {WEIGHTS}", "name a CLIP's checkpoint, such as runs/clip-demo/latest"
        )
    where = target_of(target)
    name = target.rstrip("/").rpartition("/")[2]
    card = (
        (model / "README.md").read_text() if (model / "README.md").exists() else f"# {model.resolve().name}\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        for file in FILES:
            if (model / file).exists():
                shutil.copyfile(model / file, Path(folder, file))  # a link would be a version that can change
        config = read_config(model)
        text = config["model_cfg"].get("text_cfg", {})
        if "hf_tokenizer_name" in text:  # a place on this machine, until now
            text["hf_tokenizer_name"] = target.removeprefix(HUB) if target.startswith(HUB) else name
        Path(folder, CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        Clip(folder)  # it loads, and its vectors are finite
        Path(folder, "README.md").write_text(card + _table(results))
        files = {
            path.name: {"sha256": sha256_file(path), "bytes": path.stat().st_size}
            for path in sorted(Path(folder).iterdir())
        }
        if wrong := [result for result in results if result.weights != files[WEIGHTS]["sha256"]]:
            reason = f"{wrong[0].benchmark} was asked of {wrong[0].model}, not of the weights in {model}"
            hint = f"{command('recap', 'eval', str(model))} BENCHMARK... --out results.json"
            raise InputError(reason, hint)
        manifest = {"kind": "model", "name": name, "version": version, "files": files}
        Path(folder, MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        staged = Staged(Path(folder), version, manifest)
        return where.publish(staged, dry_run=dry_run, rebase=rebase)


def target_of(text: str) -> Target:
    if text.startswith(HUB):
        from builder.versions.hub import Hub

        return Hub(text.removeprefix(HUB), kind="model", ours=FILES)
    if not text.strip() or "://" in text:
        raise InputError(f"'{text}' is no target", f"name a folder, or {HUB}user/name")
    return Folder(Path(text))


def _table(results: Sequence[Result]) -> str:
    if not results:
        return ""
    rows = [
        f"| {result.benchmark} | {result.protocol} | {metric.name} | {metric.value:.1f} | "
        f"{metric.low:.1f} to {metric.high:.1f} | {result.seen} |"
        for result in results
        for metric in result.metrics
    ]
    head = "| benchmark | protocol | metric | % | 95 % interval | images trained on |"
    return "\n".join(["", "## Evaluation", "", head, "|" + " --- |" * 6, *rows, ""])
