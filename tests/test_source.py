"""source: whatever the tables, every row comes out once, in order, in one schema, with the text it had."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from builder import index
from builder.commit import commit, working
from builder.core import Recipe
from builder.errors import InputError, RecipeError, ShardError
from builder.executors.work import in_this_process
from builder.run import Run, build
from builder.schedule import Outcome, Schedule
from builder.stages.source import OPTIONAL, SCHEMA, Source
from builder.store import Folder

Row = dict[str, Any]


def here(schedule: Schedule) -> Iterator[Outcome]:
    """An executor without worker processes; what a task raises comes out."""
    while task := schedule.take():
        stage = schedule.stages[task.stage]
        with stage.open() as work, working(schedule.store, task) as at_hand:
            outcome = Outcome(task, commit(schedule.store, stage, at_hand, work(at_hand), 0))
        schedule.done(outcome)
        yield outcome


def shards(place: Path, files: object, **settings: Any) -> list[pa.Table]:
    """The source's shards, as a build makes them."""
    build(Recipe("r", (Source(files=str(files), **settings),)), place, executor=here)
    run = Run.open(place)
    blocks = {f"{n:05d}": block.name for block in run.index.blocks for n in range(block.first, block.last)}
    found = list(run.shards("source"))
    assert [name for name, _ in found] == [f"source/{block}/{shard}" for shard, block in blocks.items()]
    for name, record in found:
        (output,) = record.outputs
        assert output == f"{name}.{record.key[:8]}.parquet"
        assert record.rows == {"ok": pq.read_metadata(run.local(output)).num_rows}
    return [pq.read_table(run.local(name)) for name in run.files("source")]


def rows(run: Path, files: object, **settings: Any) -> list[Row]:
    return [row for table in shards(run, files, **settings) for row in table.to_pylist()]


def datacomp(first: int, number: int) -> pa.Table:
    """A metadata file as DataComp's, with rows `first`, `first + 1` and so on."""
    n = range(first, first + number)
    return pa.table(
        {
            "uid": [f"{k:032x}" for k in n],
            "url": [f"http://h.example/{k}.jpg" for k in n],
            "text": [f"caption {k}" for k in n],
            "original_width": pa.array([100 + k for k in n], pa.int64()),
            "original_height": pa.array([200 + k for k in n], pa.int64()),
            "clip_b32_similarity_score": pa.array([k / 1024 for k in n], pa.float32()),
            "clip_l14_similarity_score": pa.array([k / 2048 for k in n], pa.float32()),
            "face_bboxes": pa.array(
                [[[0.1, 0.2, 0.3, 0.4]] * (k % 3) for k in n], pa.list_(pa.list_(pa.float64()))
            ),
            "sha256": [f"{k:064x}" for k in n],
        }
    )


def write(path: Path, columns: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    """Rows 0 to 46 in four files: of 20 rows in groups of 6, of none, of 1 and of 26."""
    folder = tmp_path / "metadata"
    (folder / "deeper").mkdir(parents=True)
    pq.write_table(datacomp(0, 20), folder / "a.parquet", row_group_size=6)
    pq.write_table(datacomp(20, 0), folder / "b.parquet")
    pq.write_table(datacomp(20, 1), folder / "c.parquet")
    pq.write_table(datacomp(21, 26), folder / "deeper" / "d.parquet", row_group_size=10)
    (folder / "README.md").write_text("not a table")
    return folder


# --- slices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_per_shard", [1, 7, 20, 47, 48, 10_000])
def test_shards_in_order_are_the_files_in_order(tmp_path: Path, metadata: Path, rows_per_shard: int) -> None:
    """Across borders of files and of row groups; all shards but the last are full."""
    tables = shards(tmp_path / "run", metadata, rows_per_shard=rows_per_shard)
    assert [len(table) for table in tables[:-1]] == [rows_per_shard] * (
        47 // rows_per_shard - (47 % rows_per_shard == 0)
    )
    whole, plain = pa.concat_tables(tables), datacomp(0, 47)
    assert whole.schema == SCHEMA
    for ours, theirs in {
        "uid": "uid",
        "url": "url",
        "org_caption": "text",
        **{name: name for name in OPTIONAL},
    }.items():
        assert whole[ours].to_pylist() == plain[theirs].to_pylist(), ours
    assert whole["shard"].to_pylist() == [n // rows_per_shard for n in range(47)]
    assert whole["row"].to_pylist() == [n % rows_per_shard for n in range(47)]
    assert not any(whole["org_caption_repaired"].to_pylist())


@pytest.mark.parametrize("limit", [1, 7, 20, 21, 46, 47, 1000])
def test_a_limit_is_the_first_rows(tmp_path: Path, metadata: Path, limit: int) -> None:
    found = rows(tmp_path / "run", metadata, rows_per_shard=7, limit=limit)
    assert [row["org_caption"] for row in found] == [f"caption {n}" for n in range(min(limit, 47))]


@pytest.mark.parametrize("setting", ["limit", "rows_per_shard"])
@pytest.mark.parametrize("value", [0, -1, -20])
def test_no_rows_at_all_is_a_users_mistake(tmp_path: Path, metadata: Path, setting: str, value: int) -> None:
    with pytest.raises(RecipeError, match=setting):
        shards(tmp_path / "run", metadata, **{setting: value})


def test_a_folder_a_glob_and_a_file(tmp_path: Path, metadata: Path) -> None:
    number = {
        "folder": metadata,
        "glob": metadata / "*.parquet",
        "deep glob": metadata / "**" / "*.parquet",
        "file": metadata / "a.parquet",
    }
    assert {how: len(rows(tmp_path / how, files)) for how, files in number.items()} == {
        "folder": 47,
        "glob": 21,
        "deep glob": 47,
        "file": 20,
    }


def test_a_name_relative_to_where_the_user_is(
    tmp_path: Path, metadata: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(rows(Path("run"), "metadata/*.parquet")) == 21


def test_names_of_files_and_runs_may_hold_any_character(tmp_path: Path) -> None:
    folder = tmp_path / "it's [1] 100% é"
    write(folder / "in" / "it's a [1].parquet", {"url": ["http://h/1"], "caption": ["one"]})
    (folder / "in" / "it's b [2].csv").write_text("url,caption\nhttp://h/2,two\n")
    assert [row["org_caption"] for row in rows(folder / "run", folder / "in")] == ["one", "two"]


def test_a_file_may_have_a_name_that_looks_like_a_glob(tmp_path: Path) -> None:
    write(tmp_path / "in [1].parquet", {"url": ["http://h/1"], "caption": ["one"]})
    assert [row["org_caption"] for row in rows(tmp_path / "run", tmp_path / "in [1].parquet")] == ["one"]


def test_the_same_rows_in_other_shards_have_the_same_content(tmp_path: Path, metadata: Path) -> None:
    few, many = (rows(tmp_path / str(n), metadata, rows_per_shard=n) for n in (5, 40))
    place = {"shard": 0, "row": 0}
    assert [row | place for row in few] == [row | place for row in many]


def files_of(place: Path) -> dict[str, int]:
    """Files of the source's shards, and when they were written."""
    run = Run.open(place)
    return {name: run.local(name).stat().st_mtime_ns for name in run.files("source")}


def numbers(names: Iterable[str]) -> list[int]:
    return sorted(int(name.rpartition("/")[2].partition(".")[0]) for name in names)


def test_a_changed_file_makes_only_its_shards_again(tmp_path: Path, metadata: Path) -> None:
    shards(tmp_path / "run", metadata, rows_per_shard=10)
    before = files_of(tmp_path / "run")
    pq.write_table(
        datacomp(21, 26), metadata / "deeper" / "d.parquet"
    )  # the same rows in one row group: other bytes
    shards(tmp_path / "run", metadata, rows_per_shard=10)
    after = files_of(tmp_path / "run")
    assert numbers(name for name in after if after[name] != before.get(name)) == [2, 3, 4]


# --- batches ------------------------------------------------------------------------------------------------


def captions(tables: Iterable[pa.Table]) -> list[list[int]]:
    """The numbers of the rows of each shard."""
    return [[int(text.split()[1]) for text in table["org_caption"].to_pylist()] for table in tables]


def numbered(*shards: tuple[int, int]) -> list[list[int]]:
    return [[*range(start, stop)] for start, stop in shards]


def test_what_comes_to_the_metadata_begins_a_shard_whatever_its_name(tmp_path: Path, metadata: Path) -> None:
    """And a block. The last shard of before stays as it was, partly filled."""
    place = tmp_path / "run"
    shards(place, metadata, rows_per_shard=20)
    before = files_of(place)
    pq.write_table(datacomp(47, 30), metadata / "a0.parquet")
    tables = shards(place, metadata, rows_per_shard=20)
    assert captions(tables) == numbered((0, 20), (20, 40), (40, 47), (47, 67), (67, 77))
    assert [table["shard"].unique().to_pylist() for table in tables] == [[n] for n in range(5)]
    assert [name.split("/")[1] for name in files_of(place)] == ["00000"] * 3 + ["00001"] * 2
    assert before.items() <= files_of(place).items()
    assert Run.open(place).index.of_batches() == [{"files": 3, "rows": 47}, {"files": 1, "rows": 30}]


def test_a_file_without_rows_is_no_news(tmp_path: Path, metadata: Path) -> None:
    """A second build finds nothing to do."""
    first = shards(tmp_path / "run", metadata, rows_per_shard=20)
    before = files_of(tmp_path / "run")
    assert shards(tmp_path / "run", metadata, rows_per_shard=20) == first
    assert files_of(tmp_path / "run") == before


def test_the_metadata_may_grow_by_a_folder(tmp_path: Path) -> None:
    """As by months: the files of the first keep their rows, though they have another folder in common now."""
    folder, place = tmp_path / "metadata", tmp_path / "run"
    for month, first in (("2026-11", 0), ("2026-12", 30)):
        (folder / month).mkdir(parents=True)
        pq.write_table(datacomp(first, 30), folder / month / "a.parquet")
        before = files_of(place) if place.exists() else {}
        tables = shards(place, folder, rows_per_shard=20)
        assert before.items() <= files_of(place).items()
    assert captions(tables) == numbered((0, 20), (20, 30), (30, 50), (50, 60))


def test_a_text_table_may_come_to_the_metadata_too(tmp_path: Path, metadata: Path) -> None:
    place = tmp_path / "run"
    shards(place, metadata, rows_per_shard=20)
    before = files_of(place)
    (metadata / "0.csv").write_text(
        "url,caption\n" + "".join(f"http://h/{n},caption {n}\n" for n in (47, 48))
    )
    assert captions(shards(place, metadata, rows_per_shard=20))[3:] == [[47, 48]]
    assert before.items() <= files_of(place).items()


def test_a_larger_limit_goes_on_in_the_middle_of_a_file_with_a_shard_of_its_own(
    tmp_path: Path, metadata: Path
) -> None:
    """None at all is all that is left. What was there stays, byte for byte."""
    place, before, expected = tmp_path / "run", dict[str, int](), list[list[int]]()
    for limit, more in (
        (16, numbered((0, 7), (7, 14), (14, 16))),
        (25, numbered((16, 23), (23, 25))),
        (None, numbered((25, 32), (32, 39), (39, 46), (46, 47))),
    ):
        expected += more
        assert captions(shards(place, metadata, rows_per_shard=7, limit=limit)) == expected
        assert before.items() <= files_of(place).items()
        before = files_of(place)


@pytest.mark.parametrize("limit", [1, 15, 16, 17, 24, 25])
def test_a_smaller_limit_is_the_first_rows_and_a_larger_one_after_it_what_was_there(
    tmp_path: Path, metadata: Path, limit: int
) -> None:
    place = tmp_path / "run"
    for larger in (16, 25):
        tables = shards(place, metadata, rows_per_shard=7, limit=larger)
    found = captions(shards(place, metadata, rows_per_shard=7, limit=limit))
    assert [n for shard in found for n in shard] == [*range(limit)]
    assert Run.open(place).index.num_rows() == limit
    assert shards(place, metadata, rows_per_shard=7, limit=25) == tables


def test_a_block_ends_after_its_number_of_shards_and_where_a_batch_does(
    tmp_path: Path, metadata: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "BLOCK", 4)
    place = tmp_path / "run"
    shards(place, metadata, rows_per_shard=9)
    pq.write_table(datacomp(47, 9 * 5), metadata / "e.parquet")
    tables = shards(place, metadata, rows_per_shard=9)
    assert [n for shard in captions(tables) for n in shard] == [*range(92)]
    blocks = [(block.name, block.batch, block.first, block.last) for block in Run.open(place).index.blocks]
    assert blocks == [("00000", 0, 0, 4), ("00001", 0, 4, 6), ("00002", 1, 6, 10), ("00003", 1, 10, 11)]


def test_an_index_that_no_longer_fits_is_made_anew_only_if_it_may(tmp_path: Path, metadata: Path) -> None:
    """It is asked with the reason; while it may not, the index stays as it was."""
    store, asked = Folder(tmp_path / "run"), list[str]()

    def refuse(reason: str, first: int) -> None:
        assert first == 0
        asked.append(reason)
        raise InputError("that would be too much")

    def extended(rows_per_shard: int = 20, **settings: Any) -> Source:
        return Source(files=str(metadata), rows_per_shard=rows_per_shard, **settings)

    first = extended().extend(store, restart=refuse)
    assert [extended(limit=limit).extend(store, restart=refuse).num_rows() for limit in (5, 47)] == [5, 47]
    for other in (extended(10), extended(layout="datacomp")):
        with pytest.raises(InputError, match="that would be too much"):
            other.extend(store, restart=refuse)
    changed, moved = metadata / "deeper" / "d.parquet", metadata / "c.parquet"
    was = changed.read_bytes()
    pq.write_table(datacomp(21, 26), changed)
    with pytest.raises(InputError, match="that would be too much"):
        extended().extend(store, restart=refuse)
    changed.write_bytes(was)
    moved.rename(metadata / "f.parquet")
    with pytest.raises(InputError, match="that would be too much"):
        extended().extend(store, restart=refuse)
    assert [reason.partition(" was ")[0] for reason in asked] == [
        "source.rows_per_shard",
        "source.layout",
        "metadata file deeper/d.parquet is another",
        "metadata file c.parquet is not there any more",
    ]
    assert [index.load(store, "source", None).slices(n) for n in range(3)] == [
        first.slices(n) for n in range(3)
    ]
    anew = extended(10).extend(store, restart=lambda reason, first: asked.append(reason))
    assert (len(anew), len(anew.batches), anew.num_rows(), len(asked)) == (5, 1, 47, 5)


def test_an_appended_file_that_is_mended_costs_no_earlier_row_its_place(
    tmp_path: Path, metadata: Path
) -> None:
    """Its batch is cut anew, and those after it; killed in between, the next build goes on."""
    store, asked = Folder(tmp_path / "run"), list[tuple[str, int]]()
    source = Source(files=str(metadata), rows_per_shard=20)
    first = source.extend(store, restart=pytest.fail)
    for number, name in enumerate(("a0.parquet", "a1.parquet")):
        pq.write_table(datacomp(47 + 30 * number, 30), metadata / name)
        grown = source.extend(store, restart=pytest.fail)
    assert (len(grown), grown.first_shard(1), grown.first_shard(2)) == (7, 3, 5)
    limited = Source(files=str(metadata), rows_per_shard=20, limit=60).extend(store, restart=pytest.fail)
    assert limited.of_batches() == [{"files": 3, "rows": 47}, {"files": 1, "rows": 13}]
    pq.write_table(datacomp(107, 25), metadata / "a0.parquet")

    class Dies(Folder):
        def delete(self, name: str) -> None:
            super().delete(name)
            if name == "source/run/00002.json":
                raise KeyboardInterrupt

    def restart(reason: str, first: int) -> None:
        asked.append((reason, first))

    with pytest.raises(KeyboardInterrupt):
        source.extend(Dies(tmp_path / "run"), restart=restart)
    again = source.extend(store, restart=restart)
    assert asked == [("metadata file a0.parquet is another", 3)] * 2
    assert [again.slices(n) for n in range(3)] == [first.slices(n) for n in range(3)]
    assert again.of_batches() == [{"files": 3, "rows": 47}, {"files": 2, "rows": 55}]


def test_a_shards_inputs_are_slices_of_its_files(tmp_path: Path, metadata: Path) -> None:
    """Of a file that had to be converted, the object with its rows is an input too."""
    (metadata / "e.csv").write_text("url,caption\n" + "".join(f"http://h/{n},c\n" for n in range(5)))
    source = Source(files=str(metadata), rows_per_shard=20)
    found = source.extend(Folder(tmp_path / "run"), restart=pytest.fail)
    hashes = {
        name: hashlib.sha256((metadata / name).read_bytes()).hexdigest()
        for name in ("a.parquet", "c.parquet", "deeper/d.parquet")
    }
    objects, outside = zip(*(source.task_inputs(found.slices(n)) for n in range(3)), strict=True)
    assert objects[:2] == ({}, {})
    assert outside[0] == {"a.parquet[0:20]": hashes["a.parquet"]}
    assert outside[1] == {
        "c.parquet[0:1]": hashes["c.parquet"],
        "deeper/d.parquet[0:19]": hashes["deeper/d.parquet"],
    }
    ((stored, sha256),) = objects[2].items()
    assert hashlib.sha256((tmp_path / "run" / stored).read_bytes()).hexdigest() == sha256
    assert outside[2] == {"deeper/d.parquet[19:26]": hashes["deeper/d.parquet"], f"{stored}[0:5]": sha256}


# --- layouts ------------------------------------------------------------------------------------------------

URLS, CAPTIONS = ["http://h/0.jpg", "http://h/1.jpg", "http://h/2.jpg"], ["a cat", "zwei Hunde", "三只鸟"]
LAYOUTS: dict[str, dict[str, Any]] = {
    "laion": {
        "SAMPLE_ID": [5, 6, 7],
        "URL": URLS,
        "TEXT": CAPTIONS,
        "WIDTH": pa.array([640, None, 10], pa.int32()),
        "HEIGHT": [480, 5, 20],
    },
    "capsfusion": {"image_url": URLS, "laion_2b": CAPTIONS, "laion_coco": ["x"] * 3, "capsfusion": ["y"] * 3},
    "pixelprose": {
        "uid": ["u0", "u1", "u2"],
        "url": URLS,
        "original_caption": CAPTIONS,
        "vlm_caption": ["x"] * 3,
        "sha256": ["a" * 64] * 3,
    },
    "img2dataset": {"url": URLS, "caption": CAPTIONS},
    "datacomp": {"uid": ["u0", "u1", "u2"], "url": URLS, "text": CAPTIONS},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("named", [False, True], ids=["found", "named"])
def test_a_known_layout_is_found_by_its_columns(tmp_path: Path, layout: str, named: bool) -> None:
    write(tmp_path / "in.parquet", LAYOUTS[layout])
    found = rows(tmp_path / "run", tmp_path / "in.parquet", **({"layout": layout} if named else {}))
    assert [(row["url"], row["org_caption"]) for row in found] == list(zip(URLS, CAPTIONS, strict=True))
    if "uid" in LAYOUTS[layout]:
        assert [row["uid"] for row in found] == ["u0", "u1", "u2"]
    if layout == "laion":
        assert [(row["original_width"], row["original_height"]) for row in found] == [
            (640, 480),
            (None, 5),
            (10, 20),
        ]
    if layout == "pixelprose":
        assert found[0]["sha256"] == "a" * 64


@pytest.mark.parametrize("ending", ["csv", "tsv", "csv.gz", "tsv.gz"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_text_table_is_the_same_as_its_parquet(tmp_path: Path, layout: str, ending: str) -> None:
    comma = "," if ending.startswith("csv") else "\t"
    columns = {
        name: column.to_pylist() if isinstance(column, pa.Array) else column
        for name, column in LAYOUTS[layout].items()
    }
    lines = [
        comma.join(columns),
        *(
            comma.join("" if v is None else str(v) for v in line)
            for line in zip(*columns.values(), strict=True)
        ),
    ]
    data = "".join(f"{line}\n" for line in lines).encode()
    (tmp_path / f"in.{ending}").write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    write(tmp_path / "in.parquet", LAYOUTS[layout])
    assert rows(tmp_path / "text", tmp_path / f"in.{ending}") == rows(
        tmp_path / "parquet", tmp_path / "in.parquet"
    )


@pytest.mark.parametrize("number", [1, 2, 1000])
def test_cc3m_is_a_tsv_without_a_header_caption_first(tmp_path: Path, number: int) -> None:
    """Its first line is a row like any other; quotes and number signs are part of a caption."""
    captions = ['a "red" car', "# 1 dad", '"unclosed', "it's 5'11\" tall", "1998", "title, with; commas|bars"]
    lines = [(captions[n % len(captions)], f"https://h/{n}.jpg") for n in range(number)]
    (tmp_path / "Train_GCC-training.tsv").write_text("".join(f"{caption}\t{url}\n" for caption, url in lines))
    found = rows(tmp_path / "run", tmp_path / "Train_GCC-training.tsv", rows_per_shard=300)
    assert [(row["org_caption"], row["url"]) for row in found] == lines


def test_a_csv_keeps_quoted_commas_quotes_and_line_breaks(tmp_path: Path) -> None:
    captions = [
        "a, b",
        'say "hi"',
        "two\nlines",
        "",
        "  spaces  ",
        "semi;colon|bar\ttab",
        "a\0b",
        "NULL",
        "é☃",
    ]
    lines = [
        f'http://h/{n},"{caption.replace(chr(34), chr(34) * 2)}"\n' for n, caption in enumerate(captions)
    ]
    (tmp_path / "in.csv").write_text("url,caption\n" + "".join(lines), newline="")
    found = rows(tmp_path / "run", tmp_path / "in.csv", rows_per_shard=2)
    assert [row["org_caption"] for row in found] == captions
    assert [row["url"] for row in found] == [f"http://h/{n}" for n in range(len(captions))]


def test_text_tables_and_parquet_files_go_together(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", {"url": URLS, "caption": CAPTIONS})
    (tmp_path / "in" / "b.csv").write_text("url,caption\nhttp://h/3.jpg,four\nhttp://h/4.jpg,five\n")
    write(tmp_path / "in" / "c.parquet", {"URL": ["http://h/5.jpg"], "TEXT": ["six"]})
    found = rows(tmp_path / "run", tmp_path / "in", rows_per_shard=4)
    assert [row["org_caption"] for row in found] == [*CAPTIONS, "four", "five", "six"]


def test_named_columns(tmp_path: Path) -> None:
    table = {
        "id": [70, 71, 72],
        "link": URLS,
        "alt": CAPTIONS,
        "url": ["x"] * 3,
        "text": ["y"] * 3,
        "original_width": [1, 2, 3],
    }
    write(tmp_path / "in.parquet", table)
    found = rows(
        tmp_path / "run", tmp_path / "in.parquet", url_column="link", caption_column="alt", uid_column="id"
    )
    assert [(row["uid"], row["url"], row["org_caption"]) for row in found] == list(
        zip(["70", "71", "72"], URLS, CAPTIONS, strict=True)
    )
    assert [row["original_width"] for row in found] == [1, 2, 3]


def test_one_named_column_of_a_known_layout(tmp_path: Path) -> None:
    write(tmp_path / "in.parquet", LAYOUTS["capsfusion"])
    found = rows(tmp_path / "run", tmp_path / "in.parquet", caption_column="capsfusion")
    assert [row["org_caption"] for row in found] == ["y"] * 3


@pytest.mark.parametrize(
    ("columns", "settings", "missing"),
    [
        (["uid", "url", "alt"], {}, "text"),
        (["uid", "text", "x"], {}, "url"),
        (["url", "caption"], {"url_column": "link", "caption_column": "caption"}, "link"),
        (["url", "caption"], {"url_column": "url", "caption_column": "alt"}, "alt"),
        (["url", "caption"], {"uid_column": "id"}, "id"),
        (["url", "caption"], {"layout": "laion"}, "URL"),
    ],
)
def test_a_missing_column_is_named_and_so_are_those_that_are_there(
    tmp_path: Path, columns: list[str], settings: dict[str, str], missing: str
) -> None:
    write(tmp_path / "in.parquet", {name: ["a"] for name in columns})
    with pytest.raises(
        InputError, match=rf"in\.parquet: no column .*'{missing}'.*found: {', '.join(columns)}\n.*url_column="
    ):
        shards(tmp_path / "run", tmp_path / "in.parquet", **settings)


def test_an_unknown_layout_is_a_users_mistake(tmp_path: Path) -> None:
    write(tmp_path / "in.parquet", {"url": URLS, "caption": CAPTIONS})
    with pytest.raises(InputError, match=r"(?s)laoin.*laion"):
        shards(tmp_path / "run", tmp_path / "in.parquet", layout="laoin")


# --- files that cannot be used ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nothing", "nothing/*.parquet", "empty", "*.md", "other.txt"])
def test_no_files_is_said_with_what_to_type(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.md").write_text("x")
    (tmp_path / "other.txt").write_text("x")
    with pytest.raises(InputError, match=r"(?s)no parquet, csv or tsv file at .*metadata="):
        shards(tmp_path / "run", tmp_path / name)


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.tsv"])
def test_tables_without_rows_are_no_input(tmp_path: Path, name: str) -> None:
    if name.endswith("parquet"):
        write(tmp_path / name, {"url": pa.array([], pa.string()), "caption": pa.array([], pa.string())})
    else:
        (tmp_path / name).write_text("url,caption\n" if name == "a.csv" else "url\tcaption\n")
    with pytest.raises(InputError, match="has no rows"):
        shards(tmp_path / "run", tmp_path / name)


def whole_parquet(tmp_path: Path) -> bytes:
    return write(
        tmp_path / "whole.parquet",
        {"url": [f"http://h/{n}" for n in range(3000)], "caption": [f"{n * n:x}" for n in range(3000)]},
    ).read_bytes()


@pytest.mark.parametrize("how", ["empty", "text", "cut off", "footer"])
def test_a_file_that_is_no_parquet_is_named(tmp_path: Path, how: str) -> None:
    whole = whole_parquet(tmp_path)
    damaged = {
        "empty": b"",
        "text": b"<html>not found</html>",
        "cut off": whole[:-100],
        "footer": whole[:-40] + b"\xff" * 32 + whole[-8:],
    }
    (tmp_path / "bad.parquet").write_bytes(damaged[how])
    with pytest.raises(InputError, match=r"bad\.parquet is not a parquet file"):
        shards(tmp_path / "run", tmp_path / "bad.parquet")


def test_a_parquet_with_damaged_pages_is_named(tmp_path: Path) -> None:
    whole = whole_parquet(tmp_path)
    (tmp_path / "bad.parquet").write_bytes(whole[:4] + b"\xff" * 5000 + whole[5004:])
    with pytest.raises(ShardError, match=r"bad\.parquet: column 'url' of row group 0 cannot be read"):
        shards(tmp_path / "run", tmp_path / "bad.parquet")


def test_a_csv_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_bytes(b"url,caption\nhttp://h/1,caf\xe9\n")
    with pytest.raises(
        InputError, match=r"(?s)bad\.csv is not utf-8; it looks like cp1250.*source.encoding=cp1250"
    ):
        shards(tmp_path / "run", tmp_path / "bad.csv")
    assert [
        row["org_caption"] for row in rows(tmp_path / "said", tmp_path / "bad.csv", encoding="cp1250")
    ] == ["café"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("url,caption\n" + "http://h/1,a\n" * 5 + "http://h/9,a,b\nhttp://h/7,c\n", 7),
        ("url,caption\nhttp://h/1,a\nhttp://h/2\n", 3),
        ('url,caption\nhttp://h/1,"two\nlines"\nhttp://h/2,b,c\n', 4),
        ('url,caption\nhttp://h/1,a\nhttp://h/2,"never closed\nhttp://h/3,c\n', 3),
        ('url,caption\nhttp://h/1,"a" b\n', 2),
    ],
)
def test_a_line_of_a_csv_that_is_no_row_is_named(tmp_path: Path, text: str, line: int) -> None:
    """It is neither skipped nor taken for the first row."""
    (tmp_path / "in.csv").write_text(text)
    with pytest.raises(InputError, match=rf"in\.csv, line {line}: "):
        shards(tmp_path / "run", tmp_path / "in.csv")


@pytest.mark.parametrize(
    "text",
    [
        "http://h/1,a\nhttp://h/2,b\n", "a,http://h/1\nb,http://h/2\n", "url,caption\nhttp://h/1,a\nhttp://h/2,b\n",
        "url;caption\nhttp://h/1;a\nhttp://h/2;b\n", "\ufeffurl,caption\r\nhttp://h/1,a\r\n\r\nhttp://h/2,b\r\n",
    ],
)  # fmt: skip
def test_the_url_of_a_csv_is_what_looks_like_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "in.csv").write_text(text, newline="")
    assert [(row["url"], row["org_caption"]) for row in rows(tmp_path / "run", tmp_path / "in.csv")] == [
        ("http://h/1", "a"),
        ("http://h/2", "b"),
    ]


def test_columns_of_a_csv_without_a_header_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("a,http://h/1,x\nb,http://h/2,y\n")
    with pytest.raises(InputError, match=r"(?s)no header, and 3 columns.*url_column=column1"):
        shards(tmp_path / "run", tmp_path / "in.csv")
    given = {"url_column": "column1", "caption_column": "column2"}
    assert [row["org_caption"] for row in rows(tmp_path / "said", tmp_path / "in.csv", **given)] == ["x", "y"]
    (tmp_path / "in.csv").write_text(
        "www.h/1,text,url\nhttp://h/2,y,z\n"
    )  # its first line looks like no row and like a header
    given = {"url_column": "column0", "caption_column": "column1"}
    assert [row["org_caption"] for row in rows(tmp_path / "again", tmp_path / "in.csv", **given)] == [
        "text",
        "y",
    ]


def test_a_table_is_not_blamed_for_what_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("url,caption\nhttp://h/1,a\n")
    name, fs, path = Source(files=str(tmp_path / "in.csv")).find()[0]
    with pytest.raises(OSError, match="No space left"):
        Source(files=path).text_table(name, fs, path).to_parquet("/dev/full")


def test_a_field_that_never_ends_is_told(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text('a,"\n' + "x" * (17 << 20))
    with pytest.raises(InputError, match=r"in\.csv, line 1: field larger"):
        shards(tmp_path / "run", tmp_path / "in.csv")


def test_a_missing_column_is_told_with_the_nearest_names_and_not_with_all(tmp_path: Path) -> None:
    write(
        tmp_path / "in.parquet",
        {"UID": ["0"], "Url": ["http://h/"], "Text": ["a"]} | {f"c{n}": [n] for n in range(500)},
    )
    with pytest.raises(
        InputError, match=r"(?s)'uid' and no column 'url'.* and 483 more.*did you mean (source\.\w+=\w+ ?){3}"
    ):
        shards(tmp_path / "run", tmp_path / "in.parquet")


@pytest.mark.parametrize("kind", ["list", "struct", "twice", "group"])
def test_one_bad_file_costs_its_own_shards(tmp_path: Path, kind: str) -> None:
    """The file and the column are named; it is not tried again, and the other shards are done."""
    folder = tmp_path / "in"
    write(folder / "a.parquet", {"url": URLS, "caption": CAPTIONS})
    write(folder / "c.parquet", {"url": URLS, "caption": CAPTIONS})
    if kind == "group":
        whole = whole_parquet(tmp_path)
        (folder / "b.parquet").write_bytes(whole[:4] + b"\xff" * 5000 + whole[5004:])
    elif kind == "twice":
        pq.write_table(
            pa.table([URLS, CAPTIONS, CAPTIONS], ["url", "caption", "caption"]), folder / "b.parquet"
        )
    else:
        write(
            folder / "b.parquet",
            {"url": [["http://h/"]] if kind == "list" else [{"a": "http://h/"}], "caption": ["a"]},
        )
    outcomes: list[Outcome] = []
    whole_recipe = Recipe("r", (Source(files=str(folder), rows_per_shard=3),))
    result = build(
        whole_recipe,
        tmp_path / "run",
        executor=in_this_process,
        progress=lambda outcome, *_: outcomes.append(outcome),
    )
    bad = {outcome.task.name: outcome for outcome in outcomes if outcome.error}
    assert bad
    assert all("b.parquet: " in outcome.error and outcome.final for outcome in bad.values())
    assert "column" in next(iter(bad.values())).error
    assert "source/00000" in result.done


def test_a_url_is_written_as_it_is_fetched_beside_what_was_found(tmp_path: Path) -> None:
    found = [
        " http://H.example/a",
        "http://h.ex\tample/",
        "http://\uff11\uff12\uff17.0.0.1/",
        "http://b\u00fccher.example/",
        "http://h\x01.example/",
    ]
    write(tmp_path / "in.parquet", {"url": found, "caption": ["a"] * 5})
    table = rows(tmp_path / "run", tmp_path / "in.parquet")
    assert [row["url"] for row in table] == [
        "http://h.example/a", "http://h.example/", "http://127.0.0.1/", "http://xn--bcher-kva.example/", "http://h.example/",
    ]  # fmt: skip
    assert [row["url_found"] for row in table] == found
    assert [row["url_error"] for row in table] == [None] * 4 + ["a control character in the URL"]


def test_numbers_that_are_none_name_their_file_and_column(tmp_path: Path) -> None:
    write(tmp_path / "in.parquet", {"URL": URLS, "TEXT": CAPTIONS, "WIDTH": ["5", "wide", "6"]})
    with pytest.raises(ShardError, match=r"in\.parquet.*WIDTH"):
        shards(tmp_path / "run", tmp_path / "in.parquet")


def test_whole_numbers_that_pandas_wrote_as_floats(tmp_path: Path) -> None:
    """A column of integers with a gap becomes `640.0` in pandas' CSV and NaN in its memory."""
    (tmp_path / "in.csv").write_text("URL,TEXT,WIDTH,HEIGHT\nhttp://h/1,a,640.0,480.0\nhttp://h/2,b,,\n")
    assert [
        (r["original_width"], r["original_height"]) for r in rows(tmp_path / "run", tmp_path / "in.csv")
    ] == [(640, 480), (None, None)]
    write(
        tmp_path / "in.parquet",
        {"URL": URLS, "TEXT": CAPTIONS, "WIDTH": [640.0, float("nan"), 1.0], "HEIGHT": [480.0, None, 1.0]},
    )
    assert [
        (r["original_width"], r["original_height"]) for r in rows(tmp_path / "run2", tmp_path / "in.parquet")
    ] == [
        (640, 480),
        (None, None),
        (1, 1),
    ]


# --- text as found ------------------------------------------------------------------------------------------


def test_long_and_odd_captions_survive(tmp_path: Path) -> None:
    captions = [
        "a\0b",
        "x" * 1_000_000,
        "",
        " ",
        "\ufffd",
        "👩‍👩‍👧",
        "a\u202eb",
        "line\r\nbreak",
        "\\xc2\\xae",
    ]
    write(
        tmp_path / "in.parquet", {"url": [f"http://h/{n}" for n in range(len(captions))], "caption": captions}
    )
    found = rows(tmp_path / "run", tmp_path / "in.parquet")
    assert [row["org_caption"] for row in found] == captions
    assert not any(row["org_caption_repaired"] for row in found)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()], ids=str)
def test_bytes_that_are_no_utf8_are_repaired_and_flagged(tmp_path: Path, kind: pa.DataType) -> None:
    """Each bad byte becomes U+FFFD: a Latin-1 e acute, a lone surrogate in three bytes, a cut character."""
    raw = [b"fine", b"caf\xe9", b"a\xed\xa0\x80b", b"cut \xe2\x98", None, "already \ufffd".encode()]
    array = pa.array(raw, pa.large_binary() if str(kind).startswith("large") else pa.binary()).view(kind)
    write(tmp_path / "in.parquet", {"url": pa.array([f"http://h/{n}" for n in range(6)]), "caption": array})
    found = rows(tmp_path / "run", tmp_path / "in.parquet")
    assert [row["org_caption"] for row in found] == [
        "fine",
        "caf\ufffd",
        "a\ufffd\ufffd\ufffdb",
        "cut \ufffd",
        "",
        "already \ufffd",
    ]
    assert [row["org_caption_repaired"] for row in found] == [False, True, True, True, False, False]


def test_urls_that_are_none_stay_rows(tmp_path: Path) -> None:
    """What becomes of them is the download's to say."""
    array = pa.array([b"http://h/\xff", None, b"", b"not a url"], pa.binary()).view(pa.string())
    write(tmp_path / "in.parquet", {"url": array, "caption": ["a", "b", "c", "d"]})
    assert [row["url"] for row in rows(tmp_path / "run", tmp_path / "in.parquet")] == [
        "http://h/%EF%BF%BD",
        "",
        "",
        "not a url",
    ]


@pytest.mark.parametrize("kind", [pa.string(), pa.null()], ids=str)
def test_a_missing_caption_is_an_empty_one(tmp_path: Path, kind: pa.DataType) -> None:
    write(tmp_path / "in.parquet", {"url": URLS, "caption": pa.array([None] * 3, kind)})
    assert [
        (row["org_caption"], row["org_caption_repaired"])
        for row in rows(tmp_path / "run", tmp_path / "in.parquet")
    ] == [("", False)] * 3


def test_captions_that_are_numbers_or_categories_become_text(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"url": URLS, "caption": [1998, None, 5]})
    write(
        tmp_path / "b.parquet", {"url": URLS, "caption": pa.array(["cat", None, "cat"]).dictionary_encode()}
    )
    assert [row["org_caption"] for row in rows(tmp_path / "run", tmp_path / "*.parquet")] == [
        "1998",
        "",
        "5",
        "cat",
        "",
        "cat",
    ]


# --- uids ---------------------------------------------------------------------------------------------------


def test_derived_uids_come_from_url_and_caption_and_nothing_else(tmp_path: Path) -> None:
    """Not from the file, the place in it, its format or the shards.

    Another crawl of the same pairs has the same uids.
    """
    pairs = list(zip(URLS, CAPTIONS, strict=True))
    expected = {pair: hashlib.sha256("\n".join(pair).encode()).hexdigest()[:32] for pair in pairs}
    write(tmp_path / "one.parquet", {"url": URLS, "caption": CAPTIONS})
    write(tmp_path / "other.parquet", {"URL": URLS[::-1], "TEXT": CAPTIONS[::-1], "WIDTH": [1, 2, 3]})
    (tmp_path / "text.csv").write_text(
        "url,caption\n" + "".join(f"{url},{caption}\n" for url, caption in pairs)
    )
    for number, name in enumerate(("one.parquet", "other.parquet", "text.csv")):
        found = rows(tmp_path / f"run{number}", tmp_path / name, rows_per_shard=1 + number)
        assert {(row["url"], row["org_caption"]): row["uid"] for row in found} == expected
    assert len(set(expected.values())) == 3


def test_rows_without_a_uid_are_a_users_mistake(tmp_path: Path) -> None:
    write(tmp_path / "in.parquet", {"id": ["a", None, "c"], "url": URLS, "caption": CAPTIONS})
    with pytest.raises(ShardError, match=r"in\.parquet: 1 rows have no id; .*uid_column"):
        shards(tmp_path / "run", tmp_path / "in.parquet", uid_column="id")
