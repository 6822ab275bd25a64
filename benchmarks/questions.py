"""What only the whole run can tell, over rows that no block holds: time, memory and spill of `uids` and
`claimed`.

Synthetic source shards of 1,000,000 rows each, in blocks of ten; a uid is 32 hexadecimal digits, one image in
a million is behind many URLs. Parts and answers are made by the stages themselves, each in a process of its
own.

    python benchmarks/questions.py [--rows 1000000 10000000 100000000]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import keep

from builder import sql
from builder.commit import commit, working
from builder.core import RUN, Question, Task
from builder.stages.questions import Claimed, Uids
from builder.store import Folder

SHARD, BLOCK = 1_000_000, 10
QUESTIONS: dict[str, Question] = {"uids": Uids(), "claimed": Claimed(max_urls=5)}


def make(folder: Path, rows: int) -> None:
    """Shards with the columns that the questions read."""
    with sql.connect(folder) as con:
        for shard in range(-(-rows // SHARD)):
            block = folder / "source" / f"{shard // BLOCK:05d}"
            block.mkdir(parents=True, exist_ok=True)
            first, last = shard * SHARD, min((shard + 1) * SHARD, rows)
            path = sql.literal(block / f"{shard:05d}.00000000.parquet")
            con.execute(
                f"""copy (select md5('uid' || i) as uid, 'http://h/' || i as url, {shard}::integer as shard,
                                 (i - {first})::integer as row,
                                 sha256('image' || if(i % 100000 = 0, i % 1000000, i)) as sha256
                          from range({first}, {last}) as rows(i))
                    to {path} (format parquet, compression zstd)"""
            )


def ask(name: str, folder: Path, block: str) -> dict[str, float]:
    """A part, or the answer, in this process: seconds, MiB resident and MiB spilled at the most."""
    store, question = Folder(folder), QUESTIONS[name]
    of = "source" if block != RUN else name
    blocks = [block] if block != RUN else store.folders(name)
    inputs = [f"{of}/{b}/{n}" for b in blocks for n in store.names(f"{of}/{b}") if n.endswith(".parquet")]
    task = Task(name, block, "part" if block != RUN else "00000", "0" * 64, dict.fromkeys(inputs, ""))
    spilled, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            sizes = (
                p.stat().st_size for p in (folder / ".scratch").rglob(".duckdb-recap-*/*") if p.is_file()
            )
            try:
                spilled.append(sum(sizes))
            except FileNotFoundError:
                continue

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    start = time.perf_counter()
    with working(store, task) as here:
        rows = question.answer(here) if block == RUN else question.part(here)
        seconds = time.perf_counter() - start
        commit(store, question, here, rows, seconds)
    ended.set()
    thread.join()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "mib": peak, "spilled_mib": max(spilled) / 2**20}


def measured(folder: Path, name: str) -> dict[str, Any]:
    def one(block: str) -> dict[str, float]:
        command = [sys.executable, __file__, "--ask", name, str(folder), block]
        found: dict[str, float] = json.loads(
            subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
        )
        return found

    parts = [one(block) for block in Folder(folder).folders("source")]
    answer = one(RUN)
    return {
        "parts_seconds": round(sum(part["seconds"] for part in parts), 1),
        "answer_seconds": round(answer["seconds"], 1),
        "mib": round(max(each["mib"] for each in (*parts, answer))),
        "spilled_mib": round(max(each["spilled_mib"] for each in (*parts, answer))),
        "parts_mib": round(sum(p.stat().st_size for p in (folder / name).rglob("part.*.parquet")) / 2**20),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[1_000_000, 10_000_000, 100_000_000])
    parser.add_argument("--ask", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.ask:
        print(json.dumps(ask(given.ask[0], Path(given.ask[1]), given.ask[2])))
        return
    result: dict[str, Any] = {}
    for rows in given.rows:
        with tempfile.TemporaryDirectory(prefix="recap-questions-") as folder:
            make(Path(folder), rows)
            result[f"{rows}_rows"] = {name: measured(Path(folder), name) for name in QUESTIONS}
            print(rows, result[f"{rows}_rows"], file=sys.stderr)
    keep("questions", result)


if __name__ == "__main__":
    main()
