"""What every target promises: a folder, the Hub on loopback, and the Hub itself where a token and a network are given."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from test_hub import other, server, staged  # noqa: F401

from analysis.diff import diff
from analysis.views import Parts
from builder import tombstones
from builder.core import Recipe, sha256_file, write_parquet
from builder.errors import InputError, VersionError
from builder.publish import Shard, put_together
from builder.target import Staged, split, target_of
from builder.versions import remove, verify


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


def test_versions_come_one_after_the_other_and_never_change(target: str, staged: Staged, tmp_path: Path) -> None:  # noqa: F811
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
    fs, root = target_of(target).files("0.1.0")
    from analysis import views

    with views.connect(views.version_parts(fs, root)) as con:
        (first, _), (_, sha256) = con.sql("select uid, sha256 from published limit 2").fetchall()
    published, number = remove(target, "0.1.1", {"uid": [first], "sha256": [sha256]})
    assert (published.new, number) == (True, 2)
    assert verify(f"{target}@v0.1.1")["problems"] == []
    changes = diff(f"{target}@v0.1.0", f"{target}@v0.1.1")
    assert (changes["removed"], changes["added"], changes["changed"]) == (2, 0, {})
    with pytest.raises(InputError, match="matches: nothing to remove"):
        remove(target, "0.1.2", {"uid": ["0" * 32]})
    with pytest.raises(InputError, match=r"has no version older than 0\.0\.1"):
        remove(target, "0.0.1", {"uid": [first]})


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


def test_what_any_version_removed_stays_removed(target: str, staged: Staged, tmp_path: Path) -> None:  # noqa: F811
    """Also in a version made from an older one, whose untouched shards the newest does not have."""
    where, first = target_of(target), in_two_shards(staged, tmp_path / "first")
    where.publish(first)
    where.publish(other(staged, tmp_path / "second", "0.2.0"))
    uids = pq.read_table(first.folder / "data/train-00000-of-00002.parquet")["uid"].to_pylist()
    assert remove(f"{target}@v0.1.0", "0.3.0", {"uid": uids[:1]})[1] == 1
    assert verify(f"{target}@v0.3.0")["problems"] == []
    assert remove(f"{target}@v0.2.0", "0.4.0", {"uid": uids[1:2]})[1] == 2
    assert diff(f"{target}@v0.2.0", f"{target}@v0.4.0")["removed"] == 2
    assert not remove(f"{target}@v0.1.0", "0.3.0", {"uid": uids[:1]})[0].new


def test_a_target_and_a_version_are_told_apart() -> None:
    assert split("out@v1.2.0") == ("out", "1.2.0")
    assert split("me@home/out") == ("me@home/out", None)
    assert split("hf://datasets/me/demo@v0.1.0") == ("hf://datasets/me/demo", "0.1.0")
    with pytest.raises(InputError, match="is no target"):
        target_of("s3://bucket/x")
    with pytest.raises(InputError, match="has a user and a name"):
        target_of("hf://datasets/demo")
