"""Metadata: CSV, TSV and parquet that is not what it should be, and places where there is none."""

from __future__ import annotations

import gzip
import os
import re
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hostile.case import (
    JPG,
    TABLE,
    Case,
    Outcome,
    Place,
    Situation,
    build_rows,
    either,
    line,
    of_datacomp,
    plan_rows,
)

HEAD = "url,caption\n"
RED = "\x1b[31m"


def rows(first: int, last: int, text: str = "caption {n}", separator: str = ",") -> str:
    return "".join(f"http://a.example/{n}.jpg{separator}{text.format(n=n)}\n" for n in range(first, last + 1))


# --- text -------------------------------------------------------------------------------------------------------------


def text() -> Iterator[Case]:
    long = "x" * 30_000_000
    french, japanese = "Café à la crème, été", "猫の写真です。犬もいます"
    cases: list[tuple[str, str, str | bytes, Place | tuple[Place, ...]]] = [
        ("a field too many", "t.csv", HEAD + rows(1, 1) + "http://a.example/2.jpg,two,three\n" + rows(3, 3), line(3)),
        ("a field too few", "t.csv", HEAD + rows(1, 2) + "http://a.example/3.jpg\n" + rows(4, 4), line(4)),
        ("a field too many in line 1500", "t.csv", HEAD + rows(1, 1498) + "http://a.example/2.jpg,two,three\n" + rows(1500, 2000), line(1500)),
        ("a field too many in the last line without its end", "t.csv", HEAD + rows(1, 3) + "http://a.example/4.jpg,two,three", line(5)),
        ("a field too many among lines that end as on Windows", "t.csv",
         HEAD + rows(1, 1) + "http://a.example/2.jpg,two,three\n" + rows(3, 3), line(3)),
        ("a field too many after a caption of three lines", "t.csv",
         HEAD + 'http://a.example/1.jpg,"one\ntwo\nthree"\n' + "http://a.example/2.jpg,two,three\n", line(5)),
        ("fields of a tsv too many", "t.tsv", "url\tcaption\n" + rows(1, 1, separator="\t") + "http://a.example/2.jpg\ttwo\tthree\n", line(3)),
        ("fields of a tsv too few", "t.tsv", "url\tcaption\n" + rows(1, 1, separator="\t") + "http://a.example/2.jpg\n", line(3)),
        ("a row that is a sentence", "t.csv", HEAD + rows(1, 3) + "-- 3 rows --\n", line(5)),
        ("an unclosed quote", "t.csv", HEAD + rows(1, 1) + 'http://a.example/2.jpg,"never closed\n' + rows(3, 5), line(3)),
        ("an unclosed quote in the first row", "t.csv", HEAD + 'http://a.example/1.jpg,"never closed\n' + rows(2, 5), line(2)),
        ("an unclosed quote in line 900", "t.csv", HEAD + rows(1, 898) + 'http://a.example/2.jpg,"never closed\n' + rows(900, 1500), line(900)),
        ("text after a closing quote", "t.csv", HEAD + rows(1, 1) + 'http://a.example/2.jpg,"two" and more\n' + rows(3, 3), line(3)),
        ("NUL in the header", "t.csv", "url,cap\0tion\n" + rows(1, 3), either("caption", "line 1", ":1", "NUL")),
        ("nothing but NULs", "t.csv", "\0" * 5000, ()),
        ("latin-1", "t.csv", (HEAD + rows(1, 1) + rows(2, 2, french)).encode("latin-1"), (latin(), "source.encoding=")),
        ("latin-1 in the last of 5,000 lines", "t.csv", (HEAD + rows(1, 4999) + rows(5000, 5000, french)).encode("latin-1"),
         (latin(), "source.encoding=")),
        ("latin-1, gzipped", "t.csv.gz", gzip.compress((HEAD + rows(1, 2, french)).encode("latin-1")), (latin(), "source.encoding=")),
        ("windows-1252", "t.csv", (HEAD + rows(1, 2, "“Café” – 5 €")).encode("cp1252"), (latin(), "source.encoding=")),
        ("utf-16 with its mark", "t.csv", (HEAD + rows(1, 3)).encode("utf-16"), (code("utf-16"), "source.encoding=")),
        ("utf-16 without its mark", "t.csv", (HEAD + rows(1, 3)).encode("utf-16-le"), (code("utf-16"), "source.encoding=")),
        ("utf-16, big end first, without its mark", "t.csv", (HEAD + rows(1, 3)).encode("utf-16-be"), (code("utf-16"), "source.encoding=")),
        ("utf-16 in a tsv", "t.tsv", ("url\tcaption\n" + rows(1, 3, separator="\t")).encode("utf-16"), (code("utf-16"), "source.encoding=")),
        ("shift-jis", "t.csv", (HEAD + rows(1, 20, japanese)).encode("shift-jis"), (either("shift_jis", "shift-jis", "cp932"), "source.encoding=")),
        ("random bytes", "t.csv", np.random.default_rng(0).bytes(5000), ()),
        ("empty", "t.csv", "", ()),
        ("empty, gzipped", "t.csv.gz", gzip.compress(b""), ()),
        ("only white space", "t.csv", "\n  \n\n", ()),
        ("only a mark of the order of bytes", "t.csv", b"\xef\xbb\xbf", ()),
        ("only a header", "t.csv", HEAD, ()),
        ("gz that is not gz", "t.csv.gz", HEAD + rows(1, 3), ()),
        ("gz that is cut off", "t.csv.gz", gzip.compress((HEAD + rows(1, 3000)).encode())[:-900], ()),
        ("gz with another checksum", "t.csv.gz", gzip.compress((HEAD + rows(1, 30)).encode())[:-8] + b"\1\2\3\4\5\6\7\x08", ()),
        ("gz with damaged bytes", "t.csv.gz", flipped(gzip.compress((HEAD + rows(1, 3000)).encode())), ()),
        ("a parquet file by its content", "t.csv", Path(__file__).read_bytes()[:0] + b"PAR1" + bytes(range(256)) * 9 + b"PAR1", ()),
        ("one column", "t.csv", "url\n" + "http://a.example/1.jpg\n" * 3, either("caption", "one column", "1 column")),
                ("commas in a tsv", "t.tsv", HEAD + rows(1, 3), either("comma", "csv", "column")),
        ("a field of 30 MB", "t.csv", HEAD + rows(1, 1) + f"http://a.example/2.jpg,{long}\n", ()),
        ("a column twice", "t.csv", "url,caption,caption\n" + "http://a.example/1.jpg,a,b\n" * 3, "'caption'"),
        ("no column is known", "t.csv", "address,words\n" + rows(1, 3), ("address", "url_column=")),
        ("columns in capitals", "t.csv", "Url,Caption\n" + rows(1, 3), ("Url", "Caption", "url_column=")),
        ("three columns without a header", "t.csv", "1,http://a.example/1.jpg,a cat\n2,http://a.example/2.jpg,a dog\n", "url_column="),
        ("four columns without a header, two with URLs", "t.csv", f"{JPG},{JPG},a cat,5\n" * 3, "url_column="),
        ("two columns without a header and without a URL", "t.csv", "one cat,a cat\ntwo dogs,dogs\n", "url_column="),
        ("two columns of URLs without a header", "t.csv", f"{JPG},{JPG}\n" * 3, "url_column="),
        ("a page that says 404", "t.csv", "<!DOCTYPE html>\n<html><head><title>404</title></head>\n<body>no such page</body></html>\n", ()),
        ("JSON lines", "t.csv", '{"url": "http://a.example/1.jpg", "text": "a cat"}\n' * 3, ()),
        ("a header of 3,000 columns", "t.csv", ",".join(f"c{n}" for n in range(3000)) + "\n" + ",".join(["x"] * 3000) + "\n", "url_column="),
    ]  # fmt: skip
    for name, file, content, place in cases:
        if "Windows" in name:
            assert isinstance(content, str)
            content = content.replace("\n", "\r\n")
        places = place if isinstance(place, tuple) else (place,)
        yield Case(f"csv: {name}", partial(_built, file, content), (file, *places), real=name == "latin-1")

    good = HEAD + rows(1, 3)
    for setting, place in (
        ("source.encoding=klingon", ("source.encoding", "klingon")),
        ("source.encoding=", "source.encoding"),
        ("source.encoding=base64", "source.encoding"),  # a codec, but not of text
        ("source.encoding=utf-16", "t.csv"),
        ("source.encoding=ascii", "t.csv"),
        ("source.url_column=link", ("t.csv", "link")),
        ("source.caption_column=alt", ("t.csv", "alt")),
        ("source.uid_column=id", ("t.csv", "id")),
        ("source.layout=laion", ("t.csv", "URL")),
    ):
        yield Case(
            f"csv: {setting}", partial(_built, "t.csv", good + rows(4, 4, "café"), setting=setting), place
        )
    yield Case("csv: the second of two is ragged", _second_is_ragged, ("b.csv", line(2)))
    yield Case(
        "csv: planned, no column is known",
        lambda s: plan_rows(s, s.file("t.csv", "address,words\n" + rows(1, 3))),
        ("t.csv", "url_column="),
    )
    yield Case("csv: planned, empty", lambda s: plan_rows(s, s.file("t.csv")), "t.csv")
    yield Case(
        "csv: planned, gz that is not gz", lambda s: plan_rows(s, s.file("t.csv.gz", good)), "t.csv.gz"
    )
    yield Case(
        "csv: what can be read is read",
        _readable,
        (),
        code=0,
        also=_captions_are_captions,
        after_progress=True,
    )


def latin() -> re.Pattern[str]:
    return re.compile("latin.?1|iso.?8859|cp125\\d|windows.?125\\d", re.IGNORECASE)


def code(name: str) -> re.Pattern[str]:
    return re.compile(name.replace("-", "[-_]?"), re.IGNORECASE)


def flipped(data: bytes) -> bytes:
    """The same with 64 other bytes in its middle."""
    half = len(data) // 2
    return data[: half - 32] + bytes(255 - byte for byte in data[half - 32 : half + 32]) + data[half + 32 :]


def _built(file: str, content: bytes | str, s: Situation, setting: str = "") -> list[object]:
    return build_rows(s, s.file(file, content), *[setting] * bool(setting))


def _second_is_ragged(s: Situation) -> list[object]:
    s.file("tables/a.csv", HEAD + rows(1, 3))
    return build_rows(s, s.file("tables/b.csv", HEAD + "http://a.example/1.jpg,a,b\n" + rows(2, 3)).parent)


def _readable(s: Situation) -> list[object]:
    """A URL tells which column is which; who writes semicolons, and a mark before the header, is understood."""
    s.file("tables/1.csv", rows(1, 1))
    s.file("tables/2.csv", "caption 2,http://a.example/2.jpg\n")
    s.file("tables/3.csv", "\ufeff" + HEAD + rows(3, 3))
    s.file("tables/4.csv", "url;caption\r\n" + rows(4, 4, separator=";"))
    s.file("tables/5.tsv", 'caption "5"\thttp://a.example/5.jpg\n')
    return build_rows(s, s.here / "tables")


def _captions_are_captions(s: Situation, _: Outcome) -> None:
    (path,) = (s.here / "run" / "source" / "00000").glob("00000.*.parquet")
    found = pq.read_table(path)
    assert found["url"].to_pylist() == [f"http://a.example/{n}.jpg" for n in range(1, 6)]
    assert found["org_caption"].to_pylist() == [
        "caption 1",
        "caption 2",
        "caption 3",
        "caption 4",
        'caption "5"',
    ]


# --- parquet ----------------------------------------------------------------------------------------------------------


def parquet() -> Iterator[Case]:
    good = _bytes(pa.table(TABLE))
    footer = int.from_bytes(good[-8:-4], "little")
    for name, content in (
        ("text", b"uid,url,text\n1,http://a.example/1.jpg,a cat\n"),
        ("cut off", good[: len(good) // 2]),
        ("without its first bytes", good[100:]),
        ("empty", b""),
        ("two marks", b"PAR1PAR1"),
        ("a footer longer than the file", good[:-8] + (1 << 30).to_bytes(4, "little") + b"PAR1"),
        ("a damaged footer", good[: -8 - footer] + flipped(good[-8 - footer : -8]) + good[-8:]),
        ("an encrypted footer", good[:-4] + b"PARE"),
        (
            "a pointer of Git LFS",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        ),
        ("NULs of the right size", bytes(len(good))),
        ("no row", _bytes(pa.table({name: pa.array([], pa.string()) for name in TABLE}))),
        ("no column", _bytes(pa.table({}))),
    ):
        yield Case(
            f"parquet: {name}", partial(_planned_parquet, content), "t.parquet", real=name == "cut off"
        )
    three = [1, 2, 3]
    strange: dict[str, dict[str, Any]] = {
        "URLs are numbers": {"url": three},
        "URLs are lists": {"url": [[JPG]] * 3},
        "captions are structs": {"text": [{"at": JPG}] * 3},
        "uids are lists": {"uid": [three] * 3},
    }
    for kind, column in strange.items():
        yield Case(
            f"parquet: {kind}",
            partial(_built_parquet, **column),
            ("t.parquet", *column),
            code=1,
            after_progress=True,
        )
    # what only the rows of a shard can tell is the shard's failure
    yield Case("parquet: widths that are words", partial(_built_parquet, original_width=["wide", "64", "64"]), ("t.parquet", "original_width"), code=(1, 2),
               after_progress=True)  # fmt: skip
    yield Case(
        "parquet: a row without a uid",
        partial(_built_parquet, uid=["1", None, "3"]),
        ("t.parquet", "uid"),
        code=(1, 2),
        after_progress=True,
    )
    yield Case("parquet: a uid twice", _uid_twice, "0000000000000007", after_progress=True)
    yield Case(
        "parquet: URLs nested in another column",
        partial(_built_parquet, {"row": [{"url": JPG, "text": "x"}] * 3}),
        ("t.parquet", "url_column="),
    )
    twice = pa.Table.from_arrays(
        [pa.array(["1"]), pa.array([JPG]), pa.array([JPG]), pa.array(["a"])], ["uid", "url", "url", "text"]
    )
    yield Case(
        "parquet: a column twice",
        lambda s: build_rows(s, s.parquet(columns=twice)),
        ("t.parquet", "'url'"),
        code=1,
        after_progress=True,
    )
    for missing in ("url", "text"):
        columns = {name: values for name, values in TABLE.items() if name != missing}
        yield Case(f"parquet: no {missing}", partial(_built_parquet, columns), ("t.parquet", f"'{missing}'"))
    capitals = {"UID": TABLE["uid"], "Url": TABLE["url"], "Text": TABLE["text"]}
    yield Case(
        "parquet: columns in capitals",
        partial(_built_parquet, capitals),
        ("t.parquet", "Url", "Text", "url_column="),
    )
    yield Case(
        "parquet: planned, columns in capitals",
        lambda s: plan_rows(s, s.parquet(columns=capitals)),
        ("t.parquet", "Url", "Text"),
    )
    wide = {f"c{n:03}": three for n in range(499)} | {"Url": TABLE["url"]}
    yield Case(
        "parquet: 500 columns",
        partial(_built_parquet, wide),
        ("t.parquet", "Url", "url_column="),
        also=_few_columns,
    )
    for setting in ("source.url_column=link", "source.caption_column=alt", "source.uid_column=id"):
        yield Case(
            f"parquet: {setting}",
            lambda s, setting=setting: build_rows(s, s.parquet(), setting),
            ("t.parquet", setting.partition("=")[2]),
        )
    yield Case(
        "parquet: a damaged column",
        _damaged_column,
        ("b.parquet", "text"),
        code=1,
        also=_others_went_on,
        after_progress=True,
        real=True,
    )
    yield Case("parquet: planned, one of two is cut off", _one_of_two, "b.parquet")


def _bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


def _planned_parquet(content: bytes, s: Situation) -> list[object]:
    return plan_rows(s, s.file("t.parquet", content))


def _built_parquet(
    columns: dict[str, Any] | Situation, s: Situation | None = None, **more: Any
) -> list[object]:
    if isinstance(columns, Situation):
        return build_rows(columns, columns.parquet(**more))
    assert s is not None
    return build_rows(s, s.parquet(columns=columns))


def _uid_twice(s: Situation) -> list[object]:
    recipe = SOURCE_AND_DOWNLOAD
    uids = ["00000000000000000000000000000007"] * 2 + ["00000000000000000000000000000008"]
    return [
        "build",
        f"{s.recipe(recipe, 'twice.py')}:rows",
        f"metadata={s.parquet(uid=uids)}",
        "--run",
        s.here / "run",
    ]


SOURCE_AND_DOWNLOAD = """
from builder.core import Recipe
from builder.stages.download import Download
from builder.stages.source import Source


def rows(*, metadata: str) -> Recipe:
    return Recipe("rows", (Source(files=metadata, rows_per_shard=100), Download(timeout_s=1)))
"""


def _few_columns(_: Situation, outcome: Outcome) -> None:
    listed = re.findall(r"\bc\d\d\d\b", outcome.err)
    assert len(listed) <= 20, f"{len(listed)} columns are listed"


def _damaged_column(s: Situation) -> list[object]:
    """Two files of a shard each; the captions of the second one are damaged."""
    s.parquet("tables/a.parquet", _rows(0))
    path = s.parquet("tables/b.parquet", _rows(100))
    meta = pq.read_metadata(path).row_group(0)
    column = next(meta.column(k) for k in range(meta.num_columns) if meta.column(k).path_in_schema == "text")
    start, data = column.dictionary_page_offset or column.data_page_offset, bytearray(path.read_bytes())
    for place in range(start, start + column.total_compressed_size):
        data[place] ^= 0x5A
    s.file(path, bytes(data))
    return build_rows(s, path.parent)


def _rows(first: int) -> dict[str, list[str]]:
    numbers = range(first, first + 100)
    return {
        "uid": [f"{n:032x}" for n in numbers],
        "url": [f"http://a.example/{n}.jpg" for n in numbers],
        "text": [f"caption {n * 7919}" for n in numbers],
    }


def _others_went_on(s: Situation, _: Outcome) -> None:
    assert (s.here / "run/source/00000/00000.json").exists()
    assert not (s.here / "run/source/00000/00001.json").exists()


def _one_of_two(s: Situation) -> list[object]:
    s.parquet("tables/a.parquet")
    return plan_rows(s, s.file("tables/b.parquet", s.parquet().read_bytes()[:-20]).parent)


# --- places -----------------------------------------------------------------------------------------------------------


def places() -> Iterator[Case]:
    def loop(s: Situation) -> Path:
        (s.here / "loop.parquet").symlink_to(s.here / "loop.parquet")
        return s.here / "loop.parquet"

    def dangling(s: Situation) -> Path:
        (s.here / "gone.parquet").symlink_to(s.here / "nowhere.parquet")
        return s.here / "gone.parquet"

    def fifo(name: str, s: Situation) -> Path:
        os.mkfifo(s.here / name)
        return s.here / name

    def a_socket(s: Situation) -> Path:
        folder = os.open(s.here, os.O_RDONLY)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"/proc/self/fd/{folder}/sock.parquet")  # a socket's path must be short
        os.close(folder)
        return s.here / "sock.parquet"

    def folder(name: str, inside: Callable[[Situation, Path], object], s: Situation) -> Path:
        (s.here / name).mkdir()
        inside(s, s.here / name)
        return s.here / name

    def nothing(s: Situation, path: Path) -> None: ...

    cases: list[tuple[str, Callable[[Situation], object], Place | tuple[Place, ...]]] = [
        ("no such file", lambda s: s.here / "nowhere.parquet", "nowhere.parquet"),
        ("no such folder", lambda s: s.here / "nowhere", "nowhere"),
        ("a pattern that nothing matches", lambda s: s.here / "*.parquet", "*.parquet"),
        ("an empty folder", partial(folder, "tables", nothing), "tables"),
        ("a folder without tables", partial(folder, "tables", lambda s, path: s.file(path / "README.md", "hello")), "tables"),
        ("a folder whose table is a folder", partial(folder, "tables", lambda s, path: (path / "x.parquet").mkdir()), "tables"),
        ("a folder that is named as a table", partial(folder, "x.parquet", nothing), "x.parquet"),
        ("a file of another kind", lambda s: s.file("t.xlsx", b"PK\3\4"), "t.xlsx"),
        ("a file without an ending", lambda s: s.file("table", HEAD), "table"),
        ("a link to itself", loop, "loop.parquet"),
        ("a link to nowhere", dangling, "gone.parquet"),
        ("a folder that holds a link to nowhere", partial(folder, "tables", lambda s, path: (path / "x.parquet").symlink_to("nowhere")), "tables"),
        ("a FIFO", partial(fifo, "f.parquet"), "f.parquet"),
        ("a FIFO, csv", partial(fifo, "f.csv"), "f.csv"),
        ("a folder that holds a FIFO", partial(folder, "tables", lambda s, path: os.mkfifo(path / "f.parquet")), "tables"),
        ("a socket", a_socket, "sock.parquet"),
        ("/dev/null", lambda s: "/dev/null", "/dev/null"),
        ("/dev/zero", lambda s: "/dev/zero", "/dev/zero"),
        ("nothing at all", lambda s: "", "metadata"),
        ("a space", lambda s: " ", either("metadata", "' '", "tsv file at")),
        ("S3 without its library, or without keys", lambda s: "s3://bucket/t.parquet", "s3://bucket/t.parquet"),
        ("a protocol that nobody speaks", lambda s: "gopher://host/t.parquet", "gopher"),
        ("a file:// that is not there", lambda s: f"file://{s.here}/nowhere.parquet", "nowhere.parquet"),
        ("a port where nobody listens", lambda s: "http://127.0.0.1:1/t.parquet", "127.0.0.1"),
        ("a host that is none", lambda s: "http://no.such.invalid/t.parquet", "no.such.invalid"),
        ("a name that is too long", lambda s: s.here / f"{'n' * 300}.parquet", "nnnn"),
        ("a name of colours", lambda s: s.here / f"{RED}red.parquet", "red.parquet"),
        ("a name of two lines", lambda s: s.here / "two\nlines.parquet", "lines.parquet"),
        ("a name that begins with a dash", lambda s: "-t.parquet", "-t.parquet"),
        ("a name that is not UTF-8", lambda s: s.here / os.fsdecode(b"caf\xe9.parquet"), "caf"),
        ("an unclosed bracket", lambda s: s.here / "t[1.parquet", "t[1.parquet"),
    ]  # fmt: skip
    for name, path, place in cases:
        yield Case(
            f"metadata: {name}",
            lambda s, path=path: plan_rows(s, path(s)),
            place,
            real=name in ("a FIFO", "a name that is not UTF-8"),
        )
    for name in ("a FIFO", "a FIFO, csv"):
        make, place = next((path, place) for known, path, place in cases if known == name)
        yield Case(f"metadata: {name}, built", lambda s, make=make: build_rows(s, make(s)), place)
    for file in ("t[1].parquet", "t{1,2}.parquet", "t'.parquet", "t*.parquet", " t .parquet", "größe 猫.parquet", "a=1.parquet", "n" * 200 + ".parquet",
                 "two\nlines.parquet", f"{RED}.parquet", "%s%d{}.parquet", os.fsdecode(b"caf\xe9.parquet")):  # fmt: skip
        yield Case(
            f"metadata: {file!a} is read",
            lambda s, file=file: [*plan_rows(s, s.file(file, _bytes(pa.table(TABLE)))), "--json"],
            '"rows_left": 3',
            code=0,
        )


# --- what else a source and a dedup read --------------------------------------------------------------------------------


def files_of_stages() -> Iterator[Case]:
    subsets: list[tuple[str, str, Callable[[Situation], object]]] = [
        ("no such file", "nowhere.npy", lambda s: s.here / "nowhere.npy"),
        ("text", "s.npy", lambda s: s.file("s.npy", "not numpy's")),
        ("cut off", "s.npy", lambda s: s.file("s.npy", _npy(np.zeros(100, "u8,u8"))[:-50])),
        ("of another type", "s.npy", lambda s: s.file("s.npy", _npy(np.zeros(5)))),
        ("a pickle", "s.npy", lambda s: s.file("s.npy", _npy(np.array([{}, None], object)))),
        ("a pickle that would run", "s.npy", lambda s: s.file("s.npy", b"cos\nsystem\n(S'touch evil'\ntR.")),
        ("several arrays", "s.npz", _npz),
        ("not sorted", "s.npy", lambda s: s.file("s.npy", _npy(np.array([(2, 0), (1, 0)], "u8,u8")))),
        ("a folder", "s.npy", lambda s: (s.here / "s.npy").mkdir() or s.here / "s.npy"),
        ("a FIFO", "s.npy", lambda s: os.mkfifo(s.here / "s.npy") or s.here / "s.npy"),
    ]
    for name, place, make in subsets:
        yield Case(
            f"subset: {name}",
            lambda s, make=make: plan_rows(s, s.parquet(), f"source.subset={make(s)}"),
            place,
        )
    stones: list[tuple[str, str, Callable[[Situation], object]]] = [
        ("no such file", "nowhere.parquet", lambda s: s.here / "nowhere.parquet"),
        ("empty", "stones.parquet", lambda s: s.file("stones.parquet")),
        ("another table", "stones.parquet", lambda s: s.parquet("stones.parquet")),
        ("numbers", "stones.parquet", lambda s: s.parquet("stones.parquet", {"kind": [1], "mark": [2]})),
        (
            "cut off",
            "stones.parquet",
            lambda s: s.file("stones.parquet", (s.version() / "tombstones.parquet").read_bytes()[:-9]),
        ),
        ("a folder", "stones", lambda s: (s.here / "stones").mkdir() or s.here / "stones"),
        (
            "a FIFO",
            "stones.parquet",
            lambda s: os.mkfifo(s.here / "stones.parquet") or s.here / "stones.parquet",
        ),
    ]
    for name, place, make in stones:
        yield Case(
            f"dedup.tombstones: {name}",
            lambda s, make=make: of_datacomp("plan", s, f"dedup.tombstones={make(s)}"),
            place,
        )


def _npy(array: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def _npz(s: Situation) -> Path:
    path = s.here / "s.npz"
    np.savez(path, a=np.zeros(3, "u8,u8"), b=np.zeros(3, "u8,u8"))
    return path


def cases() -> Iterator[Case]:
    yield from text()
    yield from parquet()
    yield from places()
    yield from files_of_stages()
