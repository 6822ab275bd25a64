"""A finished run -> a version in a target; and what can be done with versions: verify, remove rows from.

    RUN/versions/v0.1.0/     README.md, recipe.json, stats.json, manifest.json, tombstones.parquet, plots/
                             data/preview-00000-of-00001.parquet, data/train-00000-of-NNNNN.parquet
                             ledger/train-00000-of-NNNNN.parquet
    RUN/versions/v0.1.0.json written last: the key of what was staged
    RUN/versions/v0.1.0.published.json   where it was published, and the commit there

Staging links the run's files, adds statistics, card and manifest, and checks all of it before anything is sent. It is
done once: after a crash only the sending goes on.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from analysis import plots, report, views
from builder import run as runs
from builder import tombstones
from builder.commit import lock, write_atomically
from builder.core import Recipe, Record, read_rows, sha256_file, write_parquet
from builder.errors import InputError, VersionError, telling_of_a_full_disk
from builder.select import LEDGER, ROW_GROUP_ROWS, Select, schema
from builder.target import MANIFEST, OURS, VERSION, Published, Staged, Target, by_number, link, split, target_of, version_files
from cards.card import card
from cards.croissant import croissant

PREVIEW_ROWS = 1000
PREVIEW = "data/preview-00000-of-00001.parquet"
SECRETS = r"\bhf_[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{36,}|\bsk-[A-Za-z0-9_-]{32,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Shard:
    """A parquet file of a version. `path` is None where the target holds it already and nobody needs it here."""

    path: Path | None
    sha256: str
    bytes: int
    rows: int


def publish(run: Path, target: str, version: str, *, dry_run: bool = False, rebase: bool = False) -> Published:
    """Publish a finished run as `version` in `target`, a folder or `hf://datasets/user/name`.

    Raises:
        VersionError: the version exists with other bytes, the run has no row to publish, or what was staged does not verify.
        InputError: the run is not finished.
    """
    if not VERSION.fullmatch(version):
        raise VersionError(f"'{version}' is not a version", "for example --version 0.1.0")
    where = target_of(target)
    runs.finished(run)
    (run / "versions").mkdir(exist_ok=True)
    with (
        telling_of_a_full_disk(run),
        lock(run / "versions" / ".lock", f"another publish of {run} is at work", "wait for it, then type the same command again"),
    ):
        published = where.publish(stage(run, version, _tombstones(where)), dry_run=dry_run, rebase=rebase)
        if not published.plan:
            about = {"place": published.place, "commit": published.commit, "rows": published.rows}
            write_atomically(run / "versions" / f"v{version}.published.json", json.dumps(about, indent=1) + "\n")
        return published


def stage(run: Path, version: str, removed: pa.Table) -> Staged:
    """Put a version's files together in RUN/versions, or find them there. `removed` are the target's tombstones."""
    recipe = runs.load_recipe(run).portable()
    folder, record = run / "versions" / f"v{version}", run / "versions" / f"v{version}.json"
    plans = runs.plan(runs.load_recipe(run), run)
    select = plans["select"]
    key = _key(recipe, version, select.shards(), removed)
    if record.exists() and folder.exists() and json.loads(record.read_bytes())["key"] == key:
        return Staged(folder, version, json.loads((folder / MANIFEST).read_bytes()))
    shutil.rmtree(folder, ignore_errors=True)
    shards: dict[str, list[Shard]] = {"data": [], "ledger": []}
    for done in select.shards():
        for name, sha256 in done.outputs.items():
            kind, rows = ("ledger", sum(done.rows.values())) if name.endswith(".ledger.parquet") else ("data", done.rows.get("ok", 0))
            shards[kind].append(Shard(run / name, sha256, done.bytes[name], rows))
    found = views.parts(run)
    preview = list(islice((row for file in found.published for row in read_rows(Path(file))), PREVIEW_ROWS))
    if not preview:
        raise VersionError(f"no row of {run} is ok: there is nothing to publish", f"see why: recap status {run}")
    staged = put_together(folder, recipe, version, shards, preview, found, removed, _made_with(plans))
    check(staged, found, removed)
    write_atomically(record, json.dumps({"key": key}) + "\n")
    return staged


def _made_with(plans: runs.Plans) -> dict[str, str]:
    """Library -> version of what made the shards, from their records; of several, all."""
    found: dict[str, set[str]] = {}
    for plan in plans.values():
        for record in plan.shards():
            for name, number in record.versions.items():
                found.setdefault(name, set()).add(number)
    return {name: " and ".join(sorted(numbers)) for name, numbers in sorted(found.items())}


def _key(recipe: Recipe, version: str, shards: list[Record], removed: pa.Table) -> str:
    """Of all that the staged bytes depend on, the code that describes them included."""
    code = [sha256_file(path) for folder in ("analysis", "cards") for path in sorted((ROOT / folder).rglob("*")) if path.suffix in (".py", ".sql")]
    content = [version, recipe.to_json(), [shard.outputs for shard in shards], removed.to_pylist(), code, sha256_file(Path(__file__))]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def put_together(
    folder: Path,
    recipe: Recipe,
    version: str,
    shards: Mapping[str, list[Shard]],
    preview: list[dict[str, Any]],
    parts: views.Parts,
    removed: pa.Table,
    made_with: Mapping[str, str],
) -> Staged:
    """Write a version into `folder`: links to its shards, and what describes them. `parts` is where its rows can be read."""
    files: dict[str, dict[str, Any]] = {}
    for kind, of_kind in shards.items():
        (folder / kind).mkdir(parents=True)
        for index, shard in enumerate(of_kind):
            name = f"{kind}/train-{index:05d}-of-{len(of_kind):05d}.parquet"
            if shard.path:
                link(shard.path, folder / name)
            files[name] = {"sha256": shard.sha256, "bytes": shard.bytes, "rows": shard.rows}
    rows = {"train": sum(s.rows for s in shards["data"]), "preview": len(preview), "ledger": sum(s.rows for s in shards["ledger"])}
    content = hashlib.sha256("".join(file["sha256"] for file in files.values()).encode()).hexdigest()
    write_parquet(pa.Table.from_pylist(preview, schema(_captions(recipe))), folder / PREVIEW)
    sizes = {
        "train": sum(s.bytes for s in shards["data"]),
        "preview": (folder / PREVIEW).stat().st_size,
        "ledger": sum(s.bytes for s in shards["ledger"]),
    }
    manifest = {"name": recipe.name, "version": version, "rows": rows, "bytes": sizes, "content": content, "made_with": dict(made_with)}
    tombstones.write(removed, folder / tombstones.FILE)
    write_atomically(folder / "recipe.json", recipe.to_json())
    describe(folder, recipe, manifest, parts, preview[0])
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if (name := str(path.relative_to(folder))) not in files:
            files[name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
            if path.suffix == ".parquet":
                files[name]["rows"] = pq.read_metadata(path).num_rows
    manifest["files"] = dict(sorted(files.items()))
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return Staged(folder, version, manifest)


def preview_card(run: Path) -> Path:
    """The card, its plots and statistics of a run as it is, in RUN/card. Returns the path of README.md."""
    folder, found = run / "card", views.parts(run)
    sample = next((row for file in found.published for row in read_rows(Path(file))), {})
    with views.connect(found) as con:
        rows = {name: con.sql(f"select count(*) from {view}").fetchall()[0][0] for name, view in (("train", "published"), ("ledger", "ledger"))}
    describe(folder, runs.load_recipe(run).portable(), {"rows": rows | {"preview": min(PREVIEW_ROWS, rows["train"])}}, found, sample)
    return folder / "README.md"


def describe(folder: Path, recipe: Recipe, manifest: Mapping[str, Any], parts: views.Parts, sample: Mapping[str, Any]) -> None:
    """Write statistics, plots, card and, of a version, croissant.json."""
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    statistics = report.stats(parts)
    write_atomically(folder / "stats.json", report.to_json(statistics))
    plots.draw(statistics, folder / "plots")
    # From the file, as anybody recomputes it.
    statistics = json.loads((folder / "stats.json").read_text(encoding="utf-8"))
    write_atomically(folder / "README.md", card(recipe, manifest, statistics, sample))
    if "version" in manifest:
        write_atomically(folder / "croissant.json", croissant(recipe, manifest))


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
        if columns != schema(_captions(recipe)).names:
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


def _captions(recipe: Recipe) -> tuple[str, ...]:
    """Captions that a recipe publishes beyond the first."""
    select = recipe.stage("select")
    assert isinstance(select, Select)
    return select.captions


# --- before anything is sent ------------------------------------------------------------------------------------------


def check(staged: Staged, parts: views.Parts, removed: pa.Table) -> None:
    """One schema, rows as the records say, no uid twice, nothing that was removed, no secret, a card that loads and agrees.

    Raises:
        VersionError: says which file and what is wrong with it.
    """
    folder, promised = staged.folder, staged.manifest["rows"]
    expected = {"data": schema(_captions(Recipe.from_json((folder / "recipe.json").read_text(encoding="utf-8")))), "ledger": LEDGER}
    for name, file in staged.files.items():
        if name.endswith(".parquet") and (folder / name).exists() and (kind := name.partition("/")[0]) in expected:
            footer = pq.ParquetFile(folder / name)
            if not footer.schema_arrow.equals(expected[kind]):
                raise VersionError(f"{folder / name} has another schema: {footer.schema_arrow.names}")
            if footer.metadata.num_rows != file["rows"]:
                raise VersionError(f"{folder / name} has {footer.metadata.num_rows} rows, its record says {file['rows']}")
    statistics = json.loads((folder / "stats.json").read_text(encoding="utf-8"))
    counted = (report.rows(statistics, "images")[0]["rows"], sum(row["rows"] for row in report.rows(statistics, "rows_by_status")))
    if counted != (promised["train"], promised["ledger"]):
        raise VersionError(f"the card speaks of {counted} rows, the data has {(promised['train'], promised['ledger'])}")
    for path in (path for path in folder.rglob("*") if path.suffix in (".md", ".json")):
        if found := re.search(SECRETS, path.read_text(encoding="utf-8")):
            raise VersionError(f"{path} holds what looks like a secret: {found.group()[:6]}...", "remove it from the recipe or the data")
    with views.connect(parts) as con:
        for uid, times in con.sql("select uid, count(*) from ledger where uid is not null group by uid having count(*) > 1 limit 1").fetchall():
            raise VersionError(f"uid {uid} occurs {times} times in the ledger")
        con.register("tombstones", removed)
        if removed.num_rows and (number := con.sql(f"select count(*) from ({_named('published')})").fetchall()[0][0]):
            raise VersionError(
                f"{number} rows are named by tombstones of the target: they were removed from an earlier version",
                f"build without them: recap build ... dedup.tombstones={tombstones.FILE} (the file of the target's newest version)",
            )
        texts = ", ".join(f'"{name}"' for name, kind in zip(expected["data"].names, expected["data"].types, strict=True) if kind == pa.string())
        for uid in con.sql(
            f"select uid from published where regexp_matches(concat_ws(' ', {texts}), '{SECRETS.replace(chr(92) + 'b', '')}') limit 1"
        ).fetchall():
            raise VersionError(
                f"the row {uid[0]} holds what looks like a secret", "take it out: give its uid to recap remove, or to dedup.tombstones"
            )
    if all((folder / name).exists() for name in staged.files):
        _loads(folder, promised)


def _loads(folder: Path, rows: Mapping[str, int]) -> None:
    """Every config and split of the card, through `datasets`."""
    import datasets

    for config, split_name, key in (("default", "preview", "preview"), ("default", "train", "train"), ("ledger", "train", "ledger")):
        stream = datasets.load_dataset(str(folder), config, split=split_name, streaming=True)
        if rows[key] and next(iter(stream), None) is None:
            raise VersionError(f"{folder}: datasets loads no row of {config}/{split_name}")


# --- afterwards -------------------------------------------------------------------------------------------------------


def verify(place: str) -> dict[str, Any]:
    """Hold a published version against its manifest, reading each byte once: files, hashes, rows, schemas, card.

    Returns `{"place", "files", "bytes", "problems": [...]}`; no problem, and the version is what was published.
    """
    fs, root = version_files(place)
    manifest = json.loads(fs.cat_file(f"{root}/{MANIFEST}"))
    captions = _captions(Recipe.from_json(fs.cat_file(f"{root}/recipe.json").decode()))
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
    removed = tombstones.merged(_tombstones(where, base), tombstones.table(values))
    with tempfile.TemporaryDirectory(prefix="recap-remove-") as folder, telling_of_a_full_disk(folder):
        rewritten, number = _rewrite(fs, root, Path(folder), removed, {"data": schema(_captions(recipe)), "ledger": LEDGER})
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
            preview = con.sql(f"from published limit {PREVIEW_ROWS}").to_arrow_table().cast(schema(_captions(recipe))).to_pylist()
        if not preview:
            raise VersionError(f"no row of {text} {base} would be left: nothing to publish", f"delete its versions: {where.how_to_delete(base)}")
        staged = put_together(Path(folder) / "version", recipe, version, shards, preview, found, removed, manifest["made_with"])
        check(staged, found, removed)
        return where.publish(staged, dry_run=dry_run, rebase=rebase), number


def _rewrite(fs: AbstractFileSystem, root: str, folder: Path, removed: pa.Table, schemas: Mapping[str, pa.Schema]) -> tuple[dict[str, Path], int]:
    """The shards of a version that hold a row to remove, without it; and how many published rows that were."""
    found = views.version_parts(fs, root)
    rewritten: dict[str, Path] = {}
    with views.connect(found) as con:
        con.register("tombstones", removed)
        con.execute(
            f"create temp table gone as with named as ({_named('published')}) "
            "select uid, true as published from published where uid in (select row from named) union all "
            f"select row, false from ({_named('ledger', 'null')}) where row not in (select row from named)"
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


def _named(view: str, image: str = "sha256") -> str:
    """SQL of the uids of a view's rows that tombstones name."""
    return tombstones.MARKS.format(rows=f"(select uid as row, uid, url, {image} as image from {view})", tombstones="tombstones")


def _tombstones(where: Target, version: str | None = None) -> pa.Table:
    """Those of a target's version, the newest unless given."""
    versions = where.versions()
    if not versions:
        return tombstones.table({})
    fs, root = where.files(version or versions[-1])
    if not fs.exists(f"{root}/{tombstones.FILE}"):  # published before there were any
        return tombstones.table({})
    with fs.open(f"{root}/{tombstones.FILE}", "rb") as file:
        return pq.read_table(file, schema=tombstones.SCHEMA)
