"""What is removed, where things go, and names that a shell or a database would take for something else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from hostile.case import Case, Outcome, Place, Situation, either
from hostile.documents import DATA, removing

# --- lists of what is to be removed -------------------------------------------------------------------------------------


def removal() -> Iterator[Case]:
    def make(what: Callable[[Path], object], name: str = "list.txt") -> Callable[[Situation], Path]:
        def made(s: Situation) -> Path:
            what(s.here / name)
            return s.here / name

        return made

    files: list[tuple[str, str, Callable[[Situation], object], Place | tuple[Place, ...]]] = [
        ("a file that is not there", "--uids", lambda s: s.here / "nowhere.txt", "nowhere.txt"),
        ("an empty file", "--uids", make(lambda path: path.touch()), "list.txt"),
        ("a file of white space", "--urls", make(lambda path: path.write_text("\n  \n\t\n")), "list.txt"),
        ("latin-1", "--urls", make(lambda path: path.write_bytes(b"http://a.example/caf\xe9\n")), "list.txt"),
        ("utf-16", "--uids", make(lambda path: path.write_text("0123\n" * 9, encoding="utf-16")), "list.txt"),
        ("binary", "--sha256", make(lambda path: path.write_bytes(bytes(range(256)))), "list.txt"),
        ("a folder", "--uids", make(lambda path: path.mkdir()), "list.txt"),
        ("a FIFO", "--uids", make(os.mkfifo), "list.txt"),
        ("a link to itself", "--domains", make(lambda path: path.symlink_to("list.txt")), "list.txt"),
        ("/dev/null", "--uids", lambda s: "/dev/null", "/dev/null"),
        ("a uid that nobody has", "--uids", make(lambda path: path.write_text("ffffffffffffffffffffffffffffffff\n")), "f" * 32),
        ("a value of 100,000 characters and one of colours", "--uids", make(lambda path: path.write_text("u" * 100_000 + "\n\x1b[31mred\n")), "uuuu"),
        ("10,000 values that nobody has", "--uids", make(lambda path: path.write_text("".join(f"nobody-{n}\n" for n in range(10_000)))), "nobody-0"),
    ]  # fmt: skip
    for name, option, file, place in files:
        yield Case(
            f"remove: {name}",
            lambda s, option=option, file=file: [
                "remove",
                s.target(),
                option,
                file(s),
                "--version",
                "0.2.0",
                "--dry-run",
            ],
            place,
            code=(0, 2)
            if "that nobody" in name or name.startswith("a value")
            else 2,  # it may be kept out of what follows
            also=few_lines,
        )

    def some(s: Situation) -> list[object]:
        arguments = removing(s)
        s.file("uids.txt", (s.here / "uids.txt").read_text() + "nobody-has-this\n")
        return [*arguments, "--dry-run"]

    def all_rows(s: Situation) -> list[object]:
        uids = pq.read_table(s.target() / "v0.1.0" / DATA)["uid"].to_pylist()
        return [
            "remove",
            s.here / "published",
            "--uids",
            s.file("uids.txt", "\n".join(uids)),
            "--version",
            "0.2.0",
        ]

    def named_in(s: Situation, outcome: Outcome) -> None:
        assert "nobody-has-this" in outcome.out + outcome.err

    yield Case("remove: some that nobody has", some, (), code=(0, 2), also=named_in)
    yield Case("remove: every row", all_rows, "0.1.0")
    yield Case("remove: nothing", lambda s: ["remove", s.target(), "--version", "0.2.0"], "--uids")
    yield Case(
        "remove: from nothing",
        lambda s: ["remove", s.here / "nowhere", "--uids", s.file("u", "x"), "--version", "0.2.0"],
        "nowhere",
    )
    yield Case(
        "remove: from a run",
        lambda s: ["remove", s.run(), "--uids", s.file("u", "x"), "--version", "0.2.0"],
        "run",
    )
    for number in ("0.1.0", "0.0.9", "01.2.3", "", "../0.2.0"):
        yield Case(
            f"remove: as version {number!r}",
            lambda s, number=number: removing(s, number),
            number.strip() or "version",
        )
    yield Case("remove: from another version", lambda s: _at(removing(s), "v9.9.9"), "9.9.9")


def few_lines(_: Situation, outcome: Outcome) -> None:
    assert len(outcome.out.splitlines()) < 60
    assert max(map(len, outcome.out.splitlines()), default=0) <= 1000


VERSIONS = (
    "01.2.3",
    "1.2",
    "1.2.3.4",
    "v1.2.3",
    "",
    " 1.2.3",
    "1.2.3-rc1",
    "-1.2.3",
    "latest",
    "../0.2.0",
    "٠.١.٢",
    "1.2.3\n",
)


def _at(arguments: list[object], version: str) -> list[object]:
    return [arguments[0], f"{arguments[1]}@{version}", *arguments[2:]]


# --- targets ------------------------------------------------------------------------------------------------------------


def targets() -> Iterator[Case]:
    def publish(
        target: Callable[[Situation], object] | str, version: str = "0.1.0"
    ) -> Callable[[Situation], list[object]]:
        return lambda s: [
            "publish",
            s.run(),
            target if isinstance(target, str) else target(s),
            "--version",
            version,
        ]

    for version in VERSIONS:
        arguments = publish(lambda s: s.here / "out", version)
        yield Case(
            f"publish: as version {version!r}",
            arguments,
            version.strip() or "version",
            also=nothing_at("out"),
        )
    into: list[tuple[str, Callable[[Situation], object] | str, Place]] = [
        ("nothing", "", either("target", "TARGET", "''")),
        ("a file", lambda s: s.file("out", "somebody's"), "/out"),
        ("below a file", lambda s: s.file("out", "somebody's") / "deeper", "/out"),
        ("/dev/null", "/dev/null", "/dev/null"),
        ("/proc", "/proc/out", "/proc/out"),
        ("/sys", "/sys/fs/out", "/sys/fs/out"),
        ("a link to itself", lambda s: (s.here / "out").symlink_to("out") or s.here / "out", "/out"),
        ("a name that is too long", lambda s: s.here / ("n" * 300), "nnnn"),
        ("S3", "s3://bucket/out", "s3://bucket/out"),
        ("the Hub without a name", "hf://datasets/x", "hf://datasets/x"),
        ("the Hub with too many names", "hf://datasets/a/b/c", "hf://datasets/a/b/c"),
        ("the Hub with an empty name", "hf://datasets/a/", "hf://datasets/a/"),
        ("the Hub's models", "hf://models/a/b", "hf://models/a/b"),
        ("the Hub with odd characters", "hf://datasets/us er/na?me", "us er/na?me"),
        ("the Hub with colours", "hf://datasets/user/\x1b[31mred", "red"),
        ("a version of a target", lambda s: f"{s.here}/out@v0.3.0", "@v0.3.0"),
    ]
    for name, target, place in into:
        yield Case(f"publish: into {name}", publish(target), place, real=name in ("/dev/null", "/proc"))
    yield Case("publish: other bytes of a version", _other_bytes, ("v0.1.0", "0.1.1"))
    yield Case(
        "publish: an empty folder",
        lambda s: ["publish", _folder(s, "empty"), s.here / "out", "--version", "0.1.0"],
        "/empty",
    )
    yield Case(
        "publish: a version",
        lambda s: ["publish", s.version(), s.here / "out", "--version", "0.1.0"],
        "v0.1.0",
    )
    yield Case(
        "publish: a run that is not there",
        lambda s: ["publish", s.here / "nowhere", s.here / "out", "--version", "0.1.0"],
        "nowhere",
    )
    yield Case(
        "publish: /dev/null",
        lambda s: ["publish", "/dev/null", s.here / "out", "--version", "0.1.0"],
        "/dev/null",
    )
    yield Case("publish: an unfinished run", _unfinished, ("run", "recap build"))
    for command in ("verify", "card", "explore", "stats", "sql"):
        more: Sequence[object] = {"explore": ["--out", "page"], "sql": ["select 1"]}.get(command, [])
        for name, what, place in (
            ("a place that is not there", lambda s: s.here / "nowhere", "nowhere"),
            ("an empty folder", lambda s: _folder(s, "empty"), "/empty"),
            ("a version that is not there", lambda s: f"{s.target()}@v9.9.9", "9.9.9"),
            (
                "an empty name",
                lambda s: "",
                either("''", '""', "PLACE", "TARGET", "place", "neither", "no name"),
            ),
            ("the Hub without a name", lambda s: "hf://datasets/x", "hf://datasets/x"),
        ):
            yield Case(
                f"{command}: {name}",
                lambda s, command=command, what=what, more=more: [command, what(s), *more],
                place,
            )
    yield Case("verify: a file", lambda s: ["verify", s.file("f", "x")], "/f")
    yield Case("verify: a run", lambda s: ["verify", s.run()], "run")
    yield Case("status: a version", lambda s: ["status", s.version()], "v0.1.0")
    yield Case(
        "build: into a run of another recipe",
        lambda s: ["build", "demo", f"web={s.here}", "--run", _of_another(s)],
        ("/run", "--run"),
    )
    yield Case(
        "build: into somebody's folder",
        lambda s: ["build", "demo", f"web={s.here}", "--run", _somebodys(s)],
        ("photos", "--run"),
    )
    for command in ("build", "status"):
        run = ["demo", "web=x", "--run"] if command == "build" else []
        yield Case(
            f"{command}: a run on an object store",
            lambda s, more=(command, *run): [*more, "s3://bucket/run"],
            "s3://bucket/run",
        )
    yield Case(
        "build: into /proc", lambda s: ["build", "demo", f"web={s.here}", "--run", "/proc/run"], "/proc/run"
    )
    yield Case(
        "build: into /sys",
        lambda s: ["build", "demo", f"web={s.here}", "--run", "/sys/fs/run"],
        "/sys/fs/run",
    )
    yield Case(
        "build: below a file",
        lambda s: ["build", "demo", f"web={s.here}", "--run", s.file("f", "x") / "run"],
        "/f",
    )
    yield Case(
        "build: into a link to itself",
        lambda s: ["build", "demo", f"web={s.here}", "--run", _loop(s)],
        "/loop",
    )


def nothing_at(name: str) -> Callable[[Situation, Outcome], None]:
    def check(s: Situation, _: Outcome) -> None:
        assert not (s.here / name).exists()

    return check


def _folder(s: Situation, name: str) -> Path:
    (s.here / name).mkdir()
    return s.here / name


def _loop(s: Situation) -> Path:
    (s.here / "loop").symlink_to("loop")
    return s.here / "loop"


def _somebodys(s: Situation) -> Path:
    return s.file("photos/holiday.jpg", "somebody's").parent


def _of_another(s: Situation) -> Path:
    run = s.run()
    s.file(run / "recipe.json", json.loads((run / "recipe.json").read_text()) | {"name": "another"})
    return run


def _unfinished(s: Situation) -> list[object]:
    run = s.run()
    (run / "score/00000/00001.json").unlink()
    return ["publish", run, s.here / "out", "--version", "0.1.0"]


def _other_bytes(s: Situation) -> list[object]:
    manifest = s.target() / "v0.1.0/manifest.json"
    s.file(manifest, manifest.read_bytes() + b"\n")
    return ["publish", s.run(), s.here / "published", "--version", "0.1.0"]


# --- pages and subsets --------------------------------------------------------------------------------------------------


def outputs() -> Iterator[Case]:
    def page(out: Callable[[Situation], object]) -> Callable[[Situation], list[object]]:
        return lambda s: ["explore", s.version(), "--out", out(s)]

    def subset(out: Callable[[Situation], object]) -> Callable[[Situation], list[object]]:
        return lambda s: ["select", s.version(), "no_filter", "--out", out(s)]

    for command, made in (("explore", page), ("select", subset)):
        for name, out, place in (
            ("a file", lambda s: s.file("out", "somebody's"), "/out"),
            ("below a file", lambda s: s.file("out", "somebody's") / "deeper", "/out"),
            ("/dev/null", lambda s: "/dev/null", "/dev/null"),
            ("/proc", lambda s: "/proc/page", "/proc/page"),
            ("/sys", lambda s: "/sys/fs/page", "/sys/fs/page"),
            ("a link to itself", _loop, "/loop"),
            ("a name that is too long", lambda s: s.here / ("n" * 300), "nnnn"),
        ):
            yield Case(f"{command}: into {name}", made(out), place)
    yield Case("explore: into somebody's folder", page(_somebodys), "photos", real=True)
    yield Case(
        "explore: into the version itself",
        lambda s: ["explore", s.version(), "--out", s.here / "published/v0.1.0"],
        "v0.1.0",
    )
    yield Case(
        "explore: a column that is none",
        lambda s: ["explore", s.version(), "--out", s.here / "page", "--captions", "nope"],
        "nope",
    )
    yield Case(
        "select: a folder where the subset goes",
        lambda s: ["select", s.version(), "no_filter", "--out", _blocked(s)],
        "subset",
    )


def _blocked(s: Situation) -> Path:
    (s.here / "out/subset.npy/x").mkdir(parents=True)
    return s.here / "out"


# --- names that are no patterns -----------------------------------------------------------------------------------------

NAMES = (
    "run[1]",
    "run 1",
    "run'1",
    'run"1',
    "run*",
    "run{1,2}",
    "größe 猫",
    "a=1",
    "n" * 200,
    "%s",
    "run@v1",
    "two\nlines",
    "\\run",
)


def odd_names() -> Iterator[Case]:
    """Each name beside one that it would match, were it a pattern: what is read is what was named."""

    def beside(s: Situation, name: str) -> Path:
        run = s.run(name)
        for other in ("run1", "run2", "run 2"):
            shutil.copytree(run, s.here / other, copy_function=os.link)
            for output in (s.here / other / "select" / "00000").glob("00000.????????.parquet"):
                s.file(output, b"another run's")
        return run

    for name in NAMES:
        yield Case(
            f"{ascii(name)[:20]} is a run: sql",
            lambda s, name=name: ["sql", beside(s, name), "select count(*) from ledger"],
            "240",
            code=0,
        )
    for name in ("run[1]", "run'1", "a=1"):
        yield Case(
            f"{ascii(name)[:20]} is a run: diff",
            lambda s, name=name: ["diff", beside(s, name), s.target()],
            "0 added, 0 removed",
            code=0,
        )
        yield Case(
            f"{ascii(name)[:20]} is a run: status",
            lambda s, name=name: ["status", beside(s, name)],
            "select     1 shards done, 0 left",
            code=0,
        )
    for name in ("out[1]", "a=1"):
        yield Case(
            f"{name!a} is a target: verify",
            lambda s, name=name: ["verify", s.target(name)],
            "0 problems",
            code=0,
        )
        yield Case(
            f"{name!a} is a target: diff",
            lambda s, name=name: ["diff", f"{s.target(name)}@v0.1.0", s.run()],
            "0 added, 0 removed",
            code=0,
        )
    for name in ("page[1]", "größe 猫"):
        yield Case(
            f"{name!a} is a page",
            lambda s, name=name: ["explore", s.version(), "--out", s.here / name],
            "index.html",
            code=0,
        )
    for name in ("t[1].parquet", "t'.parquet", "t*.parquet", "a=1.parquet"):
        yield Case(f"{name!a} is a table: sql", lambda s, name=name: _of_table(s, name), "3", code=0)


def _of_table(s: Situation, name: str) -> list[object]:
    table: Mapping[str, Any] = {"text": ["one", "two", "three"]}
    s.parquet("t1.parquet", {"text": ["another's"]})
    return ["sql", s.parquet(name, table), "select count(*) from published"]


def cases() -> Iterator[Case]:
    yield from removal()
    yield from targets()
    yield from outputs()
    yield from odd_names()
