"""A finished run -> a version in a target.

    RUN/versions/v0.1.0/     README.md, recipe.json, stats.json, manifest.json, tombstones.parquet, plots/
                             data/preview-00000-of-00001.parquet, data/train-00000-of-NNNNN.parquet
                             ledger/train-00000-of-NNNNN.parquet
    RUN/versions/v0.1.0.json written last: the key of what was staged
    RUN/versions/v0.1.0.published.json   where it was published, and the commit there

Staging links the run's files, adds statistics, card and manifest, and checks all of it before anything is
sent. It is done once: after a crash only the sending goes on.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from analysis import plots, report, views
from builder import sql, tombstones
from builder.commit import forget
from builder.core import Recipe, Record
from builder.errors import (
    DamagedError,
    InputError,
    MovedError,
    VersionError,
    command,
    named,
    telling_of_a_full_disk,
)
from builder.files import lock, read_rows, sha256_file, write_atomically, write_parquet
from builder.places import parts
from builder.run import RECIPE, Run
from builder.stages.select import schemas
from builder.store import Folder
from builder.typed import from_json
from builder.versions.folder import link
from builder.versions.targets import removed_from, split, target_of
from builder.versions.version import MANIFEST, Published, Staged, Target, check_version, manifest_of
from cards.card import card
from cards.croissant import croissant

PREVIEW_ROWS = 1000
PREVIEW = "data/preview-00000-of-00001.parquet"
SECRETS = (
    r"\bhf_[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{36,}|\bsk-[A-Za-z0-9_-]{32,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Shard:
    """A parquet file of a version. `path` is None where the target holds it and nobody needs it here."""

    path: Path | None
    sha256: str
    bytes: int
    rows: int


def publish(
    place: str | Path, target: str, version: str, *, dry_run: bool = False, rebase: bool = False
) -> Published:
    """Publish a finished run as `version` in `target`, a folder or `hf://datasets/user/name`.

    Raises:
        VersionError: the version exists with other bytes, the run has no row to publish, or what was staged
            does not verify.
        InputError: the run is not finished.
    """
    check_version(version)
    if named := split(target)[1]:
        hint = f"name the target alone, and --version {named}: {split(target)[0]}"
        raise InputError(f"{target} is a version", hint)
    where = target_of(target)
    run = Run.open(place)
    selected = run.finished()
    versions = run.workspace / "versions"
    versions.mkdir(exist_ok=True)
    busy, hint = f"another publish of {place} is at work", "wait for it, then type the same command again"
    with telling_of_a_full_disk(place), lock(versions / ".lock", busy, hint):
        published = _published(where, run, selected, version, dry_run=dry_run, rebase=rebase)
        if not published.plan:
            about = {"place": published.place, "commit": published.commit, "rows": published.rows}
            run.store.write(
                f"versions/v{version}.published.json", (json.dumps(about, indent=1) + "\n").encode()
            )
        return published


def _published(
    where: Target, run: Run, selected: Mapping[str, Record], version: str, *, dry_run: bool, rebase: bool
) -> Published:
    while True:
        beside = where.versions()
        removed = removed_from(where, version)
        try:
            staged = stage(run, version, removed, selected)
        except (InputError, OSError, pa.ArrowException, duckdb.Error) as error:  # a file that cannot be read
            raise _damaged(run, selected, version) or error from error
        try:
            return where.publish(replace(staged, beside=beside), dry_run=dry_run, rebase=rebase)
        except DamagedError as error:
            raise _damaged(run, selected, version) or error from error
        except MovedError:  # somebody removed rows, perhaps; if nobody did, what was staged is found again
            continue


def _damaged(run: Run, selected: Mapping[str, Record], version: str) -> VersionError | None:
    """What to do where a file to publish no longer has the bytes of its record.

    Its record goes, so that a build makes it again.
    """
    damaged = []
    for task, record in selected.items():
        folder, _, name = task.rpartition("/")
        for output, sha256 in record.outputs.items():
            try:
                is_whole = sha256_file(run.local(output)) == sha256
            except FileNotFoundError:
                is_whole = False
            if not is_whole:
                damaged.append(output)
                forget(run.store, folder, name)
    if not damaged:
        return None
    (run.workspace / f"versions/v{version}.json").unlink(missing_ok=True)
    again = command("recap", "build", named(run.store.url(RECIPE)), "--run", named(run.place))
    reason = f"{run.place}/{damaged[0]} no longer has the bytes of its record"
    return VersionError(reason, f"make it again, then publish: {again}")


def stage(run: Run, version: str, removed: pa.Table, selected: Mapping[str, Record] | None = None) -> Staged:
    """Put a version's files together in RUN/versions, or find them there.

    `removed` are the target's tombstones, `selected` the records of the stage select in order, where at hand.
    """
    recipe = run.recipe.portable()
    selected = dict(run.shards("select")) if selected is None else selected
    folder, record = run.workspace / f"versions/v{version}", run.workspace / f"versions/v{version}.json"
    key = _key(recipe, version, list(selected.values()), removed)
    if staged := _staged(folder, version, record, key):
        return staged
    record.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    shards = _shards(selected, run)
    here = {kind: [str(shard.path) for shard in of_kind] for kind, of_kind in shards.items()}
    found = views.Parts(here["data"], here["ledger"], spill=run.workspace, name=run.place)
    preview = list(islice((row for file in found.published for row in read_rows(Path(file))), PREVIEW_ROWS))
    if not preview:
        hint = f"see why: {command('recap', 'status', named(run.place))}"
        raise VersionError(f"no row of {run.place} is ok: there is nothing to publish", hint)
    staged = put_together(folder, recipe, version, shards, preview, found, removed, _made(run))
    check(staged, found, removed)
    write_atomically(record, json.dumps({"key": key}) + "\n")
    return staged


def _staged(folder: Path, version: str, record: Path, key: str) -> Staged | None:
    """What was staged under that key, if nobody changed it: sizes of all files, sha256 of the small ones."""
    try:
        if from_json(dict[str, str], record.read_bytes(), what=str(record)).get("key") != key:
            return None
        staged = Staged(folder, version, manifest_of(LocalFileSystem(), str(folder)))
        for name, file in staged.files.items():
            path = folder / name
            small = path.suffix != ".parquet"
            if path.stat().st_size != file["bytes"] or (small and sha256_file(path) != file["sha256"]):
                return None
    except (OSError, InputError):
        return None
    return staged


def _is_ledger(name: str) -> bool:
    return name.endswith(".ledger.parquet")


def _shards(selected: Mapping[str, Record], run: Run | None = None) -> dict[str, list[Shard]]:
    """With their files, where a run is given to get them from."""
    shards: dict[str, list[Shard]] = {"data": [], "ledger": []}
    for done in selected.values():
        for name, sha256 in done.outputs.items():
            rows = sum(done.rows.values()) if _is_ledger(name) else done.rows.get("ok", 0)
            shard = Shard(run.local(name) if run else None, sha256, done.bytes[name], rows)
            shards["ledger" if _is_ledger(name) else "data"].append(shard)
    return shards


def _made(run: Run) -> dict[str, Any]:
    """From the records of the shards, and the index of the source.

    `made_with`: library -> version of what made them, of several all. `made_on`: stage -> first and last day,
    UTC. `batches`: how the metadata came, in order.
    """
    libraries: dict[str, set[str]] = {}
    days: dict[str, set[str]] = {}
    for stage in run.stage_names():
        for _, record in run.shards(stage):
            if record.day:
                days.setdefault(stage, set()).add(record.day)
            for name, number in record.versions.items():
                libraries.setdefault(name, set()).add(number)
    made: dict[str, Any] = {
        "made_with": {name: " and ".join(sorted(numbers)) for name, numbers in sorted(libraries.items())},
        "made_on": {stage: [min(found), max(found)] for stage, found in days.items()},
    }
    if not run.is_first_version:
        made["batches"] = run.index.of_batches()
    return made


def _key(recipe: Recipe, version: str, shards: list[Record], removed: pa.Table) -> str:
    """Of all that the staged bytes depend on, the code that describes them included."""
    kinds = (".py", ".sql", ".txt")
    described = (path for folder in ("analysis", "cards") for path in sorted((ROOT / folder).rglob("*")))
    code = [sha256_file(path) for path in described if path.suffix in kinds]
    outputs = [shard.outputs for shard in shards]
    content = [version, recipe.to_json(), outputs, removed.to_pylist(), code, sha256_file(Path(__file__))]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def put_together(
    folder: Path,
    recipe: Recipe,
    version: str,
    shards: Mapping[str, list[Shard]],
    preview: list[dict[str, Any]],
    found: views.Parts,
    removed: pa.Table,
    made: Mapping[str, Any],
) -> Staged:
    """Write a version into `folder`: links to its shards, and what describes them.

    `found` is where its rows can be read.
    """
    files: dict[str, dict[str, Any]] = {}
    for kind, of_kind in shards.items():
        (folder / kind).mkdir(parents=True)
        for index, shard in enumerate(of_kind):
            name = f"{kind}/train-{index:05d}-of-{len(of_kind):05d}.parquet"
            if shard.path:
                link(shard.path, folder / name)
            files[name] = {"sha256": shard.sha256, "bytes": shard.bytes, "rows": shard.rows}
    rows = {
        "train": sum(s.rows for s in shards["data"]),
        "preview": len(preview),
        "ledger": sum(s.rows for s in shards["ledger"]),
    }
    content = hashlib.sha256("".join(file["sha256"] for file in files.values()).encode()).hexdigest()
    write_parquet(pa.Table.from_pylist(preview, schemas(recipe)["data"]), folder / PREVIEW)
    sizes = {
        "train": sum(s.bytes for s in shards["data"]),
        "preview": (folder / PREVIEW).stat().st_size,
        "ledger": sum(s.bytes for s in shards["ledger"]),
    }
    manifest = {
        "name": recipe.name,
        "version": version,
        "rows": rows,
        "bytes": sizes,
        "content": content,
        **made,
    }
    tombstones.write(removed, folder / tombstones.FILE)
    write_atomically(folder / "recipe.json", recipe.to_json())
    describe(folder, recipe, manifest, found, preview[0])
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if (name := str(path.relative_to(folder))) not in files:
            files[name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
            if path.suffix == ".parquet":
                files[name]["rows"] = pq.read_metadata(path).num_rows
    manifest["files"] = dict(sorted(files.items()))
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return Staged(folder, version, manifest)


def preview_card(place: str | Path) -> str:
    """The card, its plots and statistics of a run as it is, in RUN/card. Returns where README.md is."""
    run = Run.open(place)
    folder, found = run.workspace / "card", parts(place)
    selected = dict(run.shards("select"))
    shards = _shards(selected)
    data = (name for done in selected.values() for name in done.outputs if not _is_ledger(name))
    sample = next((row for name in data for row in read_rows(run.local(name))), {})
    rows = {"train": sum(s.rows for s in shards["data"]), "ledger": sum(s.rows for s in shards["ledger"])}
    sizes = {"train": sum(s.bytes for s in shards["data"]), "ledger": sum(s.bytes for s in shards["ledger"])}
    manifest = {"rows": rows | {"preview": min(PREVIEW_ROWS, rows["train"])}, "bytes": sizes, **_made(run)}
    describe(folder, run.recipe.portable(), manifest, found, sample)
    if not isinstance(run.store, Folder):
        for path in (path for path in folder.rglob("*") if path.is_file()):
            run.store.write(f"card/{path.relative_to(folder)}", path.read_bytes())
    return run.store.url("card/README.md")


def describe(
    folder: Path, recipe: Recipe, manifest: Mapping[str, Any], found: views.Parts, sample: Mapping[str, Any]
) -> None:
    """Write statistics, plots, card and, of a version, croissant.json."""
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    statistics = report.stats(found)
    write_atomically(folder / "stats.json", report.to_json(statistics))
    plots.draw(statistics, folder / "plots")
    # From the file, as anybody recomputes it.
    statistics = json.loads((folder / "stats.json").read_text(encoding="utf-8"))
    write_atomically(folder / "README.md", card(recipe, manifest, statistics, sample))
    if "version" in manifest:
        write_atomically(folder / "croissant.json", croissant(recipe, manifest))


# --- before anything is sent --------------------------------------------------------------------------------


def check(staged: Staged, found: views.Parts, removed: pa.Table) -> None:
    """One schema, rows as the records say, no uid twice, nothing that was removed, no secret, a card that
    loads and agrees.

    Raises:
        VersionError: says which file and what is wrong with it.
    """
    folder, promised = staged.folder, staged.manifest["rows"]
    expected = schemas(Recipe.from_json((folder / "recipe.json").read_text(encoding="utf-8")))
    for name, file in staged.files.items():
        kind = name.partition("/")[0]
        if name.endswith(".parquet") and kind in expected and (folder / name).exists():
            footer = pq.ParquetFile(folder / name)
            if not footer.schema_arrow.equals(expected[kind]):
                raise VersionError(f"{folder / name} has another schema: {footer.schema_arrow.names}")
            if footer.metadata.num_rows != file["rows"]:
                number = footer.metadata.num_rows
                raise VersionError(f"{folder / name} has {number} rows, its record says {file['rows']}")
    statistics = json.loads((folder / "stats.json").read_text(encoding="utf-8"))
    counted = (
        report.rows(statistics, "images")[0]["rows"],
        sum(row["rows"] for row in report.rows(statistics, "rows_by_status")),
    )
    there = (promised["train"], promised["ledger"])
    if counted != there:
        raise VersionError(f"the card speaks of {counted} rows, the data has {there}")
    for path in (path for path in folder.rglob("*") if path.suffix in (".md", ".json")):
        if secret := re.search(SECRETS, path.read_text(encoding="utf-8")):
            reason = f"{path} holds what looks like a secret: {secret.group()[:6]}..."
            raise VersionError(reason, "remove it from the recipe or the data")
    with views.connect(found) as con:
        for uid, times in con.sql(
            "select uid, count(*) from ledger where uid is not null group by uid having count(*) > 1 limit 1"
        ).fetchall():
            raise VersionError(f"uid {uid} occurs {times} times in the ledger")
        con.register("tombstones", removed)
        named = f"({tombstones.named('published')}) union all ({tombstones.named('ledger', 'null')})"
        count = f"select count(distinct row) from ({named})"
        if removed.num_rows and (number := con.sql(count).fetchall()[0][0]):
            reason = f"{number} rows are named by tombstones of the target"
            hint = f"build without them: recap build ... dedup.tombstones={tombstones.FILE}"
            raise VersionError(
                f"{reason}: they were removed from an earlier version",
                f"{hint} (the file of the target's newest version)",
            )
        texts = [sql.identifier(field.name) for field in expected["data"] if field.type == pa.string()]
        pattern = SECRETS.replace(r"\b", "")
        for view, columns in (("published", texts), ("ledger", ["url", "error"])):
            looks = f"regexp_matches(concat_ws(' ', {', '.join(columns)}), {sql.literal(pattern)})"
            for (uid,) in con.sql(f"select uid from {view} where {looks} limit 1").fetchall():
                hint = "take it out: give its uid to recap remove, or to dedup.tombstones"
                raise VersionError(f"the row {uid} of {view} holds what looks like a secret", hint)
    if all((folder / name).exists() for name in staged.files):
        _loads(folder, promised)


def _loads(folder: Path, rows: Mapping[str, int]) -> None:
    """Every config and split of the card, through `datasets`."""
    import datasets

    splits = (("default", "preview", "preview"), ("default", "train", "train"), ("ledger", "train", "ledger"))
    for config, split_name, key in splits:
        stream = datasets.load_dataset(str(folder), config, split=split_name, streaming=True)
        if rows[key] and next(iter(stream), None) is None:
            raise VersionError(f"{folder}: datasets loads no row of {config}/{split_name}")
