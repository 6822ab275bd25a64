"""The card says what the data say, and is found out when it does not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlcroissant
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import recap, web_of

from builder.select import SCHEMA
from builder.versions import check_card


@pytest.fixture
def version(demo_run: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(demo_run.with_name("demo-published") / "v0.1.0", tmp_path / "v0.1.0"))
    for path in folder.rglob("*"):
        path.chmod(0o755)
    return folder


def test_a_published_card_agrees_with_its_data(version: Path) -> None:
    assert ": 0 numbers" in recap("card", "--check", version).stdout


def test_a_changed_number_in_the_card_is_found(version: Path) -> None:
    readme = version / "README.md"
    readme.write_text(readme.read_text().replace("| words, mean | ", "| words, mean | 9"))
    (problem,) = check_card(str(version))
    assert problem.startswith("README.md, line ")
    assert "| words, mean | 9" in problem
    assert recap("card", "--check", version, check=1).stdout.count("README.md, line") == 1


def test_a_changed_statistic_is_found(version: Path) -> None:
    stats = json.loads((version / "stats.json").read_text())
    stats["lengths"]["rows"][0]["words_mean"] += 1
    stats["residue"]["sha256"] = "0" * 64
    (version / "stats.json").write_text(json.dumps(stats))
    problems = check_card(str(version))
    assert "stats.json: lengths no longer agrees with the data" in problems
    assert "stats.json: residue was made by another query" in problems


def test_changed_rows_and_columns_are_found(version: Path) -> None:
    file = version / "data" / "train-00000-of-00001.parquet"
    table = pq.read_table(file)
    pq.write_table(table.slice(1).drop_columns(["width"]).append_column("width2", table.slice(1)["width"]), file)
    problems = check_card(str(version))
    assert len(problems) == 2
    assert "width2" in problems[1]
    pq.write_table(table.slice(1), file)
    problems = check_card(str(version))
    assert problems[0] == f"published has {table.num_rows - 1:,} rows, the manifest says {table.num_rows:,}"


def test_features_and_splits_match_the_parquet(version: Path) -> None:
    front = yaml.safe_load((version / "README.md").read_text().split("---\n")[1])
    default, ledger = front["dataset_info"]
    names = {"double": "float64", "float": "float32"}
    assert [(f["name"], f["dtype"]) for f in default["features"]] == [(f.name, names.get(str(f.type), str(f.type))) for f in SCHEMA]
    counts = {split["name"]: split["num_examples"] for split in default["splits"]}
    assert counts == {name: pq.read_table(next((version / "data").glob(f"{name}-*"))).num_rows for name in ("train", "preview")}
    assert ledger["splits"][0]["num_examples"] == 240
    assert front["configs"][0]["data_files"][0]["split"] == "preview"


def test_croissant_is_valid_and_reads_the_rows(version: Path) -> None:
    described = mlcroissant.Dataset(jsonld=version / "croissant.json")
    assert "error" not in described.metadata.ctx.issues.report().lower()
    first = next(iter(described.records("train")))
    row = pq.read_table(version / "data" / "train-00000-of-00001.parquet").slice(0, 1).to_pylist()[0]
    assert first["train/re_caption"].decode() == row["re_caption"]
    assert len(list(described.records("ledger"))) == 240


def test_what_the_card_tells_to_type_works(version: Path, demo_run: Path) -> None:
    """Every command and program of it, in the version's folder, the small web being up."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", (version / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert [kind for kind, _ in blocks] == ["python", "sql", "sql", "sh", "python"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "NO_ALBUMENTATIONS_UPDATE": "1"}
    with web_of(demo_run):
        for kind, text in blocks:
            line = {"python": [sys.executable, "-c", text.replace("PATH_OR_REPO", str(version))], "sh": ["bash", "-ec", text],
                    "sql": [sys.executable, "-c", f"import duckdb; print(duckdb.execute({text!r}).fetchall()[:3])"]}[kind]  # fmt: skip
            done = subprocess.run(line, cwd=version, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{text}\n{done.stderr}"
    rows = pq.read_table(next(version.glob("data/train-*"))).num_rows
    assert len(done.stdout.splitlines()) == rows
