"""Captions of every kind in one run: made by one engine, published, shown on card and page."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import recap

from builder import run as runs
from builder.places import look
from builder.run import Run
from cards.explore import explore
from recipes import datasets
from recipes.demo import web

PORT, ROWS = 8667, 60
COLUMNS = (
    "re_caption", "re_caption_condition_diverse_topk", "vec_caption", "vecap_caption", "structured_caption",
)  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("every")
    web.make(place / "web", rows=ROWS, port=PORT)
    with web.serve(place / "web", PORT):
        recipe = datasets.demo(web=str(place / "web"), rows_per_shard=ROWS // 2, every=True)
        result = runs.build(recipe, place / "run")
    assert result.failed == {}
    assert Counter(name.partition("/")[0] for name in result.done)["structured_caption"] == 2
    return place / "run"


def test_all_are_published_and_shown(run: Path, tmp_path: Path) -> None:
    recap("publish", run, tmp_path / "out", "--version", "0.1.0")
    version = tmp_path / "out" / "v0.1.0"
    assert recap("verify", version).returncode == 0
    rows = pq.read_table(version / "data" / "train-00000-of-00001.parquet").to_pylist()
    assert rows
    for row in rows:
        for column in ("re_caption", "re_caption_condition_diverse_topk", "vec_caption", "vecap_caption"):
            assert row[column] or row["org_caption"] == ""
        assert row["re_condition_length"] == len(row["re_caption_condition_diverse_topk"].split())
        assert row["re_demo_score"] in (None, 1, 2, 3, 4, 5)
        assert (row["re_demo_score"] is None) == (row["re_demo_score_defects"] == "missing")
        if row["structured_caption"]:
            assert set(json.loads(row["structured_caption"])) == {"objects", "relations", "text"}
    for column in ("re_condition_clip_score", "vec_caption_clip_score", "vecap_caption_clip_score"):
        assert any(row[column] is not None for row in rows)

    statistics = json.loads((version / "stats.json").read_text())
    defects = statistics["defects"]["rows"]
    assert {row["caption"] for row in defects} >= set(COLUMNS)
    assert {row["caption"] for row in statistics["lengths"]["rows"]} == {"org_caption", *COLUMNS}
    assert {row["caption"] for row in statistics["cosines"]["rows"]} == {"org_caption", *COLUMNS}
    readme = (version / "README.md").read_text()
    assert "Defects by kind and column" in readme
    for column in COLUMNS:
        assert f"`{column}`" in readme

    explore(look(str(version)), tmp_path / "page")
    about = json.loads((tmp_path / "page" / "data.json").read_text())
    captions = {column["name"] for column in about["columns"] if column["role"] == "caption"}
    assert captions == {"org_caption", *COLUMNS}
    told = [(row["caption"], row["defect"], row["kept"]) for row in about["defects"]]
    assert told == [(row["caption"], row["defect"], row["kept"]) for row in defects if row["defect"]]


def test_one_more_column_redoes_none(run: Path) -> None:
    before = {name: record.key for stage in COLUMNS for name, record in Run.open(run).shards(stage)}
    site = run.parent / "web"
    recipe = datasets.demo(web=str(site), rows_per_shard=ROWS // 2, every=True, short=True)
    with web.serve(site, PORT):
        done = runs.build(recipe, run).done
    assert {name.partition("/")[0] for name in done} == {"short_caption", "score", "select"}
    assert before == {name: record.key for stage in COLUMNS for name, record in Run.open(run).shards(stage)}
