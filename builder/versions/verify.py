"""Published versions, in a folder or on the Hub: verify one, check its card, remove rows from one.

A version never changes: what is removed is missing from a new one, and its tombstones keep it out of those that follow.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from analysis import report, views
from builder import sql, tombstones
from builder.core import Recipe, from_json, sha256_file, write_parquet
from builder.errors import DamagedError, InputError, VersionError, command, telling_of_a_full_disk
from builder.stages.select import ROW_GROUP_ROWS, schemas
from builder.versions.publish import PREVIEW, PREVIEW_ROWS, Shard, check, put_together
from builder.versions.targets import open_version, removed_from, split, target_of
from builder.versions.version import OURS, VERSION, Published, Version, by_number, check_version, is_inside
from cards.card import card
from cards.croissant import croissant


def verify(place: str) -> dict[str, Any]:
    """Hold a published version against its manifest, reading each byte once: files, hashes, rows, schemas, card.

    Returns `{"place", "version", "files", "bytes", "problems": [...]}`; no problem, and the version is what was published.

    Raises:
        InputError: there is no such version, or its manifest or recipe cannot be used.
    """
    version = open_version(place)
    fs, root, manifest = version.fs, version.root, version.manifest
    there = {path.removeprefix(f"{root}/") for path in fs.find(root)}
    problems, total, whole = (
        [f"{name} is missing" for name in manifest["files"] if name not in there],
        0,
        set(),
    )
    named = os.path.basename(os.path.realpath(root)) if version.is_local else root.rpartition("@")[2]
    if VERSION.fullmatch(named.removeprefix("v")) and named != f"v{manifest['version']}":
        problems.append(f"{named} holds version {manifest['version']}: it was renamed")
    for name, promised in manifest["files"].items():
        if name not in there:
            continue
        if version.is_local and not is_inside(root, name):
            problems.append(f"{name} is no regular file of this folder")
            continue
        sha256, size, end = _read_once(fs, f"{root}/{name}")
        total += size
        if (sha256, size) != (promised["sha256"], promised["bytes"]):
            problems.append(
                f"{name} has {size} bytes and sha256 {sha256}, not {promised['bytes']} and {promised['sha256']}"
            )
            continue
        whole.add(name)
        if name.endswith(".parquet"):
            problems += _other_rows(name, end, promised.get("rows"), version.recipe)
    extra = sorted(name for name in there - set(manifest["files"]) if name.startswith(OURS))
    problems += [f"{name} is not in the manifest" for name in extra]
    text = fs.cat_file(f"{root}/README.md").decode("utf-8", "replace") if "README.md" in whole else ""
    if text and (
        f"{manifest['rows']['train']:,} rows" not in text or f"version {manifest['version']}" not in text
    ):
        problems.append(
            f"README.md speaks of another version or number of rows than {manifest['version']} and {manifest['rows']['train']:,}"
        )
    return {
        "place": place,
        "version": manifest["version"],
        "files": len(manifest["files"]),
        "bytes": total,
        "problems": problems,
    }


def _other_rows(name: str, end: bytes, promised: int | None, recipe: Recipe) -> list[str]:
    """What is wrong with the schema or the number of rows of a parquet file, by its last bytes."""
    try:
        footer = pq.read_metadata(pa.BufferReader(b"PAR1" + end[-8 - int.from_bytes(end[-8:-4], "little") :]))
        found = footer.schema.to_arrow_schema()
    except (OSError, pa.ArrowException) as error:
        return [f"{name} is no parquet file: {str(error).splitlines()[0][:200]}"]
    expected = schemas(recipe).get(name.partition("/")[0], tombstones.SCHEMA)
    problems = [] if found.equals(expected) else [f"{name} has another schema than the recipe's"]
    return problems + (
        [] if footer.num_rows == promised else [f"{name} has {footer.num_rows} rows, not {promised}"]
    )


def _read_once(fs: AbstractFileSystem, path: str) -> tuple[str, int, bytes]:
    """sha256, size, and the last 16 MiB: a parquet file's footer is in them."""
    digest, size, end = hashlib.sha256(), 0, b""
    with fs.open(
        path, "rb", **({} if isinstance(fs, LocalFileSystem) else {"block_size": 0})
    ) as file:  # 0: one stream, no ranges
        while chunk := file.read(8 << 20):
            digest.update(chunk)
            size += len(chunk)
            end = (end + chunk)[-(16 << 20) :]
    return digest.hexdigest(), size, end


@dataclass(frozen=True)
class Removed:
    """What a removal published, the rows that went and those of the ledger that are told nothing of any more, and what named no row."""

    published: Published
    rows: int
    ledger_rows: int
    matched_nothing: dict[str, list[str]]  # by kind


def remove(
    target: str,
    version: str,
    values: Mapping[str, Iterable[str]],
    *,
    dry_run: bool = False,
    rebase: bool = False,
) -> Removed:
    """A new version of `TARGET` (its newest) or `TARGET@v1.2.0` without the rows that `values` name, by kind: uid, sha256, url, domain.

    Rows that are in the ledger only are told nothing of any more, and what names no row now is kept out of later versions.
    What is read is held against the base's manifest first: of a version on the Hub the shards that hold such a row, the
    others being taken over there by their hashes.

    Raises:
        InputError: there is no version to remove from, or all of it was removed before.
        DamagedError: the base is not what was published.
    """
    check_version(version)
    text, named = split(target)
    where = target_of(text)
    versions = where.versions()
    older = [known for known in versions if by_number(known) < by_number(version)]
    if named not in versions if named else not older:
        raise InputError(
            f"{text} has no version {named or f'older than {version}'}",
            f"its versions: {', '.join(versions) or 'none'}",
        )
    base = open_version(f"{text}@v{named or older[-1]}")
    before = removed_from(where, version)  # of `versions`, or of more
    removed = tombstones.merged(before, tombstones.table(values))
    _hold_against_manifest(
        base, [name for name in base.manifest["files"] if base.is_local or not name.startswith(OURS)]
    )
    with tempfile.TemporaryDirectory(prefix="recap-remove-") as folder, telling_of_a_full_disk(folder):
        rewritten, rows, ledger_rows, marks = _rewrite(base, Path(folder), removed)
        if not rewritten and removed.num_rows == before.num_rows and version not in versions:
            hint = f"look for it: {command('recap', 'sql', text, 'select uid, url from ledger')}"
            raise InputError(
                f"no row of {text} matches, and all of it is kept out already: nothing to remove", hint
            )
        shards: dict[str, list[Shard]] = {"data": [], "ledger": []}
        for name, file in base.manifest["files"].items():
            if (kind := name.partition("/")[0]) in shards and name != PREVIEW:
                path = rewritten.get(name)
                shards[kind].append(
                    Shard(path, sha256_file(path), path.stat().st_size, pq.read_metadata(path).num_rows)
                    if path
                    else Shard(None, file["sha256"], file["bytes"], file["rows"])
                )
        found = views.version_parts(base)
        here = {f"{base.root}/{name}": str(path) for name, path in rewritten.items()}
        published, ledger = (
            [here.get(base.fs._strip_protocol(path), path) for path in paths]
            for paths in (found.published, found.ledger)
        )
        found = views.Parts(published, ledger, found.filesystem)
        with views.connect(found) as con:
            preview = (
                con.sql(f"from published limit {PREVIEW_ROWS}")
                .to_arrow_table()
                .cast(schemas(base.recipe)["data"])
                .to_pylist()
            )
        if not preview:
            hint = f"delete its versions: {where.how_to_delete(named or older[-1])}"
            raise VersionError(f"no row of {target} would be left: nothing to publish", hint)
        made: dict[str, Any] = {
            name: base.manifest[name] for name in ("made_with", "made_on") if name in base.manifest
        }
        staged = put_together(
            Path(folder) / "version", base.recipe, version, shards, preview, found, removed, made
        )
        check(staged, found, removed)
        matched_nothing = {
            kind: [value for value in dict.fromkeys(of_kind) if not marks & tombstones.marks(kind, value)]
            for kind, of_kind in values.items()
        }
        staged = replace(staged, beside=versions)
        return Removed(
            where.publish(staged, dry_run=dry_run, rebase=rebase), rows, ledger_rows, matched_nothing
        )


def _hold_against_manifest(version: Version, names: Iterable[str]) -> None:
    """Raises:
    DamagedError: a file is not what was published.
    """
    for name in names:
        promised = version.manifest["files"][name]
        regular = not version.is_local or is_inside(version.root, name)
        if not regular or _read_once(version.fs, f"{version.root}/{name}")[:2] != (
            promised["sha256"],
            promised["bytes"],
        ):
            raise DamagedError(
                f"{version.root}/{name} is not what the manifest says: it was changed after it was published",
                f"get it from a copy; all that differs: {command('recap', 'verify', version.root)}",
            )


def _rewrite(version: Version, folder: Path, removed: pa.Table) -> tuple[dict[str, Path], int, int, set[str]]:
    """Shards that hold a row to remove, without it; published rows and further rows of the ledger that go; the marks that named one."""
    found = views.version_parts(version)
    expected = schemas(version.recipe)
    rewritten: dict[str, Path] = {}
    with views.connect(found) as con:
        con.register("tombstones", removed)
        con.execute(
            f"""create temp table named as select row as uid, mark, true as published from ({tombstones.named("published")})
                union all select row, mark, false from ({tombstones.named("ledger", "null")});
                create temp table gone as select uid, bool_or(published) as published from named where uid is not null group by uid"""
        )
        for path in (*found.published, *found.ledger):
            con.execute(f"create or replace temp view shard as from {sql.table(path)}")
            if not con.sql("select 1 from shard where uid in (select uid from gone) limit 1").fetchall():
                continue
            name = version.fs._strip_protocol(path).removeprefix(f"{version.root}/")
            if not version.is_local:
                _hold_against_manifest(version, [name])
            rewritten[name] = folder / name.replace("/", "-")
            kind = name.partition("/")[0]
            kept = con.sql(_WITHOUT_GONE[kind]).to_arrow_table()
            write_parquet(kept.cast(expected[kind]), rewritten[name], row_group_size=ROW_GROUP_ROWS)
        ((rows, ledger_rows),) = con.sql(
            "select count(*) filter (published), count(*) filter (not published) from gone"
        ).fetchall()
        marks = {mark for (mark,) in con.sql("select distinct mark from named").fetchall()}
    return rewritten, rows, ledger_rows, marks


_WITHOUT_GONE = {
    "data": "from shard where uid not in (select uid from gone)",
    # The ledger keeps count: a removed row stays as one of which nothing is known.
    "ledger": """
        with known as (select *, coalesce(uid in (select uid from gone), false) as is_gone from shard)
        select if(is_gone, null, uid) as uid, if(is_gone, null, url) as url, if(is_gone, 'removed', status) as status,
               if(is_gone, 'named by a tombstone', error) as error from known""",
}


def check_card(place: str) -> list[str]:
    """What in a version's statistics and card no longer agrees with its data: all of it is computed again."""
    version = open_version(place)
    fs, root, recipe, manifest = version.fs, version.root, version.recipe, version.manifest
    stored = from_json(dict[str, dict[str, Any]], version.read("stats.json"), what=f"{root}/stats.json")
    readme, json_ld = (
        version.read(name).decode("utf-8", "replace") for name in ("README.md", "croissant.json")
    )
    found = views.version_parts(version)
    problems = []
    with views.connect(found) as con:
        for name, view in (("train", "published"), ("ledger", "ledger")):
            ((number,),) = con.sql(f"select count(*) from {view}").fetchall()
            if number != manifest["rows"][name]:
                problems.append(f"{view} has {number:,} rows, the manifest says {manifest['rows'][name]:,}")
        sample = con.sql("from published limit 1").to_arrow_table().to_pylist()
    try:
        number = pq.read_metadata(pa.BufferReader(version.read(PREVIEW))).num_rows
    except (OSError, pa.ArrowException) as error:
        problems.append(f"{PREVIEW} is no parquet file: {str(error).splitlines()[0][:200]}")
    else:
        if number != manifest["rows"]["preview"]:
            problems.append(
                f"the preview has {number:,} rows, the manifest says {manifest['rows']['preview']:,}"
            )
    files = fs.find(root, detail=True)
    for name, folder in (("train", "data/train-"), ("preview", "data/preview-"), ("ledger", "ledger/train-")):
        number = sum(
            about["size"] for path, about in files.items() if path.removeprefix(f"{root}/").startswith(folder)
        )
        if number != manifest["bytes"][name]:
            problems.append(f"{folder}* have {number:,} bytes, the manifest says {manifest['bytes'][name]:,}")
    again = json.loads(report.to_json(report.stats(found)))
    for query in sorted(stored.keys() | again.keys()):
        if query == "nouns" and ("absent" in stored.get(query, {})) != ("absent" in again.get(query, {})):
            continue  # a spaCy pipeline is installed on one side only: nothing to hold against each other
        if stored.get(query) != again.get(query):
            what = (
                "was made by another query"
                if stored.get(query, {}).get("sha256") != again.get(query, {}).get("sha256")
                else "no longer agrees with the data"
            )
            problems.append(f"stats.json: {query} {what}")
    expected = card(recipe, manifest, again, sample[0] if sample else {}).splitlines()
    for number, (line, wanted) in enumerate(
        zip_longest(readme.splitlines(), expected, fillvalue=""), start=1
    ):
        if line != wanted:
            problems.append(f"README.md, line {number}: '{line[:80]}', not '{wanted[:80]}'")
    if json_ld != croissant(recipe, manifest):
        problems.append("croissant.json is not that of the recipe and the manifest")
    return problems
