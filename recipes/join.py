"""Which row of a version has its image where: uid and sha256 agree, or the row is told of and left out.

    FOLDER/00000.parquet    of one tar's images, or of ten thousand files: a sample a row, as they lie there
    FOLDER/join.json        what it was made of, the shards' rows, and the audit; written last

It is made once, before the first step, out of core: what is held of a data set is what DuckDB's memory holds.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from builder import sql
from builder.errors import InputError
from builder.files import read_file, sha256_file, write_atomically, write_parquet
from builder.run import RECIPE, Run
from builder.stages.source import read_subset
from builder.stages.textfeatures import TENSOR as TEXTS
from builder.typed import from_json
from builder.versions.targets import open_version
from builder.versions.version import Version
from recipes.images import check_alike, images_of, latents_of, run_with, shards_of, walk

ORIGINAL = "org_caption"
MEMORY = "1500MB"  # DuckDB spills beyond
_FOUND = pa.schema(
    [
        ("uid", pa.string()), ("sha256", pa.string()), ("shard", pa.int32()), ("file", pa.string()),
        ("start", pa.int64()), ("bytes", pa.int64()),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Audit:
    """Of a join: rows that are wanted, those whose image was found, those whose image is another one than the
    row says, and images that no row has; of what a subset wants, rows that the version has not. Where
    features of texts are joined, of the rows that found their image those are not found that have no
    features, or features of other texts.
    """

    rows: int
    found: int
    other_image: int
    images: int
    without_row: int
    without_features: int = 0
    other_text: int = 0
    not_in_version: int = 0

    def __str__(self) -> str:
        share = 100 * self.found / self.rows if self.rows else 0.0
        other = f", {self.other_image:,} of them another one than the row's" if self.other_image else ""
        if self.not_in_version:
            other += f", {self.not_in_version:,} of them are not in the version"
        if self.without_features:
            other += f", {self.without_features:,} found no features of their texts"
        if self.other_text:
            other += f", {self.other_text:,} features of other texts"
        return (
            f"{self.found:,} of {self.rows:,} rows found their image ({share:.1f} %); "
            f"{self.rows - self.found:,} did not{other}; "
            f"{self.without_row:,} of {self.images:,} images have no row"
        )


@dataclass(frozen=True)
class Joined:
    """`rows`: of each shard. `of` names what it was made of; `latents`, where those were joined in the place
    of the images, their VAE, its factor, the pictures' size, and their shape; `features`, where those were
    joined in the place of the texts, their encoder, its context and width, and what there is of no text.
    `order` is of the uids, as they come.
    """

    folder: Path
    rows: tuple[int, ...]
    captions: tuple[str, ...]
    audit: Audit
    of: str
    latents: dict[str, Any] | None = None
    features: dict[str, Any] | None = None
    order: str = ""

    def about(self) -> dict[str, Any]:
        """What was joined, by content."""
        of = json.loads(self.of)
        return {
            "version": f"{of['version']['name']} {of['version']['version']}",
            "files": sha256(json.dumps(of["version"]["files"], sort_keys=True).encode()).hexdigest(),
            "subset": of.get("subset"), "rows": list(self.rows), "found": self.audit.found,
            "latents": self.latents, "features": self.features,
            **({"order": self.order} if self.order else {}),  # a join of before has none
        }  # fmt: skip

    def shard(self, number: int) -> pa.Table:
        """uid, sha256, file, start, bytes, caption, and a column a caption; see `join`. With features also
        text_file, and of each caption NAME_start, a byte, NAME_tokens and NAME_cut.
        """
        return pq.read_table(self.folder / f"{number:05d}.parquet")


def join(
    version: str,
    images: str,
    folder: Path,
    *,
    captions: Sequence[str] = ("re_caption",),
    subset: Path | None = None,
    min_found: float = 0.99,
    latents: str = "",
    features: str = "",
    filled: Sequence[str] | None = None,
    accept: Callable[[Joined], None] = lambda _: None,
) -> Joined:
    """Join a version's rows with images, or take the join that lies in `folder` where it is the same.

    `images` is a run, what img2dataset wrote as tars or as parquet, or a folder of pictures, which are known
    by what they hold. `subset` is what `recap select` writes: subset.npy, or subset.parquet, which also says
    with which caption a row is trained on, `org_caption+re_caption` being both; in `caption`, null elsewhere.
    `latents` names a stage of the run: what is joined are its latents, in the place of the images; and
    `features` one whose features of these very texts are joined too. Of the columns `filled` some row has a
    text, of the captions unless given. `accept` may refuse what was joined: then the join of before stays.

    Raises:
        InputError: fewer than `min_found` of the rows found their image, or something is not what it should
            be.
    """
    opened = open_version(version)
    columns = (ORIGINAL, *(name for name in captions if name != ORIGINAL))
    given = {
        "version": opened.manifest, "images": sql.absolute(images), "files": _files(images, latents),
        "captions": columns,
    }  # fmt: skip
    if latents:
        given["latents"] = latents  # which VAE made them is in the names of their files
    if features:
        given |= {"features": features, "files_of_features": _files(images, features)}
    if subset:
        given["subset"] = sha256_file(subset)
    made_of = json.dumps(given, sort_keys=True)
    before = folder.with_name(f"{folder.name}.before")  # a join that is refused takes no other's place
    if before.exists():
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(before, folder)
    there = read(folder)
    if there is None or there.of != made_of:
        if there:
            os.replace(folder, before)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            needed = captions if filled is None else filled
            there = _join(opened, images, folder, columns, needed, subset, latents, features, made_of)
            _check(there, images, version, min_found, (latents, features))
            accept(there)
            written = {name: value for name, value in vars(there).items() if name != "folder"}
            write_atomically(folder / "join.json", json.dumps(written | {"audit": asdict(there.audit)}))
        except BaseException:
            shutil.rmtree(folder)
            if before.exists():
                os.replace(before, folder)
            raise
        shutil.rmtree(before, ignore_errors=True)
    else:
        _check(there, images, version, min_found, (latents, features))
        accept(there)
    return there


def _check(joined: Joined, images: str, version: str, min_found: float, stages: tuple[str, str]) -> None:
    if joined.audit.found < min_found * joined.audit.rows or not joined.audit.found:
        made = " and ".join(filter(None, stages))
        first = f"build {made} to the end" if made else "give the images that the version was made of"
        hint = f"{first}, or give a lower min_found than {min_found:g}"
        raise InputError(f"{images} has not the images of {version}: {joined.audit}", hint)


def _files(images: str, stage: str) -> str:
    """Names what lies in a folder of images now; of a run its records say that."""
    found = sha256()
    if stage:
        for _, record in run_with(images, stage).shards(stage):
            found.update(record.output(".safetensors").encode())
    elif "://" not in images and not (Path(images) / RECIPE).exists():
        for path in walk(Path(images)):
            about = path.stat()
            found.update(f"{path}/{about.st_size}/{about.st_mtime_ns}".encode())
    else:
        for _, record in Run.open(images).shards("download"):
            found.update(record.output(".tar").encode())
    return found.hexdigest()


def read(folder: Path) -> Joined | None:
    """The join that lies in a folder, if one does."""
    path = folder / "join.json"
    if not path.exists():
        return None
    found = from_json(dict[str, Any], read_file(path), what=str(path))
    return Joined(
        folder,
        tuple(found["rows"]),
        tuple(found["captions"]),
        Audit(**found["audit"]),
        str(found["of"]),
        found.get("latents"),
        found.get("features"),
        found.get("order", ""),
    )


def _join(
    version: Version, images: str, folder: Path, captions: tuple[str, ...], filled: Sequence[str],
    subset: Path | None, latents: str, features: str, made_of: str,
) -> Joined:  # fmt: skip
    with sql.connect(folder, memory_limit=MEMORY) as con:
        unknown = _create_rows(con, version, captions, filled, subset)
        together = "select 1 from rows where contains(caption, '+') limit 1"
        if features and con.sql(together).fetchall():
            reason = f"{subset} wants two captions together, of which there are no features"
            raise InputError(reason, "train with an encoder that reads on the way: encoder=MODEL")
        con.execute(
            "create table found(uid text, sha256 text, shard int, file text, start bigint, bytes bigint)"
        )
        about: dict[str, Any] = {}
        told: dict[str, Any] = {}
        images_found = latents_of(images, latents, about) if latents else images_of(images, folder)
        while some := list(islice(images_found, 50_000)):
            con.register("batch", pa.table(list(map(pa.array, zip(*some, strict=True))), schema=_FOUND))
            con.execute("insert into found from batch")
        # An image that is there twice is one; of those without a uid, images of one sha256 are.
        con.execute(
            """
            create table images as
                select uid, sha256, min(shard) as shard, arg_min(file, (shard, file, start)) as file,
                       arg_min(start, (shard, file, start)) as start,
                       arg_min(bytes, (shard, file, start)) as bytes
                from found group by uid, sha256;
            create table joined as
                select rows.*, images.shard, images.file, images.start, images.bytes
                from rows join images
                on rows.sha256 = images.sha256 and rows.uid = coalesce(images.uid, rows.uid);
            """
        )
        if con.sql("select count(uid) between 1 and count(*) - 1 from images").fetchall() == [(True,)]:
            con.execute(  # a row may have found its image with its uid, and one without any
                """
                delete from joined where rowid not in (
                    select arg_min(rowid, (shard, file, start)) from joined group by uid, caption
                )
                """
            )
        numbers = _numbers(con)
        numbers[0] += unknown
        numbers += [0, 0]
        listed = list(captions)
        if features:
            _join_features(con, images, features, captions, told)
            (found,) = con.sql("select count(*) from joined").fetchall()[0]
            (known,) = con.sql("select count(*) from before semi join features using (uid)").fetchall()[0]
            numbers[5:] = [numbers[1] - known, known - found]
            numbers[1] = found
            listed += ["text_file", *(f"{name}_{kind}" for name in captions for kind in FEATURES)]
        order = sha256()
        rows = tuple(_write(con, folder, listed, order))
        audit = Audit(*[*numbers, unknown])
        return Joined(folder, rows, captions, audit, made_of, about or None, told or None, order.hexdigest())


FEATURES = {"start": pa.int64(), "tokens": pa.int32(), "cut": pa.bool_()}  # of each caption


def _join_features(
    con: duckdb.DuckDBPyConnection, images: str, stage: str, captions: tuple[str, ...], told: dict[str, Any]
) -> None:
    """Of the rows in `joined` those stay whose features are of their own texts."""
    fields = [("uid", pa.string()), ("text_file", pa.string())]
    for name in captions:
        fields += [(f"{name}_{kind}", of) for kind, of in (FEATURES | {"sha256": pa.string()}).items()]
    schema = pa.schema(fields)
    con.register("none", schema.empty_table())
    con.execute("create table features as from none")
    for path, table, shard in shards_of(images, stage, TEXTS):
        of = {**shard.about, "width": shard.shape[0], "start": shard.start}
        check_alike(path, of, told, "features", "encoder")
        told |= of
        columns = [name for name in schema.names if name != "text_file"]
        try:
            batch = pq.read_table(table, columns=["status", *columns])
        except pa.ArrowInvalid as error:
            raise InputError(
                f"{table} has not the captions {', '.join(captions)}", "build the stage of them"
            ) from error
        con.register("batch", batch)
        con.execute(
            f"insert into features by name select {', '.join(map(sql.identifier, columns))}, "
            f"{sql.literal(str(path))} as text_file from batch where status = 'ok'"
        )
    if not told:
        raise InputError(f"the stage {stage} of {images} has no shards", "build it")
    told |= {"context": int(told["context"]), "empty": int(told["empty"])}
    of_a_token = 2 * told["width"]
    same = " and ".join(  # of a text that is white alone there are no features, and none are asked for
        f"(trim(coalesce({name}, ''), {_white()}) = '' or sha256({name}) = {of_it})"
        for name, of_it in ((sql.identifier(n), sql.identifier(f"{n}_sha256")) for n in captions)
    )
    where = ", ".join(
        f"{told['start']} + {of_a_token} * {start} as {start}"
        for start in (sql.identifier(f"{name}_start") for name in captions)
    )
    con.execute(
        f"""
        alter table joined rename to before;
        create table joined as
            select before.*, features.* exclude (uid) replace ({where})
            from before join features using (uid) where {same};
        """
    )


@cache
def _white() -> str:
    """What Python's strip takes away, for DuckDB's trim."""
    return sql.literal("".join(c for c in map(chr, range(sys.maxunicode + 1)) if c.isspace()))


def _numbers(con: duckdb.DuckDBPyConnection) -> list[int]:
    counts = """
        select (select count(*) from rows), (select count(*) from joined),
               (select count(*) from rows semi join found using (uid) anti join joined using (uid)),
               (select count(*) from found),
               (select count(*) from found anti join joined using (file, start))
    """
    return list(con.sql(counts).fetchall()[0])


def _create_rows(
    con: duckdb.DuckDBPyConnection, version: Version, captions: tuple[str, ...], filled: Sequence[str],
    subset: Path | None,
) -> int:  # fmt: skip
    """The table `rows(uid, sha256, caption, ...)`: of each caption a column, some of which has a text. Gives
    how many uids of the subset the version has not.
    """
    files = [f"{version.root}/{name}" for name in version.manifest["files"] if name.startswith("data/train-")]
    if not version.is_local:
        con.register_filesystem(version.fs)
        files = [version.fs.unstrip_protocol(name) for name in files]
    there = con.sql(f"from {sql.table(files)} limit 0").columns
    for name in (name for name in captions if name not in there):
        known = ", ".join(column for column in there if column.endswith("caption"))
        raise InputError(f"the version has no captions '{name}'", f"it has: {known}")
    listed = ", ".join(map(sql.identifier, captions))
    chosen, of = "null::text", ""
    if subset and subset.suffix == ".npy":
        con.execute("create table uids(uid text)")
        for part in _uids(subset):
            con.register("part", part)
            con.execute("insert into uids from part")
        of = "semi join uids using (uid)"
    elif subset:
        chosen, of = "uids.caption", "join uids using (uid)"
        _check_subset(con, subset, captions)
        con.execute(f"create table uids as select distinct uid, caption from {sql.table(subset)}")
    con.execute(
        f"create table rows as select uid, sha256, {chosen} as caption, {listed} from {sql.table(files)} {of}"
    )
    if subset and con.sql("select count(*) from rows").fetchall() == [(0,)]:
        raise InputError(f"{subset} names no row of the version", "make it of this version: recap select")
    by_the_mix = con.sql("select 1 from rows where coalesce(caption, '') = '' limit 1").fetchall()
    for name in filled if by_the_mix else ():
        text = f"trim({sql.identifier(name)}, {_white()})"
        if not con.sql(f"select 1 from rows where {text} <> '' limit 1").fetchall():
            raise InputError(f"the captions '{name}' are empty in every row", "train on another column")
    if not subset:
        return 0
    return int(con.sql("select count(distinct uid) from uids anti join rows using (uid)").fetchall()[0][0])


def _check_subset(con: duckdb.DuckDBPyConnection, subset: Path, captions: tuple[str, ...]) -> None:
    """Raises:
    InputError: it is no subset, or wants captions that the training does not read.
    """
    hint = "give subset.npy or subset.parquet of `recap select`"
    if subset.suffix != ".parquet" or not subset.is_file():
        raise InputError(f"{subset} is no subset", hint)
    if not {"uid", "caption"} <= set(con.sql(f"from {sql.table(subset)} limit 0").columns):
        raise InputError(f"{subset} has not the columns uid and caption", hint)
    split = f"select distinct unnest(string_split(caption, '+')) from {sql.table(subset)}"
    wanted = {name for (name,) in con.sql(split).fetchall() if name}
    if absent := sorted(wanted - set(captions)):
        reason = f"{subset} wants the captions '{absent[0]}', which the training does not read"
        raise InputError(reason, f"name them among its captions, which are: {', '.join(captions)}")


def _uids(subset: Path) -> Iterator[pa.Table]:
    pairs = read_subset(str(subset))
    for start in range(0, len(pairs), 100_000):
        part = pairs[start : start + 100_000]
        yield pa.table({"uid": [f"{int(high):016x}{int(low):016x}" for high, low in part]})


def _write(
    con: duckdb.DuckDBPyConnection, folder: Path, captions: Sequence[str], order: Any
) -> Iterator[int]:
    """Shard by shard, each in the order of its images; gives their rows. Shards without any are left out. Of
    the uids `order` is told.
    """
    listed = ", ".join(("uid", "sha256", "file", "start", "bytes", "caption", *map(sql.identifier, captions)))
    ends = [0]
    for (rows,) in con.sql("select count(*) from joined group by shard order by shard").fetchall():
        ends.append(ends[-1] + rows)
    reader = con.sql(
        f"select {listed} from joined order by shard, file, start, uid, caption"
    ).to_arrow_reader(50_000)
    waiting: list[pa.RecordBatch] = []
    here = 0
    for number, (start, stop) in enumerate(pairwise(ends)):
        while here < stop:
            waiting.append(reader.read_next_batch())
            here += len(waiting[-1])
        table = pa.Table.from_batches(waiting)
        shard = table.slice(0, stop - start)
        order.update("\n".join(shard["uid"].to_pylist()).encode() + b"\n")
        write_parquet(shard, folder / f"{number:05d}.parquet")
        waiting = table.slice(stop - start).to_batches()
        yield stop - start
