"""The card says what the data say and where they come from, and is found out when it does not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlcroissant
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import a_version, recap_here, recap_if_full, web_of

from analysis import report
from builder.core import Recipe, SourceSet
from builder.errors import InputError, RecipeError
from builder.places import parts
from builder.resolve import resolve
from builder.stages.caption import Caption
from builder.stages.select import LEDGER, SCHEMA
from builder.versions.verify import check_card
from cards.card import card
from cards.croissant import croissant
from recipes.datasets import SOURCE_SETS, demo, recap_datacomp_1b


@pytest.fixture
def version(demo_run: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(demo_run.with_name("demo-published") / "v0.1.0", tmp_path / "v0.1.0"))
    for path in folder.rglob("*"):
        path.chmod(0o755)
    return folder


@pytest.mark.full
def test_a_published_card_agrees_with_its_data(version: Path) -> None:
    assert ": 0 numbers" in recap_if_full("card", "--check", version).stdout


def test_a_changed_number_in_the_card_is_found(version: Path) -> None:
    readme = version / "README.md"
    readme.write_text(readme.read_text().replace("| words, mean | ", "| words, mean | 9"))
    (problem,) = check_card(str(version))
    assert problem.startswith("README.md, line ")
    assert "| words, mean | 9" in problem
    assert recap_here("card", "--check", version, check=1).stdout.count("README.md, line") == 1


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
    pq.write_table(
        table.slice(1).drop_columns(["width"]).append_column("width2", table.slice(1)["width"]), file
    )
    with pytest.raises(InputError, match="another schema than the recipe's"):
        check_card(str(version))
    pq.write_table(table.slice(1), file)
    problems = check_card(str(version))
    assert problems[0] == f"published has {table.num_rows - 1:,} rows, the manifest says {table.num_rows:,}"


def test_features_and_splits_match_the_parquet(version: Path) -> None:
    front = yaml.safe_load((version / "README.md").read_text().split("---\n")[1])
    default, ledger = front["dataset_info"]
    names = {"double": "float64", "float": "float32"}
    assert [(f["name"], f["dtype"]) for f in default["features"]] == [
        (f.name, names.get(str(f.type), str(f.type))) for f in SCHEMA
    ]
    counts = {split["name"]: split["num_examples"] for split in default["splits"]}
    assert counts == {
        name: pq.read_table(next((version / "data").glob(f"{name}-*"))).num_rows
        for name in ("train", "preview")
    }
    assert ledger["splits"][0]["num_examples"] == 240
    assert front["configs"][0]["data_files"][0]["split"] == "preview"


def test_croissant_is_valid_and_reads_the_rows(version: Path) -> None:
    described = mlcroissant.Dataset(jsonld=version / "croissant.json")
    assert "error" not in described.metadata.ctx.issues.report().lower()
    first = next(iter(described.records("train")))
    row = pq.read_table(version / "data" / "train-00000-of-00001.parquet").slice(0, 1).to_pylist()[0]
    assert first["train/re_caption"].decode() == row["re_caption"]
    assert len(list(described.records("ledger"))) == 240


@pytest.mark.slow
def test_what_the_card_tells_to_type_works(version: Path, demo_run: Path) -> None:
    """Every command and program of it, in the version's folder, the small web being up."""
    blocks = re.findall(
        r"^```(\w+)\n(.*?)^```$", (version / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert [kind for kind, _ in blocks] == ["python", "sql", "sql", "sh", "python"]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "NO_ALBUMENTATIONS_UPDATE": "1",
    }
    with web_of(demo_run):
        for kind, text in blocks:
            line = {
                "python": [sys.executable, "-c", text.replace("PATH_OR_REPO", str(version))],
                "sh": ["bash", "-ec", text],
                "sql": [
                    sys.executable,
                    "-c",
                    f"import duckdb; print(duckdb.execute({text!r}).fetchall()[:3])",
                ],
            }[kind]
            done = subprocess.run(
                line, cwd=version, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{text}\n{done.stderr}"
    rows = pq.read_table(next(version.glob("data/train-*"))).num_rows
    assert len(done.stdout.splitlines()) == rows


# --- without a run ------------------------------------------------------------------------------------------

ROW = {"uid": "0", "url": "http://h.example/0", "org_caption": "a cat", "re_caption": "A cat on a mat."}
MANIFEST = {"version": "0.1.0", "rows": {"train": 1, "preview": 1, "ledger": 4}}
LINKS = {
    "http://h.example/0": "ok", "http://127.0.0.1/1": "hash_mismatch", "http://x.a|b**c`d/2": "dead_link",
    "http://x.an IP address/3": "opted_out",
}  # fmt: skip


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of one row, and of a ledger of four."""
    folder = tmp_path_factory.mktemp("version")
    ledger = [{"uid": f"{n}", "url": url, "status": status} for n, (url, status) in enumerate(LINKS.items())]
    a_version(folder, pa.Table.from_pylist([ROW], SCHEMA), pa.Table.from_pylist(ledger, LEDGER))
    found: dict[str, Any] = json.loads(report.to_json(report.stats(parts(folder))))
    return found


def of_datacomp(**settings: str) -> Recipe:
    return recap_datacomp_1b(metadata="m", captioner="c", clip="c", **settings)  # type: ignore[arg-type]


def front_and_section(text: str, title: str) -> tuple[dict[str, Any], str]:
    """Front matter of a card, and what stands under a heading."""
    (section,) = re.findall(rf"^## {title}\n\n(.*?)\n\n## ", text, re.DOTALL | re.MULTILINE)
    return yaml.safe_load(text.split("---\n")[1]), section


def test_the_table_of_links_tells_alive_from_changed_and_holds_no_markup(statistics: dict[str, Any]) -> None:
    _, section = front_and_section(card(demo(), MANIFEST, statistics, ROW), "Every source row")
    assert section.rpartition("\n\n")[2].splitlines() == [
        "| domain | links | alive, % | changed, % |",
        "| --- | --- | --- | --- |",
        "| an | 1 | 0.0 | 0.0 |",
        "| an IP address | 1 | 0.0 | 100.0 |",
        "| a?b??c?d | 1 | 0.0 | 0.0 |",
        "| example | 1 | 100.0 | 0.0 |",
    ]


def test_statistics_of_an_older_version_still_make_a_card(statistics: dict[str, Any]) -> None:
    links = [{k: v for k, v in row.items() if k != "changed_percent"} for row in statistics["links"]["rows"]]
    older = statistics | {"links": {"rows": links}}
    assert "| example | 1 | 100.0 | - |" in card(demo(), MANIFEST, older, ROW)


@pytest.mark.parametrize("of", ["row", "setting"])
def test_a_string_of_a_megabyte_makes_no_card_of_a_megabyte(statistics: dict[str, Any], of: str) -> None:
    text, recipe, row = "word " * 200_000, demo(), ROW
    if of == "setting":
        caption = recipe.stage("re_caption")
        assert isinstance(caption, Caption)
        longer = replace(caption, prompt=text)
        stages = tuple(longer if stage is caption else stage for stage in recipe.stages)
        recipe = replace(recipe, stages=stages)
    else:
        row = row | {"re_caption": text}
    made = card(recipe, MANIFEST, statistics, row)
    assert len(made) < 20_000
    assert json.dumps(f"{text[:2000]}… (1,000,000 characters)", ensure_ascii=False) in made
    whole = card(demo(), MANIFEST, statistics, ROW | {"re_caption": "x" * 2000})
    assert json.dumps("x" * 2000) in whole


@pytest.mark.parametrize("name", ["", *SOURCE_SETS])
def test_a_card_states_licence_and_source_set(statistics: dict[str, Any], tmp_path: Path, name: str) -> None:
    """To people, to the Hub and to machines; none of them is told a licence that nobody stated."""
    recipe = of_datacomp(source_set=name)
    source = recipe.source
    front, section = front_and_section(card(recipe, MANIFEST, statistics, ROW), "Licence and attribution")
    (tmp_path / "croissant.json").write_text(croissant(recipe, MANIFEST))
    described = mlcroissant.Dataset(jsonld=tmp_path / "croissant.json").metadata
    assert described.ctx.issues.errors == set()
    about = json.loads((tmp_path / "croissant.json").read_text())
    if source is None:
        assert front["license"] == about["license"] == "unknown"
        assert "`source_set=...`" in section
        assert "`license=...`" in section
        assert "source_datasets" not in front
        assert "isBasedOn" not in about
        return
    assert source == SOURCE_SETS[name]
    assert front["license"] == recipe.license == source.license
    assert front["source_datasets"] == ["extended"]
    assert front.get("license_link") == (source.url if source.license == "other" else None)
    assert f"{source.name}, <{source.url}>" in section
    assert source.citation in card(recipe, MANIFEST, statistics, ROW).partition("## Citing")[2]
    assert (about["isBasedOn"]["name"], about["isBasedOn"]["url"]) == (source.name, source.url)
    stated = {"cc-by-4.0": "https://creativecommons.org/licenses/by/4.0/", "other": source.url}
    assert described.license == [stated.get(source.license, source.license)]
    assert {"cc-by-4.0": "cc-by-4.0", "other": "terms of", "unknown": "no licence"}[source.license] in section


def test_captions_may_have_another_licence_than_their_source_set(statistics: dict[str, Any]) -> None:
    recipe = of_datacomp(source_set="cc3m", license="cc0-1.0")
    front, section = front_and_section(card(recipe, MANIFEST, statistics, ROW), "Licence and attribution")
    assert (front["license"], "license_link" in front) == ("cc0-1.0", False)
    assert section.startswith("Captions and metadata: cc0-1.0.")
    assert "Conceptual Captions" in section
    assert demo().license == "cc0-1.0"


def test_a_source_set_that_is_not_known_is_named_with_those_that_are() -> None:
    settings = ["metadata=m", "captioner=c", "clip=c", "source_set=datcomp"]
    with pytest.raises(RecipeError, match=r"no source set 'datcomp'\n.*datacomp, laion, cc3m, capsfusion"):
        resolve("recap_datacomp_1b", settings)
    assert resolve("recap_datacomp_1b", [*settings[:3], "source_set=laion"]).source == SOURCE_SETS["laion"]


def test_a_recipe_json_from_before_source_sets_loads_and_stays_as_it_is() -> None:
    """Byte for byte: a version that only loses rows keeps its recipe."""
    stages = json.loads(of_datacomp().to_json())["stages"]
    about = {"name": "r", "title": "t", "license": "cc-by-4.0", "description": "d"}
    text = json.dumps({**about, "stages": stages}, indent=2) + "\n"
    recipe = Recipe.from_json(text)
    assert (recipe.license, recipe.source) == ("cc-by-4.0", None)
    assert recipe.to_json() == text


def test_a_recipe_json_holds_its_source_set() -> None:
    recipe = of_datacomp(source_set="datacomp")
    data = json.loads(recipe.to_json())
    assert list(data) == ["name", "title", "license", "description", "source", "stages"]
    assert list(data["source"]) == ["name", "url", "license", "citation"]
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert isinstance(Recipe.from_json(recipe.to_json()).source, SourceSet)
    source = data["source"]
    for wrong in ({"name": "x"}, source | {"colour": "red"}, source | {"url": 5}, "datacomp"):
        with pytest.raises(RecipeError, match="source"):
            Recipe.from_json(json.dumps(data | {"source": wrong}))
