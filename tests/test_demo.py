"""`recap demo`, as a newcomer meets it, and the commands that it names."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import recap, recap_here

from builder.run import Run

STATUS = {  # fault -> status with verification, as the demo's web plants them
    "ok": {"ok"}, "flaky": {"ok"}, "redirect": {"ok"}, "gone": {"dead_link"}, "slow": {"timeout"},
    "private": {"blocked"}, "noai": {"opted_out"}, "placeholder": {"hash_mismatch"},
    "changed": {"hash_mismatch"}, "html": {"undecodable"}, "empty": {"undecodable"},
    "truncated": {"undecodable"}, "bomb": {"too_large"},
}  # fmt: skip


def test_the_demo_shows_a_row_the_statistics_and_what_to_type_next(demo_run: Path) -> None:
    said = (demo_run.parent / "stdout.txt").read_text()
    for expected in (
        "url             http://127.0.0.1:8651/",
        "re_caption ",
        "words, mean",
        "dead_link",
        "What to type next",
        "recap sql",
    ):
        assert expected in said


def test_every_row_has_the_status_of_its_fault(demo_run: Path) -> None:
    truth = json.loads((demo_run.with_name("demo-web-240-8651") / "truth.json").read_text())
    ledger = pq.read_table(demo_run.with_name("demo-published") / "latest" / "ledger").to_pylist()
    assert [row["uid"] for row in ledger if row["status"] not in STATUS[truth[row["uid"]]["fault"]]] == []
    assert {row["uid"] for row in ledger} == set(truth)


def test_recaptions_are_nearer_to_the_images_than_the_originals(demo_run: Path) -> None:
    """The papers' point, on the demo's data."""
    rows = json.loads((demo_run.with_name("demo-published") / "latest" / "stats.json").read_text())[
        "cosines"
    ]["rows"]
    mean = {row["caption"]: row["cosine_mean"] for row in rows}
    assert mean["re_caption"] > mean["org_caption"]


def test_counts_by_status_add_up_at_every_stage(demo_run: Path) -> None:
    for stage in json.loads(recap_here("status", demo_run, "--json").stdout):
        assert sum(stage["rows"].values()) == 240, stage
        assert stage["shards_left"] == 0


def test_a_second_build_does_nothing(demo_run: Path) -> None:
    site = Path(Run.open(demo_run).source.files).parent
    done = recap("build", "demo", f"web={site}", "--run", demo_run, "--json")
    assert json.loads(done.stdout)["done"] == 0


def test_a_changed_setting_redoes_its_stage_and_what_follows(demo_run: Path) -> None:
    site = Path(Run.open(demo_run).source.files).parent
    plan = json.loads(
        recap_here("plan", "demo", f"web={site}", "score.precision=bf16", "--run", demo_run, "--json").stdout
    )
    assert {p["stage"]: p["shards_left"] for p in plan} == {
        "source": 0, "download": 0, "dedup": 0, "re_caption": 0, "score": 2, "select": 1,
    }  # fmt: skip


def test_sql_sees_the_views(demo_run: Path) -> None:
    rows = json.loads(recap_here("sql", demo_run, "select count(*) as n from ledger", "--json").stdout)
    assert rows == [{"n": 240}]
    done = recap_here("sql", demo_run, "select nonsense", check=2)
    assert "nonsense" in done.stderr


@pytest.mark.parametrize("place", ["demo", "demo-published/latest"])
def test_stats_of_a_run_and_of_its_version_are_the_same(demo_run: Path, place: str) -> None:
    published = json.loads((demo_run.with_name("demo-published") / "latest" / "stats.json").read_text())
    assert json.loads(recap_here("stats", demo_run.parent / place, "--json").stdout) == published


def test_a_version_comes_back_from_its_own_recipe(demo_run: Path) -> None:
    """The published recipe.json is accepted for a name; only places of the other machine must be named."""
    recipe = demo_run.with_name("demo-published") / "latest" / "recipe.json"
    site = Path(Run.open(demo_run).source.files).parent
    plan = json.loads(
        recap_here("plan", recipe, f"source.files={site}/metadata", "--run", demo_run, "--json").stdout
    )
    assert [p["shards_left"] for p in plan] == [0] * 6
