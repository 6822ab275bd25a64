"""Publish, verify and remove rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from builder.commands.options import (
    as_json_option,
    dry_run_option,
    path_type,
    rebase_option,
    run_argument,
    version_option,
)
from builder.errors import UserError, command
from builder.shown import echo, print_


@click.command()
@run_argument
@click.argument("target")
@version_option
@dry_run_option
@rebase_option
@as_json_option
def publish(run: Path | str, target: str, version: str, dry_run: bool, rebase: bool, as_json: bool) -> None:
    """Publish a finished run as a version in TARGET, a folder or hf://datasets/user/name.

    The same command again, after whatever crash, finishes the job or says that it is done.
    """
    from builder.versions.publish import publish as publish_run

    result = publish_run(run, target, version, dry_run=dry_run, rebase=rebase)
    say_published(result, target, version, as_json)


def say_published(result: Any, target: str, version: str, as_json: bool, removal: Any = None) -> None:
    said = "published" if result.new else "is there already, byte for byte; nothing to do"
    said = "would be published" if result.plan else said
    lines = [f"{result.place}: {result.rows} rows, {said}"]
    lines += [f"  {name:<16} {value}" for name, value in result.plan.items()]
    if not result.plan:
        load = json.dumps(result.place)
        if target.startswith("hf://"):
            load = f'"{target.removeprefix("hf://datasets/")}", revision="v{version}"'
        lines += [f"  at {result.commit}"] if result.commit else []
        lines += [
            "load it:",
            f"  datasets.load_dataset({load})",
            f"  {command('recap', 'sql', f'{target}@v{version}', 'from published limit 5')}",
            f"  {command('recap', 'verify', f'{target}@v{version}')}",
        ]
    about = {}
    if removal:
        about = {
            "removed": removal.rows,
            "removed_of_ledger": removal.ledger_rows,
            "matched_nothing": removal.matched_nothing,
        }
        gone = "would be removed" if result.plan else "removed"
        went = [f"  {removal.rows} rows {gone}, and {removal.ledger_rows} that were in the ledger only"]
        later = "later versions will not have it either"
        for kind, values in removal.matched_nothing.items():
            went += [f"  no row has the {kind} {value[:200]}; {later}" for value in values[:20]]
            went += [f"  and {len(values) - 20} more of {kind}"] if values[20:] else []
        lines[1:1] = went
    print_(vars(result) | about, as_json, "\n".join(lines))


@click.command()
@click.argument("place", metavar="TARGET@v1.2.0")
@as_json_option
def verify(place: str, as_json: bool) -> None:
    """Read a published version once, every byte, and hold it against its manifest. Exit status 1: it
    differs.
    """
    from builder.versions.verify import verify as verify_version

    result = verify_version(place)
    problems = result["problems"]
    said = f"{place}: {result['files']} files, {result['bytes']:,} bytes, {len(problems)} problems"
    print_(result, as_json, "\n".join([said, *problems]))
    sys.exit(1 if problems else 0)


@click.command()
@click.argument("target", metavar="TARGET[@v1.2.0]")
@click.option("--uids", type=path_type, help="File of uids, one a line.")
@click.option("--sha256", type=path_type, help="File of images' sha256.")
@click.option("--urls", type=path_type, help="File of URLs.")
@click.option("--domains", type=path_type, help="File of domains; subdomains go with them.")
@version_option
@dry_run_option
@rebase_option
@as_json_option
def remove(
    target: str, version: str, dry_run: bool, rebase: bool, as_json: bool, **files: Path | None
) -> None:
    """Publish a new version of TARGET without the rows that the files name; later versions cannot bring them
    back.
    """
    from builder.files import read_lines
    from builder.versions.remove import remove as remove_rows
    from builder.versions.targets import split, target_of
    from builder.versions.version import by_number

    kinds = {"uids": "uid", "sha256": "sha256", "urls": "url", "domains": "domain"}
    given = {kinds[name]: path for name, path in files.items() if path}
    lines = {kind: map(str.strip, read_lines(path)) for kind, path in given.items()}
    values = {kind: [line for line in of_kind if line] for kind, of_kind in lines.items()}
    if not any(values.values()):
        named = f" in {' '.join(map(str, given.values()))}" if given else ""
        example = command("recap", "remove", target, "--uids", "FILE", "--version", version)
        raise UserError(f"nothing to remove was named{named}", f"for example: {example}")
    removal = remove_rows(target, version, values, dry_run=dry_run, rebase=rebase)
    say_published(removal.published, split(target)[0], version, as_json, removal)
    if not as_json and not dry_run:
        where = target_of(split(target)[0])
        echo("Older versions still hold the rows; to delete those:")
        for older in where.versions():
            if by_number(older) < by_number(version):
                echo(f"  {where.how_to_delete(older)}")
