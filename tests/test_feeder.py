"""Requests made ready in processes of their own are those that the engine makes, whatever befalls."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import CAPTIONER

from builder.captions import feeder as feeding
from builder.captions.asking import Job, Request
from builder.captions.feeder import AHEAD, Failure, Feeder
from builder.captions.replies import Reply
from builder.captions.vllm import Engine
from builder.stages.caption import Caption
from recipes.demo import world

SETTINGS = Caption(model=str(CAPTIONER), dtype="float32", max_model_len=512, kv_cache_gib=1, feeders=2)
SHORT = replace(SETTINGS, name="short_caption", max_tokens=8)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(SETTINGS, SHORT)
    yield engine
    engine.close()


@pytest.fixture
def feeder(engine: Engine) -> Feeder:
    """Once as many as it is to have have begun: their template imports for a while."""
    assert engine.feeder is not None
    deadline = time.monotonic() + 120
    while len(children(engine.feeder.template.pid)) != len(engine.feeder.workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return engine.feeder


def requests(number: int) -> list[Request]:
    scenes = (world.scene(world.HELD_OUT + 8_000_000 + n) for n in range(number))
    return [Request(str(n), world.jpeg(world.draw(scene, 128), 95)) for n, scene in enumerate(scenes)]


@pytest.mark.slow
def test_captions_are_those_of_one_process(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the feeders hold at a time, some of which are no pictures."""
    asked = requests(3 * AHEAD)
    asked[5], asked[70] = replace(asked[5], image=b"no picture"), replace(asked[70], image=None)
    fed = engine.replies(SETTINGS, asked)
    assert engine.waited_s > 0
    monkeypatch.setattr(engine, "feeder", None)
    assert engine.replies(SETTINGS, asked) == fed
    assert "cannot be decoded" in fed["5"].error
    assert fed["70"].error == "its image is not in the tar"
    assert sum(not reply.error for reply in fed.values()) == len(asked) - 2


@pytest.mark.slow
def test_columns_and_shards_share_what_room_the_feeders_have(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two columns none waits until the other is done; a retry does not wait for a shard begun ahead."""
    monkeypatch.setattr(feeding, "AHEAD", 8)
    asked = requests(60)
    order: list[str] = []
    found: dict[str, set[str]] = {"long": set(), "short": set(), "ahead": set()}

    def job(name: str, kind: Caption, retried: int) -> Job:
        def deliver(request: Request, reply: Reply) -> bool:
            order.append(name)
            again = request.attempt == 0 and int(request.uid) < retried
            if not again:
                assert request.uid not in found[name]
                found[name].add(request.uid)
            return again

        return Job(kind, iter(asked), {}, deliver, shard="1" if name == "ahead" else "0")

    both = [job("short", SHORT, 0), job("ahead", SETTINGS, 0)]
    first = job("long", SETTINGS, 20)
    engine.finish(first, lambda: both.pop(0) if both else None)
    for other in list(engine.jobs):
        engine.finish(other)
    assert [len(uids) for uids in found.values()] == [60] * 3
    assert order.index("short") < 60
    assert engine.jobs == []


@pytest.mark.slow
def test_a_feeder_that_is_killed_is_replaced_and_costs_nothing(engine: Engine, feeder: Feeder) -> None:
    before = engine.replies(SETTINGS, requests(8))
    for child in children(feeder.template.pid):
        os.kill(child, signal.SIGKILL)
    assert engine.replies(SETTINGS, requests(8)) == before


@pytest.mark.slow
def test_an_image_of_which_feeders_die_fails_alone(feeder: Feeder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is at it dies."""
    (picture, *_) = requests(1)
    assert picture.image is not None
    those = children(feeder.template.pid)
    for child in those:  # none answers before it dies
        os.kill(child, signal.SIGSTOP)
    deadly = feeder.submit("deadly", picture.image, [1])
    monkeypatch.setattr(deadly, "deaths", feeding.DEATHS - 1)
    worker = next(worker for worker in feeder.workers if deadly in worker.asked)
    assert worker.asked[0] is deadly
    worker.socket.shutdown(2)
    assert feeder.result(deadly) == Failure("the process that decoded the image died of it")
    for child in those:
        os.kill(child, signal.SIGCONT)


@pytest.mark.slow
def test_feeders_end_with_the_process_that_has_them(feeder: Feeder) -> None:
    """Also where it is killed: then the kernel closes its sockets, as here."""
    those = [feeder.template.pid, *children(feeder.template.pid)]
    feeder.control.close()
    for worker in feeder.workers:
        worker.socket.close()
    feeder.template.wait(timeout=20)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in those) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in those)


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
