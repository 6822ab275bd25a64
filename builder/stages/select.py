"""select: the rows and columns that are published, coalesced into large shards, and a ledger of all the others.

Reads   source, download, caption, score, of `shards_per_file` shards at a time.
Writes  `<file>.parquet` with the columns of `SCHEMA`, rows that are ok;
        `<file>.ledger.parquet` with the columns of `LEDGER`, every source row; of removed ones only that.

The schema is pinned: all columns of Recap-DataComp-1B with its types, and ours; then, for each caption beyond the first
that the recipe makes, its text and how it ended. A later append never rewrites a file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from builder import sql
from builder.core import Count, Recipe, Stage, Status, Task, Work, write_parquet
from builder.errors import RecipeError

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
PUBLISHED_BEFORE = (
    "re_caption_condition_diverse_topk",
)  # a caption that has columns of its own in the schema
ROW_GROUP_ROWS = 100_000  # about 100 MB before compression
LEDGER = pa.schema(
    [("uid", pa.string()), ("url", pa.string()), ("status", pa.string()), ("error", pa.string())]
)


def columns(captions: tuple[str, ...] = ()) -> tuple[tuple[str, pa.DataType, str], ...]:
    """(name, type, what it is) of the published columns of a recipe that makes these captions beyond `re_caption`."""
    extra = [name for name in captions if name not in SCHEMA.names]
    return COLUMNS + tuple(
        column
        for name in extra
        for column in (
            (name, pa.string(), f"the caption `{name}`"),
            (f"{name}_finish_reason", pa.string(), "`stop`, or `length`: cut off at the token limit"),
            (f"{name}_num_tokens", pa.int32(), "its tokens, the captioner's tokenizer"),
        )
    )


def schema(captions: tuple[str, ...] = ()) -> pa.Schema:
    return pa.schema([(name, kind) for name, kind, _ in columns(captions)])


def schemas(recipe: Recipe) -> dict[str, pa.Schema]:
    """Of the parquet files of a recipe's versions, by their folder.

    Raises:
        RecipeError: the recipe publishes nothing.
    """
    select = recipe.stage("select")
    if not isinstance(select, Select):
        raise RecipeError(
            f"recipe {recipe.name}: its stage select is another", "use builder.stages.select.Select"
        )
    return {"data": schema(select.captions), "ledger": LEDGER}


_WORD = r"[^\s\p{Z}\x{0B}\x{1C}-\x{1F}\x{85}]+"  # between white space, Unicode's
_JOIN = """
select source.uid, source.url, re_caption, org_caption, image_sha256 as sha256, key,
       re_caption_cosine as re_clip_score, org_caption_cosine as org_clip_score,
       len(regexp_extract_all(re_caption, '{word}')) as re_length, len(regexp_extract_all(org_caption, '{word}')) as org_length,
       re_caption_finish_reason as re_finish_reason, re_caption_num_tokens as re_num_tokens,
       re_caption_cut as re_clip_cut, org_caption_cut as org_clip_cut, width, height,
       clip_b32_similarity_score, clip_l14_similarity_score, score.status as status, score.error as error{captions}
from source positional join download positional join caption positional join score
"""


@dataclass(frozen=True, kw_only=True)
class Select(Stage):
    """`shards_per_file` source shards become one published file: aim at 200,000 rows, 220-430 MB.

    `captions` are the caption specs that are published besides `re_caption`.
    """

    name: ClassVar[str] = "select"
    reads: ClassVar[tuple[str, ...]] = ("source", "download", "caption", "score")
    libraries: ClassVar[tuple[str, ...]] = ("pyarrow", "duckdb")

    shards_per_file: Count = 20
    captions: tuple[str, ...] = ()

    @property
    def shards_per_task(self) -> int:
        return self.shards_per_file

    def __post_init__(self) -> None:
        for name in self.captions:
            if name in SCHEMA.names and name not in PUBLISHED_BEFORE:
                raise RecipeError(
                    f"select.captions names '{name}', which is a column of every version",
                    "give the caption another name",
                )

    def names_captions(self) -> tuple[str, ...]:
        return ("re_caption", *self.captions)

    @contextmanager
    def open(self) -> Iterator[Work]:
        join, target = (
            _JOIN.format(word=_WORD, captions="".join(map(_caption_sql, self.captions))),
            schema(self.captions),
        )
        with sql.connect(threads=1) as con:

            def work(task: Task) -> Mapping[str, int]:
                parts = []
                for files in zip(*(task.all_inputs(stage) for stage in self.reads), strict=True):
                    for stage, file in zip(self.reads, files, strict=True):
                        con.execute(f"create or replace temp view {stage} as from {sql.table(file)}")
                    ((same, rows),) = con.sql(
                        "select count(*) filter (source.uid is not distinct from download.uid and source.uid is not distinct from caption.uid "
                        "and source.uid is not distinct from score.uid), count(*) from source positional join download "
                        "positional join caption positional join score"
                    ).fetchall()
                    if same != rows:
                        raise ValueError(
                            f"the stages of shard {files[0].stem} do not hold the same rows: {same} of {rows} agree"
                        )
                    parts.append(con.sql(join).to_arrow_table())
                table = pa.concat_tables(parts)
                ledger = table.select(LEDGER.names)
                removed = pc.equal(ledger["status"], Status.REMOVED)
                for index, name in enumerate(("uid", "url")):  # of what was taken down nothing is told
                    ledger = ledger.set_column(index, name, pc.if_else(removed, None, ledger[name]))
                write_parquet(
                    ledger.cast(LEDGER), task.output(".ledger.parquet"), row_group_size=ROW_GROUP_ROWS
                )
                published = table.filter(pc.equal(table["status"], "ok"))
                for field in target:
                    if field.name not in published.column_names:
                        published = published.append_column(field, pa.nulls(len(published), field.type))
                write_parquet(
                    published.select(target.names).cast(target), task.output(), row_group_size=ROW_GROUP_ROWS
                )
                return Counter(table["status"].to_pylist())

            yield work


def _caption_sql(name: str) -> str:
    """What a further caption adds to the join. The published alt-text-conditioned one has columns of its own in the schema."""
    if name == "re_caption_condition_diverse_topk":
        return f", {name}, len(regexp_extract_all({name}, '{_WORD}')) as re_condition_length"
    return "".join(f", {sql.identifier(name + suffix)}" for suffix in ("", "_finish_reason", "_num_tokens"))
