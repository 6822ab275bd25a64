"""Who builds in a run: one at a time, on whatever machine, with nothing but objects.

    .lease/00000007     of the build that has it: who, since when, and a number that it keeps changing

The highest number has the lease. Who wants it watches that object: one that has not changed over `expiry_s`
of the observer's own clock is nobody's, and no two machines' clocks are ever compared. The next number is
made so that of two that want it one gets it. Records carry the number of the build that committed them, and a
build that was only asleep finds a higher one before it commits.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from builder.errors import InputError, command, named

if TYPE_CHECKING:
    from builder.store import Store

log = logging.getLogger(__name__)
FOLDER = ".lease"
GIVEN_BACK = b"given back"
BEAT_S = 10.0  # how often the holder changes its object
EXPIRY_S = 60.0  # a lease that has not changed for so long is nobody's


@dataclass(frozen=True)
class Holder:
    who: str
    since: str
    where: str  # the machine, since it was started, and what numbers its processes there
    pid: int
    beat: int = 0
    workers: dict[str, int] = field(default_factory=dict)  # by stage

    @classmethod
    def here(cls) -> Holder:
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a container's user may have no name
            user = str(os.getuid())
        pid = os.getpid()
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return cls(f"{user} at {socket.gethostname()}, process {pid}", since, where(), pid)

    @classmethod
    def parse(cls, data: bytes) -> Holder | None:
        """None where it was given back, or is being written."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return None

    def written(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    def was_here(self) -> bool:
        return self.where == where()

    def is_gone(self) -> bool:
        """Is it known to have ended? Of a process elsewhere nothing is known."""
        return self.was_here() and not Path(f"/proc/{self.pid}").exists()


@cache
def where() -> str:
    """Names this machine, since it was started, and this container of it."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


@dataclass
class Lease:
    """A lease that is held; `is_lost` where another build may have it now."""

    number: int
    expiry_s: float
    is_lost: bool = False
    workers: dict[str, int] = field(default_factory=dict)  # by stage, that are there now

    @property
    def name(self) -> str:
        return _name(self.number)


def confirm(store: Store) -> None:
    """Does the build still hold what it builds in? Asked by whoever commits, on whatever machine.

    Raises:
        InputError: another build has it now, or it could not be kept.
    """
    held = store.held
    if held and (held.is_lost or numbers(store)[-1:] != [held.number]):
        reason = (
            f"{store.place} could not be written to for {held.expiry_s:g} s, or another build took it over"
        )
        raise InputError(reason, "look whether one is at work, then type the same command again")


def hold(store: Store) -> None:
    """As `confirm`, by what is known already: of whoever holds the lease himself.

    Raises:
        InputError: it was lost.
    """
    if store.held and store.held.is_lost:
        confirm(store)


def numbers(store: Store) -> list[int]:
    """Of the leases that are there; the highest counts."""
    return sorted(int(name) for name in store.names(FOLDER) if name.isdecimal())


def holder(store: Store) -> Holder | None:
    """Who has a run, as far as its objects say: it may be gone by now."""
    found = numbers(store)
    return Holder.parse(store.read(_name(found[-1])) or b"") if found else None


@contextmanager
def leased(
    store: Store,
    *,
    beat_s: float = BEAT_S,
    expiry_s: float = EXPIRY_S,
    is_gone: Callable[[Holder], bool] | None = None,
) -> Iterator[Lease]:
    """Hold a run's lease. `is_gone` may know of a holder that it has ended.

    Raises:
        InputError: somebody else does; it is said who, and since when.
    """
    found = numbers(store)
    if found:
        _wait_until_free(store, _name(found[-1]), beat_s, expiry_s, is_gone or Holder.is_gone)
    lease, mine = Lease(found[-1] + 1 if found else 1, expiry_s), Holder.here()
    try:
        store.create(lease.name, mine.written())
    except FileExistsError:
        raise busy(store) from None
    if numbers(store)[-1:] != [lease.number]:  # what was listed before is long ago
        store.delete(lease.name)
        raise busy(store)
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(store, lease, mine, beat_s, ended), daemon=True)
    thread.start()
    try:
        for older in found:
            store.delete(_name(older))
        yield lease
    finally:
        ended.set()
        thread.join()
        if not lease.is_lost:
            with suppress(OSError, InputError):  # then it expires
                store.write(lease.name, GIVEN_BACK)  # the number is not used again


def _wait_until_free(
    store: Store, name: str, beat_s: float, expiry_s: float, is_gone: Callable[[Holder], bool]
) -> None:
    """Raises:
    InputError: it is held.
    """
    held = store.read(name)
    known = Holder.parse(held or b"")
    if held in (GIVEN_BACK, None) or (known and is_gone(known)):
        return  # where it has gone meanwhile there is a newer one, which is found
    by = known.who if known else "somebody"
    log.info("waiting up to %g s to see whether the build of %s is at work still", expiry_s, by)
    end = time.monotonic() + expiry_s
    while (now := store.read(name)) == held and time.monotonic() < end:
        time.sleep(min(beat_s, expiry_s) / 4)
    if now not in (held, GIVEN_BACK):  # it was changed, or a newer one is there
        raise busy(store)


def _beat(store: Store, lease: Lease, mine: Holder, beat_s: float, ended: threading.Event) -> None:
    written = time.monotonic()
    while not ended.wait(beat_s):
        with suppress(Exception):  # the next one may come through; too long without one is told
            if numbers(store)[-1:] != [lease.number]:
                break
            mine = replace(mine, beat=mine.beat + 1, workers=lease.workers)
            store.write(lease.name, mine.written())
            written = time.monotonic()
        if time.monotonic() - written > lease.expiry_s:
            break
    lease.is_lost = not ended.is_set()


def busy(store: Store) -> InputError:
    by = holder(store)
    told = f": {by.who}, since {by.since}" if by else ""
    see = f"see how far it is: {command('recap', 'status', named(store.place))}"
    return InputError(f"another build is at work in {store.place}{told}", see)


def _name(number: int) -> str:
    return f"{FOLDER}/{number:08d}"
