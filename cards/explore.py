"""A static page to look at a run or a version: samples with image, captions, scores and status.

    OUT/index.html, explorer.js, explorer.css   the page, the same for every data set
    OUT/data.json                               what it is, columns, rows by status, defects, number of chunks
    OUT/rows/00000.json.gz                      a chunk of rows, by column
    OUT/thumbs/00000/000000001.jpg              a run's images, at most 256 px; of a version `url` is shown

The rows are a prepared sample: all rows of up to `ROWS`, beyond that a fixed selection. The page searches all
of their text, sorts them by one column, and filters them by columns. It has no language of conditions:
that is `recap sql PLACE "from published where ..."`, which reads all of the data. A filter is one of

    text            contains, does not contain (whatever the case), is (exactly)
    number, date    = ≠ < ≤ > ≥, of a date with a time by its day in UTC
    bool            is true, is false
    any             is empty (null or an empty text), is not empty

and of a value that is empty only "is empty" holds.

DuckDB in a browser was measured (DuckDB-Wasm, Chromium 150, no network, 2026-11-21) and left out: 1.32.0 has
a wasm of 34 MB (7.7 MB gzipped), takes 1.2 s to start, and gets its parquet reader from extensions.duckdb.org
on the first query: offline every query fails. 1.28.0, of 2023, is the last with parquet inside (18 MB, starts
in 0.4 s, reads 100,000 rows in 0.5 s, searches one column in 0.13 s). Both need node where the page is made.
This page with 100,000 rows of 60 words (33 MB): first rows after 0.7 s, all after 2.0-2.9 s, a search of all
text 45-70 ms, a filter 10-60 ms, an order 60-130 ms, on 2 busy cores (Chromium 156, 2026-11-26).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from PIL import Image

from analysis import report
from analysis.views import connect
from builder import sql
from builder.columns import NOT_CAPTIONS, prefix
from builder.errors import InputError, telling_of_a_full_disk
from builder.places import Place
from builder.run import Run
from builder.stages.imagetar import images
from builder.stages.select import COLUMNS
from builder.store import Folder

PAGE = Path(__file__).parent / "explorer"
FILES = ("index.html", "explorer.js", "explorer.css")
ROWS = 100_000
CHUNK_BYTES = 8 << 20
THUMB_PIXELS = 256
NO_CAPTION = ("uid", "url", "sha256", "key", "status", "error")


def explore(place: Place, out: Path, *, rows: int | None = None) -> Path:
    """Write the page for RUN, TARGET, TARGET@v1.2.0 or tables with captions into `out`, whole or not at all.

    Returns its index.html.

    Raises:
        InputError: there is nothing to show in `place`, or `out` holds something else than such a page.
    """
    out = out.absolute()
    _only_a_page(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise InputError(
            f"{out} cannot be written: {error.strerror}", "name another folder: --out DIR"
        ) from error
    with (
        tempfile.TemporaryDirectory(prefix=f".{out.name[:100]}-", dir=out.parent) as folder,
        telling_of_a_full_disk(out),
    ):
        page, before = Path(folder, "page"), Path(folder, "before")
        _write(place, page, rows or ROWS)
        _only_a_page(out)  # still
        if out.exists():
            os.replace(out, before)
        os.replace(page, out)
    return out / "index.html"


def _only_a_page(out: Path) -> None:
    """Raises:
    InputError: `out` holds something that is not of such a page, and would be lost with it.
    """
    if not out.exists() or not any(out.iterdir() if out.is_dir() else [out]):
        return
    if not all((out / name).is_file() for name in (*FILES, "data.json")):
        raise InputError(
            f"{out} is there already and is no page of recap explore",
            "name a folder that does not exist yet: --out DIR",
        )
    for path in out.rglob("*"):
        name = path.relative_to(out).as_posix()
        if not path.is_dir() and not re.fullmatch(
            r"index\.html|explorer\.(js|css)|data\.json|rows/\d+\.json\.gz|thumbs/\d+/\d+\.jpg", name
        ):
            raise InputError(
                f"{path} is no part of the page that recap explore wrote",
                "move it away, or name another folder: --out DIR",
            )


def _write(place: Place, folder: Path, room: int) -> None:
    found = place.parts
    (folder / "rows").mkdir(parents=True)
    for name in FILES:
        shutil.copyfile(PAGE / name, folder / name)
    about, tars = _about(place), _tars(place.run)
    digest, keys, shown, chunks = hashlib.sha256(), set[str](), 0, 0
    with connect(found) as con:
        view = "published" if found.ledger else _table_view(con)
        described = _columns(con, view)
        counted = (
            "select status, count(*) from ledger group by all order by count(*) desc, status"
            if found.ledger
            else f"select 'ok', count(*) from {view}"
        )
        status = dict(con.sql(counted).fetchall())
        defects = report.defects(con)
        for table in _chunks(_sample(con, view, sum(n for name, n in status.items() if name != "ok"), room)):
            data = _chunk(table)
            (folder / "rows" / f"{chunks:05d}.json.gz").write_bytes(data)
            digest.update(data)
            chunks, shown = chunks + 1, shown + table.num_rows
            keys.update(key for key in table["key"].to_pylist() if key)
    if first := next(tars, None):
        _thumbs(chain([first], tars), keys, folder / "thumbs")
    about |= {
        "id": digest.hexdigest()[:16],
        "status": status,
        "rows": shown,
        "chunks": chunks,
        "columns": described,
        "defects": [
            {**row, "column": f"{prefix(row['caption'])}_defects"} for row in defects if row["defect"]
        ],
        "thumbs": first is not None,
    }
    (folder / "data.json").write_text(
        json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _about(place: Place) -> dict[str, Any]:
    """Name, version and licence, for the head and the foot of the page."""
    if place.run:
        recipe = place.run.recipe
        return {"title": recipe.title or recipe.name, "version": "not published", "license": recipe.license}
    if place.version:
        recipe, manifest = place.version.recipe, place.version.manifest
        title, version = recipe.title or manifest["name"], f"version {manifest['version']}"
        return {"title": title, "version": version, "license": recipe.license}
    return {"title": Path(place.parts.name).name, "version": "", "license": ""}


def _tars(run: Run | None) -> Iterator[Path]:
    """A run's images, as far as they are still there; what had to be brought is here one at a time."""
    if run is None:
        return
    for name in run.files("download", ".tar"):
        with suppress(FileNotFoundError):
            path = run.local(name)
            yield path
            if not isinstance(run.store, Folder):
                path.unlink()


def _table_view(con: duckdb.DuckDBPyConnection) -> str:
    """Somebody else's table as if it were published: with uid, url and key, made up where there is none."""
    there = [name for name, *_ in con.sql("describe published").fetchall()]
    url = next((name for name in ("url", "URL", "image_url", "coco_url") if name in there), None)
    made = {
        "uid": "cast(row_number() over () as varchar)",
        "url": sql.identifier(url) if url else "null::varchar",
        "key": "null::varchar",
    }
    added = [f"{expression} as {name}" for name, expression in made.items() if name not in there]
    taken = [
        name for name in there if name.lower() in ("status", "error")
    ]  # the page has columns of these names
    renamed = [f"{sql.identifier(name)} as {sql.identifier(f'{name}_there')}" for name in taken]
    every = f"* rename ({', '.join(renamed)})" if renamed else "*"
    con.execute(f"create temp view shown as select {', '.join([*added, every])} from published")
    return "shown"


def _columns(con: duckdb.DuckDBPyConnection, view: str) -> list[dict[str, str]]:
    """Name, kind (text, number, date, bool), what it is, and its role: caption, score or none."""
    schema = con.sql(f"from {view} limit 0").to_arrow_table().schema
    schema = schema.append(pa.field("status", pa.string())).append(pa.field("error", pa.string()))
    what = {name: text for name, _, text in COLUMNS} | {
        "status": "how far the row came",
        "error": "why it came no further",
    }
    described = []
    for field in schema:
        kind = _kind(field.type)
        caption = kind == "text" and field.name not in NO_CAPTION and not field.name.endswith(NOT_CAPTIONS)
        role = "caption" if caption else "score" if kind == "number" and field.name.endswith("_score") else ""
        described.append({"name": field.name, "kind": kind, "role": role, "what": what.get(field.name, "")})
    return sorted(described, key=lambda column: column["name"] != "org_caption")  # the original first


def _kind(of: pa.DataType) -> str:
    if pa.types.is_boolean(of):
        return "bool"
    if pa.types.is_integer(of) or pa.types.is_floating(of) or pa.types.is_decimal(of):
        return "number"
    return "date" if pa.types.is_date(of) or pa.types.is_timestamp(of) else "text"


def _sample(con: duckdb.DuckDBPyConnection, view: str, failed: int, room: int) -> Iterator[pa.Table]:
    """Published rows, then failed ones. Where there are too many, those with the smallest hashes.

    Failed ones get a tenth of the room at least.
    """
    ((published,),) = con.sql(f"select count(*) from {view}").fetchall()
    failed_room = failed if published + failed <= room else min(failed, max(room - published, room // 10))
    for rows, number, most in (
        (f"(select *, 'ok' as status, null::varchar as error from {view})", published, room - failed_room),
        (
            "(select uid, url, status, error, null::varchar as key from ledger where status <> 'ok')",
            failed,
            failed_room,
        ),
    ):
        chosen = (
            f" where hash(uid, url) in (select hash(uid, url) as h from {rows} order by h limit {most})"
            if number > most
            else ""
        )
        for batch in con.sql(f"from {rows}{chosen} limit {most}").to_arrow_reader(1000) if most else ():
            yield pa.table(batch)


def _chunks(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Tables of one kind joined to about `CHUNK_BYTES`."""
    held: list[pa.Table] = []
    for table in tables:
        if held and (table.schema != held[0].schema or sum(t.nbytes for t in held) > CHUNK_BYTES):
            yield pa.concat_tables(held)
            held = []
        held.append(table)
    if held:
        yield pa.concat_tables(held)


def _chunk(table: pa.Table) -> bytes:
    """JSON by column, gzipped without a clock; a column without a value is null."""
    columns = {
        name: None if table[name].null_count == table.num_rows else _values(table[name])
        for name in table.column_names
    }
    text = json.dumps(
        {"rows": table.num_rows, "columns": columns},
        ensure_ascii=False,
        separators=(",", ":"),
        allow_nan=False,
        default=str,
    )
    return gzip.compress(text.encode(), compresslevel=4, mtime=0)


def _values(column: pa.ChunkedArray) -> list[Any]:
    """As JSON has them, and as DuckDB compares them: 0.3 of 32 bits is 0.3, not 0.30000001192092896."""
    of = column.type
    if pa.types.is_timestamp(of):
        column = column.cast(pa.timestamp(of.unit)).cast(pa.string())  # in UTC, wherever the page is made
    elif pa.types.is_date(of):
        column = column.cast(pa.string())
    elif pa.types.is_float32(of):
        column = column.cast(pa.string()).cast(pa.float64())
    elif pa.types.is_decimal(of):
        column = column.cast(pa.float64())
    values: list[Any] = column.to_pylist()
    if pa.types.is_nested(of):
        return [None if value is None else str(value) for value in values]
    if pa.types.is_floating(column.type):
        return [value if value is not None and math.isfinite(value) else None for value in values]
    return values


def _thumbs(tars: Iterable[Path], keys: set[str], folder: Path) -> None:
    """The images of `keys` as JPEGs of at most `THUMB_PIXELS`, where explorer.js looks for them."""

    def write(sample: tuple[str, bytes]) -> None:
        key, image = sample
        path = folder / key[:5] / f"{key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(io.BytesIO(image)) as picture:
            if max(picture.size) > THUMB_PIXELS:
                picture.draft("RGB", (THUMB_PIXELS, THUMB_PIXELS))
                picture.thumbnail((THUMB_PIXELS, THUMB_PIXELS))
                picture.convert("RGB").save(path, quality=80)
            else:
                path.write_bytes(image)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for tar in tars:
            samples = ((key, image) for key, image in images(tar) if key in keys and key.isdecimal())
            while some := list(islice(samples, 256)):
                list(threads.map(write, some))
