"""The join of a version's rows with their images before a training: time, memory and disk by rows.

    python benchmarks/join.py [--rows 1000000 10000000]

The version is made of a few captions again and again; its images are told by a generator and are nowhere:
reading the heads of tars is not in it. One row in fifty has no image, one in fifty another.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from common import ROOT, keep
from fsspec.implementations.local import LocalFileSystem

sys.path.insert(0, str(ROOT))

from builder.versions.version import Version
from recipes import join

A_FILE = 100_000  # rows
SHORT = [f"picture {n} of a thing for sale" for n in range(1000)]
LONG = [" ".join(f"The image shows thing {n} beside thing {k}." for k in range(7)) for n in range(1000)]


def sha256(number: int) -> str:
    return hashlib.sha256(number.to_bytes(8, "big")).hexdigest()


def made(folder: Path, rows: int) -> dict[str, Any]:
    (folder / "data").mkdir()
    names = []
    for start in range(0, rows, A_FILE):
        numbers = range(start, min(rows, start + A_FILE))
        table = {
            "uid": [f"{n:032x}" for n in numbers], "sha256": [sha256(n) for n in numbers],
            "org_caption": [SHORT[n % 1000] for n in numbers],
            "re_caption": [LONG[n % 1000] for n in numbers],
        }  # fmt: skip
        names.append(f"data/train-{start // A_FILE:05d}.parquet")
        pq.write_table(pa.table(table), folder / names[-1])
    return {"files": {name: {} for name in names}}


def images(rows: int) -> Iterator[tuple[str, str, int, str, int, int]]:
    for n in range(rows):
        if n % 50 != 1:
            content = sha256(n if n % 50 != 2 else n + rows)
            tar = n // 10_000
            yield f"{n:032x}", content, tar, f"/images/{tar:05d}.tar", n % 10_000 * 20_480, 20_000


def one(rows: int) -> None:
    """In a process of its own: what it took at most."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        version = Version(LocalFileSystem(), text, made(folder, rows), None)  # type: ignore[arg-type]
        join.images_of = lambda *_: images(rows)
        out, before = folder / "joined", psutil.Process().memory_info().rss
        out.mkdir()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is the join's alone
        begun = time.monotonic()
        found = join._join(version, "", out, ("org_caption", "re_caption"), None, "", "", "{}")
        shards, audit = found.rows, found.audit
        seconds = time.monotonic() - begun
        assert sum(shards) == audit.found == rows - 2 * (rows // 50)
        size = sum(path.stat().st_size for path in out.glob("*.parquet"))
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
        print(json.dumps({
            "rows": rows, "seconds": round(seconds, 1), "rows_per_s": round(rows / seconds),
            "peak_mib": int(peak.split()[1]) // 1024, "mib_before": before >> 20, "written_mib": size >> 20,
        }))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments.one)
        return
    found = []
    for rows in arguments.rows:
        done = subprocess.run(
            [sys.executable, __file__, "--one", str(rows)], check=True, stdout=subprocess.PIPE, text=True
        )
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(found[-1], flush=True)
    keep("join", {"by_rows": found})


if __name__ == "__main__":
    main()
