"""A finished run -> one immutable version in a folder.

    TARGET/v0.1.0/           README.md, recipe.json, stats.json, manifest.json, plots/
                             data/preview-00000-of-00001.parquet, data/train-00000-of-NNNNN.parquet
                             ledger/train-00000-of-NNNNN.parquet
    TARGET/latest            symbolic link to the newest

A version is put together under a name that nobody loads, verified there, and moved into place by one rename. The same
bytes again are recognized; other bytes under an existing version are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from analysis import plots, report
from builder import run as runs
from builder.commit import lock, sync, write_atomically
from builder.core import Recipe, read_rows, sha256_file, write_parquet
from builder.errors import VersionError
from builder.select import LEDGER, SCHEMA
from cards.card import card

PREVIEW_ROWS = 1000


@dataclass(frozen=True)
class Published:
    """Where a version lies, and whether this call put it there."""

    folder: Path
    rows: int
    new: bool


def publish(run: Path, target: Path, version: str, *, dry_run: bool = False) -> Published:
    """Publish a finished run as `target`/v`version`.

    Raises:
        VersionError: the version exists with other bytes, the run has no row to publish, or what was staged does not verify.
        InputError: the run is not finished.
    """
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise VersionError(f"'{version}' is not a version", "for example --version 0.1.0")
    runs.finished(run)
    final = target / f"v{version}"
    target.mkdir(parents=True, exist_ok=True)
    with lock(target / ".lock", f"another publish is at work in {target}", "wait for it, then type the same command again"):
        for leftover in target.glob(".staging-*"):
            shutil.rmtree(leftover)
        staging = target / f".staging-v{version}"
        manifest = stage(run, staging, version)
        verify(staging)
        same = final.exists() and (final / "manifest.json").read_bytes() == (staging / "manifest.json").read_bytes()
        if final.exists() and not same:
            shutil.rmtree(staging)
            raise VersionError(
                f"{final} exists and holds other bytes; a version never changes", f"publish under a new one: --version {_next(target)}"
            )
        if same or dry_run:
            shutil.rmtree(staging)
        else:
            for path in staging.rglob("*"):
                if path.is_file():
                    path.chmod(0o444)
                sync(path)
            os.rename(staging, final)
            link = target / ".latest.part"
            link.unlink(missing_ok=True)
            link.symlink_to(final.name)
            os.replace(link, target / "latest")
            sync(target)
    return Published(final, manifest["rows"]["train"], not same and not dry_run)


def stage(run: Path, folder: Path, version: str) -> dict[str, Any]:
    """Put a version's files together in `folder`; parquet is linked, not copied, where the file system can. Returns the manifest."""
    published, ledger = report.files(run)
    recipe = runs.load_recipe(run).portable()
    (folder / "plots").mkdir(parents=True)
    for kind, files in (("data", published), ("ledger", ledger)):
        (folder / kind).mkdir()
        for index, file in enumerate(files):
            _link(file, folder / kind / f"train-{index:05d}-of-{len(files):05d}.parquet")
    preview = _preview(published)
    if not preview:
        raise VersionError(f"no row of {run} is ok: there is nothing to publish", f"see why: recap status {run}")
    write_parquet(pa.Table.from_pylist(preview, SCHEMA), folder / "data" / "preview-00000-of-00001.parquet")
    write_atomically(folder / "recipe.json", recipe.to_json())
    _describe(run, recipe, preview, folder, f"version {version}")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        "name": recipe.name,
        "version": version,
        "rows": {"train": _rows(published), "preview": len(preview), "ledger": _rows(ledger)},
        "files": {str(path.relative_to(folder)): {"sha256": sha256_file(path), "bytes": path.stat().st_size} for path in paths},
    }
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return manifest


def preview_card(run: Path) -> Path:
    """The card, its plots and statistics of a run as it is, in RUN/card. Returns the path of README.md."""
    folder = run / "card"
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    published, _ = report.files(run)
    _describe(run, runs.load_recipe(run).portable(), _preview(published), folder, "not published yet")
    return folder / "README.md"


def _describe(run: Path, recipe: Recipe, preview: list[dict[str, Any]], folder: Path, version: str) -> None:
    statistics = report.stats(run)
    write_atomically(folder / "stats.json", report.to_json(statistics))
    names = plots.draw(statistics, folder / "plots")
    content = hashlib.sha256("".join(sha256_file(file) for files in report.files(run) for file in files).encode()).hexdigest()
    sample = preview[0] if preview else {}
    write_atomically(folder / "README.md", card(recipe, statistics, sample, version=version, content=content, plots=names))


def _preview(files: list[Path]) -> list[dict[str, Any]]:
    return list(islice((row for file in files for row in read_rows(file)), PREVIEW_ROWS))


def verify(folder: Path) -> None:
    """Hold a version against its manifest: hashes, schema, rows, and every config and split through `datasets`.

    Raises:
        VersionError: says which file and how it differs.
    """
    import datasets

    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for name, promised in manifest["files"].items():
        if sha256_file(folder / name) != promised["sha256"]:
            raise VersionError(f"{folder / name} differs from the manifest")
    for pattern, schema in (("data/*.parquet", SCHEMA), ("ledger/*.parquet", LEDGER)):
        for path in folder.glob(pattern):
            if not pq.read_schema(path).equals(schema):
                raise VersionError(f"{path} has another schema: {pq.read_schema(path).names}")
    expected = {("default", "train"): "data/train-*", ("default", "preview"): "data/preview-*", ("ledger", "train"): "ledger/train-*"}
    for (config, split), pattern in expected.items():
        number = _rows(sorted(folder.glob(f"{pattern}.parquet")))
        if number != manifest["rows"][split if config == "default" else "ledger"]:
            raise VersionError(f"{folder}: {config}/{split} has {number} rows, the manifest another number")
        stream = datasets.load_dataset(str(folder), config, split=split, streaming=True)
        if next(iter(stream), None) is None:
            raise VersionError(f"{folder}: datasets loads no row of {config}/{split}")


def _rows(files: list[Path]) -> int:
    return sum(pq.read_metadata(file).num_rows for file in files)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _next(target: Path) -> str:
    """The first free patch version after the newest one."""
    taken = [tuple(int(x) for x in path.name[1:].split(".")) for path in target.glob("v*.*.*")]
    major, minor, patch = max(taken)
    return f"{major}.{minor}.{patch + 1}"
