"""What builder.captions.checks finds of captions known to be defective, and what it flags of good ones.

Defective: benchmarks/defects/labelled.jsonl, labelled by hand. Good: captions of ../shared/data, by humans
and by models, in two halves (every other caption). The thresholds were chosen with an eye on both halves and
on rounds 1 and 2 of the labels; round 3 and the sets of `unseen` came after.

    python benchmarks/defects.py [--examples 5]
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import sys
import time
import timeit
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import ROOT, keep

from builder.captions.checks import Checks, Defect, find

LABELLED = ROOT / "benchmarks" / "defects" / "labelled.jsonl"
DATA = ROOT.parent / "shared" / "data"
ENGLISH = Checks(language="en")
APART = {
    Defect.BOILERPLATE,
    Defect.TRUNCATED,
}  # told, but no false alarm: a human may write "This photo shows"
IIW = ("IIW-400", "DCI_Test", "DOCCI_Test", "CM_3600", "LocNar_Eval")


def labelled() -> list[dict[str, Any]]:
    return [json.loads(line) for line in LABELLED.read_text(encoding="utf-8").splitlines()]


def good(data: Path = DATA) -> Iterator[tuple[str, list[str]]]:
    """(name, captions) of each set that should not be flagged."""

    def read(name: str) -> Any:
        return json.loads((data / name).read_text(encoding="utf-8"))

    yield "flickr8k, human", [c for five in read("flickr8k/captions.json").values() for c in five]
    with open(data / "flickr8k-blip2/generated_captions_comparison.csv", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    for column in ("base_caption", "lora_caption", "given_caption"):
        yield f"flickr8k-blip2, {column}", [row[column] for row in rows]
    files = [data / "imageinwords" / name / "data.jsonl" for name in IIW]
    lines = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    yield "imageinwords, human", [row[k] for row in lines for k in ("IIW", "DOCCI") if row.get(k)]
    yield "imageinwords, model", [row["IIW-P5B"] for row in lines if row.get("IIW-P5B")]
    yield "capsfusion, fused", [row["capsfuion_official"] for row in read("capsfusion/example_data.json")]
    halves = [read(f"coco-tiny/annotations/captions_{half}2017.json") for half in ("train", "val")]
    yield "coco-tiny, human", [row["caption"] for half in halves for row in half["annotations"]]


def unseen(data: Path = DATA) -> Iterator[tuple[str, list[str]]]:
    """Human captions that nobody looked at while the checks were written."""
    rows = json.loads((data / "aloha/nocaps-val-foil.json").read_text(encoding="utf-8"))
    yield "aloha, nocaps' human", sorted({c for row in rows for c in row["references"]})
    text = (data / "concadia/trial_info/exp_sample.json").read_text(encoding="utf-8")
    images = json.loads(text[text.index("{") :].rstrip().rstrip(";"))["images"]
    for name in ("description", "caption"):
        yield f"concadia, {name}", [row[name]["raw"] for row in images]


def flagged(captions: list[str]) -> dict[str, Any]:
    """Percent of captions by defect, and with any that counts as a false alarm."""
    found = [find(caption, "stop", ENGLISH) for caption in captions]
    counts = Counter(str(defect) for each in found for defect in each)
    alarms = sum(bool(each.keys() - APART) for each in found)
    return {
        "captions": len(captions),
        "flagged_percent": round(100 * alarms / len(captions), 2),
        **{f"{defect}_percent": round(100 * n / len(captions), 2) for defect, n in sorted(counts.items())},
    }


def recall(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By kind, of how many labelled so; and how many flagged as loops that are none."""
    found = [find(row["caption"], row["finish_reason"], Checks()) for row in rows]
    result: dict[str, Any] = {}
    for kind in (Defect.LOOP, Defect.TRUNCATED, Defect.BOILERPLATE):
        of_kind = [kind in each for row, each in zip(rows, found, strict=True) if kind in row["labels"]]
        percent = round(100 * sum(of_kind) / len(of_kind), 1) if of_kind else None
        result[str(kind)] = {"labelled": len(of_kind), "found": sum(of_kind), "percent": percent}
    for name, wanted in (("garbled", True), ("good", False)):
        others = [
            Defect.LOOP in each
            for row, each in zip(rows, found, strict=True)
            if Defect.LOOP not in row["labels"] and ("garbled" in row["labels"]) == wanted
        ]
        result[name] = {"labelled": len(others), "flagged_as_loop": sum(others)}
    return result


def examples(captions: list[str], number: int) -> None:
    kinds: defaultdict[Defect, list[str]] = defaultdict(list)
    for caption in captions:
        for defect, seen in find(caption, "stop", ENGLISH).items():
            kinds[defect].append(f"{seen}: {caption[:160]!r}")
    for defect, lines in kinds.items():
        for line in random.Random(0).sample(lines, min(number, len(lines))):
            print(f"    {defect:<12}{line}", file=sys.stderr)


def microseconds(rows: list[dict[str, Any]], checks: Checks) -> dict[str, float]:
    """CPU time of a caption, of the labelled loops and of the good ones: the best of several turns."""

    def best(texts: list[str]) -> float:
        turn: Callable[[], object] = lambda: [find(text, "stop", checks) for text in texts]  # noqa: E731
        return round(
            min(timeit.repeat(turn, number=1, repeat=40, timer=time.process_time)) / len(texts) * 1e6, 1
        )

    loops = [row["caption"] for row in rows if "loop" in row["labels"]]
    whole = [row["caption"] for row in rows if not {"loop", "garbled"} & set(row["labels"])]
    return {
        "loops": best(loops),
        "good": best(whole),
        "words_of_good_mean": round(statistics.mean(len(text.split()) for text in whole), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=5, help="captions to show, of each kind and set")
    number = parser.parse_args().examples
    rows = labelled()
    result: dict[str, Any] = {
        "checks": vars(ENGLISH),
        "labelled": {"all": recall(rows)}
        | {f"round_{n}": recall([row for row in rows if row["round"] == n]) for n in (1, 2, 3)},
    }
    for name, captions in good():
        print(name, file=sys.stderr)
        examples(captions, number)
        result[name] = {"even": flagged(captions[::2]), "odd": flagged(captions[1::2])}
    for name, captions in unseen():
        print(name, file=sys.stderr)
        examples(captions, number)
        result[name] = {"unseen": flagged(captions)}
    result["microseconds"] = microseconds(rows, Checks())
    result["microseconds_with_language"] = microseconds(rows, ENGLISH)
    keep("defects", result)


if __name__ == "__main__":
    main()
