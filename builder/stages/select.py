"""select: the rows and columns that are published, coalesced into large shards, and a ledger of all others.

Reads   source, download, dedup, every caption, score, of `shards_per_file` shards at a time.
Asks    measured: which images are behind more URLs than the dedup stage allows, in the whole run.
Writes  `<file>.parquet` with the columns of `SCHEMA`, rows that are ok;
        `<file>.ledger.parquet` with the columns of `LEDGER`, every source row; of removed ones only that.

The schema is pinned: all columns of Recap-DataComp-1B with its types, and ours; then, for each caption beyond
the first that the recipe makes, its text and how it ended. A later append never rewrites a file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from builder import sql
from builder.core import Count, Question, Recipe, Stage, Status, Task, Work
from builder.errors import OutdatedError, RecipeError
from builder.files import write_parquet
from builder.stages.dedup import Dedup
from builder.stages.questions import Measured, is_sha256, of_images

COLUMNS: tuple[tuple[str, pa.DataType, str], ...] = (
    ("uid", pa.string(), "DataComp's id of the row: join on this"),
    ("url", pa.string(), "where the image was found"),
    ("re_caption", pa.string(), "the new caption"),
    ("org_caption", pa.string(), "the alt text, as found"),
    ("sha256", pa.string(), "of the image that was captioned, as served"),
    ("key", pa.string(), "img2dataset's: a position in one download, no identity"),
    ("re_clip_score", pa.float64(), "cosine of image and new caption"),
    ("org_clip_score", pa.float64(), "cosine of image and alt text; null where there is none"),
    ("re_length", pa.int64(), "words between white space"),
    ("org_length", pa.int64(), "words between white space"),
    ("re_gpt4v_score", pa.int64(), "a judge's 1-5; null where nobody judged"),
    ("org_gpt4v_score", pa.int64(), "a judge's 1-5; null where nobody judged"),
    (
        "re_caption_condition_diverse_topk",
        pa.string(),
        "alt-text-conditioned caption; null where the recipe makes none",
    ),
    ("re_condition_length", pa.int64(), "its words between white space"),
    ("re_finish_reason", pa.string(), "`stop`, or `length`: cut off at the token limit"),
    ("re_num_tokens", pa.int32(), "tokens of the new caption, the captioner's tokenizer"),
    ("re_clip_cut", pa.bool_(), "the scoring model's context cut the new caption"),
    ("org_clip_cut", pa.bool_(), "the scoring model's context cut the alt text"),
    ("width", pa.int32(), "pixels of the image that was captioned"),
    ("height", pa.int32(), "pixels of the image that was captioned"),
    ("clip_b32_similarity_score", pa.float32(), "from the metadata: cosine by OpenAI's ViT-B/32"),
    ("clip_l14_similarity_score", pa.float32(), "from the metadata: cosine by OpenAI's ViT-L/14"),
)
SCHEMA = pa.schema([(name, kind) for name, kind, _ in COLUMNS])
PUBLISHED_BEFORE = ("re_caption_condition_diverse_topk",)  # it has columns of its own in the schema
ROW_GROUP_ROWS = 100_000  # about 100 MB before compression
LEDGER = pa.schema([(name, pa.string()) for name in ("uid", "url", "status", "error")])


def columns(captions: tuple[str, ...] | None = ()) -> tuple[tuple[str, pa.DataType, str], ...]:
    """(name, type, what it is) of the published columns, where a recipe makes these beyond `re_caption`."""
    extra = [name for name in captions or () if name not in SCHEMA.names]
    return COLUMNS + tuple(
        column
        for name in extra
        for column in (
            (name, pa.string(), f"the caption `{name}`"),
            (f"{name}_finish_reason", pa.string(), "`stop`, or `length`: cut off at the token limit"),
            (f"{name}_num_tokens", pa.int32(), "its tokens, the captioner's tokenizer"),
        )
    )


def schema(captions: tuple[str, ...] | None = ()) -> pa.Schema:
    return pa.schema([(name, kind) for name, kind, _ in columns(captions)])


def schemas(recipe: Recipe) -> dict[str, pa.Schema]:
    """Of the parquet files of a recipe's versions, by their folder.

    Raises:
        RecipeError: the recipe publishes nothing.
    """
    select = recipe.stage("select")
    if not isinstance(select, Select):
        reason = f"recipe {recipe.name}: its stage select is another"
        raise RecipeError(reason, "use builder.stages.select.Select")
    return {"data": schema(select.captions), "ledger": LEDGER}


_WORD = r"[^\s\p{Z}\x{0B}\x{1C}-\x{1F}\x{85}]+"  # between white space, Unicode's
# Names of its own begin with _, which no caption's name does.
_JOIN = """
with _joined as (
    select source.uid, source.url, re_caption.re_caption, source.org_caption,
           download.image_sha256 as sha256, download.key,
           score.re_caption_cosine as re_clip_score, score.org_caption_cosine as org_clip_score,
           len(regexp_extract_all(re_caption.re_caption, '{word}')) as re_length,
           len(regexp_extract_all(source.org_caption, '{word}')) as org_length,
           re_caption.re_caption_finish_reason as re_finish_reason,
           re_caption.re_caption_num_tokens as re_num_tokens,
           score.re_caption_cut as re_clip_cut, score.org_caption_cut as org_clip_cut,
           download.width, download.height,
           source.clip_b32_similarity_score, source.clip_l14_similarity_score,
           score.status as _scored, score.error as _scored_error,
           download.status as _downloaded, dedup.status as _deduplicated{captions},
           row_number() over () as _position
    from {stages}
)
select _joined.*, if({placeholder}, 'duplicate_image', _scored) as status,
       if({placeholder}, 'one image behind ' || _urls || ' URLs', _scored_error) as error
from _joined left join _placeholders on _joined.sha256 = _placeholders._sha256 order by _position
"""
# Of the whole run, whatever was known when a row was captioned: what is published does not depend on timing.
_PLACEHOLDER = "_urls is not null and _downloaded = 'ok' and _deduplicated <> 'removed'"


@dataclass(frozen=True, kw_only=True)
class Select(Stage):
    """`shards_per_file` source shards become one published file: aim at 200,000 rows, 220-430 MB.

    `captions` are published besides `re_caption`: all that the recipe makes unless given. `max_urls` is that
    of dedup.
    """

    version: ClassVar[int] = 2
    groups: ClassVar[bool] = True
    once: ClassVar[tuple[str, ...]] = ("max_urls",)  # that of dedup; the answer that it leads to is an input
    libraries: ClassVar[tuple[str, ...]] = ("pyarrow", "duckdb")

    name: str = "select"
    shards_per_file: Count = 20
    captions: tuple[str, ...] | None = None
    max_urls: Count | None = None

    @property
    def shards_per_task(self) -> int:
        return self.shards_per_file

    def __post_init__(self) -> None:
        for name in self.captions or ():
            if name in SCHEMA.names and name not in PUBLISHED_BEFORE:
                reason = f"select.captions names '{name}', which is a column of every version"
                raise RecipeError(reason, "give the caption another name")

    def after(self, earlier: tuple[Stage, ...]) -> Stage:
        made = tuple(name for stage in earlier for name in stage.makes_captions() if name != "re_caption")
        asked = [stage.max_urls for stage in earlier if isinstance(stage, Dedup)]
        captions = made if self.captions is None else self.captions
        return replace(self, captions=captions, max_urls=asked[0] if asked else None)

    def names_captions(self) -> tuple[str, ...]:
        return ("re_caption", *(self.captions or ()))

    def reads(self) -> tuple[str, ...]:
        return ("source", "download.parquet", "dedup", *self.names_captions(), "score")

    def asks(self) -> tuple[Question, ...]:
        return (Measured(max_urls=self.max_urls),) if self.max_urls else ()

    @contextmanager
    def open(self) -> Iterator[Work]:
        stages = [name.partition(".")[0] for name in self.reads()]
        others = " positional join ".join(sql.identifier(name) for name in stages)
        more = "".join(map(_caption_sql, self.captions or ()))
        join = _JOIN.format(word=_WORD, captions=more, stages=others, placeholder=_PLACEHOLDER)
        uids = (f"{sql.identifier(name)}.uid" for name in stages[1:])
        agree = " and ".join(f"source.uid is not distinct from {uid}" for uid in uids)
        target = schema(self.captions)
        with sql.connect(threads=1) as con:

            def work(task: Task) -> Mapping[str, int]:
                parts = []
                for files in zip(*(task.all_inputs(stage) for stage in stages), strict=True):
                    for stage, file in zip(stages, files, strict=True):
                        view = sql.identifier(stage)
                        con.execute(f"create or replace temp view {view} as from {sql.table(file)}")
                    con.register("_placeholders", self._placeholders(con, task))
                    self._check_early(con, others, dict(zip(stages, files, strict=True)), task)
                    counts = con.sql(f"select count(*) filter ({agree}), count(*) from {others}")
                    ((same, rows),) = counts.fetchall()
                    if same != rows:
                        reason = f"the stages of shard {files[0].name} do not hold the same rows"
                        raise ValueError(f"{reason}: {same} of {rows} agree")
                    parts.append(con.sql(join).to_arrow_table())
                table = pa.concat_tables(parts)
                ledger = table.select(LEDGER.names)
                removed = pc.equal(ledger["status"], Status.REMOVED)
                for index, name in enumerate(("uid", "url")):  # of what was taken down nothing is told
                    ledger = ledger.set_column(index, name, pc.if_else(removed, None, ledger[name]))
                _write(ledger.cast(LEDGER), task.output(".ledger.parquet"))
                published = table.filter(pc.equal(table["status"], "ok"))
                for field in target:
                    if field.name not in published.column_names:
                        published = published.append_column(field, pa.nulls(len(published), field.type))
                _write(published.select(target.names).cast(target), task.output())
                return Counter(table["status"].to_pylist())

            yield work

    def _check_early(
        self, con: duckdb.DuckDBPyConnection, others: str, files: Mapping[str, Path], task: Task
    ) -> None:
        """Raises:
        OutdatedError: a row was not captioned, for a placeholder as it seemed then, and is none.
        """
        seemed = "{}.status = 'duplicate_image' and dedup.status = 'ok' and _urls is null"
        joined = f"{others} left join _placeholders on download.image_sha256 = _sha256"
        names = {path: name for name, path in task.files.items()}
        outdated = []
        for stage in self.names_captions():
            which = seemed.format(sql.identifier(stage))
            ((rows,),) = con.sql(f"select count(*) from {joined} where {which}").fetchall()
            outdated += [names[files[stage]]] if rows else []
        if outdated:
            reason = "made when more URLs than now seemed to lead to some images; they are made again"
            raise OutdatedError(f"{', '.join(outdated)}: {reason}", outdated)

    def _placeholders(self, con: duckdb.DuckDBPyConnection, task: Task) -> pa.Table:
        """(_sha256, _urls) of this shard's images that are behind too many URLs of the run."""
        if not self.max_urls:
            return pa.table({"_sha256": pa.array([], pa.string()), "_urls": pa.array([], pa.int64())})
        return con.sql(
            f"""select distinct image_sha256 as _sha256, urls as _urls
                from (select image_sha256, {of_images("image_sha256")}
                      from download where {is_sha256("image_sha256")})
                     join {sql.table(task.input("measured"))} using (high, low)"""
        ).to_arrow_table()


def _write(table: pa.Table, path: Path) -> None:
    write_parquet(table, path, row_group_size=ROW_GROUP_ROWS)


def _caption_sql(name: str) -> str:
    """What a further caption adds to the join.

    The published alt-text-conditioned one has columns of its own in the schema.
    """
    column = f"{sql.identifier(name)}.{sql.identifier(name)}"
    if name == "re_caption_condition_diverse_topk":
        return f", {column}, len(regexp_extract_all({column}, '{_WORD}')) as re_condition_length"
    more = (sql.identifier(name + suffix) for suffix in ("_finish_reason", "_num_tokens"))
    return "".join(f", {each}" for each in (column, *more))
