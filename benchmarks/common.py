"""What the benchmarks share: where and when a number was measured, and where it is kept."""

from __future__ import annotations

import datetime
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"


def machine() -> str:
    import torch

    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "CPU",
    )
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores of {model}{gpu}"


def keep(name: str, result: dict[str, Any]) -> None:
    """Print a result and write it to benchmarks/results/<name>.json."""
    result = {
        **result,
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
    }
    text = json.dumps(result, indent=1) + "\n"
    (Path(__file__).parent / "results").mkdir(exist_ok=True)
    (Path(__file__).parent / "results" / f"{name}.json").write_text(text)
    print(text, end="")


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Rates of paired runs, and the median of the pairs' ratios."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "ours": [round(x, 1) for x in ours],
        "bare": [round(x, 1) for x in theirs],
        "ratio_median": round(statistics.median(ratios), 3),
    }
