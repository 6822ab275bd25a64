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
from builder.target import MANIFEST, OURS, Published, by_number, split, target_of, version_files
from cards.card import card


def verify(place: str) -> dict[str, Any]:
    """Hold a published version against its manifest, reading each byte once: files, hashes, rows, schemas, card.

    Returns `{"place", "files", "bytes", "problems": [...]}`; no problem, and the version is what was published.
    """
    fs, root = version_files(place)
    manifest = json.loads(fs.cat_file(f"{root}/{MANIFEST}"))
    captions = captions_of(Recipe.from_json(fs.cat_file(f"{root}/recipe.json").decode()))
    there = {path.removeprefix(f"{root}/") for path in fs.find(root)}
    problems, total = [f"{name} is missing" for name in manifest["files"] if name not in there], 0
    for name, promised in manifest["files"].items():
        if name not in there:
            continue
        sha256, size, footer = _read_once(fs, f"{root}/{name}", parquet=name.endswith(".parquet"))
        total += size
        if (sha256, size) != (promised["sha256"], promised["bytes"]):
            problems.append(f"{name} has {size} bytes and sha256 {sha256}, not {promised['bytes']} and {promised['sha256']}")
        elif footer is not None:
            expected = {"data": schema(captions), "ledger": LEDGER}.get(name.partition("/")[0], tombstones.SCHEMA)
            if not footer.schema.to_arrow_schema().equals(expected):
                problems.append(f"{name} has another schema than the recipe's")
            if footer.num_rows != promised["rows"]:
                problems.append(f"{name} has {footer.num_rows} rows, not {promised['rows']}")
    extra = sorted(name for name in there - set(manifest["files"]) if name.startswith(OURS))
    problems += [f"{name} is not in the manifest" for name in extra]
    text = fs.cat_file(f"{root}/README.md").decode()
    if f"{manifest['rows']['train']:,} rows" not in text or f"version {manifest['version']}" not in text:
        problems.append(f"README.md speaks of another version or number of rows than {manifest['version']} and {manifest['rows']['train']:,}")
    return {"place": place, "version": manifest["version"], "files": len(manifest["files"]), "bytes": total, "problems": problems}


def _read_once(fs: AbstractFileSystem, path: str, *, parquet: bool) -> tuple[str, int, pq.FileMetaData | None]:
    """sha256, size and, of a parquet file, its footer: it is parsed from the end of what went by."""
    digest, size, tail = hashlib.sha256(), 0, b""
    with fs.open(path, "rb", **({} if isinstance(fs, LocalFileSystem) else {"block_size": 0})) as file:  # 0: one stream, no ranges
        while chunk := file.read(8 << 20):
            digest.update(chunk)
            size += len(chunk)
            tail = (tail + chunk)[-(16 << 20) :] if parquet else b""
    footer = None
    if parquet and tail[-4:] == b"PAR1":
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if length <= len(tail):
            footer = pq.read_metadata(pa.BufferReader(b"PAR1" + tail[-length:]))
    return digest.hexdigest(), size, footer


def remove(target: str, version: str, values: Mapping[str, Iterable[str]], *, dry_run: bool = False, rebase: bool = False) -> tuple[Published, int]:
    """A new version of `TARGET` (its newest) or `TARGET@v1.2.0` without the rows that `values` name, by kind: uid, sha256, url, domain.

    Only shards that hold such a row are read and written; the others are taken over as they are. The version's tombstones
    name what was removed, by hashes. Returns what was published, and the number of rows removed.

    Raises:
        InputError: no row matches, or there is no version to remove from.
    """
    text, base = split(target)
    where = target_of(text)
    older = [known for known in where.versions() if by_number(known) < by_number(version)]
    base = base or (older[-1] if older else None)
    if base is None:
        raise InputError(f"{text} has no version older than {version}", f"its versions: {', '.join(where.versions()) or 'none'}")
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
    fs, root = version_files(place)
    recipe = Recipe.from_json(fs.cat_file(f"{root}/recipe.json").decode())
    manifest = json.loads(fs.cat_file(f"{root}/{MANIFEST}"))
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
            problems.append(f"the columns are {', '.join(columns)}; the card describes others")
        sample = con.sql("from published limit 1").to_arrow_table().to_pylist()
    again = json.loads(report.to_json(report.stats(found)))
    for query in sorted(stored.keys() | again.keys()):
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
    return problems
