"""Published versions, in a folder or on the Hub: verify one, check its card, remove rows from one.

A version never changes: what is removed is missing from a new one, and its tombstones keep it out of those that follow.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from analysis import report, views
from builder import tombstones
from builder.core import Recipe, sha256_file, write_parquet
from builder.errors import InputError, VersionError, telling_of_a_full_disk
from builder.publish import PREVIEW, PREVIEW_ROWS, Shard, captions_of, check, put_together
from builder.select import LEDGER, ROW_GROUP_ROWS, schema
from builder.target import MANIFEST, OURS, Published, by_number, check_version, split, target_of, version_files
from cards.card import card
from cards.croissant import croissant


def verify(place: str) -> dict[str, Any]:
    """Hold a published version against its manifest, reading each byte once: files, hashes, rows, schemas, card.

    Returns `{"place", "version", "files", "bytes", "problems": [...]}`; no problem, and the version is what was published.

    Raises:
        InputError: there is no such version, or its manifest or recipe cannot be read.
    """
    fs, root, recipe, manifest = _opened(place)
    there = {path.removeprefix(f"{root}/") for path in fs.find(root)}
    problems, total, whole = [f"{name} is missing" for name in manifest["files"] if name not in there], 0, set()
    for name, promised in manifest["files"].items():
        if name not in there:
            continue
        sha256, size, end = _read_once(fs, f"{root}/{name}")
        total += size
        if (sha256, size) != (promised["sha256"], promised["bytes"]):
            problems.append(f"{name} has {size} bytes and sha256 {sha256}, not {promised['bytes']} and {promised['sha256']}")
            continue
        whole.add(name)
        if name.endswith(".parquet"):
            footer = pq.read_metadata(pa.BufferReader(b"PAR1" + end[-8 - int.from_bytes(end[-8:-4], "little") :]))
            expected = {"data": schema(captions_of(recipe)), "ledger": LEDGER}.get(name.partition("/")[0], tombstones.SCHEMA)
            if not footer.schema.to_arrow_schema().equals(expected):
                problems.append(f"{name} has another schema than the recipe's")
            if footer.num_rows != promised["rows"]:
                problems.append(f"{name} has {footer.num_rows} rows, not {promised['rows']}")
    extra = sorted(name for name in there - set(manifest["files"]) if name.startswith(OURS))
    problems += [f"{name} is not in the manifest" for name in extra]
    text = fs.cat_file(f"{root}/README.md").decode() if "README.md" in whole else ""
    if text and (f"{manifest['rows']['train']:,} rows" not in text or f"version {manifest['version']}" not in text):
        problems.append(f"README.md speaks of another version or number of rows than {manifest['version']} and {manifest['rows']['train']:,}")
    return {"place": place, "version": manifest["version"], "files": len(manifest["files"]), "bytes": total, "problems": problems}


def _opened(place: str) -> tuple[AbstractFileSystem, str, Recipe, dict[str, Any]]:
    """File system, root, recipe and manifest of a version."""
    fs, root = version_files(place)
    try:
        return fs, root, Recipe.from_json(fs.cat_file(f"{root}/recipe.json").decode()), json.loads(fs.cat_file(f"{root}/{MANIFEST}"))
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"{place} is no whole version: {error}", "publish the run again, under a new version") from error


def _read_once(fs: AbstractFileSystem, path: str) -> tuple[str, int, bytes]:
    """sha256, size, and the last 16 MiB: a parquet file's footer is in them."""
    digest, size, end = hashlib.sha256(), 0, b""
    with fs.open(path, "rb", **({} if isinstance(fs, LocalFileSystem) else {"block_size": 0})) as file:  # 0: one stream, no ranges
        while chunk := file.read(8 << 20):
            digest.update(chunk)
            size += len(chunk)
            end = (end + chunk)[-(16 << 20) :]
    return digest.hexdigest(), size, end


def remove(target: str, version: str, values: Mapping[str, Iterable[str]], *, dry_run: bool = False, rebase: bool = False) -> tuple[Published, int]:
    """A new version of `TARGET` (its newest) or `TARGET@v1.2.0` without the rows that `values` name, by kind: uid, sha256, url, domain.

    Only shards that hold such a row are read and written; the others are taken over as they are. The version's tombstones
    name what was removed, by hashes. Returns what was published, and the number of rows removed.

    Raises:
        InputError: no row matches, or there is no version to remove from.
    """
    check_version(version)
    text, base = split(target)
    where = target_of(text)
    versions = where.versions()
    older = [known for known in versions if by_number(known) < by_number(version)]
    if base not in versions if base else not older:
        raise InputError(f"{text} has no version {base or f'older than {version}'}", f"its versions: {', '.join(versions) or 'none'}")
    base = base or older[-1]
    fs, root = where.files(base)
    manifest = json.loads(fs.cat_file(f"{root}/{MANIFEST}"))
    recipe = Recipe.from_json(fs.cat_file(f"{root}/recipe.json").decode())
    removed = tombstones.merged(tombstones.of_target(where, version), tombstones.table(values))
    with tempfile.TemporaryDirectory(prefix="recap-remove-") as folder, telling_of_a_full_disk(folder):
        rewritten, number = _rewrite(fs, root, Path(folder), removed, {"data": schema(captions_of(recipe)), "ledger": LEDGER})
        if not number:
            raise InputError(f"no row of {text} {base} matches: nothing to remove", f'look for it: recap sql {text} "select uid, url from published"')
        shards: dict[str, list[Shard]] = {"data": [], "ledger": []}
        for name, file in manifest["files"].items():
            if (kind := name.partition("/")[0]) in shards and name != PREVIEW:
                path = rewritten.get(name)
                shards[kind].append(
                    Shard(path, sha256_file(path), path.stat().st_size, pq.read_metadata(path).num_rows)
                    if path
                    else Shard(None, file["sha256"], file["bytes"], file["rows"])
                )
        found = views.version_parts(fs, root)
        here = {f"{root}/{name}": str(path) for name, path in rewritten.items()}
        published, ledger = ([here.get(fs._strip_protocol(path), path) for path in paths] for paths in (found.published, found.ledger))
        found = views.Parts(published, ledger, found.filesystem)
        with views.connect(found) as con:
            preview = con.sql(f"from published limit {PREVIEW_ROWS}").to_arrow_table().cast(schema(captions_of(recipe))).to_pylist()
        if not preview:
            raise VersionError(f"no row of {text} {base} would be left: nothing to publish", f"delete its versions: {where.how_to_delete(base)}")
        staged = put_together(
            Path(folder) / "version",
            recipe,
            version,
            shards,
            preview,
            found,
            removed,
            {name: manifest[name] for name in ("made_with", "made_on") if name in manifest},
        )
        check(staged, found, removed)
        return where.publish(staged, dry_run=dry_run, rebase=rebase), number


def _rewrite(fs: AbstractFileSystem, root: str, folder: Path, removed: pa.Table, schemas: Mapping[str, pa.Schema]) -> tuple[dict[str, Path], int]:
    """The shards of a version that hold a row to remove, without it; and how many published rows that were."""
    found = views.version_parts(fs, root)
    rewritten: dict[str, Path] = {}
    with views.connect(found) as con:
        con.register("tombstones", removed)
        con.execute(
            f"create temp table gone as with named as ({tombstones.named('published')}) "
            "select uid, true as published from published where uid in (select row from named) union all "
            f"select row, false from ({tombstones.named('ledger', 'null')}) where row not in (select row from named)"
        )
        for path in (*found.published, *found.ledger):
            con.from_parquet([path]).create_view("shard", replace=True)
            if not con.sql("select 1 from shard where uid in (select uid from gone) limit 1").fetchall():
                continue
            name = fs._strip_protocol(path).removeprefix(f"{root}/")
            rewritten[name] = folder / name.replace("/", "-")
            kind = name.partition("/")[0]
            kept = con.sql(_WITHOUT_GONE[kind]).to_arrow_table()
            write_parquet(kept.cast(schemas[kind]), rewritten[name], row_group_size=ROW_GROUP_ROWS)
        ((number,),) = con.sql("select count(*) from gone where published").fetchall()
    return rewritten, number


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
    fs, root, recipe, manifest = _opened(place)
    stored = json.loads(fs.cat_file(f"{root}/stats.json"))
    found = views.version_parts(fs, root)
    problems = []
    with views.connect(found) as con:
        for name, view in (("train", "published"), ("ledger", "ledger")):
            ((number,),) = con.sql(f"select count(*) from {view}").fetchall()
            if number != manifest["rows"][name]:
                problems.append(f"{view} has {number:,} rows, the manifest says {manifest['rows'][name]:,}")
        columns = [name for name, *_ in con.sql("describe published").fetchall()]
        if columns != schema(captions_of(recipe)).names:
            return [*problems, f"the columns are {', '.join(columns)}; the card describes {', '.join(schema(captions_of(recipe)).names)}"]
        sample = con.sql("from published limit 1").to_arrow_table().to_pylist()
    with fs.open(f"{root}/{PREVIEW}", "rb") as file:
        if (number := pq.read_metadata(file).num_rows) != manifest["rows"]["preview"]:
            problems.append(f"the preview has {number:,} rows, the manifest says {manifest['rows']['preview']:,}")
    files = fs.find(root, detail=True)
    for name, folder in (("train", "data/train-"), ("preview", "data/preview-"), ("ledger", "ledger/train-")):
        number = sum(about["size"] for path, about in files.items() if path.removeprefix(f"{root}/").startswith(folder))
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
    expected = card(recipe, manifest, stored, sample[0] if sample else {}).splitlines()
    given = fs.cat_file(f"{root}/README.md").decode().splitlines()
    for number, (line, wanted) in enumerate(zip_longest(given, expected, fillvalue=""), start=1):
        if line != wanted:
            problems.append(f"README.md, line {number}: '{line[:80]}', not '{wanted[:80]}'")
    if fs.cat_file(f"{root}/croissant.json").decode() != croissant(recipe, manifest):
        problems.append("croissant.json is not that of the recipe and the manifest")
    return problems
