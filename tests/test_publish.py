"""A published version: loads everywhere, never changes, is never half there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import duckdb
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, fill, mounted, output_of, recap, recap_here, record_of, web_of

from builder.errors import InputError, VersionError
from builder.stages.select import LEDGER, SCHEMA
from builder.versions.publish import publish
from builder.versions.verify import verify

RECAP_DATACOMP_1B = {  # the published schema
    "url": "string", "re_caption": "string", "org_caption": "string", "sha256": "string", "key": "string",
    "re_clip_score": "float64", "org_clip_score": "float64", "re_length": "int64", "org_length": "int64",
    "re_gpt4v_score": "int64", "org_gpt4v_score": "int64",
    "re_caption_condition_diverse_topk": "string", "re_condition_length": "int64",
}  # fmt: skip


@pytest.fixture
def version(demo_run: Path) -> Path:
    return demo_run.with_name("demo-published") / "v0.1.0"


@pytest.fixture
def copied_run(demo_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_run, tmp_path / "run"))


def tree(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_the_schema_is_a_superset_of_recap_datacomp_1b() -> None:
    for name, kind in RECAP_DATACOMP_1B.items():
        assert str(SCHEMA.field(name).type).replace("double", "float64") == kind
    assert "uid" in SCHEMA.names


def test_every_config_and_split_loads(version: Path, tmp_path: Path) -> None:
    train = datasets.load_dataset(str(version), split="train", cache_dir=str(tmp_path))
    preview = datasets.load_dataset(str(version), split="preview", cache_dir=str(tmp_path))
    ledger = datasets.load_dataset(str(version), "ledger", split="train", cache_dir=str(tmp_path))
    assert train.column_names == SCHEMA.names
    assert preview[0] == train[0]
    assert len(ledger) == 240
    assert len(train) == sum(status == "ok" for status in ledger["status"])
    assert len(set(ledger["uid"])) == 240
    assert train[0]["re_caption"]


def test_two_versions_of_one_name_are_told_apart(version: Path, copied_run: Path, tmp_path: Path) -> None:
    """`datasets` keys its cache by a folder's last name and its card, not by its path: the card must differ
    where the data do.
    """
    file = output_of(copied_run, "select")
    rows = pq.read_table(file).slice(0, 20)  # the same rows, fewer of them, and a ledger that says so
    statuses = pq.read_table(output_of(copied_run, "select", ".ledger.parquet"))
    ok = pc.and_(pc.equal(statuses["status"], "ok"), pc.invert(pc.is_in(statuses["uid"], rows["uid"])))
    ledger = statuses.set_column(2, "status", pc.if_else(ok, "dead_link", statuses["status"]))
    for path, table in ((file, rows), (output_of(copied_run, "select", ".ledger.parquet"), ledger)):
        path.chmod(0o644)
        pq.write_table(table, path)
    record = json.loads(record_of(copied_run, "select").read_text())
    record["bytes"] = {name: (copied_run / name).stat().st_size for name in record["bytes"]}
    record["outputs"] = {
        name: hashlib.sha256((copied_run / name).read_bytes()).hexdigest() for name in record["outputs"]
    }
    record["rows"] |= {"dead_link": record["rows"]["dead_link"] + record["rows"]["ok"] - 20, "ok": 20}
    record_of(copied_run, "select").write_text(json.dumps(record))
    other = Path(publish(copied_run, str(tmp_path / "out"), "0.1.0").place)
    assert other.name == version.name
    sizes = [
        len(datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache")))
        for folder in (version, other)
    ]
    assert sizes[0] == sum(pq.read_metadata(file).num_rows for file in (version / "data").glob("train-*"))
    assert sizes[1] == 20


def test_duckdb_reads_it(version: Path) -> None:
    assert duckdb.sql(
        f"select count(*) from '{version}/data/train-*.parquet' where re_clip_score is null"
    ).fetchall() == [(0,)]


def test_numbers_in_the_rows_follow_from_the_rows(version: Path) -> None:
    for row in pq.read_table(version / "data").to_pylist():
        assert row["re_length"] == len(row["re_caption"].split())
        assert row["org_length"] == len(row["org_caption"].split())
        assert -1 <= row["re_clip_score"] <= 1
        assert len(row["sha256"]) == 64
        assert row["re_finish_reason"] in ("stop", "length")


def test_publishing_the_same_bytes_again_does_nothing(copied_run: Path, tmp_path: Path) -> None:
    first = publish(copied_run, str(tmp_path / "out"), "1.0.0")
    before = {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*")}
    second = publish(copied_run, str(tmp_path / "out"), "1.0.0")
    assert (first.new, second.new) == (True, False)
    assert {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*")} == before


def test_other_bytes_under_a_version_are_refused(copied_run: Path, tmp_path: Path) -> None:
    publish(copied_run, str(tmp_path / "out"), "1.0.0")
    before = tree(tmp_path / "out")
    recipe = copied_run / "recipe.json"
    recipe.write_text(recipe.read_text().replace("recapkit demo", "another title"))
    with pytest.raises(VersionError, match="never changes") as refused:
        publish(copied_run, str(tmp_path / "out"), "1.0.0")
    assert refused.value.hint.endswith("--version 1.0.1")
    assert tree(tmp_path / "out") == before
    publish(copied_run, str(tmp_path / "out"), "1.0.1")
    assert (tmp_path / "out" / "latest").resolve().name == "v1.0.1"
    assert {name: sha for name, sha in tree(tmp_path / "out").items() if name.startswith("v1.0.0/")} == {
        name: sha for name, sha in before.items() if name.startswith("v1.0.0/")
    }


@pytest.mark.parametrize(
    "damage",
    [
        "a byte in the middle",
        "zeros",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("pages", "footer")),
    ],
)
def test_a_damaged_file_of_a_run_is_made_again_by_the_build_that_is_named(
    copied_run: Path, tmp_path: Path, damage: str
) -> None:
    """Publishing again for ever would not mend it."""
    if damage == "zeros":
        publish(copied_run, str(tmp_path / "first"), "1.0.0")  # whose files are other names of the run's
    file = output_of(copied_run, "select")
    whole = file.read_bytes()
    data = bytearray(whole)
    damaged = {
        "a byte in the middle": [len(data) // 2],
        "pages": range(20, 3000),
        "footer": range(len(data) - 600, len(data) - 8),
    }
    for place in damaged.get(damage, ()):
        data[place] ^= 0xFF
    data = bytearray(len(data)) if damage == "zeros" else data
    file.chmod(0o644)
    file.unlink()
    file.write_bytes(data)
    with pytest.raises(
        VersionError, match=r"select/00000/00000\.[0-9a-f]{8}\.parquet no longer has the bytes of its record"
    ) as told:
        publish(copied_run, str(tmp_path / "out"), "1.0.1")
    assert (
        told.value.hint
        == f"make it again, then publish: recap build {copied_run}/recipe.json --run {copied_run}"
    )
    if damage == "zeros":
        with web_of(copied_run):
            recap("build", copied_run / "recipe.json", "--run", copied_run)
        assert file.read_bytes() == whole
        assert publish(copied_run, str(tmp_path / "out"), "1.0.1").new
    else:
        assert not record_of(copied_run, "select").exists()


def test_what_is_wrong_with_the_target_does_not_cost_hashing_the_run(
    copied_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builder.versions.publish._damaged", lambda *_: pytest.fail("the run was hashed"))
    (tmp_path / "out" / "latest").mkdir(parents=True)
    with pytest.raises(InputError, match="no link to a version"):
        publish(copied_run, str(tmp_path / "out"), "1.0.0")
    (tmp_path / "file").write_text("somebody's")
    with pytest.raises(OSError, match="file"):
        publish(copied_run, str(tmp_path / "file"), "1.0.0")


def test_a_target_without_a_name_is_refused(copied_run: Path) -> None:
    with pytest.raises(InputError, match="the target has no name"):
        publish(copied_run, "", "1.0.0")


@pytest.mark.parametrize(
    "version", ["01.2.3", "1.02.3", "1.2", "v1.2.3", "1.2.3.4", " 1.2.3", "1.2.3\n", "١.2.3", ""]
)
def test_what_is_no_version_is_refused(copied_run: Path, tmp_path: Path, version: str) -> None:
    with pytest.raises(VersionError, match="is not a version"):
        publish(copied_run, str(tmp_path / "out"), version)


def test_a_dry_run_publishes_nothing(copied_run: Path, tmp_path: Path) -> None:
    assert not publish(copied_run, str(tmp_path / "out"), "1.0.0", dry_run=True).new
    assert list((tmp_path / "out").glob("[!.]*")) == []


def test_what_was_staged_and_changed_since_is_staged_again(copied_run: Path, tmp_path: Path) -> None:
    publish(copied_run, str(tmp_path / "out"), "1.0.0", dry_run=True)
    readme = copied_run / "versions" / "v1.0.0" / "README.md"
    card = readme.read_text()
    readme.write_text(card.replace("e", "a"))
    publish(copied_run, str(tmp_path / "out"), "1.0.0")
    assert (tmp_path / "out" / "v1.0.0" / "README.md").read_text() == card
    (tmp_path / "out" / "latest").unlink()  # as after a crash just before it
    assert not publish(copied_run, str(tmp_path / "out"), "1.0.0").new
    assert (tmp_path / "out" / "latest").resolve().name == "v1.0.0"


def test_what_was_refused_once_is_not_taken_for_staged(copied_run: Path, tmp_path: Path) -> None:
    """A version of one recipe, then one of another that is refused, then the first again."""
    recipe = copied_run / "recipe.json"
    first = recipe.read_text()
    publish(copied_run, str(tmp_path / "out"), "1.0.0", dry_run=True)
    recipe.write_text(first.replace("recapkit demo", f"hf_{'x' * 34}"))
    with pytest.raises(VersionError, match="secret"):
        publish(copied_run, str(tmp_path / "out"), "1.0.0")
    recipe.write_text(first)
    published = Path(publish(copied_run, str(tmp_path / "out"), "1.0.0").place)
    assert "hf_x" not in (published / "README.md").read_text()


def test_an_unfinished_run_is_refused(copied_run: Path, tmp_path: Path) -> None:
    record_of(copied_run, "score", 1).unlink()
    with pytest.raises(InputError, match=r"not complete: 1 score shards, 1 select shards"):
        publish(copied_run, str(tmp_path / "out"), "1.0.0")


@pytest.mark.parametrize("version_name", ["1.0", "v1.0.0", "1.0.0/../..", ""])
def test_a_version_is_three_numbers(copied_run: Path, tmp_path: Path, version_name: str) -> None:
    with pytest.raises(VersionError, match="not a version"):
        publish(copied_run, str(tmp_path / "out"), version_name)


def test_verify_finds_a_changed_byte(version: Path, tmp_path: Path) -> None:
    shutil.copytree(version, tmp_path / "v")
    assert verify(str(tmp_path / "v"))["problems"] == []
    file = next((tmp_path / "v" / "ledger").glob("*.parquet"))
    file.chmod(0o644)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    (problem,) = verify(str(tmp_path / "v"))["problems"]
    assert re.match(rf"ledger/{file.name} has {len(data)} bytes and sha256 ", problem)


def test_verify_tells_of_what_it_cannot_read(version: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(version, tmp_path / "v"))
    (place / "README.md").unlink()
    file = next((place / "data").glob("train-*.parquet"))
    file.chmod(0o644)
    data = file.read_bytes()
    file.write_bytes(data[:-40] + bytes(32) + data[-8:])  # the footer
    missing, damaged = verify(str(place))["problems"]
    assert missing == "README.md is missing"
    assert damaged.startswith(f"data/{file.name} has ")
    (place / "recipe.json").unlink()
    with pytest.raises(InputError, match=r"is missing|cannot be used|not a recipe"):
        verify(str(place))


def test_a_place_may_be_relative(version: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(version.parent, tmp_path / "out", symlinks=True)
    monkeypatch.chdir(tmp_path)
    for place in ("out", "out@v0.1.0", "out/v0.1.0", "out/v0.1.0/", f"{tmp_path}/out/v0.1.0/"):
        assert verify(place)["problems"] == [], place
    uid = pq.read_table(next((version / "data").glob("train-*.parquet")))["uid"][0].as_py()
    Path("uids.txt").write_text(f"\ufeff{uid.upper()}\n\n")
    said = recap_here("remove", "out", "--uids", "uids.txt", "--version", "0.1.1", "--dry-run").stdout
    assert "1 rows would be removed" in said
    assert "Older versions" not in said
    for arguments in (
        ["out", "--version", "0.2"],
        ["out@v0.0.9", "--version", "0.1.2"],
    ):
        assert "version" in recap_here("remove", *arguments, "--uids", "uids.txt", check=2).stderr
    assert (
        "cannot be read"
        in recap_here("remove", "out", "--version", "0.1.2", "--uids", "none.txt", check=2).stderr
    )


def test_published_files_name_no_place_on_this_machine(version: Path, demo_run: Path) -> None:
    for path in version.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".md"):
            assert str(demo_run.parent) not in path.read_text()
            assert str(ROOT) not in path.read_text()


def test_hostile_captions_cannot_break_the_card(copied_run: Path) -> None:
    """The first row's caption tries to end its block and start markup."""
    from builder.versions.publish import preview_card

    file = output_of(copied_run, "select")
    rows = pq.read_table(file).to_pylist()
    rows[0]["org_caption"] = "```\n</code>\n# <script>alert(1)</script>\n---\nlicense: mine\n---"
    import pyarrow as pa

    file.chmod(0o644)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), file)
    record = json.loads(record_of(copied_run, "select").read_text())
    record["bytes"][str(file.relative_to(copied_run))] = file.stat().st_size
    record_of(copied_run, "select").write_text(json.dumps(record))
    text = Path(preview_card(copied_run)).read_text()
    lines = [line for line in text.splitlines() if "<script>" in line or "license: mine" in line]
    assert lines
    assert all(line.startswith("    ") for line in lines)


@pytest.mark.slow
def test_a_killed_publish_leaves_nothing_visible_and_the_next_one_finishes(
    copied_run: Path, tmp_path: Path
) -> None:
    """kill -9 at some moments of a publish: no version, or the whole one."""
    expected = tree(Path(publish(copied_run, str(tmp_path / "expected"), "1.0.0").place))
    command = [
        sys.executable,
        "-m",
        "builder.cli",
        "publish",
        str(copied_run),
        str(tmp_path / "out"),
        "--version",
        "1.0.0",
    ]
    final = tmp_path / "out" / "v1.0.0"
    start = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    seconds = time.monotonic() - start
    shutil.rmtree(tmp_path / "out")
    for k in (0, 2, 4):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds * (0.4 + 0.1 * k))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if final.exists():
            assert tree(final) == expected
    recap(*command[3:])
    assert tree(final) == expected
    assert list((tmp_path / "out").glob(".staging*")) == []
    assert LEDGER.names == pq.read_schema(next((final / "ledger").glob("*.parquet"))).names


@pytest.mark.parametrize(
    "kib_left", [0, pytest.param(8, marks=pytest.mark.slow), 60, pytest.param(100, marks=pytest.mark.slow)]
)
def test_a_full_disk_is_told_and_the_same_command_goes_on(
    demo_run: Path, tmp_path: Path, kib_left: int
) -> None:
    expected = tree(demo_run.with_name("demo-published") / "v0.1.0")
    with mounted(tmp_path / "disk", mib=24) as disk:
        run = Path(shutil.copytree(demo_run, disk / "run", ignore=shutil.ignore_patterns("versions")))
        (run / "versions").mkdir()
        ballast = fill(disk, kib_left)
        with pytest.raises(InputError, match=r"the disk of .* is full\n.*type the same command again"):
            publish(run, str(disk / "out"), "0.1.0")
        ballast.unlink()
        publish(run, str(disk / "out"), "0.1.0")
        assert tree(disk / "out" / "v0.1.0") == expected
