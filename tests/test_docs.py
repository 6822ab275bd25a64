"""The README names what there is: commands, files, statuses, columns."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import click
import pytest
from conftest import ROOT, recap

from builder.cli import main
from builder.core import Status

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", list(main.commands))
def test_every_command_has_help_and_stands_in_the_readme(name: str) -> None:
    command = main.commands[name]
    assert command.help
    assert f"recap {name}" in README
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name not in ("help", "as_json", "run"):
            assert parameter.help, f"{name} --{parameter.name}"


def test_every_command_of_the_readme_exists() -> None:
    named = set(re.findall(r"\brecap ([a-z]+(?:-[a-z]+)*)", README))
    assert named - set(main.commands) == set()


FOLDERS = ("builder", "analysis", "cards", "recipes", "tests", "benchmarks")


def test_the_tree_of_the_readme_is_the_tree() -> None:
    """Every module stands under its folder, and whatever stands there is there."""
    tree = next(
        block
        for block in re.findall(r"^```\n(.*?)^```$", README, re.M | re.S)
        if block.startswith("builder/")
    )
    folder, listed = "", dict[str, set[str]]()
    for line in tree.splitlines():
        if head := re.match(r"(\w+)/ ", line):
            folder = head[1]
        names = re.findall(
            r"(?<![\w*/.])[\w/]+\.(?:py|sql)\b|(?<![\w*/.])\w+/(?=\s)",
            line[len(folder) + 2 :] if head else line,
        )
        listed.setdefault(folder, set()).update(names)
    assert set(listed) == set(FOLDERS)
    for name, there in listed.items():
        assert [
            each for each in there if not (ROOT / name / each).exists() and not [*(ROOT / name).rglob(each)]
        ] == [], name
    for name in ("builder", "analysis", "cards"):
        assert {path.name for path in (ROOT / name).rglob("*.py")} - {"__init__.py"} - listed[
            name
        ] == set(), name
    assert {path.name for path in (ROOT / "recipes").glob("*.py")} - {"__init__.py"} - listed[
        "recipes"
    ] == set()


DOCUMENTS = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not {".venv", ".uv", "node_modules"} & set(path.relative_to(ROOT).parts)
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_is_there(document: Path) -> None:
    """Files in backquotes and targets of links, and no place that was left open."""
    text = document.read_text(encoding="utf-8")
    files = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`", text)
    links = [
        link
        for link in re.findall(r"\]\(([^)\s]+)\)", text)
        if "://" not in link and not link.startswith("#")
    ]
    assert [name for name in files if not (ROOT / name).exists()] == []
    assert [name for name in links if not (document.parent / name.partition("#")[0]).exists()] == []
    assert re.findall(r"@@|\?\?\?|\b(?:TODO|TBD|FIXME|XXX)\b|\bN(?:\.N)+\b", text) == []


def test_every_status_is_explained() -> None:
    listed = re.search(r"a `status` from a closed list:(.*?)\. ", " ".join(README.split()))
    assert listed
    assert re.findall(r"`(\w+)`", listed[1]) == list(Status)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["build", "dmo"], "there is no recipe 'dmo'"),
        (["build", "demo", "rows_per_shrd=5"], "did you mean rows_per_shard?"),
        (["build", "demo", "rows_per_shard=many"], "rows_per_shard"),
        (["build", "demo", "download.timeot_s=5"], "did you mean timeout_s?"),
        (["build", "demo", "downlod.timeout_s=5"], "no stage 'downlod'"),
        (["build", "recap_datacomp_1b"], "needs metadata, captioner, clip"),
        (["publish", "runs", "ftp://me/demo", "--version", "0.1.0"], "is no target"),
    ],
)
def test_a_users_mistake_is_one_line_and_the_next_command(
    arguments: list[str], expected: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cwd")
    (folder / "runs").mkdir()
    done = recap(*arguments, cwd=folder, check=2)
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert done.stdout == ""


def imports(path: Path, names: set[str]) -> set[str]:
    """Modules of ours that a module imports, wherever in it, but not for types only."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.ImportFrom) and child.module:
                named = {child.module, *(f"{child.module}.{alias.name}" for alias in child.names)}
                found.update(named & names)
            walk(child)

    walk(ast.parse(path.read_text(encoding="utf-8")))
    return found


def test_there_is_no_circle_of_files() -> None:
    paths = [path for name in ("builder", "analysis", "cards") for path in (ROOT / name).rglob("*.py")]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    graph = {name: imports(path, set(modules)) for name, path in modules.items()}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names them
    of_builder = {name for module in graph if module.startswith("analysis") for name in graph[module]}
    below = {
        "builder.columns",
        "builder.errors",
        "builder.files",
        "builder.sql",
        "builder.model",
    }  # it takes files, never places
    assert {name for name in of_builder if name.startswith("builder.")} <= below
