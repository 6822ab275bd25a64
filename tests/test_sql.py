"""DuckDB reads what is named and nothing else, wherever it runs and whatever the names are."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis import views
from analysis.diff import diff
from builder import sql


@pytest.mark.parametrize("name", ["run[1]", "r*n1", "r?n1", "it's", "a=1", "{run1,x}", "back\\\\slash", "é" * 60])
def test_a_path_is_no_pattern(tmp_path: Path, name: str) -> None:
    for folder in (name, "run1"):
        (tmp_path / folder).mkdir()
        pq.write_table(pa.table({"x": [folder]}), tmp_path / folder / "f.parquet")
    with sql.connect() as con:
        found = con.sql(f"from {sql.table(tmp_path / name / 'f.parquet')}")
        assert (found.columns, found.fetchall()) == (["x"], [(name,)])


@pytest.mark.parametrize("statement", ["install httpfs", "load httpfs", "set autoload_known_extensions = true", "from 's3://bucket/x.parquet'"])
def test_no_extension_is_installed_or_loaded(statement: str) -> None:
    with sql.connect() as con, pytest.raises(duckdb.Error):
        con.execute(statement)


def test_what_does_not_fit_the_memory_goes_where_it_is_said_and_then_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "spill").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    spilled = 0
    with sql.connect(tmp_path / "spill", memory_limit="60MB", threads=2) as con:
        rows = con.sql("select hash(range) as h, repeat('x', 40) as t from range(4000000) order by h").to_arrow_reader(100_000)
        for _ in rows:
            spilled = max(spilled, sum(path.stat().st_size for path in (tmp_path / "spill").rglob("*") if path.is_file()))
    assert spilled > 10_000_000
    assert list((tmp_path / "spill").iterdir()) == []
    assert list((tmp_path / "here").iterdir()) == []


def test_a_column_name_is_no_sql(tmp_path: Path) -> None:
    name = f"x\"); copy (select 1) to '{tmp_path}/written.csv' --"
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        pq.write_table(pa.table({"uid": ["0"], "caption": ["a"], name: [value]}), tmp_path / folder / "t.parquet")
    assert diff(str(tmp_path / "a"), str(tmp_path / "b"))["changed"] == {name: 1}
    with views.connect(str(tmp_path / "a"), ["caption"]) as con:
        assert con.sql("select count(*) from captions").fetchall() == [(1,)]
    assert not (tmp_path / "written.csv").exists()
