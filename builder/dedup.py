"""dedup: images that stand in for many others become `duplicate_image`, before anybody pays for captioning them.

Reads   download.
Writes  `<shard>.parquet`: uid, status, error.
Survey  which sha256 is served under more than `max_urls` distinct URLs in the whole run: "image not available" and its kin.
        All its rows go, for none of them is what its caption speaks of. An image under a few URLs is a photo that was
        shared; its rows stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import duckdb

from builder.core import Stage, Task, Work, write_parquet


@dataclass(frozen=True, kw_only=True)
class Dedup(Stage):
    """`max_urls` is how many distinct URLs one image may have."""

    name: ClassVar[str] = "dedup"
    reads: ClassVar[tuple[str, ...]] = ("download",)
    surveys: ClassVar[tuple[str, ...]] = ("download",)
    libraries: ClassVar[tuple[str, ...]] = ("pyarrow", "duckdb")

    max_urls: int = 5

    def survey(self, task: Task) -> Mapping[str, int]:
        files = [str(path) for path in task.all_inputs("download")]
        with duckdb.connect(config={"temp_directory": str(task.folder)}) as con:
            table = con.sql(
                """select image_sha256, count(distinct url) as urls from read_parquet(?) where status = 'ok'
                   group by all having urls > ? order by all""",
                params=[files, self.max_urls],
            ).to_arrow_table()
        write_parquet(table, task.output())
        return {"images": table.num_rows}

    @contextmanager
    def open(self) -> Iterator[Work]:
        with duckdb.connect(config={"threads": 1}) as con:

            def work(task: Task) -> Mapping[str, int]:
                table = con.sql(
                    """select uid, if(urls is null, status, 'duplicate_image') as status,
                              if(urls is null, error, 'one image behind ' || urls || ' URLs') as error
                       from read_parquet($files, file_row_number = true) as rows left join read_parquet($images) as images
                            on rows.image_sha256 = images.image_sha256 and status = 'ok'
                       order by rows.file_row_number""",
                    params={"files": str(task.input("download")), "images": str(task.folder / "survey.parquet")},
                ).to_arrow_table()
                write_parquet(table, task.output())
                return Counter(table["status"].to_pylist())

            yield work
