"""The nouns keep their word: keys, recipe.json, records."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from builder.core import Recipe, Record, Stage, Task, parse, read_rows, sha256_file, task_key, write_parquet
from builder.errors import RecipeError
from builder.stages.caption import Caption, CaptionSpec
from builder.stages.dedup import Dedup
from builder.stages.download import Download
from builder.stages.score import Score
from builder.stages.source import Source
from recipes import datasets as recipes

INPUTS = {"source/00000.parquet": "a" * 64, "source/00001.parquet": "b" * 64}


@dataclass(frozen=True, kw_only=True)
class Paint(Stage):
    name: ClassVar[str] = "paint"
    colour: str = "red"
    coats: float = 2.0
    workers: int | None = None


@dataclass(frozen=True, kw_only=True)
class BetterPaint(Paint):
    version: ClassVar[int] = 2


def key(stage: Stage) -> str:
    return task_key(stage, INPUTS, "00000")


def metadata(folder: Path, rows: int = 3) -> Path:
    folder.mkdir(parents=True)
    table = pa.table(
        {
            "uid": [f"{n:032x}" for n in range(rows)],
            "url": ["http://h/1.jpg"] * rows,
            "text": ["a cat"] * rows,
        }
    )
    pq.write_table(table, folder / "part.parquet")
    return folder


# --- keys -------------------------------------------------------------------------------------------------------------


def test_a_key_is_64_hex_digits_and_always_the_same() -> None:
    assert key(Paint()) == key(Paint())
    assert len(key(Paint())) == 64
    assert set(key(Paint())) <= set("0123456789abcdef")


@pytest.mark.parametrize(
    "other",
    [Paint(colour="blue"), Paint(coats=3), BetterPaint()],
    ids=["a setting", "another setting", "the stage's version"],
)
def test_what_can_change_the_bytes_changes_the_key(other: Stage) -> None:
    assert key(other) != key(Paint())


def test_an_input_changes_the_key_and_so_does_the_task() -> None:
    stage = Paint()
    keys = {
        task_key(stage, INPUTS, "00000"),
        task_key(stage, INPUTS, "00001"),
        task_key(stage, INPUTS, "survey"),
        task_key(stage, INPUTS | {"source/00001.parquet": "c" * 64}, "00000"),
        task_key(stage, {"source/00000.parquet": "a" * 64}, "00000"),
        task_key(stage, {}, "00000"),
    }
    assert len(keys) == 6


def test_the_order_of_the_inputs_does_not() -> None:
    assert task_key(Paint(), dict(reversed(INPUTS.items())), "00000") == key(Paint())


def test_workers_never_change_a_key() -> None:
    assert key(Paint(workers=7)) == key(Paint())
    assert key(Download(workers=7, concurrency=3)) == key(Download())
    caption = Caption(model="user/captioner@0123abc")
    assert key(replace(caption, in_flight=1, kv_cache_gib=9, gpu_memory_utilization=0.5)) == key(caption)


OTHER_DOWNLOADS = {
    "image_px": 64,
    "resize_mode": "border",
    "resize_only_if_bigger": False,
    "encode_quality": 90,
    "blur_faces": False,
    "verify_sha256": False,
    "timeout_s": 3.0,
    "retries": 0,
    "max_bytes": 10,
    "max_pixels": 10,
    "allow_private": ("127.0.0.1/32",),
    "disallowed_directives": ("noai",),
    "user_agent_token": "other",
}


def test_every_setting_of_the_download_but_its_parallelism_changes_its_key() -> None:
    """A setting that is added later has to be decided upon here."""
    assert set(asdict(Download())) == {
        *OTHER_DOWNLOADS,
        "workers",
        "concurrency",
        "nameservers",
        "accept_failures",
    }
    keys = {key(Download(**{name: value})) for name, value in OTHER_DOWNLOADS.items()}
    assert len(keys - {key(Download())}) == len(OTHER_DOWNLOADS)


def test_dedup_and_caption_settings_change_their_keys() -> None:
    assert key(Dedup(max_urls=2)) != key(Dedup())
    caption = Caption(model="user/captioner@0123abc")
    others = [
        Caption(model="user/captioner@4567def"),
        replace(caption, dtype="float32"),
        replace(caption, max_model_len=99),
        replace(caption, specs=(CaptionSpec(prompt="Describe."),)),
        replace(caption, specs=(CaptionSpec(max_tokens=9),)),
        replace(caption, specs=(CaptionSpec(), CaptionSpec(name="second"))),
    ]
    assert len({key(caption), *map(key, others)}) == 7


def test_the_folder_of_the_metadata_does_not_change_a_key(tmp_path: Path) -> None:
    """The same files elsewhere, by folder or by glob, are the same input."""
    here = metadata(tmp_path / "here")
    shutil.copytree(here, tmp_path / "deep" / "down" / "there")
    names = [here, tmp_path / "deep" / "down" / "there", here / "*.parquet", here / "part.parquet"]
    stages = [Source(files=str(name)) for name in names]
    assert len({task_key(stage, stage.survey_inputs(tmp_path), "survey") for stage in stages}) == 1


def test_other_metadata_another_limit_or_other_shards_change_the_survey(tmp_path: Path) -> None:
    here, other = str(metadata(tmp_path / "here")), str(metadata(tmp_path / "other", rows=4))
    stages = [
        Source(files=here),
        Source(files=other),
        Source(files=here, limit=2),
        Source(files=here, rows_per_shard=2),
    ]
    assert len({task_key(stage, stage.survey_inputs(tmp_path), "survey") for stage in stages}) == 4


def test_limit_and_shard_size_do_not_change_the_key_of_a_shard_that_stays_as_it_is() -> None:
    slices = {"part.parquet[0:10]": "a" * 64}
    keys = {
        task_key(stage, slices, "00000")
        for stage in (Source(files="x"), Source(files="y", limit=10), Source(files="x", rows_per_shard=10))
    }
    assert len(keys) == 1
    assert task_key(Source(files="x", url_column="link"), slices, "00000") not in keys


@pytest.mark.parametrize("stage_type", [Caption, Score])
def test_a_model_enters_by_its_content(stage_type: type[Caption] | type[Score], tmp_path: Path) -> None:
    for name in ("one", "same", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"2" if name == "other" else b"1")
    one, same, other = (key(stage_type(model=str(tmp_path / name))) for name in ("one", "same", "other"))
    assert one == same
    assert one != other


def test_5_and_5_0_are_one_setting_with_one_key() -> None:
    whole, fraction = (Recipe("r", (Download(timeout_s=value),)) for value in (5, 5.0))
    assert key(whole.stage("download")) == key(fraction.stage("download"))
    assert whole.to_json() == fraction.to_json()


# --- recipe.json ------------------------------------------------------------------------------------------------------


def a_recipe() -> Recipe:
    return recipes.recap_datacomp_1b(
        metadata="/data/of/mine/*.parquet",
        captioner="user/captioner@0123abc",
        clip="/models/clip",
        allow_private=("::1/128",),
    )


@pytest.mark.parametrize(
    "recipe",
    [recipes.demo(), a_recipe(), Recipe("ünïcødé", (Dedup(),), title="図", description='"quoted"\n')],
)
def test_a_recipe_survives_its_json(recipe: Recipe) -> None:
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert again.to_json() == recipe.to_json()


def test_two_recipes_that_differ_in_one_setting_differ_in_one_line() -> None:
    one, other = (recipes.demo(rows_per_shard=n).to_json().splitlines() for n in (100, 200))
    assert len(one) == len(other)
    assert [(a.strip(), b.strip()) for a, b in zip(one, other, strict=True) if a != b] == [
        ('"rows_per_shard": 100,', '"rows_per_shard": 200,')
    ]


def test_a_published_recipe_does_not_tell_where_things_lay_on_this_machine() -> None:
    text = a_recipe().portable().to_json()
    assert "/data/of/mine" not in text
    assert "/models" not in text
    assert "user/captioner@0123abc" in text
    assert recipes.demo().portable() == recipes.demo()  # relative paths stay


def changed(**changes: object) -> str:
    return json.dumps(json.loads(Recipe("r", (Dedup(),)).to_json()) | changes)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (changed(colour="red"), "colour"),
        (changed(stages=[{"stage": "builder.stages.dedup:Dedup", "max_url": 5}]), "max_url"),
        (changed(stages=[{"stage": "builder.stages.dedup:Dedup", "max_urls": "many"}]), "max_urls"),
        (changed(stages=[{"stage": "builder.stages.source:Source"}]), "files"),
        (changed(stages=[{"stage": "builder.stages.dedup:Nope"}]), "Nope"),
        (changed(stages=[{"stage": "builder.nope:Nope"}]), "nope"),
        (changed(stages=[{"stage": "builder.core:Recipe"}]), "recipe"),
        (changed(stages=[{"stage": "builder.core:Stage"}]), "not a recipe.json"),
        (changed(stages=[{"stage": "subprocess:Popen"}]), "subprocess"),
        (changed(stages=[{"stage": "builderx.evil:Stage"}]), "builderx"),
        (changed(stages=[{"max_urls": 5}]), "stage"),
        (changed(stages=["dedup"]), "not a recipe.json"),
        (changed(stages=None), "not a recipe.json"),
        ("[]", "not a recipe.json"),
        ("null", "not a recipe.json"),
        ('{"name": "r"}', "stages"),
        ('{"name": "r", "sta', "not a recipe.json"),
        ("", "not a recipe.json"),
    ],
)
def test_what_is_not_a_recipe_json_is_refused_with_the_reason(text: str, says: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.from_json(text)
    assert says in str(error.value)


def test_a_foreign_module_of_a_recipe_json_is_not_even_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_stages.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match="not part of recapkit"):
        Recipe.from_json(changed(stages=[{"stage": "evil_stages:Evil"}]))
    assert "evil_stages" not in sys.modules


def test_a_stage_that_a_recipe_lacks_is_named_with_those_it_has() -> None:
    with pytest.raises(RecipeError, match=r"no stage 'select'\n.*dedup"):
        Recipe("r", (Dedup(),)).stage("select")


def test_a_value_of_the_wrong_type_is_named_with_its_place() -> None:
    with pytest.raises(RecipeError, match=r"stage caption: specs\.0\.max_tokens: .*integer.*'lots'"):
        parse(Caption, {"model": "m", "specs": [{"max_tokens": "lots"}]}, what="stage caption")


# --- records and files ------------------------------------------------------------------------------------------------


def a_record() -> Record:
    return Record(
        "k",
        {"a": "1"},
        {"source/00000.parquet": "2"},
        {"source/00000.parquet": 3},
        {"ok": 4},
        5.5,
        {"pyarrow": "6"},
    )


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    (tmp_path / "00000.json").write_text(json.dumps(asdict(a_record())))
    assert Record.read(tmp_path / "00000.json") == a_record()


def test_a_half_written_record_is_none(tmp_path: Path) -> None:
    """What a crash of the machine can leave: nothing, a part, or a file of the right length full of zeros."""
    path = tmp_path / "00000.json"
    assert Record.read(path) is None
    whole = json.dumps(asdict(a_record())).encode()
    for damaged in (
        *(whole[:n] for n in range(len(whole))),
        b"\0" * len(whole),
        whole[:100] + b"\0" * 100,
        b"{}",
        b"null",
        b"[]",
    ):
        path.write_bytes(damaged)
        assert Record.read(path) is None, damaged


def test_a_task_finds_its_inputs_by_stage_and_ending(tmp_path: Path) -> None:
    names = [
        "download/00007.tar",
        "download/00007.parquet",
        "dedup/survey.parquet",
        "dedup/00007.parquet",
        "download2/00007.tar",
    ]
    task = Task(tmp_path, "caption", "00007", "k", dict.fromkeys(names, ""))
    assert task.input("download") == tmp_path / "download/00007.parquet"
    assert task.input("download", ".tar") == tmp_path / "download/00007.tar"
    assert task.all_inputs("dedup") == [tmp_path / "dedup/00007.parquet"]


def test_inputs_come_in_the_order_of_their_shards_beyond_shard_99999(tmp_path: Path) -> None:
    """1.28 billion rows in shards of 10,000 are 128,000 shards."""
    names = [f"download/{shard:05d}.parquet" for shard in (100_000, 9, 99_999, 10, 100_001)]
    task = Task(tmp_path, "select", "00000", "k", dict.fromkeys(names, ""))
    assert [int(path.stem) for path in task.all_inputs("download")] == [9, 10, 99_999, 100_000, 100_001]


def test_the_same_rows_are_the_same_bytes_and_come_back(tmp_path: Path) -> None:
    rows = [{"uid": f"{n}", "caption": "a\0b\u2603" * n} for n in range(2500)]
    for name in ("one", "other"):
        write_parquet(pa.Table.from_pylist(rows), tmp_path / name)
    assert sha256_file(tmp_path / "one") == sha256_file(tmp_path / "other")
    assert list(read_rows(tmp_path / "one")) == rows
    assert list(read_rows(tmp_path / "one", ["uid"], batch=7)) == [{"uid": row["uid"]} for row in rows]
