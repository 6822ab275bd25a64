"""Publishing to the Hub: bytes sent by versions that follow one another, and the rate over the bare client.

    python benchmarks/publish.py

400,000 rows in 20 shards, random words of realistic frequency, through the client's own Xet into the store of
a Hub on loopback (`tests/hub`). What was sent is what the store grew by, and what reached the server itself.
Each publish is a process of its own with empty local caches, as on another machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import ROOT, keep

sys.path.insert(0, str(ROOT / "tests"))
from hub.server import Hub as Server

from builder.files import sha256_file, write_parquet
from builder.stages.select import ROW_GROUP_ROWS, SCHEMA
from builder.versions.version import Staged

SHARDS, ROWS, TURNS = 20, 20_000, 3
WORDS = np.array(
    ["".join(map(chr, word)) for word in np.random.default_rng(0).integers(97, 123, (30_000, 6))]
)
FREQUENCY = 1 / (np.arange(len(WORDS)) + 10)


def texts(rng: np.random.Generator, rows: int, words: int) -> list[str]:
    drawn = rng.choice(WORDS, (rows, words), p=FREQUENCY / FREQUENCY.sum())
    return [" ".join(line) for line in drawn]


def rows_of(number: int) -> pa.Table:
    rng = np.random.default_rng(number)
    hexes = [rng.bytes(32).hex() for _ in range(ROWS)]
    columns: dict[str, Any] = {
        "uid": [h[:32] for h in hexes], "url": [f"https://images.example.org/{h[8:48]}.jpg" for h in hexes],
        "sha256": hexes, "re_caption": texts(rng, ROWS, 50), "org_caption": texts(rng, ROWS, 8),
        "key": [f"{number:05d}{k:04d}" for k in range(ROWS)], "re_clip_score": rng.normal(0.33, 0.04, ROWS),
        "org_clip_score": rng.normal(0.27, 0.05, ROWS), "re_length": [50] * ROWS, "org_length": [8] * ROWS,
        "re_finish_reason": ["stop"] * ROWS, "re_num_tokens": rng.integers(50, 90, ROWS).astype(np.int32),
        "re_clip_cut": [False] * ROWS, "org_clip_cut": [False] * ROWS,
        "width": rng.integers(200, 512, ROWS).astype(np.int32),
        "height": rng.integers(200, 512, ROWS).astype(np.int32),
    }  # fmt: skip
    return pa.table(
        {name: columns.get(name, pa.nulls(ROWS, SCHEMA.field(name).type)) for name in SCHEMA.names}
    ).cast(SCHEMA)


def stage(folder: Path, shards: list[Path], version: str) -> Staged:
    files = {}
    for index, shard in enumerate(shards):
        name = f"data/train-{index:05d}-of-{len(shards):05d}.parquet"
        (folder / "data").mkdir(parents=True, exist_ok=True)
        os.link(shard, folder / name)
        files[name] = {"sha256": sha256_file(shard), "bytes": shard.stat().st_size, "rows": ROWS}
    (folder / "README.md").write_text(f"---\nlicense: mit\n---\nversion {version}\n")
    files["README.md"] = {
        "sha256": sha256_file(folder / "README.md"),
        "bytes": (folder / "README.md").stat().st_size,
    }
    manifest = {
        "name": "hub benchmark",
        "version": version,
        "rows": {"train": ROWS * len(shards)},
        "files": files,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Staged(folder, version, manifest)


def job(what: str, folder: Path, version: str) -> None:
    """In a process of its own: publish a folder, ours or bare, and print the seconds."""
    from huggingface_hub import HfApi

    from builder.versions.hub import Hub

    start = time.perf_counter()
    if what == "ours":
        Hub("me/bench").publish(Staged(folder, version, json.loads((folder / "manifest.json").read_text())))
    else:
        api = HfApi()
        api.create_repo("me/bench", repo_type="dataset", exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id="me/bench", repo_type="dataset")
        api.create_tag("me/bench", repo_type="dataset", tag=f"v{version}")
    print(time.perf_counter() - start)


def run(server: Server, what: str, staged: Staged) -> float:
    shutil.rmtree(server.folder / "client", ignore_errors=True)
    for cache in server.folder.glob("cas*/xet/shard-cache"):
        shutil.rmtree(cache)
    command = [sys.executable, __file__, what, str(staged.folder), staged.version]
    done = subprocess.run(command, env=os.environ | server.env(), capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def stored(server: Server) -> int:
    files = (
        path
        for part in ("xorbs", "shards")
        for path in server.folder.glob(f"cas*/xet/xorbs/{part}/*")
        if path.suffix != ".tagset"
    )
    return sum(path.stat().st_size for path in files) + server.bytes_in


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tables = [rows_of(number) for number in range(SHARDS + 1)]
        plain, wider = [], []
        for number, table in enumerate(tables):
            plain.append(folder / f"plain-{number}.parquet")
            write_parquet(table, plain[-1], row_group_size=ROW_GROUP_ROWS)
            wider.append(folder / f"wider-{number}.parquet")
            more = table.append_column(
                "short_caption", pa.array(texts(np.random.default_rng(1000 + number), ROWS, 20))
            )
            write_parquet(more, wider[-1], row_group_size=ROW_GROUP_ROWS)
        column = sum(
            group.column(group.num_columns - 1).total_compressed_size
            for path in wider
            for meta in (pq.read_metadata(path),)
            for group in map(meta.row_group, range(meta.num_row_groups))
        )
        captions = pq.read_table(wider[3])["re_caption"].to_pylist()
        captions[10_000:10_010] = [f"{caption} changed" for caption in captions[10_000:10_010]]
        at = pq.read_schema(wider[3]).get_field_index("re_caption")
        changed = [*wider[:3], folder / "changed.parquet", *wider[4:]]
        write_parquet(
            pq.read_table(wider[3]).set_column(at, "re_caption", pa.array(captions)),
            changed[3],
            row_group_size=ROW_GROUP_ROWS,
        )
        versions = {
            "first": stage(folder / "v1", plain[:SHARDS], "0.1.0"),
            "5_percent_appended": stage(folder / "v2", plain, "0.2.0"),
            "one_more_caption_column": stage(folder / "v3", wider, "0.3.0"),
            "10_rows_of_one_shard_changed": stage(folder / "v4", changed, "0.4.0"),
            "same_rows_under_a_new_version": stage(folder / "v5", changed, "0.5.0"),
        }  # fmt: skip
        result: dict[str, Any] = {
            "rows": SHARDS * ROWS,
            "shards": SHARDS,
            "column_bytes": column,
            "changed_shard_bytes": changed[3].stat().st_size,
        }
        sent: dict[str, Any] = {}
        with Server(folder / "hub") as server:
            for name, staged in versions.items():
                before = stored(server)
                run(server, "ours", staged)
                sent[name] = {
                    "version_bytes": sum(file["bytes"] for file in staged.files.values()),
                    "sent_bytes": stored(server) - before,
                }
            before = stored(server)
            run(server, "ours", staged)
            sent["published_again"] = {
                "version_bytes": sent[name]["version_bytes"],
                "sent_bytes": stored(server) - before,
            }
        rates: dict[str, list[float]] = {"ours": [], "bare": []}
        size = sent["first"]["version_bytes"]
        for turn in range(TURNS):
            for what in ("ours", "bare") if turn % 2 else ("bare", "ours"):
                with Server(folder / f"hub-{turn}-{what}") as server:
                    rates[what].append(round(size / run(server, what, versions["first"]) / 1e6, 1))
        ratios = sorted(a / b for a, b in zip(rates["ours"], rates["bare"], strict=True))
        keep(
            "publish",
            result
            | {
                "sent": sent,
                "rate_unit": "MB/s",
                **rates,
                "ratio_median": round(ratios[len(ratios) // 2], 3),
            },
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        job(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
    else:
        main()
