"""CSV and TSV tables: every line is a row or an error with its number, and every cell is text.

Quoted line breaks make slicing the text itself impossible, so a table is read once, into parquet.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import re
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from builder.errors import InputError
from builder.files import encoding_of

MAX_FIELD_CHARACTERS, MAX_HEAD_CHARACTERS = 1 << 24, 1 << 20
BATCH_ROWS = 10_000
_UNREADABLE = (csv.Error, UnicodeError, OSError, EOFError, zlib.error)


@dataclass(frozen=True)
class TextTable:
    """A table's file and how to read it. `known` are names that a header may have.

    `numbered`: without one, columns are column0 and so on. `headless`: these are asked for; unless the first
    line has one of them, it is a row.
    """

    name: str
    fs: AbstractFileSystem
    path: str
    encoding: str = "utf-8"
    delimiter: str | None = None
    known: frozenset[str] = frozenset()
    numbered: bool = False
    headless: frozenset[str] = frozenset()

    @contextmanager
    def open(self) -> Iterator[tuple[list[str], Iterator[list[str]]]]:
        """(names of the columns, rows).

        Raises:
            InputError: a line that is no row, text in another encoding, or no header and columns that
                could be anything.
        """
        csv.field_size_limit(MAX_FIELD_CHARACTERS)
        # utf-8-sig: with the mark that Excel begins with, too.
        encoding = "utf-8-sig" if codecs.lookup(self.encoding).name == "utf-8" else self.encoding
        with ExitStack() as stack:
            try:
                raw = stack.enter_context(self.fs.open(self.path, "rb", compression="infer"))
                text = stack.enter_context(io.TextIOWrapper(raw, encoding=encoding, newline=""))
                head = text.readline(MAX_FIELD_CHARACTERS)
                while (
                    head.count('"') % 2
                    and len(head) < MAX_HEAD_CHARACTERS
                    and (more := text.readline(MAX_FIELD_CHARACTERS))
                ):
                    head += more  # a quoted line break
                if "\0" in head:
                    raise InputError(
                        f"{self.name} holds NUL characters: it looks like utf-16",
                        "say so: source.encoding=utf-16-le (or utf-16)",
                    )
                dialect = self._dialect(head)
            except _UNREADABLE as error:
                raise self._unreadable(error, 1) from error
            reader = csv.reader(itertools.chain(io.StringIO(head, newline=""), text), strict=True, **dialect)
            rows = self._lines(reader)
            first = next(rows, None)
            if first is None:
                raise InputError(f"{self.name} is empty", "leave it out")
            header = self._header(first)
            names = header or self._headless(first)
            yield names, self._whole(len(names), rows if header else itertools.chain([first], rows), reader)

    def _unreadable(self, error: Exception, line: int) -> InputError:
        """What is wrong with the file, whose line `line` was read."""
        if isinstance(error, csv.Error):
            hint = "mend that line, or give the table as parquet"
            return InputError(f"{self.name}, line {line}: {error}", hint)
        if isinstance(error, UnicodeError):  # holds the part of the file with what could not be read
            looks = encoding_of(error.object) if isinstance(error, UnicodeDecodeError) else "another one"
            return InputError(
                f"{self.name} is not {self.encoding}; it looks like {looks}",
                f"if so, say it: source.encoding={looks}",
            )
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        hint = "get the file again, then type the same command again"
        return InputError(f"{self.name} cannot be read: {said}", hint)

    def to_parquet(self, target: str) -> None:
        """Raises:
        InputError: as `open` does.
        """
        with self.open() as (names, rows):
            schema = pa.schema([(column, pa.string()) for column in names])
            with pq.ParquetWriter(target, schema, compression="zstd") as writer:
                while batch := list(itertools.islice(rows, BATCH_ROWS)):
                    columns = [
                        pa.array([cell or None for cell in column], pa.string())
                        for column in zip(*batch, strict=True)
                    ]
                    writer.write_table(pa.table(columns, schema))

    def _lines(self, reader: Any) -> Iterator[list[str]]:
        """Rows; an empty line is none."""
        while True:
            start = reader.line_num + 1
            try:
                row = next(reader, None)
            except _UNREADABLE as error:
                raise self._unreadable(error, start) from error
            if row is None:
                return
            if row:
                yield row

    def _whole(self, number: int, rows: Iterator[list[str]], reader: Any) -> Iterator[list[str]]:
        """Rows of so many fields."""
        for row in rows:
            if len(row) != number:
                start = reader.line_num - sum(len(re.findall(r"\r\n|\r|\n", cell)) for cell in row)
                reason = f"{self.name}, line {start}: {len(row)} fields, not {number}"
                raise InputError(reason, "mend that line, or give the table as parquet")
            yield row

    def _dialect(self, head: str) -> dict[str, Any]:
        """How the fields are parted; a TSV knows no quotes.

        Raises:
            InputError: the first line is a URL and something else in more than one way.
        """
        if self.path.lower().endswith((".tsv", ".tsv.gz")):
            return {"delimiter": self.delimiter or "\t", "quoting": csv.QUOTE_NONE}
        parted = {
            mark: next(csv.reader(io.StringIO(head, newline=""), delimiter=mark), [])
            for mark in self.delimiter or ",;\t|"
        }
        if header := next((mark for mark, cells in parted.items() if self.known & set(cells)), None):
            return {"delimiter": header}
        with_url = [mark for mark, cells in parted.items() if len(cells) > 1 and any(map(_is_url, cells))]
        if len(with_url) > 1:
            marks = " or ".join(map(repr, with_url))
            raise InputError(
                f"{self.name} has no header, and its first line can be parted by {marks}",
                f"say which: source.delimiter='{with_url[0]}'",
            )
        return {"delimiter": with_url[0] if with_url else max(parted, key=lambda mark: len(parted[mark]))}

    def _header(self, first: list[str]) -> list[str]:
        """The names in the first line; none where it is a row already: a URL is no column's name."""
        if self.headless and not self.headless & set(first):
            return []
        if not self.known & set(first) and any(map(_is_url, first)):
            return []
        if twice := next((column for column in first if first.count(column) > 1), None):
            raise InputError(
                f"{self.name}: there are several columns '{twice}'", "give each column a name of its own"
            )
        return first

    def _headless(self, first: list[str]) -> list[str]:
        """Names where there is no header: of two columns, the URL is the one that looks like it."""
        if self.numbered:
            return [f"column{n}" for n in range(len(first))]
        if len(first) != 2 or all(map(_is_url, first)):
            url = next(f"column{n}" for n, cell in enumerate(first) if _is_url(cell))
            raise InputError(
                f"{self.name} has no header, and {len(first)} columns: "
                "which are URL and caption is not known",
                f"name them: source.url_column={url} source.caption_column=column...",
            )
        return ["url" if _is_url(cell) else "caption" for cell in first]


def _is_url(cell: str) -> bool:
    return re.match(r"\s*https?://", cell, re.IGNORECASE) is not None
