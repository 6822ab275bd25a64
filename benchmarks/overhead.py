"""The demo's rows by processes here and on a Ray of one machine, in turns: the time of each after start-up.

Start-up is what Ray itself takes to come up, measured alone; the loading of models is part of both.

    python benchmarks/overhead.py [--rows 2000] [--turns 3]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, keep

sys.path.insert(0, str(ROOT))

from builder.executors.local import local
from builder.executors.ray import connected, on_ray
from builder.run import build
from recipes import datasets
from recipes.demo import web

PORT = 8653


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {"local": [], "ray": []}
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder, "web")
        web.make(site, rows=arguments.rows, port=PORT)
        recipe = datasets.demo(web=str(site))
        with web.serve(site, PORT):
            for turn in range(arguments.turns):
                for name in ("local", "ray") if turn % 2 == 0 else ("ray", "local"):
                    place = Path(folder, f"{name}-{turn}")
                    if name == "local":
                        begun = time.monotonic()
                        result = build(recipe, place, executor=local)
                        seconds[name].append(time.monotonic() - begun)
                    else:
                        with connected("ray"):
                            begun = time.monotonic()
                            result = build(recipe, place, executor=on_ray("ray"))
                            seconds[name].append(time.monotonic() - begun)
                    assert result.failed == {}
                    print(name, round(seconds[name][-1], 1), flush=True)
    ratios = [ours / theirs for ours, theirs in zip(seconds["ray"], seconds["local"], strict=True)]
    keep("overhead", {
        "rows": arguments.rows,
        "seconds": {name: [round(s, 1) for s in found] for name, found in seconds.items()},
        "ratio_median": round(statistics.median(ratios), 3),
    })  # fmt: skip


if __name__ == "__main__":
    main()
