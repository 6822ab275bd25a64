"""SQL, selections, differences and statistics of what is not fit for them; and what of it reaches a terminal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
from conftest import CAPTIONER
from hostile.case import JPG, TABLE, Case, Outcome, Place, Situation, build_rows, either, line, plan_rows

RED = "\x1b[31mred\x1b[0m"
BELL = "\x07\x9b31m\x7f\x00\x08"


def sql() -> Iterator[Case]:
    table: Callable[[Situation], object] = lambda s: s.parquet()  # noqa: E731
    queries: list[tuple[str, str, Place | tuple[Place, ...]]] = [
        ("a mistake", "selec 1", "selec"),
        (
            "a mistake in its third line",
            "select 1\nfrom published\nwher true and",
            either("wher", "syntax", "line 3", "LINE 3"),
        ),
        ("a view that is none", "from nothing_here", "nothing_here"),
        ("a column that is none", "select colour from published", "colour"),
        ("a function that is none", "select paint(text) from published", "paint"),
        (
            "a cast that fails",
            "select text::integer from published",
            either("INT32", "INTEGER", "cast", "Conversion"),
        ),
        ("an extension to install", "install httpfs", either("httpfs", "extension", "install")),
        ("an extension to load", "load httpfs", either("httpfs", "extension", "load")),
        (
            "an extension to install by force",
            "force install spatial from 'http://127.0.0.1:1/'",
            either("spatial", "extension", "install"),
        ),
        (
            "a file of the network",
            "from 'http://127.0.0.1:1/t.parquet'",
            either("127.0.0.1", "httpfs", "extension"),
        ),
        ("a file of S3", "from 's3://bucket/t.parquet'", either("s3://", "httpfs", "extension")),
        ("a setting to unlock", "set lock_configuration = false", either("lock", "configuration")),
        ("a file that is not there", "from 'nowhere.parquet'", "nowhere.parquet"),
        ("a query of 100,000 characters", "select " + "1 + " * 25_000, ()),
        ("a query nested 20,000 deep", "select " + "(" * 20_000 + "1" + ")" * 20_000, ()),
        ("a query of colours", "select \x1b[31mred", "red"),
        ("an unclosed quote", "select 'text", either("unterminated", "quot", "'text")),
        ("NULs", "select 'a' || chr(0) || x from published", "x"),
        ("an error of its own", "select error('mine\n\nmore ' || chr(27) || '[31m')", "mine"),
        (
            "a regular expression that is none",
            "select regexp_matches(text, '(') from published",
            either("(", "regular", "missing"),
        ),
    ]
    for name, query, place in queries:
        yield Case(
            f"sql: {name}",
            lambda s, query=query: ["sql", table(s), query],
            place,
            real=name == "an extension to load",
        )
    yield Case("sql: a mistake on standard input", lambda s: ["sql", s.parquet()], "selec", stdin=b"selec 1")
    yield Case(
        "sql: standard input that is not UTF-8",
        lambda s: ["sql", s.parquet()],
        either("input", "UTF-8", "utf-8"),
        stdin=b"select 'caf\xe9'",
    )
    yield Case(
        "sql: standard input that is empty",
        lambda s: ["sql", s.parquet()],
        either("query", "input", "QUERY"),
        stdin=b"",
        code=(0, 2),
    )
    yield Case("sql: several answers", lambda s: ["sql", s.parquet(), "select 1; select 2"], (), code=(0, 2))
    places: list[tuple[str, Callable[[Situation], object], Place | tuple[Place, ...]]] = [
        ("no caption", lambda s: s.parquet(columns={"url": [JPG]}), "--captions"),
        ("no row", lambda s: s.parquet(columns={"text": pa.array([], pa.string())}), "t.parquet"),
        (
            "only nulls",
            lambda s: s.parquet(columns={"text": pa.array([None, None], pa.string())}),
            "t.parquet",
        ),
        ("text that is not UTF-8", lambda s: s.file("t.csv", b"text\ncaf\xe9\nth\xe9\n"), "t.csv"),
        ("text that is not UTF-8 in a parquet", _not_utf8, "t.parquet"),
        (
            "a ragged csv",
            lambda s: s.file("t.csv", "text,other\n" + "a,b\n" * 30 + "a,b,c,d\n" + "a,b\n" * 30),
            "t.csv",
        ),
        ("JSON that is none", lambda s: s.file("t.json", "{'text': 5"), "t.json"),
        ("JSON that is one number", lambda s: s.file("t.json", "5"), "t.json"),
        (
            "JSON lines, one of which is none",
            lambda s: s.file("t.jsonl", '{"text": "a"}\n{"text": }\n{"text": "b"}\n'),
            "t.jsonl",
        ),
        ("an empty JSON", lambda s: s.file("t.json", ""), "t.json"),
        ("an empty csv", lambda s: s.file("t.csv", ""), "t.csv"),
        ("a parquet that is none", lambda s: s.file("t.parquet", "text"), "t.parquet"),
        ("a FIFO", lambda s: os.mkfifo(s.here / "t.csv") or s.here / "t.csv", "t.csv"),
        (
            "a folder that is named as a table",
            lambda s: (s.here / "t.parquet").mkdir() or s.here / "t.parquet",
            "t.parquet",
        ),
        ("tables of other columns", _two_tables, ("b.parquet", "more")),
        (
            "captions that are numbers",
            lambda s: s.parquet(columns={"text": [1, 2]}),
            either("text", "--captions"),
        ),
    ]
    for name, make, place in places:
        yield Case(f"stats: {name}", lambda s, make=make: ["stats", make(s)], place)
    for command in ("sql", "explore"):
        for name, make, place in (places[6], places[10], places[12]):
            more: Sequence[object] = (
                ["select max(text) from published"] if command == "sql" else ["--out", "page"]
            )
            yield Case(
                f"{command}: {name}",
                lambda s, make=make, command=command, more=more: [command, make(s), *more],
                place,
            )


def _not_utf8(s: Situation) -> object:
    offsets = np.array([0, 4, 7], np.int32).tobytes()
    return s.parquet(
        columns={
            "text": pa.StringArray.from_buffers(2, pa.py_buffer(offsets), pa.py_buffer(b"caf\xe9th\xe9"))
        }
    )


def _two_tables(s: Situation) -> object:
    s.parquet("tables/a.parquet")
    return s.parquet("tables/b.parquet", more=[1, 2, 3]).parent


# --- options of the statistics, selections, differences -------------------------------------------------------------------


def options() -> Iterator[Case]:
    files: list[tuple[str, str, Callable[[Situation], object], Place | tuple[Place, ...]]] = [
        ("a tokenizer that is not there", "--tokenizer", lambda s: s.here / "nowhere.json", "nowhere.json"),
        ("a tokenizer that is none", "--tokenizer", lambda s: s.file("tok.json", "{}"), "tok.json"),
        (
            "a tokenizer that is cut off",
            "--tokenizer",
            lambda s: s.file("tok.json", (CAPTIONER / "tokenizer.json").read_bytes()[:999]),
            "tok.json",
        ),
        ("a tokenizer that is a folder", "--tokenizer", lambda s: CAPTIONER, "captioner"),
        (
            "a tokenizer that is a FIFO",
            "--tokenizer",
            lambda s: os.mkfifo(s.here / "tok.json") or s.here / "tok.json",
            "tok.json",
        ),
        (
            "words that are not UTF-8",
            "--vocabulary",
            lambda s: s.file("words.txt", b"caf\xe9\n"),
            "words.txt",
        ),
        ("words that are a folder", "--vocabulary", lambda s: s.file("words/x.txt").parent, "/words"),
        (
            "words that are a FIFO",
            "--vocabulary",
            lambda s: os.mkfifo(s.here / "words.txt") or s.here / "words.txt",
            "words.txt",
        ),
        (
            "scores that are none",
            "--concreteness",
            lambda s: s.file("c.tsv", "word\tscore\nbanana\t5.0\napple\tmany\n"),
            ("c.tsv", line(3)),
        ),
        (
            "scores that are not there",
            "--concreteness",
            lambda s: s.file("c.tsv", "word\tscore\nbanana\n"),
            ("c.tsv", line(2)),
        ),
        (
            "scores behind commas",
            "--concreteness",
            lambda s: s.file("c.tsv", "word,score\nbanana,5.0\n"),
            ("c.tsv", line(2)),
        ),
        (
            "scores that are not UTF-8",
            "--concreteness",
            lambda s: s.file("c.tsv", b"caf\xe9\t5.0\n"),
            "c.tsv",
        ),
        (
            "scores of colours",
            "--concreteness",
            lambda s: s.file("c.tsv", f"word\tscore\n{RED}\tred\n"),
            ("c.tsv", line(2)),
        ),
        ("captions that are none", "--captions", lambda s: "nope", "nope"),
        ("captions of colours", "--captions", lambda s: RED, "red"),
    ]
    for name, option, make, place in files:
        yield Case(
            f"stats: {name}",
            lambda s, option=option, make=make: ["stats", s.parquet(number=[1, 2, 3]), option, make(s)],
            place,
        )
    selections: list[tuple[str, Sequence[object], Place]] = [
        ("a strategy that is none", ["best"], "best"),
        ("a misspelt strategy", ["raw_topp", "fraction=0.3"], "raw_top"),
        ("two, one of which is none", ["no_filter+best"], "best"),
        ("a plus too many", ["no_filter+"], "strategy"),
        ("a path", ["../strategies/no_filter"], "../strategies/no_filter"),
        ("no fraction", ["raw_top"], "fraction"),
        ("fraction=0", ["raw_top", "fraction=0"], "fraction"),
        ("fraction=2", ["raw_top", "fraction=2"], "fraction"),
        ("fraction=nan", ["raw_top", "fraction=nan"], "fraction"),
        ("fraction=many", ["raw_top", "fraction=many"], "fraction"),
        ("fraction twice", ["raw_top", "fraction=0.1", "fraction=0.2"], "fraction"),
        ("no equals sign", ["raw_top", "fraction"], "fraction"),
        ("threshold=nan", ["clip_score", "threshold=nan"], "threshold"),
        ("a misspelt setting", ["raw_top", "fracton=0.3"], "fracton"),
        ("words that are not there", ["text_based", "words=nowhere.txt"], "nowhere.txt"),
        ("no words", ["text_based"], "words"),
        (
            "embeddings that are not there",
            ["image_based", "embeddings=nowhere.npz", "centroids=c.npy", "targets=t.npy"],
            "nowhere.npz",
        ),
        ("no centroids", ["image_based", "embeddings=nowhere.npz"], either("centroids", "nowhere.npz")),
        ("a setting of colours", ["raw_top", "\x1b[31mred=1"], "red"),
    ]
    for name, arguments, place in selections:
        yield Case(
            f"select: {name}",
            lambda s, arguments=arguments: ["select", s.version(), *arguments, "--out", s.here / "out"],
            place,
        )
    yield Case("select: embeddings that are a pickle", _pickled, "e.npz")
    yield Case(
        "select: no uid",
        lambda s: ["select", s.parquet(columns={"text": ["a"]}), "no_filter", "--out", s.here / "out"],
        "uid",
    )
    yield Case(
        "select: uids of another kind",
        lambda s: ["select", s.parquet(uid=["a", "b", "c"]), "no_filter", "--out", s.here / "out"],
        "uid",
    )
    differences: list[tuple[str, Callable[[Situation], Sequence[object]], Place]] = [
        ("no uid", lambda s: [s.parquet("a.parquet", {"text": ["x"]}), s.parquet()], ("a.parquet")),
        ("a place that is none", lambda s: [s.parquet(), s.here / "nowhere"], "nowhere"),
        ("a column that is none", lambda s: [s.parquet(), "--columns", "text,nope"], "nope"),
        (
            "a column of numbers",
            lambda s: [s.parquet(number=[1, 2, 3]), "--columns", "text,number"],
            "number",
        ),
        (
            "uids of other types",
            lambda s: [s.parquet("a.parquet", uid=[[1], [2], [3]]), s.parquet("b.parquet")],
            "uid",
        ),
        ("a folder without tables", lambda s: [s.parquet(), s.file("x/README.md", "hello").parent], "/x"),
    ]
    for name, made, place in differences:
        yield Case(f"diff: {name}", lambda s, made=made: ["diff", *made(s)], place)


def _pickled(s: Situation) -> list[object]:
    path = s.here / "e.npz"
    np.savez(path, uid=np.array([{}], object), embedding=np.zeros((1, 2)))
    np.save(s.here / "c.npy", np.zeros((1, 2)))
    settings = [f"embeddings={path}", f"centroids={s.here}/c.npy", f"targets={s.here}/c.npy"]
    return ["select", s.version(), "image_based", *settings, "--out", s.here / "out"]


# --- the terminal ---------------------------------------------------------------------------------------------------------


def terminal() -> Iterator[Case]:
    """Whatever the data and their names hold: nothing moves the cursor or sets a colour."""
    evil = f"a{RED}{BELL}\r\x1b]0;title\x07b"
    yield Case(
        "shown: a caption, sql",
        lambda s: ["sql", s.parquet(text=[evil] * 3), "select text from published"],
        "red",
        code=0,
    )
    yield Case(
        "shown: a caption, sql --json",
        lambda s: ["sql", s.parquet(text=[evil] * 3), "select text from published", "--json"],
        "red",
        code=0,
    )
    yield Case(
        "shown: a column, sql",
        lambda s: ["sql", s.parquet(**{evil: [1, 2, 3]}), "from published"],
        "red",
        code=0,
    )
    yield Case(
        "shown: a column, stats",
        lambda s: ["stats", s.parquet(columns={f"caption {evil}": TABLE["text"]})],
        "red",
        code=0,
    )
    yield Case(
        "shown: a column that is none, sql",
        lambda s: ["sql", s.parquet(**{evil: [1, 2, 3]}), "select colour from published"],
        "colour",
    )
    yield Case(
        "shown: columns that are none, stats",
        lambda s: ["stats", s.parquet(columns={evil: ["a"]})],
        "--captions",
    )
    yield Case(
        "shown: a column, diff",
        lambda s: ["diff", s.parquet("a.parquet", **{evil: [1, 2, 3]}), s.parquet("b.parquet")],
        "red",
        code=0,
    )
    yield Case(
        "shown: values, diff",
        lambda s: ["diff", *(s.parquet(f"{n}.parquet", **{evil: [n, 2, 3]}) for n in (1, 2))],
        "red",
        code=0,
    )
    yield Case(
        "shown: a column, plan",
        lambda s: plan_rows(s, s.parquet(columns={evil: ["a"], "url": [JPG]})),
        "t.parquet",
    )
    yield Case(
        "shown: a column, build",
        lambda s: build_rows(s, s.parquet(columns={evil: ["a"], "url": [JPG]})),
        "t.parquet",
    )
    yield Case(
        "shown: a column of a csv",
        lambda s: build_rows(s, s.file("t.csv", f"url,{RED}\n{JPG},a\n")),
        ("t.csv", "red"),
    )
    yield Case(
        "shown: a row of a csv",
        lambda s: build_rows(s, s.file("t.csv", f"url,caption\n{JPG},a\n{JPG},{RED},c\n")),
        ("t.csv", line(3)),
    )
    yield Case("shown: a file, plan", lambda s: plan_rows(s, s.file(f"{RED}.parquet", "no parquet")), "red")
    yield Case(
        "shown: a file, stats", lambda s: ["stats", s.file(f"{RED}.csv", b"caption\ncaf\xe9\n")], "red"
    )
    yield Case("shown: a place, status", lambda s: ["status", s.here / RED], "red")
    yield Case("shown: a place, verify", lambda s: ["verify", s.here / RED], "red")
    yield Case(
        "shown: a place, explore", lambda s: ["explore", s.parquet(), "--out", s.here / RED], "red", code=0
    )
    yield Case("shown: a run, status", _failed_with_colours, "red", code=0)
    for quote, name in (
        ("a statement", "a\"; copy (select 1) to 'x' --"),
        ("a quote", 'a"b'),
        ("an apostrophe", "a'b"),
        ("a comment", "a--b/*"),
        ("a line", "a\nb"),
        ("a parameter", "$a"),
        ("nothing", ""),
    ):
        for command in ("diff", "sql", "explore", "stats"):
            made = _with_column(name, command)
            if made is not None and (command in ("diff", "sql") or quote == "a statement"):
                yield Case(
                    f"a column named by {quote}: {command}",
                    made,
                    (),
                    code=(0, 2) if name == "" else 0,
                    also=_no_file,
                )


def _with_column(name: str, command: str) -> Callable[[Situation], list[object]] | None:
    def made(s: Situation) -> list[object]:
        if command == "diff":
            return ["diff", *(s.parquet(f"{n}.parquet", **{name: [n, 2, 3]}) for n in (1, 2))]
        if command == "stats":
            return ["stats", s.parquet(**{name: ["x", "y", "z"]}), "--captions", f"text,{name}"]
        return [
            command,
            s.parquet(**{name: ["x", "y", "z"]}),
            *(["from published"] if command == "sql" else ["--out", s.here / "page"]),
        ]

    return None if name == "" and command == "stats" else made


def _no_file(s: Situation, _: Outcome) -> None:
    assert not (s.here / "x").exists()


def _failed_with_colours(s: Situation) -> list[object]:
    run = s.run()
    (run / "score/00000/00001.json").unlink()
    s.file(run / "score/00000/00001.failed", f"{RED}{BELL}\n")
    return ["status", run]


def cases() -> Iterator[Case]:
    yield from sql()
    yield from options()
    yield from terminal()
