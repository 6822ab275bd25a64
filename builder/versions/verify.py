"""Published versions, in a folder or on the Hub: one against its manifest, and its card against its data."""

from __future__ import annotations

import hashlib
import json
import os
from itertools import zip_longest
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from analysis import report, views
from builder import tombstones
from builder.core import Recipe
from builder.places import version_parts
from builder.stages.select import schemas
from builder.typed import from_json
from builder.versions.publish import PREVIEW
from builder.versions.targets import open_version
from builder.versions.version import OURS, VERSION, is_inside
from cards.card import card
from cards.croissant import croissant


def verify(place: str) -> dict[str, Any]:
    """Hold a published version against its manifest, reading each byte once: files, hashes, rows, schemas,
    card.

    Returns `{"place", "version", "files", "bytes", "problems": [...]}`; no problem, and the version is what
    was published.

    Raises:
        InputError: there is no such version, or its manifest or recipe cannot be used.
    """
    version = open_version(place)
    fs, root, manifest = version.fs, version.root, version.manifest
    there = {path.removeprefix(f"{root}/") for path in fs.find(root)}
    problems = [f"{name} is missing" for name in manifest["files"] if name not in there]
    total, whole = 0, set()
    named = os.path.basename(os.path.realpath(root)) if version.is_local else root.rpartition("@")[2]
    if VERSION.fullmatch(named.removeprefix("v")) and named != f"v{manifest['version']}":
        problems.append(f"{named} holds version {manifest['version']}: it was renamed")
    for name, promised in manifest["files"].items():
        if name not in there:
            continue
        if version.is_local and not is_inside(root, name):
            problems.append(f"{name} is no regular file of this folder")
            continue
        sha256, size, end = read_once(fs, f"{root}/{name}")
        total += size
        if (sha256, size) != (promised["sha256"], promised["bytes"]):
            wanted = f"{promised['bytes']} and {promised['sha256']}"
            problems.append(f"{name} has {size} bytes and sha256 {sha256}, not {wanted}")
            continue
        whole.add(name)
        if name.endswith(".parquet"):
            problems += _other_rows(name, end, promised.get("rows"), version.recipe)
    extra = sorted(name for name in there - set(manifest["files"]) if name.startswith(OURS))
    problems += [f"{name} is not in the manifest" for name in extra]
    text = fs.cat_file(f"{root}/README.md").decode("utf-8", "replace") if "README.md" in whole else ""
    number, rows = manifest["version"], f"{manifest['rows']['train']:,}"
    if text and (f"{rows} rows" not in text or f"version {number}" not in text):
        problems.append(f"README.md speaks of another version or number of rows than {number} and {rows}")
    counts = {"files": len(manifest["files"]), "bytes": total}
    return {"place": place, "version": number, **counts, "problems": problems}


def _other_rows(name: str, end: bytes, promised: int | None, recipe: Recipe) -> list[str]:
    """What is wrong with the schema or the number of rows of a parquet file, by its last bytes."""
    try:
        footer = pq.read_metadata(pa.BufferReader(b"PAR1" + end[-8 - int.from_bytes(end[-8:-4], "little") :]))
        found = footer.schema.to_arrow_schema()
    except (OSError, pa.ArrowException) as error:
        return [f"{name} is no parquet file: {str(error).splitlines()[0][:200]}"]
    expected = schemas(recipe).get(name.partition("/")[0], tombstones.SCHEMA)
    problems = [] if found.equals(expected) else [f"{name} has another schema than the recipe's"]
    if footer.num_rows != promised:
        problems.append(f"{name} has {footer.num_rows} rows, not {promised}")
    return problems


def read_once(fs: AbstractFileSystem, path: str) -> tuple[str, int, bytes]:
    """sha256, size, and the last 16 MiB: a parquet file's footer is in them."""
    digest, size, end = hashlib.sha256(), 0, b""
    options = {} if isinstance(fs, LocalFileSystem) else {"block_size": 0}  # 0: one stream, no ranges
    with fs.open(path, "rb", **options) as file:
        while chunk := file.read(8 << 20):
            digest.update(chunk)
            size += len(chunk)
            end = (end + chunk)[-(16 << 20) :]
    return digest.hexdigest(), size, end


def check_card(place: str) -> list[str]:
    """What in a version's statistics and card no longer agrees with its data: all of it is computed again."""
    version = open_version(place)
    fs, root, recipe, manifest = version.fs, version.root, version.recipe, version.manifest
    stored = from_json(dict[str, dict[str, Any]], version.read("stats.json"), what=f"{root}/stats.json")
    texts = (version.read(name) for name in ("README.md", "croissant.json"))
    readme, json_ld = (text.decode("utf-8", "replace") for text in texts)
    found = version_parts(version)
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
        if number != (promised := manifest["rows"]["preview"]):
            problems.append(f"the preview has {number:,} rows, the manifest says {promised:,}")
    files = fs.find(root, detail=True)
    sizes = {path.removeprefix(f"{root}/"): about["size"] for path, about in files.items()}
    for name, folder in (("train", "data/train-"), ("preview", "data/preview-"), ("ledger", "ledger/train-")):
        number = sum(size for file, size in sizes.items() if file.startswith(folder))
        if number != manifest["bytes"][name]:
            problems.append(f"{folder}* have {number:,} bytes, the manifest says {manifest['bytes'][name]:,}")
    again = json.loads(report.to_json(report.stats(found)))
    for query in sorted(stored.keys() | again.keys()):
        if query == "nouns" and ("absent" in stored.get(query, {})) != ("absent" in again.get(query, {})):
            continue  # a spaCy pipeline is installed on one side only: nothing to hold against each other
        if stored.get(query) != again.get(query):
            same_query = stored.get(query, {}).get("sha256") == again.get(query, {}).get("sha256")
            what = "no longer agrees with the data" if same_query else "was made by another query"
            problems.append(f"stats.json: {query} {what}")
    expected = card(recipe, manifest, again, sample[0] if sample else {}).splitlines()
    both = zip_longest(readme.splitlines(), expected, fillvalue="")
    for number, (line, wanted) in enumerate(both, start=1):
        if line != wanted:
            problems.append(f"README.md, line {number}: '{line[:80]}', not '{wanted[:80]}'")
    if json_ld != croissant(recipe, manifest):
        problems.append("croissant.json is not that of the recipe and the manifest")
    return problems
