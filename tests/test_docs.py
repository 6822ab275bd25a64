"""The README names what there is: commands, files, statuses, columns."""

from __future__ import annotations

import re

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
    assert set(re.findall(r"\brecap ([a-z]+)", README)) <= set(main.commands) | {"build"}


def test_the_tree_of_the_readme_is_the_tree() -> None:
    for path in [*(ROOT / "builder").glob("*.py"), *(ROOT / "analysis").glob("*.py"), *(ROOT / "cards").glob("*.py")]:
        assert path.name in README or path.name == "__init__.py", path


def test_every_status_is_explained() -> None:
    assert [status for status in Status if f"`{status}`" not in README] == []


def test_no_placeholder_is_left_in_the_documents() -> None:
    for path in [*ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md")]:
        assert "@@" not in path.read_text(encoding="utf-8"), path


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
def test_a_users_mistake_is_one_line_and_the_next_command(arguments: list[str], expected: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("cwd")
    (folder / "runs").mkdir()
    done = recap(*arguments, cwd=folder, check=2)
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert done.stdout == ""
