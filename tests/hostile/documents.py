"""The files that describe a run and a version, and the records of a run's shards: whatever may stand in their place."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hostile.case import Case, Json, Outcome, Place, Situation, either

DATA = "data/train-00000-of-00001.parquet"
Break = Callable[[Path], object]


def put(content: bytes | str | Json) -> Break:
    """Another content; a function is given the old one."""

    def broken(path: Path) -> None:
        new = content(path.read_bytes()) if callable(content) else content
        new = new if isinstance(new, bytes | str) else json.dumps(new)
        path.unlink(missing_ok=True)
        path.write_bytes(new.encode() if isinstance(new, str) else new)

    return broken


def instead(make: Callable[[Path], object]) -> Break:
    """Something else than a file."""

    def broken(path: Path) -> None:
        path.unlink(missing_ok=True)
        make(path)

    return broken


def _nan(old: bytes) -> bytes:
    return re.sub(rb": -?\d+\.?\d*(?=[,\n}])", b": NaN", old, count=1)


BROKEN: Mapping[str, Break] = {
    "a list": put([]),
    "a string": put(b'"recipe"'),
    "null": put(b"null"),
    "a number": put(b"5"),
    "an empty object": put({}),
    "nested 10,000 deep": put(b"[" * 10_000 + b"]" * 10_000),
    "nested 10,000 deep in objects": put(b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
    "a number of 10,000 digits": put(b'{"name": ' + b"9" * 10_000 + b"}"),
    "not UTF-8": put(b'{"name": "caf\xe9"}'),
    "utf-16": put(lambda old: old.decode().encode("utf-16")),
    "cut off": put(lambda old: old[: len(old) // 2]),
    "empty": put(b""),
    "NULs": put(lambda old: bytes(len(old))),
    "50 MB of spaces": put(b" " * 50_000_000),
    "not a number": put(_nan),
    "a FIFO": instead(os.mkfifo),
    "a folder": instead(lambda path: path.mkdir()),
    "a link to /etc/passwd": instead(lambda path: path.symlink_to("/etc/passwd")),
    "a link to nowhere": instead(lambda path: path.symlink_to("nowhere")),
    "a link to itself": instead(lambda path: path.symlink_to(path.name)),
    "gone": instead(lambda path: None),
}
SOME = (
    "a list",
    "null",
    "nested 10,000 deep",
    "not UTF-8",
    "a FIFO",
    "a folder",
    "a link to /etc/passwd",
    "empty",
)
FEW = ("a list", "an empty object", "a FIFO", "a folder")
TWO = ("a list", "a FIFO")
MANY = (*SOME, "cut off", "not a number", "gone")


def tells_nothing_of_it(_: Situation, outcome: Outcome) -> None:
    assert "root:" not in outcome.out + outcome.err
    assert "/bin/" not in outcome.err


def unless_gone(file: str, kind: str) -> Place:
    return (
        either(file, "v0.1.0 has no version")
        if kind in ("gone", "a link to nowhere", "a link to itself")
        else file
    )


def broken(
    kinds: tuple[str, ...] | Mapping[str, Break],
    file: str,
    commands: Mapping[str, Callable[[Situation], list[object]]],
    **more: Any,
) -> Iterator[Case]:
    """Each command on each kind of a broken file."""
    for command, prepare in commands.items():
        for kind in kinds:
            also = tells_nothing_of_it if "passwd" in kind else None
            real = (file, command, kind) in (
                ("recipe.json", "status", "a FIFO"),
                ("manifest.json", "verify", "a FIFO"),
            )
            yield Case(
                f"{file} is {kind}: {command}",
                partial(_broken, BROKEN[kind], file, prepare),
                unless_gone(file.rpartition("/")[2], kind),
                also=also,
                real=real,
                **more,
            )


def _broken(
    breaks: Break, file: str, prepare: Callable[[Situation], list[object]], s: Situation
) -> list[object]:
    arguments = prepare(s)
    version, run = s.here / "published/v0.1.0", s.here / "run"
    folder = version if version.exists() else run
    breaks(next(folder.glob(file)) if "*" in file else folder / file)
    return arguments


def removing(s: Situation, number: str = "0.2.0") -> list[object]:
    uid = pq.read_table(s.target() / "v0.1.0" / DATA)["uid"][0].as_py()
    return ["remove", s.here / "published", "--uids", s.file("uids.txt", f"{uid}\n"), "--version", number]


def on_version(command: str, *more: object) -> Callable[[Situation], list[object]]:
    return lambda s: [command, *more, s.version()]


VERIFY = {"verify": on_version("verify")}
CHECK = {"card --check": on_version("card", "--check")}
REMOVE = {"remove": removing}
EXPLORE = {"explore": lambda s: ["explore", s.version(), "--out", s.here / "page"]}
STATUS = {"status": lambda s: ["status", s.run()]}


def whole_files() -> Iterator[Case]:
    yield from broken(BROKEN, "recipe.json", STATUS)
    yield from broken(
        MANY, "recipe.json", {"plan": lambda s: ["plan", s.run() / "recipe.json", "--run", s.here / "other"]}
    )
    yield from broken(TWO, "recipe.json", {
        "sql": lambda s: ["sql", s.run(), "from published"], "stats": lambda s: ["stats", s.run()], "card": lambda s: ["card", s.run()],
        "publish": lambda s: ["publish", s.run(), s.here / "out", "--version", "0.1.0"],
    })  # fmt: skip
    yield from broken(
        FEW, "recipe.json", {"build": lambda s: ["build", "demo", f"web={s.here}", "--run", s.run()]}
    )
    yield from broken(FEW, "recipe.json", VERIFY)
    yield from broken(TWO, "recipe.json", REMOVE | CHECK | EXPLORE)
    yield from broken(BROKEN, "manifest.json", VERIFY)
    yield from broken(FEW, "manifest.json", REMOVE)
    yield from broken(TWO, "manifest.json", CHECK | EXPLORE)
    yield from broken(SOME, "stats.json", CHECK)
    for file in ("stats.json", "README.md", "croissant.json"):  # not what the manifest says: a difference
        yield from broken(("a list", "a FIFO", "a folder", "a link to itself", "gone"), file, VERIFY, code=1)
    for file in ("README.md", "croissant.json"):
        yield from broken(("not UTF-8", "a FIFO", "gone"), file, CHECK, code=(1, 2))
    for kind in ("a list", "a FIFO", "a link to itself"):
        yield from broken((kind,), "tombstones.parquet", REMOVE)
        yield from broken((kind,), "tombstones.parquet", VERIFY, code=1)
        yield from broken((kind,), "tombstones.parquet", {"publish": _publishing_again})
    yield from broken(("a FIFO",), "manifest.json", {"publish": _publishing_again}, code=(0, 2))
    for kind in (
        "empty",
        "cut off",
        "NULs",
        "a FIFO",
        "a folder",
        "a link to /etc/passwd",
        "a link to nowhere",
        "gone",
    ):
        yield from broken((kind,), DATA, VERIFY, code=1)
    for kind in ("cut off", "a FIFO"):
        yield from broken((kind,), DATA, {
            "sql": lambda s: ["sql", s.version(), "select max(re_caption) from published"], "explore": EXPLORE["explore"], "remove": removing,
            "diff": lambda s: ["diff", s.target(), s.here / "published"], "select": lambda s: ["select", s.version(), "no_filter", "--out", s.here / "o"],
        })  # fmt: skip
        yield from broken((kind,), DATA, CHECK, code=(1, 2))


def _publishing_again(s: Situation) -> list[object]:
    return ["publish", s.run(), s.target(), "--version", "0.2.0"]


# --- fields -------------------------------------------------------------------------------------------------------------


def changed(path: str, value: Json = None, *, gone: bool = False) -> Break:
    """Another value at `rows.train` or `stages.0.files` of a JSON; or none. `/` instead of dots where a name has dots."""
    parts = path.split("/" if "/" in path else ".")

    def change(old: bytes) -> Json:
        data = place = json.loads(old)
        for part in parts[:-1]:
            place = place[int(part) if isinstance(place, list) else part.replace("|", "/")]
        key = int(parts[-1]) if isinstance(place, list) else parts[-1].replace("|", "/")
        if gone:
            del place[key]
        else:
            place[key] = value
        return data

    return put(change)


def fields() -> Iterator[Case]:
    train, prepare = DATA.replace("/", "|"), on_version("verify")
    readme = "files/README.md"
    manifest: list[tuple[str, Break, Place | tuple[Place, ...], int | tuple[int, ...]]] = [
        *((f"without {name}", changed(name, gone=True), name, 2) for name in ("version", "rows", "bytes", "files", "name")),
        ("without rows.train", changed("rows.train", gone=True), "train", 2),
        ("without a file's sha256", changed(f"files/{train}/sha256", gone=True), "sha256", 2),
        ("without a file's bytes", changed(f"{readme}/bytes", gone=True), "bytes", 2),
        ("without a table's rows", changed(f"files/{train}/rows", gone=True), "rows", 2),
        ("files is a list", changed("files", ["README.md"]), "files", 2),
        ("files is null", changed("files"), "files", 2),
        ("files is empty", changed("files", {}), "manifest", (1, 2)),
        ("a file is a number", changed(readme, 5), "README.md", 2),
        ("sha256 is a number", changed(f"{readme}/sha256", 5), "sha256", 2),
        ("sha256 is none", changed(f"{readme}/sha256", "xyz"), "README.md", (1, 2)),
        ("bytes is text", changed(f"{readme}/bytes", "many"), "bytes", 2),
        ("bytes is less than none", changed(f"{readme}/bytes", -1), "README.md", (1, 2)),
        ("rows.train is text", changed("rows.train", "many"), "train", 2),
        ("version is no version", changed("version", "one"), "version", (1, 2)),
        ("version is another's", changed("version", "9.9.9"), "9.9.9", (1, 2)),
        ("name is a list", changed("name", []), "name", 2),
        ("another sha256 of a file", changed(f"{readme}/sha256", "0" * 64), "README.md", 1),
        ("another size of a file", changed(f"{readme}/bytes", 5), "README.md", 1),
        ("another number of rows of a table", changed(f"files/{train}/rows", 5), DATA, 1),
        ("another number of rows", changed("rows.train", 5), either("README.md", "train"), 1),
        ("a file that is not there", changed("files/plots|x.png", {"sha256": "0" * 64, "bytes": 5}), "plots/x.png", 1),
    ]  # fmt: skip
    for name, breaks, place, code in manifest:
        places = place if isinstance(place, tuple) else (place,)
        file = ("manifest.json",) if code == 2 else ()
        yield Case(
            f"manifest.json: {name}",
            partial(_broken, breaks, "manifest.json", prepare),
            (*file, *places),
            code=code,
        )
    entry = {"sha256": "0" * 64, "bytes": 5}
    for name, place in {
        "../secret": "../secret", "/etc/passwd": "/etc/passwd", "plots/../../secret": "plots/../../secret", "": "manifest.json", ".": "manifest.json",
        "plots": "plots", "a\0b": "manifest.json", "plots\\x.png": "plots", "data/evil.exe": "data/evil.exe",
        "other/x.txt": "other/x.txt", "plots//x.png": "plots//x.png", "./README.md": "./README.md", "x" * 300: "xxxx",
        "plots/\x1b[31mred.png": "red.png", "data/train-*.parquet": "data/train-*.parquet", "caf\udce9": either("caf", "manifest.json"),
    }.items():  # fmt: skip
        breaks = changed(f"files/{name.replace('/', '|')}", entry)
        yield Case(
            f"manifest.json names {ascii(name)[:30]}: verify",
            partial(_broken, breaks, "manifest.json", prepare),
            place,
            code=(1, 2),
        )
        if name in ("../secret", "data/evil.exe"):
            yield Case(
                f"manifest.json names {name!r}: remove",
                partial(_broken, breaks, "manifest.json", removing),
                place or "manifest.json",
            )
    recipe: list[tuple[str, Break, Place]] = [
        *((f"without {name}", changed(name, gone=True), name) for name in ("name", "stages")),
        ("a field too many", changed("colour", "red"), "colour"),
        ("name is a number", changed("name", 5), "name"),
        ("name leads elsewhere", changed("name", "../../etc"), "name"),
        ("licence is null", changed("license"), "license"),
        ("stages is an object", changed("stages", {}), "stages"),
        ("stages is empty", changed("stages", []), "stages"),
        ("a stage is a string", changed("stages.0", "source"), "stage"),
        ("a stage without its class", changed("stages.0.stage", gone=True), "stage"),
        ("a stage of another package", changed("stages.0.stage", "os:system"), "os"),
        ("a stage of another package, loaded already", changed("stages.0.stage", "subprocess:Popen"), "subprocess"),
        ("a stage that is not there", changed("stages.0.stage", "builder.stages.source:Nothing"), "Nothing"),
        ("a stage that is no stage", changed("stages.0.stage", "builder.core:Recipe"), "recipe"),
        ("a stage that is a number", changed("stages.0.stage", 5), "stage"),
        ("a stage of colours", changed("stages.0.stage", "\x1b[31mbuilder:red"), "builder"),
        ("a stage twice", put(lambda old: {**json.loads(old), "stages": [json.loads(old)["stages"][0]] * 2}), "source"),
        ("a stage without its files", changed("stages.0.files", gone=True), "files"),
        ("a setting that is none", changed("stages.0.colour", "red"), "colour"),
        ("a setting of another type", changed("stages.0.rows_per_shard", "many"), "rows_per_shard"),
        ("a setting that is impossible", changed("stages.0.rows_per_shard", 0), "rows_per_shard"),
        ("a setting that is not a number", put(lambda old: re.sub(rb'"timeout_s": [\d.]+', b'"timeout_s": NaN', old)), "timeout_s"),
        ("files is a list", changed("stages.0.files", ["a", "b"]), "files"),
        ("a setting with a NUL", changed("stages.0.files", "a\0b"), "files"),
    ]  # fmt: skip
    for name, breaks, place in recipe:
        command: Callable[[Situation], list[object]] = lambda s: [  # noqa: E731
            "plan",
            s.run() / "recipe.json",
            "--run",
            s.here / "other",
        ]
        yield Case(
            f"recipe.json: {name}", partial(_broken, breaks, "recipe.json", command), ("recipe.json", place)
        )


# --- commit records -----------------------------------------------------------------------------------------------------

RECORDS: Mapping[str, Break] = {
    "a list": BROKEN["a list"],
    "an empty object": BROKEN["an empty object"],
    "empty": BROKEN["empty"],
    "cut off": BROKEN["cut off"],
    "nested 10,000 deep": BROKEN["nested 10,000 deep"],
    "not UTF-8": BROKEN["not UTF-8"],
    "a FIFO": BROKEN["a FIFO"],
    "a folder": BROKEN["a folder"],
    "a link to itself": BROKEN["a link to itself"],
    "of a number of rows that is text": changed("rows", {"ok": "many"}),
    "of rows that are a list": changed("rows", []),
    "of bytes that are text": changed("bytes", {"source/00000/00000.parquet": "many"}),
    "of outputs that are a list": changed("outputs", ["source/00000.parquet"]),
    "of outputs elsewhere": changed("outputs", {"../../../../etc/passwd": "0" * 64}),
    "of outputs without bytes": changed("bytes", {}),
    "of seconds that are text": changed("seconds", "long"),
    "of a day that is a number": changed("day", 5),
    "of a key that is a number": changed("key", 5),
}


def records() -> Iterator[Case]:
    """A record that cannot be one is none: the shard is not done. Or its file is named."""
    for kind, breaks in RECORDS.items():
        also = None if "of a day" in kind else _named_or_left
        yield Case(
            f"a record is {kind}: status",
            partial(_broken, breaks, "source/00000/00000.json", STATUS["status"]),
            (),
            code=(0, 2),
            also=also,
        )
    for kind in ("a list", "a folder", "of rows that are a list", "of outputs elsewhere", "a FIFO"):
        again: dict[str, Callable[[Situation], list[object]]] = {
            "publish": lambda s: ["publish", s.run(), s.here / "out", "--version", "0.1.0"],
            "plan": lambda s: ["plan", s.run() / "recipe.json", "--run", s.here / "run"],
        }
        for command, prepare in again.items():
            broken_record = partial(_broken, RECORDS[kind], "source/00000/00000.json", prepare)
            if command == "publish":
                yield Case(f"a record is {kind}: publish", broken_record, either("00000.json", "/run "))
            else:
                yield Case(f"a record is {kind}: plan", broken_record, (), code=(0, 2), also=_named_or_left)
    for kind in ("not UTF-8", "a folder", "of rows that are a list"):
        yield Case(
            f"an index's record is {kind}: status",
            partial(_broken, RECORDS[kind], "source/run/00000.json", STATUS["status"]),
            (),
            code=(0, 2),
        )
    for kind in ("cut off", "a folder"):
        yield Case(
            f"an index is {kind}: status",
            partial(_broken, BROKEN[kind], "source/run/00000.*.parquet", STATUS["status"]),
            either("source/run/00000."),
        )
    for kind in ("a list", "a folder", "a FIFO", "nested 10,000 deep"):
        yield Case(
            f"the hashes of the inputs are {kind}: status",
            partial(_broken, BROKEN[kind], "source/run/files", STATUS["status"]),
            (),
            code=(0, 2),
        )
    for kind in ("not UTF-8", "a FIFO"):
        prepare = STATUS["status"]
        yield Case(
            f"a reason of failure is {kind}: status",
            partial(_broken, BROKEN[kind], "source/00000/00009.failed", prepare),
            (),
            code=(0, 2),
        )


def _named_or_left(s: Situation, outcome: Outcome) -> None:
    if outcome.code == 2:
        assert "00000.json" in outcome.err
    else:
        assert re.search(r"source +(1 shards done, 1 left|1 +1 )", outcome.out), outcome.out


# --- tables -------------------------------------------------------------------------------------------------------------


def tables() -> Iterator[Case]:
    def other_columns(s: Situation) -> list[object]:
        path = s.version() / DATA
        s.file(path, _bytes(pq.read_table(path).drop_columns(["re_length"])))
        return ["card", "--check", path.parent.parent]

    def one_more(s: Situation) -> list[object]:
        s.file(
            s.version() / "data/train-00001-of-00001.parquet",
            (s.here / "published/v0.1.0" / DATA).read_bytes(),
        )
        return ["verify", s.here / "published/v0.1.0"]

    def renamed(s: Situation) -> list[object]:
        target = s.target()
        os.rename(target / "v0.1.0", target / "v0.2.0")
        return ["verify", f"{target}@v0.2.0"]

    def flipped(s: Situation) -> list[object]:
        path = s.version() / DATA
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        s.file(path, bytes(data))
        return ["verify", path.parent.parent]

    yield Case("a column is gone: card --check", other_columns, "re_length", code=2)
    yield Case("a table too many: verify", one_more, "train-00001-of-00001.parquet", code=1)
    yield Case("a version renamed: verify", renamed, ("0.1.0", "0.2.0"), code=(1, 2), real=True)
    yield Case("a bit of a table: verify", flipped, DATA, code=1)


def _bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


def cases() -> Iterator[Case]:
    yield from whole_files()
    yield from fields()
    yield from records()
    yield from tables()
