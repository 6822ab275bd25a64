"""What the first version of recapkit built and published, kept in first_version/: it is read as it was.

Both were made by the code of 2026-11-25 from 24 rows of the demo's world, in shards of ten, with a second
caption column.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import ROOT, recap_here

from analysis.diff import diff
from builder.core import Recipe
from builder.errors import InputError
from builder.places import look, parts
from builder.run import Run, build, garbage, retry
from builder.status import status
from builder.versions.publish import publish
from builder.versions.remove import remove
from builder.versions.verify import verify

KEPT = ROOT / "tests" / "first_version"


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(KEPT / "run", tmp_path / "run"))


@pytest.fixture
def old_target(tmp_path: Path) -> Path:
    return Path(shutil.copytree(KEPT / "published", tmp_path / "published"))


def test_a_version_is_verified_and_read(old_target: Path) -> None:
    assert verify(f"{old_target}@v0.1.0")["problems"] == []
    rows = json.loads(
        recap_here(
            "sql", f"{old_target}@v0.1.0", "select count(short_caption) as n from published", "--json"
        ).stdout
    )
    assert rows == [{"n": 18}]


def test_rows_are_removed_from_a_version(old_target: Path) -> None:
    data = pq.read_table(old_target / "v0.1.0" / "data" / "train-00000-of-00001.parquet")
    uid = data["uid"][3].as_py()
    assert remove(str(old_target), "0.1.1", {"uid": [uid]}).rows == 1
    assert verify(f"{old_target}@v0.1.1")["problems"] == []
    found = diff(parts(f"{old_target}@v0.1.0"), parts(f"{old_target}@v0.1.1"))
    assert (found["rows"], found["removed"], found["changed"]) == ((18, 17), 1, {})


def test_its_recipe_has_a_stage_for_every_caption_now() -> None:
    recipe = Recipe.from_json((KEPT / "published" / "v0.1.0" / "recipe.json").read_text())
    names = ["source", "download", "dedup", "re_caption", "short_caption", "score", "select"]
    assert [stage.name for stage in recipe.stages] == names
    assert recipe.captions() == ("re_caption", "short_caption")
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_a_run_is_looked_at_and_published(old_run: Path, old_target: Path, tmp_path: Path) -> None:
    """With the very rows that the first version published."""
    table = status(Run.open(old_run))
    names = ["source", "download", "dedup", "caption", "score", "select"]
    assert [row["stage"] for row in table] == names
    assert all(sum(row["rows"].values()) == 24 and not row["shards_left"] for row in table)  # type: ignore[attr-defined]
    assert len(look(old_run).parts.published) == 1
    place = Path(publish(old_run, str(tmp_path / "out"), "0.1.0").place)
    assert verify(str(place))["problems"] == []
    before, after = (
        json.loads((folder / "manifest.json").read_text()) for folder in (old_target / "v0.1.0", place)
    )
    same = [name for name in before["files"] if before["files"][name] == after["files"].get(name)]
    assert {name for name in before["files"] if name.endswith(".parquet")} <= set(same)
    assert recap_here("explore", old_run, "--out", tmp_path / "page").exit_code == 0
    assert len(list((tmp_path / "page" / "thumbs").rglob("*.jpg"))) == 18


def test_a_run_that_was_not_finished_is_not_published(old_run: Path, tmp_path: Path) -> None:
    (old_run / "score" / "00001.json").unlink()
    with pytest.raises(InputError, match="not complete: 1 score shards"):
        publish(old_run, str(tmp_path / "out"), "0.1.0")


def test_a_run_cannot_be_continued_and_says_so(old_run: Path) -> None:
    recipe = Run.open(old_run).recipe
    for attempt in (lambda: build(recipe, old_run), lambda: retry(old_run, ["timeout"])):
        with pytest.raises(InputError, match=r"first version of recapkit and cannot be continued\n.*--run"):
            attempt()
    with pytest.raises(InputError, match="first version"):
        garbage(old_run)
