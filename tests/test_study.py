"""A study, reduced: what it trains, what it does not train again, what it says."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from test_data import published_in

from builder.errors import InputError
from recipes import study
from recipes.clip import table3, table4
from recipes.demo import demo
from recipes.dit import table7
from recipes.evaluate import results
from recipes.evaluate.results import Result, metric
from recipes.study import Found


def written(folder: Path, arm: str, seed: int, hits: list[float], protocol: str = "p") -> Path:
    path = folder / arm / str(seed) / "results-b.json"
    result = Result("b", protocol, "m", {"images": len(hits)}, (metric("R@1", hits),), None, "R@1")
    results.write([result], path)
    return path


def test_a_value_is_the_mean_over_seeds_and_a_difference_is_of_the_same_draws(tmp_path: Path) -> None:
    """Two arms whose seeds differ much, and whose difference does not."""
    chance = np.random.default_rng(0)
    paths: dict[str, list[Path]] = {"mixed": [], "originals": []}
    for seed, share in enumerate((0.3, 0.6, 0.9)):
        hits = (chance.random(400) < share).astype(float)
        fewer = hits * (chance.random(400) < 0.8)
        paths["mixed"].append(written(tmp_path, "mixed", seed, hits.tolist()))
        paths["originals"].append(written(tmp_path, "originals", seed, fewer.tolist()))
    found = Found(paths)
    assert found.value("mixed", "b", "R@1").value == pytest.approx(
        np.mean(found.seeds("mixed", "b", "R@1")), abs=0.01
    )
    value, difference = found.value("mixed", "b", "R@1"), found.difference("mixed", "originals", "b", "R@1")
    assert value.high - value.low > 20  # three seeds, far apart
    assert 0 < difference.low < difference.value < difference.high
    assert difference.high - difference.low < value.high - value.low


def test_what_was_not_asked_alike_is_no_comparison(tmp_path: Path) -> None:
    paths = {arm: [written(tmp_path, arm, 0, [1.0, 0.0], arm)] for arm in ("25 steps", "50 steps")}
    with pytest.raises(InputError, match="b was asked as '50 steps', before '25 steps'"):
        Found(paths)


def test_what_was_written_below_a_page_stays(tmp_path: Path) -> None:
    page = tmp_path / "table.md"
    study.write(page, "# One\n")
    page.write_text(page.read_text() + "\n## Remarks\n\nLook at the third row.\n")
    study.write(page, "# Two\n")
    assert page.read_text() == "# Two\n\n## Remarks\n\nLook at the third row.\n"


@pytest.mark.slow
def test_table_3_is_made_and_what_is_done_is_not_done_again(demo_run: Path, tmp_path: Path) -> None:
    given = [
        "--arms", "0.5,1", "--seeds", "1", "--scenes", "200", "--version", str(published_in(demo_run)),
        "--images", str(demo_run), "--out", str(tmp_path / "out"), "--docs", str(tmp_path / "docs"),
    ]  # fmt: skip
    first = CliRunner().invoke(table3.main, [*given, "--samples", "4000"], catch_exceptions=False)
    assert first.exit_code == 0
    text = (tmp_path / "docs" / "table3.md").read_text()
    assert re.search(r"^\| 0\.5 \| \d+\.\d \[", text, re.M)
    assert "| 1 | 69.7 | 57.3 | 37.7 | 84.2 | 63.0 |" in text  # the paper's
    assert "outside the interval" in text
    assert (tmp_path / "docs" / "table3.png").stat().st_size > 10_000
    begun = time.monotonic()
    again = CliRunner().invoke(table3.main, [*given, "--samples", "4000"], catch_exceptions=False)
    assert again.exit_code == 0
    assert time.monotonic() - begun < 10
    CliRunner().invoke(table3.main, [*given, "--samples", "1000"], catch_exceptions=False)
    assert (tmp_path / "docs" / "table3.md").read_text() != text  # not those of 4,000
    of_table_3 = tmp_path / "out" / "samples-1000" / "1" / "0" / "log.jsonl"
    before = of_table_3.stat().st_mtime_ns
    done = CliRunner().invoke(
        table4.main, ["--arms", "N-P-1,N-N-1", *given[2:], "--samples", "1000"], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert of_table_3.stat().st_mtime_ns == before  # towers of two N are table 3's
    text = (tmp_path / "docs" / "table4.md").read_text()
    for line in (r"\| N \| P \| 1 \|", r"\| N \| N \| 1 \|", r"\| N-N-1 less N-P-1 \|"):
        assert re.search(rf"^{line} -?\d+\.\d \[", text, re.M)
    assert "| S | small | none | 60.7 |" in text  # the paper's


@pytest.mark.slow
def test_a_demo_ends_with_what_its_captions_are_worth(
    demo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "SAMPLES", 1024)
    demo._train(published_in(demo_run), demo_run, tmp_path / "demo")
    said = capsys.readouterr().out
    assert re.search(r"T2I R@5 by descriptions: originals only \d+\.\d %, mixed \d+\.\d %", said)
    shutil.rmtree(tmp_path / "demo-clip")


@pytest.mark.slow
def test_table_7_is_made(demo_run: Path, tmp_path: Path) -> None:
    given = [
        "--arms", "0,1", "--seeds", "1", "--scenes", "20", "--version", str(published_in(demo_run)),
        "--images", str(demo_run), "--out", str(tmp_path / "out"), "--docs", str(tmp_path / "docs"),
        "--samples", "1024",
    ]  # fmt: skip
    done = CliRunner().invoke(table7.main, given, catch_exceptions=False)
    assert done.exit_code == 0
    text = (tmp_path / "docs" / "table7.md").read_text()
    assert re.search(r"^\| 0 \| \d+\.\d \[", text, re.M)
    assert "| 1 | 32.5 | 28.9 | 36.2 | 29.3 | 19.9 | 1.4 |" in text  # the paper's
    assert re.search(r"pairs at descriptions: -?\d+\.\d \[.*\]; ahead: \*\*(yes|no)\*\*", text)
    assert (tmp_path / "docs" / "table7.png").stat().st_size > 10_000
