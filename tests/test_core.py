"""The nouns keep their word: keys, recipe.json, records."""

from __future__ import annotations

import json
import sys
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pytest

from builder.core import Recipe, Record, Stage, Task, task_key
from builder.errors import RecipeError
from builder.files import read_rows, sha256_file, write_parquet
from builder.stages.best import Best
from builder.stages.caption import Caption
from builder.stages.dedup import Dedup
from builder.stages.download import Download
from builder.stages.embed import Embed
from builder.stages.score import Score
from builder.stages.select import Select
from builder.stages.source import Source
from builder.typed import parse
from recipes import datasets as recipes

INPUTS = {"source/00000.parquet": "a" * 64, "source/00001.parquet": "b" * 64}


@dataclass(frozen=True, kw_only=True)
class Paint(Stage):
    effort: ClassVar[tuple[str, ...]] = ("workers",)

    name: str = "paint"
    colour: str = "red"
    coats: float = 2.0
    workers: int | None = None


@dataclass(frozen=True, kw_only=True)
class BetterPaint(Paint):
    version: ClassVar[int] = 2


def key(stage: Stage) -> str:
    return key_of(stage, "00000", INPUTS)


def key_of(stage: Stage, name: str, inputs: dict[str, str], outside: dict[str, str] | None = None) -> str:
    return task_key(stage, name, inputs, outside or {}, stage.settings())


# --- keys ---------------------------------------------------------------------------------------------------


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
        key_of(stage, "00000", INPUTS),
        key_of(stage, "00001", INPUTS),
        key_of(stage, "part", INPUTS),
        key_of(stage, "00000", INPUTS | {"source/00001.parquet": "c" * 64}),
        key_of(stage, "00000", {"source/00000.parquet": "a" * 64}),
        key_of(stage, "00000", {}),
        key_of(stage, "00000", {}, INPUTS),
    }
    assert len(keys) == 7


def test_the_order_of_the_inputs_does_not() -> None:
    assert key_of(Paint(), "00000", dict(reversed(INPUTS.items()))) == key(Paint())


def test_which_key_made_an_input_does_not_either() -> None:
    """Where a stage is done again with the same bytes, what follows stays done."""
    names = {"source/00000/00000.0123abcd.parquet": "a" * 64, "source/00000/00001.4567efab.parquet": "b" * 64}
    assert key_of(Paint(), "00000", names) == key(Paint())


def test_a_new_setting_with_a_default_changes_no_key() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Later(Paint):
        varnish: bool = False

    assert key(Later()) == key(Paint())
    assert key(Later(varnish=True)) != key(Paint())


# Of the settings that shape outputs: whoever changes one raises the stage's version here and there.
DEFAULTS = {
    ("Source", 3): {
        "layout": "auto", "url_column": None, "caption_column": None, "uid_column": None, "encoding": "utf-8",
        "delimiter": None, "subset": None,
    },
    ("Download", 4): {
        "image_px": 512, "resize_mode": "keep_ratio_largest", "resize_only_if_bigger": True,
        "encode_quality": 95, "blur_faces": True, "verify_sha256": True,
        "max_bytes": 50_000_000, "max_pixels": 64_000_000,
        "allow_private": (), "disallowed_directives": ("noai", "noimageai", "noindex", "noimageindex"),
        "user_agent_token": "recapkit",
    },
    ("Dedup", 2): {"max_urls": 5, "tombstones": None},
    ("Caption", 2): {
        "max_repeated": 0.25, "max_stutter": 0.9, "max_same": 3, "min_words": 1, "language": "",
        "min_bytes": 25, "min_confidence": 0.5,
        "prompt": "Please generate a detailed caption of this image. Please be as descriptive as possible.",
        "image": True, "max_tokens": 128, "min_tokens": 1, "temperature": 0.0, "top_k": 0, "top_p": 1.0,
        "value": "text", "json_schema": "", "retries": 2, "retry_temperature": 0.7, "retry_top_p": 0.9,
        "tolerated": ("truncated", "boilerplate"), "otherwise": "fail",
        "dtype": "auto", "quantization": "", "max_model_len": None,
    },
    ("Score", 1): {"captions": None, "precision": "fp32", "vectors": ""},
    ("Embed", 1): {"precision": "fp32"},
    ("Best", 1): {"by": "score"},
    ("Select", 3): {
        "shards_per_file": 20, "captions": None, "ratings": None, "scores": None,
        "ends": ("finish_reason", "num_tokens", "defects", "rejected", "blind"), "max_identical": 20,
    },
}  # fmt: skip


@pytest.mark.parametrize("stage", [Source, Download, Dedup, Caption, Embed, Score, Best, Select])
def test_the_defaults_are_those_of_the_stages_version(stage: type[Stage]) -> None:
    left_out = {"name", "workers", *stage.effort, *stage.once}
    shaping = [f.name for f in fields(stage) if f.name not in left_out and f.default is not MISSING]
    assert {name: stage.default(name) for name in shaping} == DEFAULTS[stage.__name__, stage.version]


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
    "max_bytes": 10,
    "max_pixels": 10,
    "allow_private": ("127.0.0.1/32",),
    "disallowed_directives": ("noai",),
    "user_agent_token": "other",
}


def test_every_setting_of_the_download_but_how_hard_it_tries_changes_its_key() -> None:
    """A setting that is added later has to be decided upon here."""
    assert set(asdict(Download())) == {
        *OTHER_DOWNLOADS,
        *Download.effort,
        *Download.once,
        "name",
        "workers",
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
        replace(caption, prompt="Describe."),
        replace(caption, max_tokens=9),
        replace(caption, name="second"),
    ]
    assert len({key(caption), *map(key, others)}) == 7


def test_limit_and_shard_size_do_not_change_the_key_of_a_shard_that_stays_as_it_is() -> None:
    slices = {"part.parquet[0:10]": "a" * 64}
    stages = (Source(files="x"), Source(files="y", limit=10), Source(files="x", rows_per_shard=10))
    keys = {key_of(stage, "00000", {}, slices) for stage in stages}
    assert len(keys) == 1
    assert key_of(Source(files="x", url_column="link"), "00000", {}, slices) not in keys


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


# --- recipe.json --------------------------------------------------------------------------------------------


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
    with pytest.raises(RecipeError, match=r"stage caption: max_tokens: .*integer.*'lots'"):
        parse(Caption, {"model": "m", "max_tokens": "lots"}, what="stage caption")


# --- records and files --------------------------------------------------------------------------------------


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


def test_a_record_survives_its_file() -> None:
    assert Record.from_json(a_record().to_json()) == a_record()


def test_a_record_of_an_older_or_a_later_version_is_read() -> None:
    old = {
        "key": "k",
        "inputs": {},
        "outputs": {},
        "bytes": {},
        "rows": {"ok": 4},
        "seconds": 1,
        "versions": {},
    }
    assert Record.from_json(json.dumps(old)) == Record("k", rows={"ok": 4}, seconds=1.0)
    assert Record.from_json(json.dumps(old | {"a_field_that_came": [1]})) == Record(
        "k", rows={"ok": 4}, seconds=1.0
    )
    assert Record.from_json('{"key": "k"}') == Record("k")


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a/b/c/d.parquet", "source/../x.parquet", ""]
)
def test_a_record_names_nothing_outside_its_run(name: str) -> None:
    assert Record.from_json(Record("k", outputs={name: "2"}, bytes={name: 3}).to_json()) is None


def test_a_half_written_record_is_none() -> None:
    """What a crash of the machine can leave: nothing, a part, or a file of the right length full of zeros."""
    whole = a_record().to_json().encode()
    cut = [whole[:n] for n in range(len(whole))]
    for damaged in (*cut, b"\0" * len(whole), whole[:100] + b"\0" * 100, b"{}", b"null", b"[]"):
        assert Record.from_json(damaged) is None, damaged


def a_task(stage: str, name: str, *names: str) -> Task:
    return Task(
        stage, "00000", name, "k", dict.fromkeys(names, ""), files={name: Path("/", name) for name in names}
    )


def test_a_task_finds_its_inputs_by_stage_and_ending() -> None:
    names = [
        "download/00000/00007.0123abcd.tar",
        "download/00000/00007.0123abcd.parquet",
        "claimed/run/00000.0123abcd.parquet",
        "dedup/00000/00007.4567efab.parquet",
        "download2/00000/00007.0123abcd.tar",
        "select/00000/00007.0123abcd.ledger.parquet",
    ]
    task = a_task("re_caption", "00007", *names)
    assert task.input("download") == Path("/", names[1])
    assert task.input("download", ".tar") == Path("/", names[0])
    assert task.input("claimed") == Path("/", names[2])
    assert task.all_inputs("dedup") == [Path("/", names[3])]
    assert task.all_inputs("select", ".ledger.parquet") == [Path("/", names[5])]
    assert task.object(".parquet") == "re_caption/00000/00007.k.parquet"
    again = replace(task, attempt=1)
    assert again.object(".parquet") != task.object(".parquet")


def test_inputs_come_in_the_order_of_their_shards_beyond_shard_99999() -> None:
    """1.28 billion rows in shards of 10,000 are 128,000 shards."""
    names = [f"download/00001/{shard:05d}.0123abcd.parquet" for shard in (100_000, 9, 99_999, 10, 100_001)]
    found = [
        int(path.name.partition(".")[0]) for path in a_task("select", "00000", *names).all_inputs("download")
    ]
    assert found == [9, 10, 99_999, 100_000, 100_001]


def test_the_same_rows_are_the_same_bytes_and_come_back(tmp_path: Path) -> None:
    rows = [{"uid": f"{n}", "caption": "a\0b\u2603" * n} for n in range(2500)]
    for name in ("one", "other"):
        write_parquet(pa.Table.from_pylist(rows), tmp_path / name)
    assert sha256_file(tmp_path / "one") == sha256_file(tmp_path / "other")
    assert list(read_rows(tmp_path / "one")) == rows
    assert list(read_rows(tmp_path / "one", ["uid"], batch=7)) == [{"uid": row["uid"]} for row in rows]
