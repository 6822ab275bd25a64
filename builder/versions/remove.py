"""Rows of a published version are removed by a new one: a version never changes.

What is removed is missing from the new version, and its tombstones keep it out of those that follow.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from analysis import views
from builder import sql, tombstones
from builder.errors import DamagedError, InputError, VersionError, command, telling_of_a_full_disk
from builder.files import sha256_file, write_parquet
from builder.places import version_parts
from builder.stages.select import ROW_GROUP_ROWS, schemas
from builder.versions.publish import PREVIEW, PREVIEW_ROWS, Shard, check, put_together
from builder.versions.targets import open_version, removed_from, split, target_of
from builder.versions.verify import read_once
from builder.versions.version import OURS, Published, Version, by_number, check_version, is_inside


@dataclass(frozen=True)
class Removed:
    """What a removal published, the rows that went and those of the ledger that are told nothing of any more,
    and what named no row.
    """

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
    """A new version of `TARGET` (its newest) or `TARGET@v1.2.0` without the rows that `values` name, by kind:
    uid, sha256, url, domain.

    Rows that are in the ledger only are told nothing of any more, and what names no row now is kept out of
    later versions. What is read is held against the base's manifest first: of a version on the Hub the shards
    that hold such a row, the others being taken over there by their hashes.

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
        reason = f"{text} has no version {named or f'older than {version}'}"
        raise InputError(reason, f"its versions: {', '.join(versions) or 'none'}")
    base = open_version(f"{text}@v{named or older[-1]}")
    before = removed_from(where, version)  # of `versions`, or of more
    removed = tombstones.merged(before, tombstones.table(values))
    names = [name for name in base.manifest["files"] if base.is_local or not name.startswith(OURS)]
    _hold_against_manifest(base, names)
    with tempfile.TemporaryDirectory(prefix="recap-remove-") as folder, telling_of_a_full_disk(folder):
        rewritten, rows, ledger_rows, marks = _rewrite(base, Path(folder), removed)
        if not rewritten and removed.num_rows == before.num_rows and version not in versions:
            hint = f"look for it: {command('recap', 'sql', text, 'select uid, url from ledger')}"
            reason = f"no row of {text} matches, and all of it is kept out already: nothing to remove"
            raise InputError(reason, hint)
        shards: dict[str, list[Shard]] = {"data": [], "ledger": []}
        for name, file in base.manifest["files"].items():
            if (kind := name.partition("/")[0]) in shards and name != PREVIEW:
                shard = Shard(None, file["sha256"], file["bytes"], file["rows"])
                if path := rewritten.get(name):
                    number = pq.read_metadata(path).num_rows
                    shard = Shard(path, sha256_file(path), path.stat().st_size, number)
                shards[kind].append(shard)
        found = version_parts(base)
        here = {f"{base.root}/{name}": str(path) for name, path in rewritten.items()}
        kinds = (found.published, found.ledger)
        published, ledger = ([here.get(base.fs._strip_protocol(path), path) for path in of] for of in kinds)
        found = replace(found, published=published, ledger=ledger)
        with views.connect(found) as con:
            first = con.sql(f"from published limit {PREVIEW_ROWS}").to_arrow_table()
            preview = first.cast(schemas(base.recipe)["data"]).to_pylist()
        if not preview:
            hint = f"delete its versions: {where.how_to_delete(named or older[-1])}"
            raise VersionError(f"no row of {target} would be left: nothing to publish", hint)
        told = ("made_with", "made_on", "batches")
        made = {name: base.manifest[name] for name in told if name in base.manifest}
        into = Path(folder) / "version"
        staged = put_together(into, base.recipe, version, shards, preview, found, removed, made)
        check(staged, found, removed)
        matched_nothing = {
            kind: [value for value in dict.fromkeys(of_kind) if not marks & tombstones.marks(kind, value)]
            for kind, of_kind in values.items()
        }
        staged = replace(staged, beside=versions)
        result = where.publish(staged, dry_run=dry_run, rebase=rebase)
        return Removed(result, rows, ledger_rows, matched_nothing)


def _hold_against_manifest(version: Version, names: Iterable[str]) -> None:
    """Raises:
    DamagedError: a file is not what was published.
    """
    for name in names:
        path, file = f"{version.root}/{name}", version.manifest["files"][name]
        regular = not version.is_local or is_inside(version.root, name)
        if not regular or read_once(version.fs, path)[:2] != (file["sha256"], file["bytes"]):
            reason = f"{path} is not what the manifest says: it was changed after it was published"
            hint = f"get it from a copy; all that differs: {command('recap', 'verify', version.root)}"
            raise DamagedError(reason, hint)


def _rewrite(version: Version, folder: Path, removed: pa.Table) -> tuple[dict[str, Path], int, int, set[str]]:
    """Shards that hold a row to remove, without it; published rows and further rows of the ledger that go;
    the marks that named one.
    """
    found = version_parts(version)
    expected = schemas(version.recipe)
    rewritten: dict[str, Path] = {}
    with views.connect(found) as con:
        con.register("tombstones", removed)
        con.execute(
            f"""create temp table named as
                select row as uid, mark, true as published from ({tombstones.named("published")})
                union all select row, mark, false from ({tombstones.named("ledger", "null")});
                create temp table gone as select uid, bool_or(published) as published
                from named where uid is not null group by uid"""
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
        count = "select count(*) filter (published), count(*) filter (not published) from gone"
        ((rows, ledger_rows),) = con.sql(count).fetchall()
        marks = {mark for (mark,) in con.sql("select distinct mark from named").fetchall()}
    return rewritten, rows, ledger_rows, marks


_WITHOUT_GONE = {
    "data": "from shard where uid not in (select uid from gone)",
    # The ledger keeps count: a removed row stays as one of which nothing is known.
    "ledger": """
        with known as (select *, coalesce(uid in (select uid from gone), false) as is_gone from shard)
        select if(is_gone, null, uid) as uid, if(is_gone, null, url) as url,
               if(is_gone, 'removed', status) as status,
               if(is_gone, 'named by a tombstone', error) as error from known""",
}
