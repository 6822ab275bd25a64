"""Keeping an engine busy: shards as jobs, a steady number of requests in flight, the next shard's fed while
the last of one finish.

So the engine does not drain at the end of a shard. A request whose reply is no good is asked again in its
place among the others. Columns that are made of the same shard at a time take turns, image by image, so that
an engine that keeps what it computed of an image computes it once.
"""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

from builder.captions.kinds import Kind
from builder.captions.replies import Reply

log = logging.getLogger(__name__)
# What is counted of a job.
BROKEN_UP = "special tokens broken up"
TOKENS = "tokens paid for"  # of prompts and replies, by an endpoint
PREPARED = 64  # requests that are made ready at a time


@dataclass(frozen=True)
class Request:
    """What is asked about one row: by its picture as it is encoded, where its kind of caption has one, and by
    the columns that its prompt quotes.
    """

    uid: str
    image: bytes | None = None
    row: Mapping[str, Any] = field(default_factory=dict)
    attempt: int = 0
    blank: bool = False  # the picture shows nothing: does the model look?

    @cached_property
    def sha256(self) -> str:
        """Of the picture; of nothing, where there is none."""
        return hashlib.sha256(self.image or b"").hexdigest()


@dataclass(eq=False)  # each is itself
class Job:
    """What is asked for one column of one shard."""

    kind: Kind
    requests: Iterator[Request]
    known: Mapping[str, Reply]  # replies that are there already, by their keys
    # Gets what became of each, in any order; says whether it is to be asked again, as its next attempt.
    deliver: Callable[[Request, Reply], bool]
    shard: str = ""
    counts: Counter[str] = field(default_factory=Counter)  # what the engine counts besides
    more: bool = True  # requests that nobody has looked at yet
    again: deque[Request] = field(default_factory=deque)
    preparing: deque[tuple[Ready, Any]] = field(default_factory=deque)  # what somebody makes ready
    ready: deque[Ready] = field(default_factory=deque)
    asked: int = 0  # requests in the engine
    is_broken: bool = False  # begun ahead of its time, and then its input could not be read

    def is_fed(self) -> bool:
        """Has all of it been put to the engine?"""
        return not (self.more or self.again or self.preparing or self.ready)

    def is_done(self) -> bool:
        return self.is_fed() and not self.asked

    def group(self, number: int) -> list[Request]:
        """The next ones to look at."""
        group = [self.again.popleft() for _ in range(min(number, len(self.again)))]
        if self.more and not group:
            group = list(islice(self.requests, number))
            self.more = len(group) == number
        return group

    def came(self, request: Request, reply: Reply) -> None:
        if self.deliver(request, reply):
            again = Request(request.uid, request.image, request.row, request.attempt + 1, request.blank)
            self.again.append(again)


@dataclass(frozen=True)
class Ready:
    """A request as its engine takes it."""

    request: Request
    key: str
    prompt_cut: bool
    sampling: Any = None
    prompt: Any = None


class Asking(ABC):
    """An engine, and the jobs that it is asked for. Subclasses say how to make requests ready, put them and
    get what came.
    """

    def __init__(self, in_flight: int, columns: int = 1) -> None:
        self.in_flight = in_flight
        self.columns = columns  # that it makes of one shard
        self.at_a_time = PREPARED
        self.jobs: list[Job] = []
        self.asked: dict[str, tuple[Job, Ready]] = {}
        self.number = 0

    @abstractmethod
    def prepare(self, job: Job, requests: Sequence[Request]) -> None:
        """Make requests ready, for `job.ready`, or answer them by what is known. What is not finished at once
        goes into `job.preparing`.
        """

    def has_room(self, job: Job) -> bool:
        """Is it time to prepare more of a job?"""
        return not job.ready

    def collect(self, job: Job, *, wait: bool = False) -> None:  # noqa: B027 - most prepare at once
        """Move what is prepared to `job.ready`; with `wait` at least one, if there is one."""

    @abstractmethod
    def put(self, name: str, ready: Ready) -> Reply | None:
        """Put it to the engine; the reply, if it is refused."""

    @abstractmethod
    def step(self) -> Iterable[tuple[str, Reply]]:
        """What came since, by its name, after waiting for something: it has left the engine."""

    @abstractmethod
    def abort(self, names: Sequence[str]) -> None:
        """Of these nothing is wanted."""

    @abstractmethod
    def close(self) -> None:
        pass

    def replies(self, kind: Kind, requests: Iterable[Request]) -> dict[str, Reply]:
        """uid -> what the model says of each, whatever it is."""
        found: dict[str, Reply] = {}

        def deliver(request: Request, reply: Reply) -> bool:
            found[request.uid] = reply
            return False

        self.finish(Job(kind, iter(requests), {}, deliver))
        return found

    def finish(self, job: Job, more: Callable[[], Job | None] = lambda: None) -> None:
        """Do a job to its end. Where it leaves room in the engine, `more` is asked for the next one, which is
        begun.

        Whatever goes wrong, no request is left in the engine.
        """
        if job not in self.jobs:
            self.jobs.append(job)
        try:
            for _ in range(len(self.jobs), self.columns):
                if of_this_shard := more():
                    self.jobs.append(of_this_shard)
            while not job.is_done():
                self._fill(job, more)
                if not self.asked:
                    slowest = next((one for one in (job, *self.jobs) if one.preparing), job)
                    self.collect(slowest, wait=True)
                    continue
                for name, reply in self.step():
                    asked_by, ready = self.asked.pop(name)
                    asked_by.asked -= 1
                    asked_by.came(ready.request, reply)
            self.jobs.remove(job)
        except BaseException:
            self.abort(list(self.asked))
            self.asked.clear()
            self.jobs.clear()
            raise

    def _fill(self, current: Job, more: Callable[[], Job | None]) -> None:
        """Ask until `in_flight` requests are in the engine."""
        waiting = [job for job in self.jobs if not job.is_fed()]
        while waiting and len(self.asked) < self.in_flight:
            first = waiting[0].shard
            turn = [job for job in waiting if job.shard == first]
            for job in turn:
                if len(self.asked) < self.in_flight and not self._ask(job, current):
                    waiting.remove(job)
        if len(self.asked) < self.in_flight and (job_ahead := more()):
            self.jobs.append(job_ahead)

    def _ask(self, job: Job, current: Job) -> bool:
        """Put the next request of a job to the engine; False where it has none just now."""
        try:
            while self.has_room(job) and (group := job.group(self.at_a_time)):
                self.prepare(job, group)
            self.collect(job)
        except Exception:
            if job is current:
                raise
            log.info("a shard that was begun ahead is begun anew when its turn comes", exc_info=True)
            self._give_up(job)
            return False
        if not job.ready:
            return False  # others have what room there is to prepare, or it is being prepared
        ready = job.ready.popleft()
        self.number += 1
        name = str(self.number)
        if refused := self.put(name, ready):
            job.came(ready.request, refused)
        else:
            job.asked += 1
            self.asked[name] = (job, ready)
        return not job.is_fed()

    def _give_up(self, job: Job) -> None:
        job.is_broken = True
        self.jobs.remove(job)
        names = [name for name, (asked_by, _) in self.asked.items() if asked_by is job]
        self.abort(names)
        for name in names:
            del self.asked[name]
