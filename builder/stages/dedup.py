"""dedup: rows that nobody should pay for captioning: placeholders known by now, and what was taken down.

Reads   download.
Asks    claimed: which sha256 of the metadata stand under more than `max_urls` distinct URLs in the whole run:
        "image not available" and its kin. All their rows go, for none of them is what its caption speaks of.
        An image under a few URLs is a photo that was shared; its rows stay. What the images that came say
        beyond that is applied in select.
Writes  `<shard>.parquet`: uid, status, error.

Rows that a tombstone names become `removed`. Only shards whose rows change are captioned again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pyarrow as pa

from builder import sql, tombstones
from builder.core import Count, Json, Question, Stage, Task, Work
from builder.errors import InputError
from builder.files import read_file, sha256_known, write_parquet
from builder.stages.download import Download
from builder.stages.questions import Claimed, is_sha256, of_images


@dataclass(frozen=True, kw_only=True)
class Dedup(Stage):
    """`max_urls` is how many distinct URLs one image may have; `tombstones` a version's file of that name.

    `by_metadata`: the metadata's hashes are believed, because the download verifies them: found, not given.
    """

    version: ClassVar[int] = 2
    libraries: ClassVar[tuple[str, ...]] = ("pyarrow", "duckdb")
    paths: ClassVar[tuple[str, ...]] = ("tombstones",)
    once: ClassVar[tuple[str, ...]] = ("by_metadata",)  # as the download says; what it leads to is an input

    name: str = "dedup"
    max_urls: Count = 5
    by_metadata: bool = False
    tombstones: str | None = None

    def reads(self) -> tuple[str, ...]:
        return ("source", "download.parquet") if self.by_metadata else ("download.parquet",)

    def asks(self) -> tuple[Question, ...]:
        return (Claimed(max_urls=self.max_urls),) if self.by_metadata else ()

    def after(self, earlier: tuple[Stage, ...]) -> Stage:
        verified = any(stage.verify_sha256 for stage in earlier if isinstance(stage, Download))
        return replace(self, by_metadata=verified)

    def settings(self) -> dict[str, Json]:
        settings = super().settings()
        if self.tombstones is None:
            return settings
        if not Path(self.tombstones).is_file():
            hint = f"name the {tombstones.FILE} of a published version"
            raise InputError(f"there is no file of tombstones {self.tombstones}", hint)
        return settings | {"tombstones": sha256_known(Path(self.tombstones))}

    def check(self) -> None:
        self._removed()

    def _removed(self) -> pa.Table:
        if not self.tombstones:
            return tombstones.table({})
        return tombstones.read(read_file(Path(self.tombstones)), self.tombstones)

    @contextmanager
    def open(self) -> Iterator[Work]:
        with sql.connect(threads=1) as con:
            con.register("tombstones", self._removed())
            numbered = "(select file_row_number as row, uid, url, image_sha256 as image from rows)"
            removed = tombstones.MARKS.format(rows=numbered, tombstones="tombstones")

            def work(task: Task) -> Mapping[str, int]:
                downloaded = sql.table(task.input("download"), file_row_number="true")
                con.register("placeholders", self._placeholders(task))
                table = con.sql(
                    f"""with rows as (from {downloaded}), removed as (select distinct row from ({removed}))
                        select uid,
                               case when removed.row is not null then 'removed'
                                    when urls is not null then 'duplicate_image' else status end as status,
                               case when removed.row is not null then 'named by a tombstone'
                                    when urls is not null then 'one image behind ' || urls || ' URLs'
                                    else error end as error
                        from rows left join placeholders
                             on rows.image_sha256 = placeholders.sha256 and status = 'ok'
                             left join removed on rows.file_row_number = removed.row
                        order by rows.file_row_number"""
                ).to_arrow_table()
                write_parquet(table, task.output())
                return Counter(table["status"].to_pylist())

            yield work

    def _placeholders(self, task: Task) -> pa.Table:
        """(sha256, urls) of this shard's claimed images that stand under too many URLs."""
        if not self.by_metadata:
            return pa.table({"sha256": pa.array([], pa.string()), "urls": pa.array([], pa.int64())})
        claimed = sql.table(task.input("source"))
        with sql.connect(threads=1) as con:
            return con.sql(
                f"""select distinct sha256, urls
                    from (select sha256, {of_images("sha256")} from {claimed} where {is_sha256("sha256")})
                         join {sql.table(task.input("claimed"))} using (high, low)"""
            ).to_arrow_table()
