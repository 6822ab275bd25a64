"""DuckDB reads what is named and nothing else, wherever it runs and whatever the names are."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import threading
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import a_version

from analysis import views
from analysis.diff import diff
from builder import sql
from builder.errors import InputError
from builder.places import parts
from builder.stages.select import LEDGER, SCHEMA
from builder.stages.source import Source


@pytest.mark.parametrize(
    "name", ["run[1]", "r*n1", "r?n1", "it's", "a=1", "{run1,x}", "back\\\\slash", "é" * 60]
)
def test_a_path_is_no_pattern(tmp_path: Path, name: str) -> None:
    for folder in (name, "run1"):
        (tmp_path / folder).mkdir()
        pq.write_table(pa.table({"x": [folder]}), tmp_path / folder / "f.parquet")
    with sql.connect() as con:
        found = con.sql(f"from {sql.table(tmp_path / name / 'f.parquet')}")
        assert (found.columns, found.fetchall()) == (["x"], [(name,)])


@pytest.mark.parametrize(
    "statement",
    ["install httpfs", "load httpfs", "set autoload_known_extensions = true", "from 's3://bucket/x.parquet'"],
)
def test_no_extension_is_installed_or_loaded(statement: str) -> None:
    with sql.connect() as con, pytest.raises(duckdb.Error):
        con.execute(statement)


def test_what_does_not_fit_the_memory_goes_where_it_is_said_and_then_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "spill").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    spilled = 0
    with sql.connect(tmp_path / "spill", memory_limit="60MB", threads=2) as con:
        rows = con.sql(
            "select hash(range) as h, repeat('x', 40) as t from range(4000000) order by h"
        ).to_arrow_reader(100_000)
        for _ in rows:
            spilled = max(
                spilled,
                sum(path.stat().st_size for path in (tmp_path / "spill").rglob("*") if path.is_file()),
            )
    assert spilled > 10_000_000
    assert list((tmp_path / "spill").iterdir()) == []
    assert list((tmp_path / "here").iterdir()) == []


def test_what_a_killed_process_spilled_goes_with_the_next_one(tmp_path: Path) -> None:
    (tmp_path / ".duckdb-recap-killed").mkdir()
    (tmp_path / ".duckdb-recap-killed" / "spilled").write_text("rows")
    with sql.connect(tmp_path):
        (at_work,) = tmp_path.iterdir()
        with sql.connect(tmp_path):
            assert at_work.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with sql.connect(tmp_path) as con:
        assert con.sql("select 1").fetchall() == [(1,)]
    assert list(tmp_path.iterdir()) == []


def test_a_signal_ends_a_query(tmp_path: Path) -> None:
    """DuckDB makes a RuntimeError of what the handler raises, which a build would take for a failed shard."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, end)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt), sql.connect(tmp_path) as con:
            con.sql("select sum(hash(a.range)) from range(1000000000) a").fetchall()
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["~", "file:", "~root"])
def test_a_relative_path_is_that_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """DuckDB would read below the home of the user, or from the root."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in (tmp_path / name, tmp_path / "home"):
        folder.mkdir()
        pq.write_table(pa.table({"caption": [folder.name]}), folder / "t.parquet")
    with views.connect(parts(f"{name}/t.parquet")) as con:
        assert con.sql("select text from captions").fetchall() == [(name,)]


def test_values_of_other_types_are_changed_and_nan_is_like_nan(tmp_path: Path) -> None:
    for name, values in (("a", [1, 2]), ("b", ["1", "x"])):
        pq.write_table(
            pa.table({"uid": ["0", "1"], "v": values, "s": [float("nan"), 1.0]}), tmp_path / f"{name}.parquet"
        )
    found = diff(parts(tmp_path / "a.parquet"), parts(tmp_path / "b.parquet"))
    assert (found["changed"], found["means"]) == ({"v": 1}, {})
    pq.write_table(pa.table({"uid": [0, 1], "v": [1, 2]}), tmp_path / "c.parquet")
    with pytest.raises(InputError, match="rows cannot be joined"):
        diff(parts(tmp_path / "a.parquet"), parts(tmp_path / "c.parquet"))


def test_of_a_version_only_what_its_manifest_names_is_read(tmp_path: Path) -> None:
    row = {"uid": "0", "url": "http://h.example/", "org_caption": "a", "re_caption": "b"}
    ledger = pa.Table.from_pylist([{"uid": "0", "url": row["url"], "status": "ok", "error": None}], LEDGER)
    version = a_version(tmp_path / "v", pa.Table.from_pylist([row], SCHEMA), ledger)
    data = version / "data" / "train-00000-of-00001.parquet"
    shutil.copy(data, version / "data" / "train-00001-of-00001.parquet")
    with views.connect(parts(version)) as con:
        assert con.sql("select count(*) from published").fetchall() == [(1,)]
    data.rename(tmp_path / "private.parquet")
    data.symlink_to(tmp_path / "private.parquet")
    with pytest.raises(InputError, match="no regular file of this folder"):
        parts(version)


def test_hidden_files_are_no_tables(tmp_path: Path) -> None:
    pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "a.parquet")
    (tmp_path / "._a.parquet").write_bytes(b"of a file manager")
    assert parts(tmp_path).published == [str(tmp_path / "a.parquet")]
    assert [name for name, *_ in Source(files=str(tmp_path)).find()] == ["a.parquet"]


def test_a_column_name_is_no_sql(tmp_path: Path) -> None:
    name = f"x\"); copy (select 1) to '{tmp_path}/written.csv' --"
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        pq.write_table(
            pa.table({"uid": ["0"], "caption": ["a"], name: [value]}), tmp_path / folder / "t.parquet"
        )
    assert diff(parts(tmp_path / "a"), parts(tmp_path / "b"))["changed"] == {name: 1}
    with views.connect(parts(str(tmp_path / "a"), ["caption"])) as con:
        assert con.sql("select count(*) from captions").fetchall() == [(1,)]
    assert not (tmp_path / "written.csv").exists()
