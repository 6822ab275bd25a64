"""What every target promises: a folder, the Hub on loopback, the Hub itself, given a token and a network."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hub.server import Hub as Server
from hub.store import flip
from test_hub import other, server, staged  # noqa: F401

from analysis.diff import diff
from analysis.views import Parts
from builder import tombstones
from builder.core import Recipe
from builder.errors import InputError, MovedError, VersionError
from builder.files import sha256_file, write_parquet
from builder.places import parts
from builder.versions.folder import Folder
from builder.versions.publish import Shard, put_together
from builder.versions.remove import remove
from builder.versions.targets import removed_from, split, target_of
from builder.versions.verify import verify
from builder.versions.version import MANIFEST, Staged


@pytest.fixture(params=["folder", "hub", "real hub"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "folder":
        yield str(tmp_path / "out")
    elif request.param == "hub":
        request.getfixturevalue("server")
        yield "hf://datasets/me/demo"
    elif user := os.environ.get("RECAP_REAL_HUB"):
        from huggingface_hub import HfApi

        repo = f"{user}/recapkit-contract-{uuid.uuid4().hex[:8]}"
        yield f"hf://datasets/{repo}"
        HfApi().delete_repo(repo, repo_type="dataset", missing_ok=True)
    else:
        pytest.skip("needs network and a token: RECAP_REAL_HUB=user HF_TOKEN=... runs it")


HUB_IS_SLOW = pytest.mark.parametrize(
    "target", ["folder", pytest.param("hub", marks=pytest.mark.slow), "real hub"], indirect=True
)


def test_versions_come_one_after_the_other_and_never_change(
    target: str,
    staged: Staged,  # noqa: F811
    tmp_path: Path,
) -> None:
    where = target_of(target)
    assert where.versions() == []
    assert where.publish(staged, dry_run=True).plan["files"] == len(staged.promised())
    assert where.versions() == []
    assert where.publish(staged).new
    assert not where.publish(staged).new
    with pytest.raises(VersionError, match="never changes"):
        where.publish(other(staged, tmp_path / "other", **{"README.md": b"changed"}))
    second = other(staged, tmp_path / "second", "0.10.0", **{"plots/more.txt": b"more"})
    assert where.publish(second).new
    third = other(staged, tmp_path / "third", "0.9.0")
    assert where.publish(third).new
    assert where.versions() == ["0.1.0", "0.9.0", "0.10.0"]
    assert verify(f"{target}@v0.1.0")["problems"] == []
    fs, root = where.files("0.10.0")
    assert fs.cat_file(f"{root}/plots/more.txt") == b"more"


def test_rows_go_and_the_rest_stays(target: str, staged: Staged) -> None:  # noqa: F811
    target_of(target).publish(staged)
    from analysis import views

    with views.connect(parts(f"{target}@v0.1.0")) as con:
        (first, _), (_, sha256) = con.sql("select uid, sha256 from published limit 2").fetchall()
    removal = remove(target, "0.1.1", {"uid": [first], "sha256": [sha256]})
    assert (removal.published.new, removal.rows, removal.ledger_rows, removal.matched_nothing) == (
        True,
        2,
        0,
        {"uid": [], "sha256": []},
    )
    assert verify(f"{target}@v0.1.1")["problems"] == []
    changes = diff(parts(f"{target}@v0.1.0"), parts(f"{target}@v0.1.1"))
    assert (changes["removed"], changes["added"], changes["changed"]) == (2, 0, {})
    with pytest.raises(InputError, match="nothing to remove"):
        remove(target, "0.1.2", {"uid": [first.upper()]})
    with pytest.raises(InputError, match=r"has no version older than 0\.0\.1"):
        remove(target, "0.0.1", {"uid": [first]})


@HUB_IS_SLOW
def test_rows_of_the_ledger_go_and_what_is_not_there_yet_is_kept_out(target: str, staged: Staged) -> None:  # noqa: F811
    """A dead link is published with its URL: its owner can have it taken out. What named no row is told."""
    target_of(target).publish(staged)
    from analysis import views

    with views.connect(parts(f"{target}@v0.1.0")) as con:
        ((dead, url),) = con.sql("select uid, url from ledger where status = 'dead_link' limit 1").fetchall()
    removal = remove(target, "0.1.1", {"url": [url], "domain": ["nowhere.example"]})
    assert (removal.rows, removal.ledger_rows, removal.matched_nothing) == (
        0,
        1,
        {"url": [], "domain": ["nowhere.example"]},
    )
    assert verify(f"{target}@v0.1.1")["problems"] == []
    with views.connect(parts(f"{target}@v0.1.1")) as con:
        assert con.sql(f"select count(*) from ledger where uid = '{dead}' or url = '{url}'").fetchall() == [
            (0,)
        ]
        assert con.sql("select count(*) from ledger").fetchall() == [(240,)]
    later = remove(target, "0.1.2", {"uid": ["0" * 32]})
    assert (later.rows, later.ledger_rows, later.matched_nothing) == (0, 0, {"uid": ["0" * 32]})
    assert not remove(target, "0.1.2", {"uid": ["0" * 32]}).published.new
    held = removed_from(target_of(target), "0.1.3")["mark"].to_pylist()
    assert tombstones.marks("domain", "Nowhere.Example.") | tombstones.marks("uid", "0" * 32) <= set(held)


def test_what_was_changed_after_it_was_published_is_not_made_official(staged: Staged, tmp_path: Path) -> None:  # noqa: F811
    """A flipped byte would get a fresh hash otherwise, and a changed uid would escape."""
    Folder(tmp_path / "out").publish(staged)
    name = next(name for name in staged.files if name.startswith("data/train"))
    path = tmp_path / "out" / "v0.1.0" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)
    with pytest.raises(VersionError, match=rf"{name} is not what the manifest says"):
        remove(str(tmp_path / "out"), "0.1.1", {"uid": ["0" * 32]})
    assert Folder(tmp_path / "out").versions() == ["0.1.0"]


def test_what_the_hub_stores_otherwise_is_not_made_official(server: Server, staged: Staged) -> None:  # noqa: F811
    """Of a version on the Hub, the shards with a row to remove are read, and held against the manifest."""
    place = "hf://datasets/me/demo"
    target_of(place).publish(staged)
    name = next(name for name in staged.files if name.startswith("data/train"))
    uid = pq.read_table(staged.folder / name, columns=["uid"])["uid"][0].as_py()
    repo = server.repo("me/demo")
    flip(repo.store.path(repo.at("v0.1.0").files[name]))
    with pytest.raises(VersionError, match=rf"{name} is not what the manifest says"):
        remove(place, "0.1.1", {"uid": [uid]})
    assert target_of(place).versions() == ["0.1.0"]


def test_a_version_that_comes_while_another_is_put_together_is_obeyed(staged: Staged, tmp_path: Path) -> None:  # noqa: F811
    """It may have removed rows."""
    Folder(tmp_path / "out").publish(staged)
    second = other(staged, tmp_path / "second", "0.2.0")
    remove(str(tmp_path / "out"), "0.1.1", {"uid": ["0" * 32]})
    with pytest.raises(MovedError, match=r"0\.1\.1 was published while 0\.2\.0"):
        Folder(tmp_path / "out").publish(replace(second, beside=["0.1.0"]))
    assert Folder(tmp_path / "out").publish(replace(second, beside=["0.1.0", "0.1.1"])).new


def test_a_copy_that_is_whole_is_taken_of_several(staged: Staged, tmp_path: Path) -> None:  # noqa: F811
    out = Folder(tmp_path / "out")
    out.publish(staged)
    remove(str(out.path), "0.1.1", {"uid": ["0" * 32]})
    name = next(name for name in staged.files if name.startswith("data/train"))
    for copy in (out.path / "v0.1.1" / name,):
        data = bytearray(copy.read_bytes())
        copy.unlink()
        data[len(data) // 2] ^= 1
        copy.write_bytes(data)
    assert remove(f"{out.path}@v0.1.0", "0.1.2", {"uid": ["1" * 32]}).published.new
    assert verify(f"{out.path}@v0.1.2")["problems"] == []


def test_what_lies_beside_the_versions_does_not_stop_a_publish(staged: Staged, tmp_path: Path) -> None:  # noqa: F811
    out = Folder(tmp_path / "out")
    out.path.mkdir()
    (out.path / "v0.0.9").write_text("a file")
    assert out.publish(staged).new
    (out.path / "latest").unlink()
    (out.path / "latest").mkdir()
    with pytest.raises(InputError, match="latest is there, and no link"):
        out.publish(other(staged, tmp_path / "second", "0.2.0"))
    assert out.versions() == ["0.1.0"]


@pytest.mark.parametrize(
    "name",
    ["plots/../../../private", "/etc/passwd", "../private", "plots/link.png", "data/x.parquet", "bin/sh",
     ".hidden", ""],
)  # fmt: skip
def test_a_strangers_manifest_reaches_nothing_outside_its_folder(
    staged: Staged,  # noqa: F811
    tmp_path: Path,
    name: str,
) -> None:
    private, target = tmp_path / "private", tmp_path / "a" / "b" / "out"
    private.write_text("mine")
    private.chmod(0o600)
    Folder(target).publish(staged)
    version = target / "v0.1.0"
    (version / "plots" / "link.png").symlink_to(private)
    manifest = json.loads((version / MANIFEST).read_text())
    manifest["files"][name] = {"sha256": sha256_file(private), "bytes": 4}
    (version / MANIFEST).unlink()
    (version / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises((InputError, VersionError), match=r"manifest|link\.png"):
        remove(str(target), "0.1.1", {"uid": ["0" * 32]})
    if name == "plots/link.png":
        assert "plots/link.png is no regular file of this folder" in verify(str(version))["problems"]
    assert private.stat().st_mode & 0o777 == 0o600
    assert private.stat().st_nlink == 1
    assert Folder(target).versions() == ["0.1.0"]


def test_a_version_that_was_renamed_is_told(staged: Staged, tmp_path: Path) -> None:  # noqa: F811
    Folder(tmp_path).publish(staged)
    assert verify(str(tmp_path / "latest"))["problems"] == []
    (tmp_path / "v0.1.0").rename(tmp_path / "v0.2.0")
    assert verify(str(tmp_path / "v0.2.0"))["problems"] == ["v0.2.0 holds version 0.1.0: it was renamed"]


def in_two_shards(version: Staged, folder: Path) -> Staged:
    """The same rows in two data shards."""
    source = version.folder / "data/train-00000-of-00001.parquet"
    rows, shards = pq.read_table(source), []
    for number, part in enumerate((rows.slice(0, 50), rows.slice(50))):
        path = folder.with_name(f"part-{number}.parquet")
        write_parquet(part, path)
        shards.append(Shard(path, sha256_file(path), path.stat().st_size, part.num_rows))
    ledger = version.folder / "ledger/train-00000-of-00001.parquet"
    about = version.files["ledger/train-00000-of-00001.parquet"]
    recipe = Recipe.from_json((version.folder / "recipe.json").read_text())
    parts = Parts([str(shard.path) for shard in shards], [str(ledger)])
    of_kind = {"data": shards, "ledger": [Shard(ledger, about["sha256"], about["bytes"], about["rows"])]}
    return put_together(folder, recipe, "0.1.0", of_kind, rows.to_pylist(), parts, tombstones.table({}), {})


@HUB_IS_SLOW
def test_what_any_version_removed_stays_removed(target: str, staged: Staged, tmp_path: Path) -> None:  # noqa: F811
    """Also in a version made from an older one, whose untouched shards the newest does not have."""
    where, first = target_of(target), in_two_shards(staged, tmp_path / "first")
    where.publish(first)
    where.publish(other(staged, tmp_path / "second", "0.2.0"))
    uids = pq.read_table(first.folder / "data/train-00000-of-00002.parquet")["uid"].to_pylist()
    assert remove(f"{target}@v0.1.0", "0.3.0", {"uid": uids[:1]}).rows == 1
    assert verify(f"{target}@v0.3.0")["problems"] == []
    assert remove(f"{target}@v0.2.0", "0.4.0", {"uid": uids[1:2]}).rows == 2
    assert diff(parts(f"{target}@v0.2.0"), parts(f"{target}@v0.4.0"))["removed"] == 2
    assert not remove(f"{target}@v0.1.0", "0.3.0", {"uid": uids[:1]}).published.new


def test_a_target_and_a_version_are_told_apart() -> None:
    assert split("out@v1.2.0") == ("out", "1.2.0")
    assert split("me@home/out") == ("me@home/out", None)
    assert split("hf://datasets/me/demo@v0.1.0") == ("hf://datasets/me/demo", "0.1.0")
    with pytest.raises(InputError, match="is no target"):
        target_of("s3://bucket/x")
    with pytest.raises(InputError, match="has a user and a name"):
        target_of("hf://datasets/demo")
