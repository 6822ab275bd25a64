"""select: the rows and columns that are published, coalesced into large shards, and a ledger of all others.

Reads   source, download, dedup, every caption, score, of `shards_per_file` shards at a time.
Asks    measured: which images are behind more URLs than the dedup stage allows, in the whole run.
Writes  `<file>.parquet` with the columns of `SCHEMA`, rows that are ok;
        `<file>.ledger.parquet` with the columns of `LEDGER`, every source row; of removed ones only that.

The schema is pinned: all columns of Recap-DataComp-1B with its types, and ours; then, for each caption beyond
the first that the recipe makes, its text, how it ended and its scores; and the judges' ratings. A later
append never rewrites a file.

A caption that more than `max_identical` rows of one file have gets the defect `identical`: a model that says
the same of everything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from builder import sql
from builder.columns import PUBLISHED_BEFORE, prefix, score_column
from builder.core import Count, Json, Question, Recipe, Stage, Status, Task, Work
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
    ("re_defects", pa.string(), "defects with which the new caption was kept, comma separated"),
    ("re_rejected", pa.string(), "defects of replies before it, ; between replies"),
    ("re_blind", pa.bool_(), "a blank picture gets this caption too; null but for a sample"),
    ("re_clip_cut", pa.bool_(), "the scoring model's context cut the new caption"),
    ("org_clip_cut", pa.bool_(), "the scoring model's context cut the alt text"),
    ("width", pa.int32(), "pixels of the image that was captioned"),
    ("height", pa.int32(), "pixels of the image that was captioned"),
    ("clip_b32_similarity_score", pa.float32(), "from the metadata: cosine by OpenAI's ViT-B/32"),
    ("clip_l14_similarity_score", pa.float32(), "from the metadata: cosine by OpenAI's ViT-L/14"),
)
SCHEMA = pa.schema([(name, kind) for name, kind, _ in COLUMNS])
IDENTICAL = "identical"
# What a stage writes of a caption, and what is published of it: under the caption's prefix.
_ENDS: tuple[tuple[str, pa.DataType, str], ...] = (
    ("finish_reason", pa.string(), "`stop`, or `length`: cut off at the token limit"),
    ("num_tokens", pa.int32(), "its tokens, the captioner's tokenizer"),
    ("defects", pa.string(), "defects with which it was kept, comma separated"),
    ("rejected", pa.string(), "defects of replies before it, ; between replies"),
    ("blind", pa.bool_(), "a blank picture gets it too; null but for a sample"),
)
ROW_GROUP_ROWS = 100_000  # about 100 MB before compression
LEDGER = pa.schema([(name, pa.string()) for name in ("uid", "url", "status", "error")])


def schemas(recipe: Recipe) -> dict[str, pa.Schema]:
    """Of the parquet files of a recipe's versions, by their folder.

    Raises:
        RecipeError: the recipe publishes nothing.
    """
    select = recipe.stage("select")
    if not isinstance(select, Select):
        reason = f"recipe {recipe.name}: its stage select is another"
        raise RecipeError(reason, "use builder.stages.select.Select")
    return {"data": select.schema(), "ledger": LEDGER}


_WORD = r"[^\s\p{Z}\x{0B}\x{1C}-\x{1F}\x{85}]+"  # between white space, Unicode's
# Names of its own begin with _, which no caption's name does.
_JOIN = """
with _joined as (
    select source.uid, source.url, source.org_caption,
           download.image_sha256 as sha256, download.key,
           {lengths}, {made},
           download.width, download.height,
           source.clip_b32_similarity_score, source.clip_l14_similarity_score,
           {status} as _scored, {error} as _scored_error,
           download.status as _downloaded, dedup.status as _deduplicated,
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

    `captions` are published besides `re_caption`, `ratings` the judges', and `scores` as `stage.caption`: all
    that the recipe makes unless given. `max_urls` is that of dedup, and `quoted` are captions of which
    published ones are made, and which are not.
    """

    version: ClassVar[int] = 3
    groups: ClassVar[bool] = True
    # That of dedup; the answer that it leads to is an input, as the captions that are quoted are.
    once: ClassVar[tuple[str, ...]] = ("max_urls", "quoted")
    libraries: ClassVar[tuple[str, ...]] = ("pyarrow", "duckdb")

    name: str = "select"
    shards_per_file: Count = 20
    captions: tuple[str, ...] | None = None
    ratings: tuple[str, ...] | None = None
    scores: tuple[str, ...] | None = None
    # What of how each caption ended.
    ends: tuple[Literal["finish_reason", "num_tokens", "defects", "rejected", "blind"], ...] = (
        "finish_reason", "num_tokens", "defects", "rejected", "blind",
    )  # fmt: skip
    max_identical: Count = 20
    max_urls: Count | None = None
    quoted: tuple[str, ...] = ()

    @property
    def shards_per_task(self) -> int:
        return self.shards_per_file

    def __post_init__(self) -> None:
        for name in self.captions or ():
            if name in SCHEMA.names and name not in PUBLISHED_BEFORE:
                reason = f"select.captions names '{name}', which is a column of every version"
                raise RecipeError(reason, "give the caption another name")
        scored = [score_column(*score.split(".", 1)) for score in self.scores or ()]
        for names in ([name for name, *_ in self.columns()], [*scored, *(self.ratings or ())]):
            known = [name.lower() for name in names]
            for name in (name for name in known if known.count(name) > 1):
                raise RecipeError(
                    f"two published columns are called '{name}'", "give a caption or a score another name"
                )

    def after(self, earlier: tuple[Stage, ...]) -> Stage:
        made = tuple(name for stage in earlier for name in stage.makes_captions() if name != "re_caption")
        ratings = tuple(name for stage in earlier for name in stage.makes_ratings())
        scores = tuple(f"{stage.name}.{name}" for stage in earlier for name in stage.makes_scores())
        asked = [stage.max_urls for stage in earlier if isinstance(stage, Dedup)]
        captions = made if self.captions is None else self.captions
        for score in (score for score in self.scores or () if score not in scores):
            reason = f"select.scores names '{score}', which no stage before it makes"
            raise RecipeError(reason, f"there are: {', '.join(scores)}")
        there = {"org_caption", "re_caption", *captions}
        scores = tuple(score for score in scores if score.partition(".")[2] in there)
        found = replace(
            self,
            captions=captions,
            ratings=ratings if self.ratings is None else self.ratings,
            scores=scores if self.scores is None else self.scores,
            max_urls=asked[0] if asked else None,
            quoted=(),
        )
        reads = set(found.reads())
        for stage in reversed(earlier):
            if stage.name in reads:
                reads.update(name.partition(".")[0] for name in stage.reads())
        return replace(found, quoted=tuple(name for name in made if name in reads - set(found.reads())))

    def names_captions(self) -> tuple[str, ...]:
        return ("re_caption", *(self.captions or ()))

    def reads(self) -> tuple[str, ...]:
        scoring = (score.partition(".")[0] for score in self.scores or ())
        made = dict.fromkeys((*self.names_captions(), *scoring, *(self.ratings or ()), *self.quoted))
        return ("source", "download.parquet", "dedup", *made)

    def columns(self) -> tuple[tuple[str, pa.DataType, str], ...]:
        """(name, type, what it is) of the published columns."""
        without = {f"re_{end}" for end, *_ in _ENDS if end not in self.ends}
        found = [column for column in COLUMNS if column[0] not in without]
        for name in self.captions or ():
            if name not in PUBLISHED_BEFORE:
                found.append((name, pa.string(), f"the caption `{name}`"))
            found += [(f"{prefix(name)}_{end}", kind, what) for end, kind, what in self._ends(name)]
        for stage, _, name in (score.partition(".") for score in self.scores or ()):
            column = score_column(stage, name)
            cut = column.removesuffix("_score") + "_cut"
            if column not in SCHEMA.names:
                found.append((column, pa.float64(), f"cosine of image and `{name}`, by `{stage}`"))
                found.append((cut, pa.bool_(), f"the context of `{stage}` cut `{name}`"))
        for name in self.ratings or ():
            if name not in SCHEMA.names:
                found.append((name, pa.int64(), "a model's 1-5 of a caption; null where it gave none"))
            found.append((f"{name}_defects", pa.string(), "`missing` where there is none"))
            found.append((f"{name}_rejected", pa.string(), "defects of replies before, ; between replies"))
        return tuple(found)

    def _ends(self, name: str) -> Iterator[tuple[str, pa.DataType, str]]:
        before = "defects" not in self.ends  # then there were none for the one that the paper publishes
        return (end for end in _ENDS if end[0] in self.ends and not (before and name in PUBLISHED_BEFORE))

    @classmethod
    def from_before(cls, data: dict[str, Json]) -> dict[str, Json]:
        """Of captions' ends there were two, and scores were published of two captions."""
        if "scores" in data:
            return data
        scores = [f"score.{name}" for name in ("org_caption", "re_caption")]
        return data | {"scores": scores, "ratings": [], "ends": ["finish_reason", "num_tokens"]}

    def schema(self) -> pa.Schema:
        return pa.schema([(name, kind) for name, kind, _ in self.columns()])

    def asks(self) -> tuple[Question, ...]:
        return (Measured(max_urls=self.max_urls),) if self.max_urls else ()

    @contextmanager
    def open(self) -> Iterator[Work]:
        stages = [name.partition(".")[0] for name in self.reads()]
        others = " positional join ".join(sql.identifier(name) for name in stages)
        join = self._join(stages, others)
        uids = (f"{sql.identifier(name)}.uid" for name in stages[1:])
        agree = " and ".join(f"source.uid is not distinct from {uid}" for uid in uids)
        target = self.schema()
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
                published = self._identical(published.select(target.names).cast(target))
                _write(published, task.output())
                return Counter(table["status"].to_pylist())

            yield work

    def _join(self, stages: list[str], others: str) -> str:
        """SQL for the rows of a shard, with every column that is published and the status of all stages."""
        made = []
        for name in self.names_captions():
            made.append(_column(name, name, name))
            made += [_column(name, f"{name}_{end}", f"{prefix(name)}_{end}") for end, *_ in self._ends(name)]
        for stage, _, name in (score.partition(".") for score in self.scores or ()):
            column = score_column(stage, name)
            made.append(_column(stage, f"{name}_cosine", column))
            made.append(_column(stage, f"{name}_cut", column.removesuffix("_score") + "_cut"))
        for name in self.ratings or ():
            made += [
                _column(name, column, column) for column in (name, f"{name}_defects", f"{name}_rejected")
            ]
        lengths = [("org_caption", "source"), ("re_caption", "re_caption")]
        lengths += [(name, name) for name in self.captions or () if name in PUBLISHED_BEFORE]
        counted = ", ".join(
            f"len(regexp_extract_all({sql.identifier(stage)}.{sql.identifier(name)}, '{_WORD}')) "
            f"as {prefix(name)}_length"
            for name, stage in lengths
        )
        failed = [name for name in stages if name not in ("source", "download", *self.quoted)]
        status, error = (
            "case "
            + " ".join(
                f"when {sql.identifier(name)}.status <> 'ok' then {sql.identifier(name)}.{column}"
                for name in failed
            )
            + f" else {otherwise} end"
            for column, otherwise in (("status", "'ok'"), ("error", "null"))
        )
        return _JOIN.format(
            lengths=counted, made=", ".join(made), status=status, error=error, stages=others,
            placeholder=_PLACEHOLDER,
        )  # fmt: skip

    def _identical(self, table: pa.Table) -> pa.Table:
        """The rows with the defect of captions that too many of them have."""
        for name in self.names_captions() if "defects" in self.ends else ():
            found = pc.value_counts(table[name])
            often = found.filter(pc.greater(found.field("counts"), self.max_identical)).field("values")
            is_one = pc.is_in(table[name], value_set=often, skip_nulls=True)
            column = f"{prefix(name)}_defects"
            told = pc.binary_join_element_wise(table[column], IDENTICAL, ",", null_handling="skip")
            index = table.schema.get_field_index(column)
            table = table.set_column(index, column, pc.if_else(is_one, told, table[column]))
        return table

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
        for stage in (*self.names_captions(), *(self.ratings or ()), *self.quoted):
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


def _column(stage: str, column: str, published: str) -> str:
    """SQL for a column of a stage's output."""
    return f"{sql.identifier(stage)}.{sql.identifier(column)} as {sql.identifier(published)}"
