"""The demo's whole line, source to published version, by this checkout and by another one, in turns.

    git worktree add /tmp/before COMMIT && python benchmarks/line.py /tmp/before [--rows 2000] [--turns 3]

Both use this environment. `overlap` is the wall time of a build over the sum of its shards' own times: below
1.0 stages worked at the same time. The pictures of the small web are drawn before, and the web is served by
the command itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, keep

from recipes.demo import web


def turn(checkout: Path, place: Path, site: Path) -> dict[str, float]:
    """Seconds of a build and of a publish by a checkout, and the sum of its shards' seconds."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}

    def recap(*arguments: object) -> tuple[float, str]:
        command = [sys.executable, "-m", "builder.cli", *map(str, arguments)]
        start = time.perf_counter()
        done = subprocess.run(
            command, cwd=checkout, env=environment, check=True,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return time.perf_counter() - start, done.stdout.decode()

    built, _ = recap("build", "demo", f"web={site}", "--run", place / "run")
    published, _ = recap("publish", place / "run", place / "out", "--version", "0.1.0")
    paths = (path for path in (place / "run").rglob("*.json") if path.parent.name != "run")
    records = [json.loads(path.read_bytes()) for path in paths]
    work = sum(r["seconds"] for r in records if isinstance(r, dict) and "outputs" in r)
    return {"build": built, "publish": published, "work": work}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"before": [], "now": []}
    with tempfile.TemporaryDirectory(prefix="recap-line-") as folder:
        site = Path(folder, "web")
        web.make(site, rows=given.rows, port=8699)
        with web.serve(site, 8699):
            for number in range(given.turns):
                for name, checkout in (("before", given.before), ("now", ROOT)):
                    place = Path(folder, f"{name}-{number}")
                    place.mkdir()
                    found[name].append(turn(checkout, place, site))
                    print(name, found[name][-1], file=sys.stderr)
    result: dict[str, Any] = {"rows": given.rows}
    for name, turns in found.items():
        result[name] = {key: [round(each[key], 1) for each in turns] for key in ("build", "publish", "work")}
        overlap = [round(each["build"] / each["work"], 3) for each in turns]
        result[name] |= {"overlap_median": statistics.median(overlap)}
    pairs = zip(found["now"], found["before"], strict=True)
    ratios = [now["build"] / before["build"] for now, before in pairs]
    result["build_ratio_median"] = round(statistics.median(ratios), 3)
    keep("line", result)


if __name__ == "__main__":
    main()
