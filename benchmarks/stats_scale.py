"""The whole report over 1M, 10M and 50M pairs of captions; its ratio to plain Python and to pandas on 1M.

    python benchmarks/stats_scale.py [1 10 50]        # millions; 50 takes some 10 GB of disk

Sizes that are not named keep their last result. Pairs are 50 and 10 words drawn by Zipf's law from 200,000,
in the published layout. Time is that of a process of its own from its start; memory is its peak, sampled five
times a second.
"""

from __future__ import annotations

import collections
import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from common import ROOT, keep

from analysis import report, views
from builder.places import parts

WORDS, ROWS = 200_000, 500_000  # vocabulary; rows of a file
COMPARED = ("lengths", "length_histogram", "vocabulary", "top_words")


def words(rng: np.random.Generator) -> tuple[pa.Array, np.ndarray[Any, Any]]:
    """A vocabulary, and a table from which a uniform draw is a draw by Zipf's law."""
    letters = rng.integers(97, 123, (WORDS, 8), dtype=np.uint8)
    lengths = rng.integers(2, 9, WORDS)
    vocabulary = pa.array(
        [bytes(row[:length]).decode() for row, length in zip(letters, lengths, strict=True)]
    )
    mass = 1 / (np.arange(WORDS) + 2.7)
    return vocabulary, np.searchsorted(np.cumsum(mass / mass.sum()), rng.random(1 << 22)).astype(
        np.int32
    ).clip(0, WORDS - 1)


def texts(
    rng: np.random.Generator, vocabulary: pa.Array, table: np.ndarray[Any, Any], rows: int, mean: int
) -> pa.Array:
    lengths = rng.integers(mean // 2, mean + mean // 2 + 1, rows)
    drawn = vocabulary.take(pa.array(table[rng.integers(0, len(table), lengths.sum())]))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    return pc.binary_join(pa.ListArray.from_arrays(offsets, drawn), " ")


def make(folder: Path, millions: int) -> None:
    """Files of the published columns that the queries read, and a ledger."""
    rng = np.random.default_rng(0)
    vocabulary, table = words(rng)
    number = millions * 1_000_000 // ROWS
    for part in range(number):
        # Half a million random URLs cost more than all the rest: hosts and paths come from a table.
        ids = pa.array(np.arange(part * ROWS, (part + 1) * ROWS)).cast(pa.string())
        urls = pc.binary_join_element_wise(
            pc.binary_join_element_wise("https://host-", pc.utf8_slice_codeunits(ids, 0, 3), ""),
            ".example.org/",
            ids,
            "",
        )
        scores = {
            "re_clip_score": pa.array(rng.normal(0.33, 0.04, ROWS)),
            "org_clip_score": pa.array(rng.normal(0.27, 0.05, ROWS)),
        }
        published = {
            "uid": ids, "url": urls, "sha256": ids, "re_caption": texts(rng, vocabulary, table, ROWS, 50),
            "org_caption": texts(rng, vocabulary, table, ROWS, 10), **scores,
            "re_gpt4v_score": pa.nulls(ROWS, pa.int64()), "org_gpt4v_score": pa.nulls(ROWS, pa.int64()),
            "re_finish_reason": pa.array(["stop"] * ROWS), "re_clip_cut": pa.array(np.zeros(ROWS, bool)),
            "org_clip_cut": pa.array(np.zeros(ROWS, bool)), "width": pa.array(rng.integers(100, 512, ROWS)),
            "height": pa.array(rng.integers(100, 512, ROWS)),
        }  # fmt: skip
        for kind, columns in (
            ("data", published),
            (
                "ledger",
                {
                    "uid": ids,
                    "url": urls,
                    "status": pa.array(["ok"] * ROWS),
                    "error": pa.nulls(ROWS, pa.string()),
                },
            ),
        ):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            pq.write_table(
                pa.table(columns),
                folder / kind / f"train-{part:05d}-of-{number:05d}.parquet",
                compression="zstd",
                row_group_size=100_000,
            )
    (folder / "manifest.json").write_text("{}")


def measured(folder: Path, *arguments: str) -> dict[str, Any]:
    """Seconds and peak memory of a process of its own."""
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, __file__, *arguments, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    watched, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        peak = max(peak, watched.memory_info().rss)
        time.sleep(0.2)
    assert process.returncode == 0, process.returncode
    assert process.stdout is not None
    return {
        "seconds": round(time.monotonic() - start, 1),
        "peak_gib": round(peak / 2**30, 2),
        **json.loads(process.stdout.read() or "{}"),
    }


def whole(folder: Path) -> None:
    result = report.stats(parts(folder))
    assert [name for name, answer in result.items() if "absent" in answer] in ([], ["nouns"])


def ours(folder: Path) -> None:
    """The questions that the two others answer, from the same SQL files."""
    with views.connect(parts(folder)) as con:
        report.prepare(con)
        answers = [con.sql((report.QUERIES / f"{name}.sql").read_text()).fetchall() for name in COMPARED]
        repeated = con.sql(
            """select caption, sum(n) from (
                   select caption, count(*) as n from captions group by caption, hash(text), length(text))
               where n > 1 group by caption"""
        ).fetchall()
    print(json.dumps({"distinct_words": answers[2][-1][1], "repeated": len(repeated)}))


def plain(folder: Path) -> None:
    """The same with `datasets` and plain Python."""
    import datasets

    rows = datasets.load_dataset(
        "parquet", data_files=f"{folder}/data/*.parquet", split="train", streaming=True
    ).select_columns(["org_caption", "re_caption"])
    lengths: dict[str, list[int]] = {"org_caption": [], "re_caption": []}
    characters: dict[str, list[int]] = {"org_caption": [], "re_caption": []}
    vocabulary = {name: collections.Counter[str]() for name in lengths}
    seen = {name: collections.Counter[str]() for name in lengths}
    find = re.compile(r"\w+").findall
    for row in rows:
        for name, text in row.items():
            lengths[name].append(len(text.split()))
            characters[name].append(len(text))
            vocabulary[name].update(find(text.lower()))
            seen[name][text] += 1
    for name in lengths:
        _ = (
            np.mean(lengths[name]),
            np.quantile(lengths[name], [0.05, 0.5, 0.95]),
            np.histogram(lengths[name], 25),
            np.mean(characters[name]),
        )
        _ = (vocabulary[name].most_common(30), sum(n for n in seen[name].values() if n > 1))
    joint = len(vocabulary["org_caption"].keys() | vocabulary["re_caption"].keys())
    print(json.dumps({"distinct_words": len(vocabulary["re_caption"]), "joint": joint}))


def with_pandas(folder: Path) -> None:
    import pandas as pd

    rows = pd.read_parquet(folder / "data", columns=["org_caption", "re_caption"])
    counts = {}
    for name in rows:
        split = rows[name].str.lower().str.split()
        words_each = split.str.len()
        _ = (
            words_each.mean(),
            words_each.quantile([0.05, 0.5, 0.95]),
            np.histogram(words_each, 25),
            rows[name].str.len().mean(),
        )
        counts[name] = split.explode().value_counts()
        _ = (counts[name].head(30), rows[name].duplicated(keep=False).sum())
    print(
        json.dumps(
            {
                "distinct_words": len(counts["re_caption"]),
                "joint": len(counts["org_caption"].index.union(counts["re_caption"].index)),
            }
        )
    )


def main(millions: list[int]) -> None:
    earlier = ROOT / "benchmarks" / "results" / "stats_scale.json"
    result: dict[str, Any] = {"pairs": {}} | (json.loads(earlier.read_text()) if earlier.exists() else {})
    with tempfile.TemporaryDirectory() as temporary:
        for number in millions:
            folder = Path(temporary, str(number))
            make(folder, number)
            size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
            result["pairs"][f"{number}M"] = measured(folder, "whole") | {
                "parquet_gb": round(size / 1e9, 2),
                "date": f"{datetime.date.today()}",
            }
            print(number, result["pairs"][f"{number}M"], file=sys.stderr)
            if number == 1:
                runs = {name: measured(folder, name) for name in ("ours", "plain", "with_pandas")}
                ratios = {
                    name: round(runs[name]["seconds"] / runs["ours"]["seconds"], 1)
                    for name in ("plain", "with_pandas")
                }
                result |= {"same_questions_on_1M": runs, "times_faster_than": ratios}
                print(ratios, file=sys.stderr)
    keep("stats_scale", result)


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].isdecimal():
        parts = {"whole": whole, "ours": ours, "plain": plain, "with_pandas": with_pandas}
        parts[sys.argv[1]](Path(sys.argv[2]))
    else:
        main([int(text) for text in sys.argv[1:]] or [1, 10, 50])
