"""The demo on three nodes of a cluster, again and again, while nodes, workers and drivers are killed and
a scratch disk is filled: what is published must be the local run's, byte for byte.

Real captioner, CLIP, Ray and web; shards of 40 rows; when a shard is done a fault, drawn, six to a build.
Needs a machine on which a file system can be mounted.

    python benchmarks/faults.py [--faults 30]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from common import ROOT, keep

sys.path.insert(0, str(ROOT / "tests"))

from conftest import recap, web_of
from nodes import FAULTS
from test_cluster import faulty_demo

A_BUILD = 6
SETTINGS = {"rows_per_shard": 40}


def published(run: Path) -> dict[str, object]:
    target = run.with_name("published")
    recap("publish", run, target, "--version", "0.1.0")
    files: dict[str, object] = json.loads((target / "v0.1.0" / "manifest.json").read_text())["files"]
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--faults", type=int, default=30)
    arguments = parser.parse_args()
    begun, chance, survived, builds = time.monotonic(), random.Random(30), Counter[str](), []
    with tempfile.TemporaryDirectory(prefix="recap-faults-") as folder:
        demo = Path(folder, "demo", "demo")
        recap("demo", "--rows", 240, "--port", 8652, "--run", demo)
        first = Path(folder, "local", "demo")
        first.parent.mkdir()
        with web_of(demo) as site:
            recap("build", "demo", f"web={site}", "rows_per_shard=40", "--run", first)
        expected = published(first)
        while survived.total() < arguments.faults:
            there = Path(folder, str(len(builds)))
            there.mkdir()
            kinds = [chance.choice(FAULTS) for _ in range(A_BUILD)]
            start = time.monotonic()
            done = faulty_demo(demo, there, kinds, len(builds), **SETTINGS)
            same = published(there / "demo") == expected
            survived.update(done)
            builds.append({"faults": done, "same_bytes": same, "seconds": round(time.monotonic() - start)})
            print(builds[-1], flush=True)
            shutil.rmtree(there)
    about = {
        "faults": survived.total(), "by_kind": dict(survived), "files_compared": len(expected),
        "builds_with_the_same_bytes": sum(bool(build["same_bytes"]) for build in builds), "builds": builds,
        "seconds": round(time.monotonic() - begun),
    }  # fmt: skip
    keep("faults", about)


if __name__ == "__main__":
    main()
