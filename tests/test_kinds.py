"""Kinds of caption, as values: the papers' prompts and sampling, and what becomes of a reply."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
import pytest
from conftest import CAPTIONER, CLIP

from builder.captions import kinds
from builder.captions.checks import Defect
from builder.captions.kinds import Kind
from builder.columns import score_column
from builder.core import Recipe, Stage
from builder.errors import RecipeError
from builder.stages.best import Best
from builder.stages.caption import Caption
from builder.stages.score import Score
from builder.stages.select import SCHEMA, Select
from recipes import datasets

MODELS = {"captioner": str(CAPTIONER), "clip": str(CLIP)}
PLAIN = Kind(name="plain", prompt="Describe.")


def test_the_judge_s_prompt_is_the_paper_s() -> None:
    """arXiv 2406.08478, section 4."""
    kind = kinds.judge("re_caption", "gpt4v")
    assert kind.name == "re_gpt4v_score"
    assert kind.prompt.splitlines() == [
        "[Image Caption] {re_caption}",
        "Rate whether the caption is of high-quality and fluent and correctly matches the given image. "
        "The rating should be 1-5, where 1 is incorrect and not fluent at all, and 5 is correct and very "
        "fluent. Try to just give a numerical rating.",
        "Your response should be in the format: Rating: (int)",
    ]
    assert kinds.judge("org_caption", "llava").name == "org_llava_score"
    assert kinds.judge("vec_caption", "llava").name == "vec_llava_score"


def test_nguyen_s_sampling_is_the_paper_s() -> None:
    """arXiv 2307.10350, section 3: top-k 50, 5 to 40 tokens, four temperatures."""
    made = [kinds.nguyen(temperature) for temperature in kinds.NGUYEN_TEMPERATURES]
    assert [kind.temperature for kind in made] == [0.5, 0.75, 1.0, 1.5]
    assert [kind.name for kind in made] == ["caption_t050", "caption_t075", "caption_t100", "caption_t150"]
    assert {(kind.top_k, kind.min_tokens, kind.max_tokens) for kind in made} == {(50, 5, 40)}


def test_sampling_says_what_restricts_and_nothing_else() -> None:
    """It enters the keys of replies: those to greedy requests are as before there was more to say."""
    greedy = {"temperature": 0.0, "top_k": 0, "max_tokens": 128, "min_tokens": 1, "seed": None}
    assert PLAIN.sampling("uid") == greedy
    assert replace(PLAIN, top_k=7, top_p=0.5).sampling("uid") == greedy
    drawn = replace(PLAIN, temperature=0.5, top_k=7, top_p=0.5).sampling("uid")
    assert drawn == {**greedy, "temperature": 0.5, "top_k": 7, "top_p": 0.5, "seed": drawn["seed"]}


def test_a_retry_is_drawn_hotter_and_with_a_seed_of_its_own() -> None:
    found = [PLAIN.sampling("uid", attempt) for attempt in range(4)]
    assert [one["temperature"] for one in found] == pytest.approx([0, 0.7, 0.85, 1.0])
    assert len({one["seed"] for one in found}) == 4
    assert found[1]["top_p"] == 0.9
    assert PLAIN.sampling("uid", 1) == found[1]
    hot = replace(PLAIN, temperature=1.0, top_p=0.8).sampling("uid", 1)
    assert (hot["temperature"], hot["top_p"]) == (1.0, 0.8)


def test_a_reply_at_the_limit_is_cut_back_to_whole_sentences() -> None:
    value, defects = PLAIN.read(" A dog. It runs over the gra", "length")
    assert value == "A dog."
    assert set(defects) == {Defect.TRUNCATED}
    assert not PLAIN.retried(defects)
    assert replace(PLAIN, tolerated=()).retried(defects)
    assert PLAIN.read("A dog runs over the gra", "length")[0] == "A dog runs over the gra"


def test_a_reply_of_nothing_has_no_value() -> None:
    value, defects = PLAIN.read(" \n", "stop")
    assert value is None
    assert PLAIN.retried(defects)


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Rating: 4", 4),
        ("rating: (5)", 5),
        ("**Rating:** 3\n\nThe caption is fluent.", 3),
        ("Rating: 4. The 2 dogs are there.", 4),
        ("4", 4),
        (" 1.", 1),
        ("I would give it a 2.", 2),
        ("Rating: (int)", None),
        ("Rating: 6", None),
        ("Rating: 0", None),
        ("Rating: 4.5", None),
        ("Rating: 45", None),
        ("4/5", None),
        ("between 3 and 4", None),
        ("Rating: 3\nRating: 4", None),
        ("", None),
        ("The caption is good.", None),
        ("Rating: -3", None),
        ("Rating - 3", 3),
        ("On a scale of 1-5 it is good.", None),
        ("Rating: ٤", None),
        ("1" * 5000, None),
    ],
)
def test_a_rating_is_the_integer_that_was_asked_for_or_none(reply: str, rating: int | None) -> None:
    kind = kinds.judge("re_caption", "judge")
    value, defects = kind.read(reply, "stop")
    assert value == rating
    assert set(defects) == (set() if rating else {Defect.UNPARSABLE})


OBJECT = {"objects": [{"name": "cube", "attributes": ["red"]}], "relations": [], "text": ["EXIT"]}


@pytest.mark.parametrize(
    ("reply", "is_one"),
    [
        (json.dumps(OBJECT, indent=2), True),
        (f"```json\n{json.dumps(OBJECT)}\n```", True),
        ('{"objects": [], "relations": [], "text": ["a\nb"]}', True),  # a guided engine lets it through
        (json.dumps(OBJECT)[:-3], False),
        (json.dumps([OBJECT]), False),
        (json.dumps(OBJECT | {"more": 1}), False),
        (json.dumps({"objects": []}), False),
        ("[" * 100_000, False),
        ("Here is the JSON you asked for.", False),
        ('{"objects": [], "relations": [], "text": [NaN]}', False),
    ],
)
def test_a_structured_caption_is_of_its_schema_or_none(reply: str, is_one: bool) -> None:
    value, defects = kinds.STRUCTURED.read(reply, "stop")
    assert set(defects) == (set() if is_one else {Defect.UNPARSABLE})
    assert (value is not None) == is_one
    if is_one:
        assert isinstance(value, str)
        assert "\n" not in value
        assert set(json.loads(value)) == {"objects", "relations", "text"}


def test_json_may_hold_what_no_text_may() -> None:
    """Halves of characters, which no parquet file takes."""
    value, _ = Kind(name="plain", prompt="Describe.", value="json").read('{"\\ud83d": "\\ud83d"}', "stop")
    assert isinstance(value, str)
    value.encode()


def test_a_structured_caption_that_loops_is_found_in_its_strings() -> None:
    looping = OBJECT | {"text": ["the the the the the the the the"]}
    _, defects = kinds.STRUCTURED.read(json.dumps(looping), "stop")
    assert set(defects) == {Defect.LOOP}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_tokens": 200}, "min_tokens=200 is more than max_tokens=128"),
        ({"json_schema": "{}"}, "has a json_schema and is no JSON"),
        ({"json_schema": "{", "value": "json"}, "its json_schema is none"),
        ({"json_schema": '{"type": "objekt"}', "value": "json"}, "its json_schema is none"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"retries": 11}, "retries"),
        ({"tolerated": ("ugly",)}, "tolerated"),
        ({"otherwise": "nothing"}, "otherwise=nothing, which there is not"),
        ({"otherwise": "late_caption"}, "otherwise=late_caption, which there is not"),
        ({"prompt": "{late_caption}"}, r"quotes \{late_caption\}"),
        ({"name": "null"}, "cannot be called 'null'"),
        ({"retry_temperature": 0.0}, "retry_temperature"),
    ],
)
def test_a_kind_that_cannot_be_is_told_with_its_recipe(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(
            "r",
            (
                Caption.of(replace(PLAIN, **settings), model=str(CAPTIONER)),
                Caption(name="late_caption", model=str(CAPTIONER)),
            ),
        )


def test_a_prompt_quotes_captions_that_are_made_before_it() -> None:
    fused = Caption.of(kinds.VECAP, model=str(CAPTIONER))
    recipe = Recipe("r", (Caption.of(kinds.VEC, model=str(CAPTIONER)), fused))
    assert fused.reads() == ("source", "download.parquet", "dedup", "vec_caption")
    assert recipe.captions() == ("vec_caption", "vecap_caption")
    with pytest.raises(RecipeError, match=r"quotes \{vec_caption\}.*\n.*org_caption, url$"):
        Recipe("r", (fused,))


RECIPES = {
    "recap_datacomp_1b": {},
    "recap_datacomp_1b_v2": {},
    "vecap": {},
    "capsfusion": {"fuser": str(CAPTIONER)},
    "nguyen_blip2_style": {},
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_papers_recipes(name: str) -> None:
    """Each can be carried out as it is written down, and publishes the schema of Recap-DataComp-1B first."""
    recipe: Recipe = getattr(datasets, name)(metadata="metadata", **MODELS, **RECIPES[name])
    recipe.check_order()
    for stage in recipe.stages[1:]:
        stage.check()
    assert Recipe.from_json(recipe.to_json()) == recipe
    select = recipe.stage("select")
    assert isinstance(select, Select)
    assert select.schema().names[: len(SCHEMA)] == SCHEMA.names
    scored = {name for stage in recipe.stages for name in stage.makes_scores()}
    assert scored == {"org_caption", *recipe.captions()}
    produced = [score_column(*score.split(".", 1)) for score in select.scores or ()]
    assert {"re_clip_score", "org_clip_score"} <= set(produced)


def test_every_kind_in_one_recipe_has_its_columns() -> None:
    select = datasets.demo(every=True).stage("select")
    assert isinstance(select, Select)
    found = {name: kind for name, kind, _ in select.columns()}
    assert found["re_demo_score"] == pa.int64()
    assert found["structured_caption"] == pa.string()
    assert found["vecap_caption_clip_score"] == found["re_condition_clip_score"] == pa.float64()
    for column in ("re", "re_condition", "vec_caption", "vecap_caption", "structured_caption"):
        assert found[f"{column}_defects"] == found[f"{column}_rejected"] == pa.string()
        assert found[f"{column}_finish_reason"] == pa.string()
    assert "re_caption_condition_diverse_topk_finish_reason" not in found


def test_two_captions_whose_published_columns_would_collide_are_refused() -> None:
    names = ("re_caption", "re")
    with pytest.raises(RecipeError, match="two published columns are called 're_finish_reason'"):
        Recipe("r", (*(Caption(name=name, model=str(CAPTIONER)) for name in names), Select()))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((Score(model=str(CLIP)), Score(name="clip", model=str(CLIP))), "two published columns are called"),
        (
            (Caption.of(kinds.judge("re_caption", "clip"), model=str(CAPTIONER)), Score(model=str(CLIP))),
            "two published columns are called 're_clip_score'",
        ),
        ((Best(name="best", of=("org_caption", "re_caption")),), "takes the best of 'org_caption'"),
    ],
)
def test_columns_that_would_be_lost_are_refused(stages: tuple[Stage, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe("r", (Caption(model=str(CAPTIONER)), *stages, Select()))


def test_select_names_scores_that_there_are() -> None:
    with pytest.raises(RecipeError, match=r"names 'score\.nothing', which no stage before it makes"):
        Recipe("r", (Caption(model=str(CAPTIONER)), Select(scores=("score.nothing",))))


def test_a_recipe_json_of_before_publishes_what_it_did() -> None:
    recipe = datasets.demo(short=True)
    data = json.loads(recipe.to_json())
    for name in ("ratings", "scores", "ends", "max_identical"):
        del data["stages"][-1][name]
    before = Recipe.from_json(json.dumps(data)).stage("select")
    assert isinstance(before, Select)
    ours = {"re_defects", "re_rejected", "re_blind"}
    more = ["short_caption", "short_caption_finish_reason", "short_caption_num_tokens"]
    assert before.schema().names == [name for name in SCHEMA.names if name not in ours] + more


def test_a_stage_has_the_settings_of_its_kind() -> None:
    stage = Caption.of(kinds.RECAP_V2, model=str(CAPTIONER), retries=0)
    assert asdict(kinds.RECAP_V2) | {"retries": 0} == {
        name: value for name, value in asdict(stage).items() if name in asdict(kinds.RECAP_V2)
    }
    assert Caption.of(kinds.RECAP_V1, model=str(CAPTIONER)) == Caption(model=str(CAPTIONER))
