"""dedup: one image behind too many URLs is no picture of what any of its captions says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from builder import tombstones
from builder.commit import commit
from builder.core import Task, write_parquet
from builder.stages.dedup import Dedup
from builder.stages.download import SCHEMA
from builder.versions.folder import Folder
from builder.versions.targets import removed_from

Row = dict[str, Any]


def image(sha256: str, *urls: str, status: str = "ok") -> list[Row]:
    """Rows of a download: one image, served under these URLs."""
    return [
        {
            "url": url,
            "status": status,
            "image_sha256": sha256,
            "error": None if status == "ok" else f"why {status}",
        }
        for url in urls
    ]


def urls(name: str, number: int) -> list[str]:
    return [f"http://{name}.example/{n}.jpg" for n in range(number)]


def dedup(run: Path, shards: Sequence[list[Row]], **settings: Any) -> list[pa.Table]:
    """Survey and every shard, as a build does them; uids are `<shard>-<row>`."""
    stage, inputs = Dedup(**settings), {}
    for folder in ("download", "dedup"):
        (run / folder).mkdir(parents=True)
    for number, rows in enumerate(shards):
        rows = [{"uid": f"{number}-{n}"} | row for n, row in enumerate(rows)]
        write_parquet(pa.Table.from_pylist(rows, SCHEMA), run / "download" / f"{number:05d}.parquet")
        inputs[f"download/{number:05d}.parquet"] = ""
    survey = Task(run, "dedup", "survey", "", inputs)
    outputs = commit(stage, survey, stage.survey(survey), 0).outputs
    tables = []
    with stage.open() as work:
        for number in range(len(shards)):
            name = f"download/{number:05d}.parquet"
            task = Task(run, "dedup", f"{number:05d}", "", {name: "", **outputs})
            counts = work(task)
            tables.append(pq.read_table(task.output()))
            assert counts == Counter(tables[-1]["status"].to_pylist())
    return tables


def statuses(tables: list[pa.Table]) -> list[list[str]]:
    return [table["status"].to_pylist() for table in tables]


def test_an_image_goes_from_one_url_more_than_max_urls(tmp_path: Path) -> None:
    rows = [
        *image("photo", *urls("a", 5)),
        *image("placeholder", *urls("b", 6)),
        *image("other", *urls("c", 1)),
    ]
    (table,) = dedup(tmp_path, [rows], max_urls=5)
    assert table["status"].to_pylist() == ["ok"] * 5 + ["duplicate_image"] * 6 + ["ok"]
    assert table["error"].to_pylist() == [None] * 5 + ["one image behind 6 URLs"] * 6 + [None]


def test_max_urls_of_one_keeps_images_with_a_single_url(tmp_path: Path) -> None:
    assert statuses(dedup(tmp_path, [image("x", *urls("a", 1)) + image("y", *urls("b", 2))], max_urls=1)) == [
        ["ok", "duplicate_image", "duplicate_image"]
    ]


def test_rows_of_one_url_count_once(tmp_path: Path) -> None:
    """Metadata names one popular photo many times; that makes it no placeholder."""
    often = urls("a", 1) * 20
    assert statuses(dedup(tmp_path, [image("photo", *often, *urls("b", 4))], max_urls=5)) == [["ok"] * 24]


def test_rows_of_one_url_go_together(tmp_path: Path) -> None:
    """All rows of a placeholder go, those that repeat a URL too."""
    assert statuses(dedup(tmp_path, [image("x", *urls("a", 3), *urls("a", 3))], max_urls=2)) == [
        ["duplicate_image"] * 6
    ]


def test_only_rows_that_are_ok_count_and_change(tmp_path: Path) -> None:
    """Another image than the metadata's, or one that could not be decoded, also has a hash."""
    failed = image("x", *urls("a", 9), status="hash_mismatch") + image(
        "y", *urls("b", 9), status="undecodable"
    )
    dead = [{"url": url, "status": "dead_link", "error": "HTTP 404"} for url in urls("c", 9)]
    rows = [*failed, *image("x", *urls("d", 2)), *dead, *image("y", *urls("e", 3))]
    (table,) = dedup(tmp_path, [rows], max_urls=2)
    before = [row["status"] for row in rows]
    assert table["status"].to_pylist() == before[:-3] + ["duplicate_image"] * 3
    assert table["error"].to_pylist()[:-3] == [row["error"] for row in rows[:-3]]


def test_urls_are_counted_over_the_whole_run(tmp_path: Path) -> None:
    """Two URLs in each of three shards are six."""
    shards = [
        image("x", f"http://{n}/1", f"http://{n}/2") + image("y", f"http://{n}/3", "http://shared/")
        for n in range(3)
    ]
    assert (
        statuses(dedup(tmp_path, shards, max_urls=5))
        == [["duplicate_image", "duplicate_image", "ok", "ok"]] * 3
    )


def test_every_row_stays_in_its_place(tmp_path: Path) -> None:
    """More rows than DuckDB and parquet put in one batch, every third a placeholder."""
    rows = [
        row
        for n in range(4000)
        for row in image("x", f"http://x/{n}")
        + image(f"y{n}", f"http://y/{n}")
        + image(f"z{n}", f"http://z/{n}")
    ]
    (table,) = dedup(tmp_path, [rows])
    assert table.column_names == ["uid", "status", "error"]
    assert table["uid"].to_pylist() == [f"0-{n}" for n in range(12_000)]
    assert table["status"].to_pylist() == ["duplicate_image", "ok", "ok"] * 4000


def test_the_same_rows_are_the_same_bytes(tmp_path: Path) -> None:
    shards = [
        image("x", *urls("a", 7)) + image(f"y{n}", *urls(f"b{n}", 2)) + image(f"z{n}", *urls(f"c{n}", 9))
        for n in range(3)
    ]
    for name in ("first", "second"):
        dedup(tmp_path / name, shards)
    for part in ("survey.parquet", ".00000.parquet.part", ".00001.parquet.part", ".00002.parquet.part"):
        assert (tmp_path / "first" / "dedup" / part).read_bytes() == (
            tmp_path / "second" / "dedup" / part
        ).read_bytes()


def test_a_run_in_which_nothing_was_downloaded(tmp_path: Path) -> None:
    dead = [{"url": url, "status": "dead_link", "error": "HTTP 404"} for url in urls("a", 9)]
    assert statuses(dedup(tmp_path, [dead, []])) == [["dead_link"] * 9, []]


def test_a_run_directory_may_have_any_name(tmp_path: Path) -> None:
    """Brackets and stars mean something to DuckDB, not to whoever names a directory."""
    assert statuses(dedup(tmp_path / "it's run [1] * ?", [image("x", *urls("a", 6))])) == [
        ["duplicate_image"] * 6
    ]


@pytest.mark.parametrize(
    ("named", "row"),
    [({"domain": [".Example.com"]}, {"url": "http://A.example.COM./x.jpg"}), ({"uid": ["AB-1"]}, {"uid": "ab-1", "url": None}),
     ({"sha256": ["ABC"]}, {"url": None, "image_sha256": "abc"})],
)  # fmt: skip
def test_a_tombstone_names_rows_however_they_are_written(
    tmp_path: Path, named: dict[str, list[str]], row: dict[str, str | None]
) -> None:
    tombstones.write(tombstones.table(named), tmp_path / "tombstones.parquet")
    rows = [{"status": "ok", **row}, *image("x", "http://example.org/example.com")]
    assert statuses(dedup(tmp_path, [rows], tombstones=str(tmp_path / "tombstones.parquet"))) == [
        ["removed", "ok"]
    ]


def test_a_version_without_tombstones_has_none(tmp_path: Path) -> None:
    """As published before there were any: the next version goes on top of it."""
    (tmp_path / "v0.1.0").mkdir()
    none = {"train": 0, "preview": 0, "ledger": 0}
    manifest = {"name": "old", "version": "0.1.0", "rows": none, "bytes": none, "files": {}}
    (tmp_path / "v0.1.0" / "manifest.json").write_text(json.dumps(manifest))
    assert removed_from(Folder(tmp_path), "0.2.0").num_rows == 0
