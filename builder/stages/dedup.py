"""dedup: images that stand in for many others become `duplicate_image`, before anybody pays for captioning them.

Reads   download.
Writes  `<shard>.parquet`: uid, status, error.
Survey  which sha256 is served under more than `max_urls` distinct URLs in the whole run: "image not available" and its kin.
        All its rows go, for none of them is what its caption speaks of. An image under a few URLs is a photo that was
        shared; its rows stay.

Rows that a tombstone names become `removed` here, too. Only shards whose rows change are captioned again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa

from builder import sql, tombstones
from builder.core import Count, Json, Stage, Task, Work, read_file, sha256_known, write_parquet
from builder.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Dedup(Stage):
    """`max_urls` is how many distinct URLs one image may have; `tombstones` a version's file of that name."""

    name: ClassVar[str] = "dedup"
    reads: ClassVar[tuple[str, ...]] = ("download",)
    surveys: ClassVar[tuple[str, ...]] = ("download",)
    libraries: ClassVar[tuple[str, ...]] = ("pyarrow", "duckdb")
    paths: ClassVar[tuple[str, ...]] = ("tombstones",)

    max_urls: Count = 5
    tombstones: str | None = None

    def settings(self) -> dict[str, Json]:
        if self.tombstones and not Path(self.tombstones).is_file():
            raise InputError(
                f"there is no file of tombstones {self.tombstones}",
                f"name the {tombstones.FILE} of a published version",
            )
        return super().settings() | {"tombstones": self.tombstones and sha256_known(Path(self.tombstones))}

    def check(self) -> None:
        self._removed()

    def _removed(self) -> pa.Table:
        return (
            tombstones.read(read_file(Path(self.tombstones)), self.tombstones)
            if self.tombstones
            else tombstones.table({})
        )

    def survey(self, task: Task) -> Mapping[str, int]:
        files = task.all_inputs("download")
        with sql.connect(task.folder) as con:
            table = con.sql(
                f"""select image_sha256, count(distinct url) as urls from {sql.table(files)} where status = 'ok'
                    group by all having urls > {self.max_urls} order by all"""
            ).to_arrow_table()
        write_parquet(table, task.output())
        return {"images": table.num_rows}

    @contextmanager
    def open(self) -> Iterator[Work]:
        with sql.connect(threads=1) as con:
            con.register("tombstones", self._removed())
            removed = tombstones.MARKS.format(
                rows="(select file_row_number as row, uid, url, image_sha256 as image from rows)",
                tombstones="tombstones",
            )

            def work(task: Task) -> Mapping[str, int]:
                downloaded = sql.table(task.input("download"), file_row_number="true")
                placeholders = sql.table(task.folder / "survey.parquet")
                table = con.sql(
                    f"""with rows as (from {downloaded}), removed as (select distinct row from ({removed}))
                       select uid,
                              case when removed.row is not null then 'removed' when urls is not null then 'duplicate_image' else status end as status,
                              case when removed.row is not null then 'named by a tombstone'
                                   when urls is not null then 'one image behind ' || urls || ' URLs' else error end as error
                       from rows left join {placeholders} as images on rows.image_sha256 = images.image_sha256 and status = 'ok'
                            left join removed on rows.file_row_number = removed.row
                       order by rows.file_row_number"""
                ).to_arrow_table()
                write_parquet(table, task.output())
                return Counter(table["status"].to_pylist())

            yield work
