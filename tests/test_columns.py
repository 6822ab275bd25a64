"""Captions are the cost: what a model said is asked for once, whatever happens to its shard or beside it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from builder.captions.vllm import Engine
from builder.executors.work import in_this_process
from builder.run import Run, build, garbage, retry
from builder.status import status
from builder.versions.publish import publish
from builder.versions.verify import verify
from recipes import datasets as recipes
from recipes.demo import web

pytestmark = pytest.mark.slow
PORT, ROWS = 8662, 100


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Requests that the engines get, by caption column."""
    found: Counter[str] = Counter()
    look_up = Engine._look_up

    def counting(engine: Engine, job: Any, *given: Any) -> Any:
        unknown = look_up(engine, job, *given)
        found[job.kind.name] += unknown is not None
        return unknown

    monkeypatch.setattr(Engine, "_look_up", counting)
    return found


def captions(run: Path, stage: str) -> dict[str, str | None]:
    paths = [run / name for name in Run.open(run).files(stage)]
    return {row["uid"]: row[stage] for path in paths for row in pq.read_table(path).to_pylist()}


def test_a_reply_is_asked_for_once(asked: Counter[str], tmp_path: Path) -> None:
    """100 rows of which 3 are missing; these are mended; a second column comes, and its prompt changes."""
    site, run = tmp_path / "web", tmp_path / "run"
    web.make(site, rows=ROWS, seed=7, port=PORT)
    truth = json.loads((site / "truth.json").read_text())
    missing = [uid for uid in truth if truth[uid]["fault"] == "ok"][:3]
    demo = recipes.demo(web=str(site), rows_per_shard=50)
    with web.serve(site, PORT, gone=missing):
        assert build(demo, run, executor=in_this_process).failed == {}
    rows = {str(row["stage"]): Counter(row["rows"]) for row in status(Run.open(run))}  # type: ignore[call-overload]
    assert asked == {"re_caption": rows["re_caption"]["ok"]}
    before = captions(run, "re_caption")

    with web.serve(site, PORT):
        asked.clear()
        retry(run, ["dead_link"], executor=in_this_process)
        assert build(demo, run, executor=in_this_process).failed == {}
        assert asked == {"re_caption": 3}
        after = captions(run, "re_caption")
        assert {uid for uid in after if after[uid] != before[uid]} == set(missing)

        asked.clear()
        wider = recipes.demo(web=str(site), rows_per_shard=50, short=True)
        done = build(wider, run, executor=in_this_process).done
        assert not any(name.startswith(("download", "re_caption")) for name in done)
        assert asked == {"short_caption": rows["re_caption"]["ok"] + 3}

        asked.clear()
        first = wider.stage("short_caption")
        other = replace(first, max_tokens=8)  # type: ignore[call-arg]
        changed = replace(wider, stages=tuple(other if stage is first else stage for stage in wider.stages))
        build(changed, run, executor=in_this_process, redo=["short_caption"])
        assert asked == {"short_caption": rows["re_caption"]["ok"] + 3}
        asked.clear()
        build(wider, run, executor=in_this_process, redo=["short_caption"])
        assert asked == {}  # the replies to the settings of before are still there
        assert garbage(run)
    place = Path(publish(run, str(tmp_path / "out"), "0.1.0").place)
    assert verify(str(place))["problems"] == []
    assert {"re_caption", "short_caption", "short_caption_num_tokens"} <= set(
        pq.read_table(place / "data").column_names
    )
