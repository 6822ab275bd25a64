"""From what the user typed to a recipe, or to one line that says what is wrong with it."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

from builder.core import Recipe
from builder.errors import RecipeError, UserError
from builder.resolve import resolve
from builder.stages.caption import Caption
from builder.stages.dedup import Dedup
from builder.stages.download import Download
from builder.stages.source import Source
from recipes import datasets as recipes

MY_FILE = """
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from builder.core import Recipe, Stage
from builder.stages.dedup import Dedup


@dataclass(frozen=True, kw_only=True)
class Paint(Stage):
    name: ClassVar[str] = "paint"
    colour: str = "red"


def mine(
    *, colour: str = "red", coats: int = 1, share: float = 0.5, fast: bool = False,
    tags: tuple[str, ...] = (), sizes: tuple[int, ...] = (1, 2), place: str | None = "here",
    limit: int | None = 9,
) -> Recipe:
    title = repr((coats, share, fast, tags, sizes, place, limit))
    return Recipe("mine", (Paint(colour=colour), Dedup()), title=title)


def other(*, metadata: str, model: str) -> Recipe:
    return Recipe("other", (Dedup(),))


def _hidden() -> Recipe:
    return Recipe("hidden", ())


def no_recipe() -> int:
    return 5
"""
_number = itertools.count()


@pytest.fixture
def my_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's file; every test has one of another name, as every user's process has its own."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / f"my_file_{next(_number)}.py"
    path.write_text(MY_FILE)
    return path


def source(recipe: Recipe) -> Source:
    stage = recipe.stage("source")
    assert isinstance(stage, Source)
    return stage


def download(recipe: Recipe) -> Download:
    stage = recipe.stage("download")
    assert isinstance(stage, Download)
    return stage


# --- names and parameters -----------------------------------------------------------------------------------


def test_a_name_is_the_function_with_its_defaults() -> None:
    assert resolve("demo") == recipes.demo()


def test_a_parameter_is_the_functions_argument() -> None:
    assert resolve("demo", ["rows_per_shard=50", "web=a=b/c"]) == recipes.demo(rows_per_shard=50, web="a=b/c")


def test_the_papers_recipe_takes_tuples_and_switches() -> None:
    given = [
        "metadata=x/*.parquet",
        "captioner=u/c@0123abc",
        "clip=m",
        "verify_sha256=false",
        "allow_private=10.0.0.0/8,::1/128",
        "image_px=64",
    ]
    assert resolve("recap_datacomp_1b", given) == recipes.recap_datacomp_1b(
        metadata="x/*.parquet",
        captioner="u/c@0123abc",
        clip="m",
        verify_sha256=False,
        allow_private=("10.0.0.0/8", "::1/128"),
        image_px=64,
    )


@pytest.mark.parametrize(
    ("settings", "title"),
    [
        ([], (1, 0.5, False, (), (1, 2), "here", 9)),
        (
            ["coats=3", "share=2", "fast=true", "tags=a,b", "sizes=7", "place=there", "limit=5"],
            (3, 2.0, True, ("a", "b"), (7,), "there", 5),
        ),
        (
            ["coats=-3", "share=1e-3", "fast=1", "tags=a", "sizes=", "place=none", "limit=None"],
            (-3, 0.001, True, ("a",), (), None, None),
        ),
        (["fast=no", "tags=none", "place=a,b=c", "coats=4"], (4, 0.5, False, ("none",), (1, 2), "a,b=c", 9)),
    ],
)
def test_values_get_the_types_of_the_function(
    my_file: Path, settings: list[str], title: tuple[object, ...]
) -> None:
    assert resolve(f"{my_file}:mine", settings).title == repr(title)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["rows_per_shard=many"], "rows_per_shard: .*integer.*'many'"),
        (["rows_per_shard=1.5"], "rows_per_shard: .*integer"),
        (["rows_per_shard=none"], "rows_per_shard: .*integer"),
        (["rows_per_shard="], "rows_per_shard: .*integer"),
        (["download.timeout_s=soon"], r"download\.timeout_s: .*number.*'soon'"),
        (["download.verify_sha256=maybe"], r"download\.verify_sha256: .*boolean"),
        (["source.limit=1e3x"], r"source\.limit: .*integer"),
        (["caption.specs=short"], r"no setting .specs."),
        (["rows_per_shard"], "'rows_per_shard' is not key=value\n.*for example"),
        (["rows_pr_shard=5"], "recipe demo has no parameter 'rows_pr_shard'\n.*did you mean rows_per_shard"),
        (
            ["colour=red"],
            "recipe demo has no parameter 'colour'\n.*there are: every, rows_per_shard, short, web",
        ),
        (["download.timeout=5"], "stage download has no setting 'timeout'\n.*did you mean timeout_s"),
        (["dedup.colour=5"], "stage dedup has no setting 'colour'\n.*there are: by_metadata, max_urls"),
        (["downlod.timeout_s=5"], "recipe demo has no stage 'downlod'\n.*download"),
        (["download.name=x"], "stage download has no setting 'name'"),
    ],
)
def test_a_wrong_setting_is_one_line_and_what_to_do(settings: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=f"(?s){says}"):
        resolve("demo", settings)


def test_what_a_recipe_needs_is_named() -> None:
    with pytest.raises(
        RecipeError,
        match=r"needs captioner, clip\n.*recap build recap_datacomp_1b captioner=\.\.\. clip=\.\.\.",
    ):
        resolve("recap_datacomp_1b", ["metadata=x"])


@pytest.mark.parametrize("name", ["dmo", "", "demo.x", "Recipe", "DEMO_CLIP"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(
        RecipeError, match=f"no recipe '{name}'\n.*demo, nguyen_blip2_style, recap_datacomp_1b"
    ):
        resolve(name)


# --- settings of stages -------------------------------------------------------------------------------------


def test_a_dotted_setting_changes_one_setting_of_one_stage() -> None:
    recipe = resolve(
        "demo", ["download.timeout_s=2", "download.retries=0", "dedup.max_urls=9", "source.limit=100"]
    )
    before, after = (r.to_json().splitlines() for r in (recipes.demo(), recipe))
    changed = [b.strip().rstrip(",") for a, b in zip(before, after, strict=True) if a != b]
    assert changed == ['"limit": 100', '"timeout_s": 2.0', '"retries": 0', '"max_urls": 9']


def test_a_stage_takes_tuples_switches_and_none() -> None:
    recipe = resolve(
        "demo",
        [
            "download.allow_private=",
            "download.blur_faces=off",
            "download.workers=2",
            "source.url_column=link",
        ],
    )
    assert (download(recipe).allow_private, download(recipe).blur_faces, download(recipe).workers) == (
        (),
        False,
        "2",
    )
    assert download(recipe).bounds() == (0, 2)
    assert source(recipe).url_column == "link"
    recipe = resolve(
        "demo", ["caption.max_model_len=none", "download.workers=none", "source.url_column=None"]
    )
    caption = recipe.stage("re_caption")
    assert isinstance(caption, Caption)
    assert (caption.max_model_len, download(recipe).workers, source(recipe).url_column) == (None, None, None)


# --- my_file.py:function ------------------------------------------------------------------------------------


def test_a_users_file_brings_its_own_stages(my_file: Path) -> None:
    recipe = resolve(f"{my_file}:mine", ["colour=blue", "dedup.max_urls=2"])
    assert [stage.name for stage in recipe.stages] == ["paint", "dedup"]
    assert recipe.stage("dedup") == Dedup(max_urls=2)
    assert '"colour": "blue"' in recipe.to_json()
    assert '"colour": "green"' in resolve(f"{my_file}:mine", ["paint.colour=green"]).to_json()


def test_a_users_file_is_found_from_where_the_user_is(my_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(my_file.parent)
    assert resolve(f"{my_file.name}:mine").name == "mine"


@pytest.mark.parametrize("name", ["", "nope", "_hidden", "no_recipe", "Dedup"])
def test_only_public_functions_that_return_a_recipe_are_recipes(my_file: Path, name: str) -> None:
    with pytest.raises(RecipeError, match=f"no recipe '{name}' in .*\n.*mine, other"):
        resolve(f"{my_file}:{name}")


def test_a_users_function_says_what_it_needs(my_file: Path) -> None:
    with pytest.raises(RecipeError, match="other needs metadata, model"):
        resolve(f"{my_file}:other")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no file .*nope\.py"):
        resolve(f"{tmp_path / 'nope.py'}:mine")


def test_a_second_file_of_one_name_is_refused_not_taken_for_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worker processes import a user's file by its name, so a process can have only one of that name."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same_name.py").write_text(MY_FILE.replace('"mine"', f'"{folder}"'))
    assert resolve(f"{tmp_path}/a/same_name.py:mine").name == "a"
    assert resolve(f"{tmp_path}/a/same_name.py:mine").name == "a"
    with pytest.raises(RecipeError, match=r"b/same_name\.py"):
        resolve(f"{tmp_path}/b/same_name.py:mine")


def test_a_file_named_like_a_library_is_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`json.py` cannot be imported as that; to say that it holds no recipe would be wrong.

    And no worker could start with it on the path.
    """
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "json.py").write_text(MY_FILE)
    with pytest.raises(RecipeError, match=r"json\.py"):
        resolve(f"{tmp_path}/json.py:mine")
    assert str(tmp_path) not in sys.path


# --- recipe.json --------------------------------------------------------------------------------------------


def test_a_recipe_json_is_the_recipe_that_wrote_it(tmp_path: Path) -> None:
    recipe = resolve("demo", ["rows_per_shard=50", "download.timeout_s=2"])
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    assert resolve(str(tmp_path / "recipe.json")) == recipe
    assert source(resolve(str(tmp_path / "recipe.json"), ["source.limit=7"])).limit == 7


def test_a_recipe_json_has_no_parameters_only_settings(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(recipes.demo().to_json())
    with pytest.raises(RecipeError, match=r"no parameter 'rows_per_shard'\n.*download\.timeout_s=5"):
        resolve(str(tmp_path / "recipe.json"), ["rows_per_shard=5"])


@pytest.mark.parametrize(
    "content",
    [None, b"", b"\xff\xfe\x00", b'{"name": "demo"}', b'{"name": "x", "stages": [{"stage": "os:system"}]}'],
)
def test_a_recipe_json_that_cannot_be_used_is_a_users_mistake(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "recipe.json").write_bytes(content)
    with pytest.raises(UserError, match=r"recipe\.json"):
        resolve(str(tmp_path / "recipe.json"))


def test_a_key_is_given_once() -> None:
    with pytest.raises(
        RecipeError, match=r"'rows_per_shard' is given twice\n.*rows_per_shard=5 or rows_per_shard=6"
    ):
        resolve("demo", ["rows_per_shard=5", "rows_per_shard=6"])


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("def mine( -> Recipe:", r"bad\.py, line 2: SyntaxError"),
        ("import nowhere_at_all", r"bad\.py, line 2: ModuleNotFoundError"),
        ("def mine() -> Recipe:\n    return 1 / 0", r"bad\.py, line 3: ZeroDivisionError"),
        ("def mine() -> Recipe:\n    return None", "returned NoneType, not a Recipe"),
    ],
)
def test_what_is_wrong_in_a_users_file_is_told_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, says: str
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "bad", raising=False)
    (tmp_path / "bad.py").write_text(f"from builder.core import Recipe\n{body}\n")
    with pytest.raises(RecipeError, match=says):
        resolve(f"{tmp_path / 'bad.py'}:mine")
