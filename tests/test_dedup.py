"""One image behind too many URLs is no picture of what any of its captions says.

Told twice: by the metadata's hashes before anything is captioned (dedup asks `claimed`), and by the images
that came (select asks `measured`). Most tests here are of both.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from builder import tombstones
from builder.commit import commit, put_record, records, working
from builder.core import RUN, Object, Question, Recipe, Record, Stage, Task, Work, task_key
from builder.errors import OutdatedError
from builder.executors.work import attempt
from builder.files import write_parquet
from builder.plan import PART
from builder.stages import download, source
from builder.stages.best import Best
from builder.stages.caption import Caption
from builder.stages.dedup import Dedup
from builder.stages.download import Download
from builder.stages.questions import Images
from builder.stages.score import Score
from builder.stages.select import Select
from builder.store import Folder
from builder.versions import folder
from builder.versions.targets import removed_from

Row = dict[str, Any]
SHARDS_A_BLOCK = 2  # here; a run has a thousand


def sha256_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def image(name: str, *urls: str, status: str = "ok") -> list[Row]:
    """Rows of a download: one image, served under these URLs, which the metadata say."""
    return [
        {
            "url": url,
            "status": status,
            "sha256": sha256_of(name),
            "image_sha256": sha256_of(name),
            "error": None if status == "ok" else f"why {status}",
        }
        for url in urls
    ]


def urls(name: str, number: int) -> list[str]:
    return [f"http://{name}.example/{n}.jpg" for n in range(number)]


class Shards:
    """A small run of rows that were not downloaded; uids are `<shard>-<row>`."""

    def __init__(self, place: Path, shards: Sequence[list[Row]]) -> None:
        self.store, self.number = Folder(place), len(shards)
        for number, rows in enumerate(shards):
            rows = [{"uid": f"{number}-{n}"} | row for n, row in enumerate(rows)]
            scored = [
                {"status": row["status"], "error": row.get("error"), "uid": row["uid"], "re_caption": "A."}
                for row in rows
            ]
            text, cosine, cut = pa.string(), pa.float64(), pa.bool_()
            caption = {
                "re_caption": text,
                "re_caption_finish_reason": text,
                "re_caption_num_tokens": pa.int32(),
                "re_caption_defects": text,
                "re_caption_rejected": text,
                "re_caption_blind": pa.bool_(),
            }
            score = {"re_caption_cosine": cosine, "re_caption_cut": cut}
            score |= {"org_caption_cosine": cosine, "org_caption_cut": cut}
            common = dict.fromkeys(("uid", "status", "error"), text)
            self.write("source", number, pa.Table.from_pylist(rows, source.SCHEMA))
            self.write("download", number, pa.Table.from_pylist(rows, download.SCHEMA))
            self.write("re_caption", number, pa.Table.from_pylist(scored, pa.schema(common | caption)))
            self.write("score", number, pa.Table.from_pylist(scored, pa.schema(common | score)))

    def name(self, stage: str, number: int, suffix: str = ".parquet") -> str:
        return f"{stage}/{number // SHARDS_A_BLOCK:05d}/{number:05d}.00000000{suffix}"

    def write(self, stage: str, number: int, table: pa.Table) -> None:
        path = self.store.root / self.name(stage, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(table, path)

    def do(self, stage: Stage, block: int | str, name: str, inputs: dict[str, str]) -> Record:
        """A task done and committed, as a worker does."""
        key = task_key(stage, name, inputs, {}, {})
        task = Task(stage.name, block if isinstance(block, str) else f"{block:05d}", name, key, inputs)
        with stage.open() as work, working(self.store, task) as here:
            return commit(self.store, stage, here, work(here), 0)

    def answer(self, question: Question) -> dict[str, str]:
        """Parts and answer."""
        parts: dict[str, str] = {}
        for block in range(-(-self.number // SHARDS_A_BLOCK)):
            first = block * SHARDS_A_BLOCK
            of_block = range(first, min(first + SHARDS_A_BLOCK, self.number))
            inputs = {self.name(question.of, number): "" for number in of_block}
            parts |= self.do(question, block, PART, inputs).outputs
        return dict(self.do(question, RUN, "00000", parts).outputs)

    def dedup(self, **settings: Any) -> list[pa.Table]:
        """By the metadata's hashes."""
        recipe = Recipe("r", (Download(), Dedup(**settings)))
        stage = recipe.stage("dedup")
        assert [question.name for question in stage.asks()] == ["claimed"]
        answers = {name: sha for question in stage.asks() for name, sha in self.answer(question).items()}
        tables = []
        for number in range(self.number):
            inputs = {self.name(read.partition(".")[0], number): "" for read in stage.reads()}
            record = self.do(stage, number // SHARDS_A_BLOCK, f"{number:05d}", inputs | answers)
            tables.append(pq.read_table(self.store.root / record.output(".parquet")))
            assert record.rows == Counter(tables[-1]["status"].to_pylist())
        return tables

    def select(self, **settings: Any) -> list[pa.Table]:
        """By the images that came, of rows that dedup knew nothing of: the ledger's rows."""
        recipe = Recipe("r", (Dedup(by_metadata=False, **settings), Caption(model="no/model@0"), Select()))
        plain, _, stage = recipe.stages
        assert plain.asks() == ()
        assert [question.name for question in stage.asks()] == ["measured"]
        answers = {name: sha for question in stage.asks() for name, sha in self.answer(question).items()}
        tables = []
        for number in range(self.number):
            record = self.do(
                plain, number // SHARDS_A_BLOCK, f"{number:05d}", {self.name("download", number): ""}
            )
            inputs = {
                self.name(read.partition(".")[0], number): "" for read in stage.reads() if read != "dedup"
            }
            inputs |= record.outputs | answers
            record = self.do(stage, number // SHARDS_A_BLOCK, f"{number:05d}", inputs)
            ledger = pq.read_table(self.store.root / record.output(".ledger.parquet"))
            assert record.rows == Counter(ledger["status"].to_pylist())
            published = pq.read_table(self.store.root / record.output(".parquet"))
            kept = [row["uid"] for row in ledger.to_pylist() if row["status"] == "ok"]
            assert published["uid"].to_pylist() == kept
            tables.append(ledger.select(["uid", "status", "error"]))
        return tables


def dedup(run: Path, shards: Sequence[list[Row]], **settings: Any) -> list[pa.Table]:
    return Shards(run, shards).dedup(**settings)


def select(run: Path, shards: Sequence[list[Row]], **settings: Any) -> list[pa.Table]:
    return Shards(run, shards).select(**settings)


def test_what_seemed_a_placeholder_and_is_none_is_captioned_after_all(tmp_path: Path) -> None:
    """Another download, or another `max_urls`, has taken back what was known early: nothing shows of that."""
    shards = Shards(tmp_path, [image("x", *urls("a", 3)), image("y", *urls("b", 3))])
    name = shards.name("re_caption", 1)
    table = pq.read_table(tmp_path / name)
    early = pa.array(["ok", "duplicate_image", "ok"])
    shards.write("re_caption", 1, table.set_column(table.column_names.index("status"), "status", early))
    put_record(shards.store, "re_caption/00000", "00001", Record(key="as it was", outputs={name: ""}))
    stage = Recipe("r", (Dedup(by_metadata=False), Caption(model="no/model@0"), Select())).stages[2]
    assert [question.max_urls for question in stage.asks() if isinstance(question, Images)] == [5]
    with pytest.raises(OutdatedError) as told:
        shards.select(max_urls=5)
    assert told.value.names == (name,)
    outcome = attempt(shards.store, stage, Task("select", "00000", "00000", "k"), outdated(told.value))
    assert outcome.damaged
    assert outcome.error.startswith(f"{name}: made when more URLs than now seemed to lead to some images")
    assert records(shards.store, "re_caption/00000") == {}
    assert statuses(shards.select(max_urls=2))[1] == ["duplicate_image"] * 3


def test_all_that_was_passed_over_early_is_made_again(tmp_path: Path) -> None:
    """Ratings too, and what is not published, of which something is made that is."""
    shards = Shards(tmp_path, [image("x", *urls("a", 3))])
    stages: tuple[Stage, ...] = (
        Dedup(by_metadata=False),
        Caption(model="no/model@0", name="first"),
        Caption(model="no/model@0", name="second", prompt="Of {first}."),
        Caption(model="no/model@0", prompt="Of {second}."),
        Caption(model="no/model@0", name="aside"),
        Caption(model="no/model@0", name="rating", value="rating", prompt="Rate {org_caption}."),
    )
    stage = Recipe("r", (*stages, Select(captions=()))).stages[-1]
    assert isinstance(stage, Select)
    assert stage.quoted == ("first", "second")
    scored = (Score(name="some", model="no/clip@0"), Best(of=("first", "aside"), by="some", name="best"))
    last = Recipe("r", (*stages, *scored, Select(captions=("best",)))).stages[-1]
    assert isinstance(last, Select)
    assert last.quoted == ("first", "second", "aside")
    passed_over = {
        "uid": [f"0-{n}" for n in range(3)],
        "status": ["duplicate_image"] * 3,
        "error": ["early"] * 3,
    }
    for name in ("first", "second", "re_caption", "rating"):
        nothing = {
            column: pa.nulls(3, pa.string()) for column in (name, f"{name}_defects", f"{name}_rejected")
        }
        shards.write(name, 0, pa.table(passed_over | nothing))
    inputs = {shards.name(read.partition(".")[0], 0): "" for read in stage.reads() if read != "dedup"}
    inputs |= shards.do(Recipe("r", stages).stages[0], 0, "00000", {shards.name("download", 0): ""}).outputs
    for question in stage.asks():
        inputs |= shards.answer(question)
    with pytest.raises(OutdatedError) as told:
        shards.do(stage, 0, "00000", inputs)
    names = [name.partition("/")[0] for name in told.value.names]
    assert names == ["re_caption", "rating", "first", "second"]


@pytest.mark.parametrize("name", ["urls", "position", "scored", "placeholders", "joined", "shards"])
def test_a_caption_may_have_any_name_that_nobody_has(tmp_path: Path, name: str) -> None:
    shards = Shards(tmp_path, [image("x", *urls("a", 3)) + image("y", *urls("b", 1))])
    captions = pa.table({
        "uid": [f"0-{n}" for n in range(4)], "status": ["ok"] * 4, "error": pa.nulls(4, pa.string()),
        name: [f"caption {n}" for n in range(4)], f"{name}_finish_reason": ["stop"] * 4,
        f"{name}_num_tokens": pa.array([2] * 4, pa.int32()), f"{name}_defects": pa.nulls(4, pa.string()),
        f"{name}_rejected": pa.nulls(4, pa.string()), f"{name}_blind": pa.nulls(4, pa.bool_()),
    })  # fmt: skip
    shards.write(name, 0, captions)
    stages = (Dedup(by_metadata=False), *(Caption(model="no/model@0", name=n) for n in ("re_caption", name)))
    _, _, _, stage = Recipe("r", (*stages, Select())).stages
    inputs = {shards.name(read.partition(".")[0], 0): "" for read in stage.reads() if read != "dedup"}
    inputs |= shards.do(Recipe("r", stages).stages[0], 0, "00000", {shards.name("download", 0): ""}).outputs
    for question in stage.asks():
        inputs |= shards.answer(question)
    record = shards.do(stage, 0, "00000", inputs)
    published = pq.read_table(shards.store.root / record.output(".parquet"))
    assert published[name].to_pylist() == [f"caption {n}" for n in range(4)]


def outdated(error: OutdatedError) -> Work:
    def work(task: Task) -> dict[str, int]:
        raise error

    return work


Told = Callable[..., list[pa.Table]]
both = pytest.mark.parametrize("told", [dedup, select])


def statuses(tables: list[pa.Table]) -> list[list[str]]:
    return [table["status"].to_pylist() for table in tables]


@both
def test_an_image_goes_from_one_url_more_than_max_urls(told: Told, tmp_path: Path) -> None:
    rows = [
        *image("photo", *urls("a", 5)),
        *image("placeholder", *urls("b", 6)),
        *image("other", *urls("c", 1)),
    ]
    (table,) = told(tmp_path, [rows], max_urls=5)
    assert table["status"].to_pylist() == ["ok"] * 5 + ["duplicate_image"] * 6 + ["ok"]
    assert table["error"].to_pylist() == [None] * 5 + ["one image behind 6 URLs"] * 6 + [None]


@both
def test_max_urls_of_one_keeps_images_with_a_single_url(told: Told, tmp_path: Path) -> None:
    assert statuses(told(tmp_path, [image("x", *urls("a", 1)) + image("y", *urls("b", 2))], max_urls=1)) == [
        ["ok", "duplicate_image", "duplicate_image"]
    ]


@both
def test_rows_of_one_url_count_once(told: Told, tmp_path: Path) -> None:
    """Metadata names one popular photo many times; that makes it no placeholder."""
    often = urls("a", 1) * 20
    assert statuses(told(tmp_path, [image("photo", *often, *urls("b", 4))], max_urls=5)) == [["ok"] * 24]


@both
def test_rows_of_one_url_go_together(told: Told, tmp_path: Path) -> None:
    """All rows of a placeholder go, those that repeat a URL too."""
    assert statuses(told(tmp_path, [image("x", *urls("a", 3), *urls("a", 3))], max_urls=2)) == [
        ["duplicate_image"] * 6
    ]


def of_every_status() -> list[Row]:
    """Another image than the metadata's, or one that could not be decoded, also has a hash."""
    failed = image("x", *urls("a", 9), status="hash_mismatch") + image(
        "y", *urls("b", 9), status="undecodable"
    )
    for row in failed:
        row["sha256"] = None
    dead = [{"url": url, "status": "dead_link", "error": "HTTP 404"} for url in urls("c", 9)]
    return [*failed, *image("x", *urls("d", 2)), *dead, *image("y", *urls("e", 3))]


@both
def test_only_rows_that_are_ok_count_and_change(told: Told, tmp_path: Path) -> None:
    rows = of_every_status()
    (table,) = told(tmp_path, [rows], max_urls=2)
    before = [row["status"] for row in rows]
    assert table["status"].to_pylist() == before[:-3] + ["duplicate_image"] * 3
    assert table["error"].to_pylist()[:-3] == [row["error"] for row in rows[:-3]]


def test_what_the_metadata_claim_counts_whatever_came(tmp_path: Path) -> None:
    """Known before the download. A row that did not come keeps its reason."""
    dead = [
        {"url": url, "status": "dead_link", "error": "HTTP 404", "sha256": sha256_of("x")}
        for url in urls("a", 5)
    ]
    rows = [*dead, *image("x", *urls("b", 1))]
    (table,) = dedup(tmp_path / "claimed", [rows], max_urls=5)
    assert table["status"].to_pylist() == ["dead_link"] * 5 + ["duplicate_image"]
    assert table["error"].to_pylist() == ["HTTP 404"] * 5 + ["one image behind 6 URLs"]
    (table,) = select(tmp_path / "measured", [rows], max_urls=5)
    assert table["status"].to_pylist() == ["dead_link"] * 5 + ["ok"]


@both
@pytest.mark.parametrize("hash_", ["", "0x", "g" * 64, "0" * 63, "0" * 65, "'", "\x00", None])
def test_what_is_no_sha256_is_no_image(told: Told, tmp_path: Path, hash_: str | None) -> None:
    """Metadata come from anybody."""
    rows = image("x", *urls("a", 9))
    for row in rows:
        row["sha256"] = row["image_sha256"] = hash_
    assert statuses(told(tmp_path, [rows])) == [["ok"] * 9]


@both
def test_urls_are_counted_over_the_whole_run(told: Told, tmp_path: Path) -> None:
    """Two URLs in each of three shards are six."""
    shards = [
        image("x", f"http://{n}/1", f"http://{n}/2") + image("y", f"http://{n}/3", "http://shared/")
        for n in range(3)  # in two blocks
    ]
    assert (
        statuses(told(tmp_path, shards, max_urls=5))
        == [["duplicate_image", "duplicate_image", "ok", "ok"]] * 3
    )


@both
def test_every_row_stays_in_its_place(told: Told, tmp_path: Path) -> None:
    """More rows than DuckDB and parquet put in one batch, every third a placeholder."""
    rows = [
        row
        for n in range(4000)
        for row in image("x", f"http://x/{n}")
        + image(f"y{n}", f"http://y/{n}")
        + image(f"z{n}", f"http://z/{n}")
    ]
    (table,) = told(tmp_path, [rows])
    assert table.column_names == ["uid", "status", "error"]
    assert table["uid"].to_pylist() == [f"0-{n}" for n in range(12_000)]
    assert table["status"].to_pylist() == ["duplicate_image", "ok", "ok"] * 4000


def test_the_same_rows_are_the_same_bytes(tmp_path: Path) -> None:
    shards = [
        image("x", *urls("a", 7)) + image(f"y{n}", *urls(f"b{n}", 2)) + image(f"z{n}", *urls(f"c{n}", 9))
        for n in range(3)
    ]
    found = []
    for name in ("first", "second"):
        run = Shards(tmp_path / name, shards)
        run.dedup()
        run.select()
        files = (path for path in run.store.root.rglob("*.*") if path.suffix == ".parquet")
        found.append({str(path.relative_to(run.store.root)): path.read_bytes() for path in files})
    assert found[0] == found[1]
    plain = Counter(Object.parse(name).plain() for name in found[0])
    for stage in ("claimed", "measured"):
        assert plain[f"{stage}/{PART}.parquet"] == 2
        assert plain[f"{stage}/00000.parquet"] == 1
    assert plain["dedup/00002.parquet"] == 2  # with the metadata's hashes, and without
    assert plain["select/00002.parquet"] == plain["select/00002.ledger.parquet"] == 1


@both
def test_a_run_in_which_nothing_was_downloaded(told: Told, tmp_path: Path) -> None:
    dead = [{"url": url, "status": "dead_link", "error": "HTTP 404"} for url in urls("a", 9)]
    assert statuses(told(tmp_path, [dead, []])) == [["dead_link"] * 9, []]


@both
def test_a_run_directory_may_have_any_name(told: Told, tmp_path: Path) -> None:
    """Brackets and stars mean something to DuckDB, not to whoever names a directory."""
    assert statuses(told(tmp_path / "it's run [1] * ?", [image("x", *urls("a", 6))])) == [
        ["duplicate_image"] * 6
    ]


@pytest.mark.parametrize(
    ("named", "row"),
    [
        ({"domain": [".Example.com"]}, {"url": "http://A.example.COM./x.jpg"}),
        ({"uid": ["AB-1"]}, {"uid": "ab-1", "url": None}),
        ({"sha256": ["ABC"]}, {"url": None, "image_sha256": "abc"}),
    ],
)
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
    assert removed_from(folder.Folder(tmp_path), "0.2.0").num_rows == 0
