"""Where a run's files are: a folder, or any URL of fsspec. Nothing else in builder/ knows.

An object is a name below the run, `download/00000/00042.1f3a9c2b.tar`, and its bytes, there whole or not at
all. Stages see local files only: `fetch` brings an object, `put` takes a finished file over. Nobody renames,
appends to or globs over a run. A lease says who builds in it.

    Folder   objects are the files of a folder; put and lease are a rename and the kernel's lock
    Remote   objects of an fsspec file system; put is one PUT; a lease is an object that its holder changes
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import fsspec

from builder.errors import InputError, command
from builder.files import lock, read_file, sync, write_atomically

SCRATCH = ".scratch"


class Journal(Protocol):
    """Lines that outlive the process that wrote them."""

    def add(self, line: str) -> None: ...

    def close(self) -> None: ...


class Store(Protocol):
    place: str

    def exists(self) -> bool:
        """Is there a run, or anything else?"""

    def read(self, name: str) -> bytes | None:
        """All of a small object; None where there is none."""

    def write(self, name: str, data: bytes) -> None:
        """A small object, whole or not at all."""

    def fetch(self, name: str, scratch: Path) -> Path:
        """A local file with an object's bytes, to be read only; where it has to be brought it goes into
        `scratch`.

        Raises:
            FileNotFoundError: there is no such object.
        """

    def put(self, file: Path, name: str) -> None:
        """Make a finished local file an object; the file is gone then."""

    def names(self, folder: str) -> list[str]:
        """Of the objects that lie directly in a folder."""

    def sizes(self, folder: str) -> dict[str, int]:
        """Name -> bytes of the objects that lie directly in a folder."""

    def folders(self, folder: str) -> list[str]:
        """Of the folders that lie directly in a folder, sorted."""

    def delete(self, name: str) -> None:
        """An object or a journal; nothing where there is none."""

    def journal(self, name: str) -> Journal:
        """A journal to write on with."""

    def journaled(self, name: str) -> list[str]:
        """Its whole lines; what a crash cut off is not among them."""

    def scratch(self) -> Path:
        """A new local folder, on the disk of a local run; who asks removes it."""

    @property
    def logs(self) -> Path:
        """A local folder for what libraries print."""

    def lease(self) -> AbstractContextManager[None]:
        """A context in which nobody else builds here.

        Raises:
            InputError: somebody else does.
        """


def store_of(place: str | Path) -> Store:
    """The store that a path or a URL names."""
    return Remote(str(place)) if "://" in str(place) else Folder(Path(place))


def _busy(place: str) -> tuple[str, str]:
    see = f"see how far it is: {command('recap', 'status', Path(place))}"
    return f"another build is at work in {place}", see


class Folder:
    """A run that is a folder of this machine, or of a file system that it has mounted."""

    def __init__(self, root: Path) -> None:
        self.root, self.place = root, str(root)
        self._known: set[str] = set()  # folders that are there

    def exists(self) -> bool:
        return self.root.exists()

    def read(self, name: str) -> bytes | None:
        path = self.root / name
        return read_file(path) if os.path.lexists(path) else None

    def write(self, name: str, data: bytes) -> None:
        self._make_folder(name)
        write_atomically(self.root / name, data)

    def fetch(self, name: str, scratch: Path) -> Path:
        path = self.root / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
        return path

    def put(self, file: Path, name: str) -> None:
        self._make_folder(name)
        sync(file)
        os.replace(file, self.root / name)

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.root / folder) if not name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def sizes(self, folder: str) -> dict[str, int]:
        try:
            with os.scandir(self.root / folder) as entries:
                seen = (entry for entry in entries if entry.is_file() and not entry.name.startswith("."))
                return {entry.name: entry.stat().st_size for entry in seen}
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def folders(self, folder: str) -> list[str]:
        try:
            with os.scandir(self.root / folder) as entries:
                return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def delete(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def journal(self, name: str) -> Journal:
        self._make_folder(name)
        return _File(self.root / name)

    def journaled(self, name: str) -> list[str]:
        return _whole_lines(self.read(name) or b"")

    def scratch(self) -> Path:
        self._make_folder(f"{SCRATCH}/any")
        return Path(tempfile.mkdtemp(dir=self.root / SCRATCH))

    @property
    def logs(self) -> Path:
        self._make_folder("logs/any")
        return self.root / "logs"

    @contextmanager
    def lease(self) -> Iterator[None]:
        """The kernel lets go of it when the process ends, however it ends. Scratch folders of before are
        nobody's then.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with lock(self.root / ".lock", *_busy(self.place)):
            shutil.rmtree(self.root / SCRATCH, ignore_errors=True)
            self._known.discard(SCRATCH)
            try:
                yield
            finally:
                shutil.rmtree(self.root / SCRATCH, ignore_errors=True)
                self._known.discard(SCRATCH)

    def _make_folder(self, name: str) -> None:
        folder = name.rpartition("/")[0]
        if folder not in self._known:
            (self.root / folder).mkdir(parents=True, exist_ok=True)
            self._known.add(folder)


class _File:
    def __init__(self, path: Path) -> None:
        if path.exists() and (whole := path.read_bytes()) and not whole.endswith(b"\n"):  # cut off by a crash
            os.truncate(path, whole.rfind(b"\n") + 1)
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - until `close`

    def add(self, line: str) -> None:
        self.file.write(line + "\n")

    def close(self) -> None:
        self.file.close()


def _whole_lines(data: bytes) -> list[str]:
    return data.decode("utf-8", "replace").split("\n")[:-1]


FLUSH_S = 5.0  # a remote journal is an object for each so many seconds; so much of it a crash costs
BEAT_S = 10.0  # how often the holder of a remote lease changes it
EXPIRY_S = 60.0  # a lease that has not changed for so long is nobody's


class Remote:
    """A run that is objects of an fsspec file system: no renaming, no appending, no locks."""

    def __init__(self, place: str, *, beat_s: float = BEAT_S, expiry_s: float = EXPIRY_S) -> None:
        self.place, self.beat_s, self.expiry_s = place.rstrip("/"), beat_s, expiry_s
        self.fs, self.root = fsspec.core.url_to_fs(self.place)
        self.root = self.root.rstrip("/")
        self.lost = False  # the lease that was held: whatever is written now may be another build's

    def exists(self) -> bool:
        return bool(self.fs.exists(self.root))

    def read(self, name: str) -> bytes | None:
        try:
            data: bytes = self.fs.cat_file(f"{self.root}/{name}")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None
        return data

    def write(self, name: str, data: bytes) -> None:
        self._hold()
        self._make_folder(name)
        self.fs.pipe_file(f"{self.root}/{name}", data)

    def fetch(self, name: str, scratch: Path) -> Path:
        path = scratch / "fetched" / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.fs.get_file(f"{self.root}/{name}", str(path))
        return path

    def put(self, file: Path, name: str) -> None:
        self._hold()
        self._make_folder(name)
        self.fs.put_file(str(file), f"{self.root}/{name}")
        file.unlink()

    def names(self, folder: str) -> list[str]:
        self._hold()
        return sorted(self.sizes(folder))

    def sizes(self, folder: str) -> dict[str, int]:
        files = (item for item in self._list(folder) if item["type"] == "file")
        return {item["name"].rpartition("/")[2]: item["size"] for item in files}

    def folders(self, folder: str) -> list[str]:
        found = (item for item in self._list(folder) if item["type"] == "directory")
        return sorted(item["name"].rpartition("/")[2] for item in found)

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError, IsADirectoryError):
            self.fs.rm_file(f"{self.root}/{name}")
        for part in self.names(name):  # of a journal
            self.fs.rm_file(f"{self.root}/{name}/{part}")

    def journal(self, name: str) -> Journal:
        return _Segments(self, name)

    def journaled(self, name: str) -> list[str]:
        parts = (self.read(f"{name}/{part}") or b"" for part in self.names(name))
        return [line for part in parts for line in _whole_lines(part)]

    def scratch(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="recap-"))

    @property
    def logs(self) -> Path:
        folder = Path(tempfile.gettempdir(), "recap-logs")
        folder.mkdir(exist_ok=True)
        return folder

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Objects `lease/<number>`: the highest number holds it and keeps changing its object.

        One that has not changed over `expiry_s` of the observer's own clock is nobody's. The next number is
        made by a conditional PUT, so that of two that want it one gets it.
        """
        names = self.names("lease")
        if names and (held := self.read(f"lease/{names[-1]}")):
            end = time.monotonic() + self.expiry_s
            while (now := self.read(f"lease/{names[-1]}")) == held and time.monotonic() < end:
                time.sleep(min(self.beat_s, self.expiry_s) / 4)
            if now is not None and now != held:
                raise InputError(*_busy(self.place))
        mine = f"lease/{int(names[-1]) + 1 if names else 0:08d}"
        self._make_folder(mine)
        try:
            self.fs.pipe_file(f"{self.root}/{mine}", uuid.uuid4().bytes, mode="create")
        except FileExistsError:
            raise InputError(*_busy(self.place)) from None
        for older in names:
            self.delete(f"lease/{older}")
        ended = threading.Event()

        def beat() -> None:
            written = time.monotonic()
            while not ended.wait(self.beat_s):
                with suppress(Exception):  # the next one may come through; too long without one is told
                    if self.names("lease")[-1:] != [mine.rpartition("/")[2]]:
                        break
                    self.fs.pipe_file(f"{self.root}/{mine}", uuid.uuid4().bytes)
                    written = time.monotonic()
                if time.monotonic() - written > self.expiry_s:
                    break
            self.lost = not ended.is_set()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            if not self.lost:
                self.delete(mine)
            self.lost = False

    def _hold(self) -> None:
        """Raises:
        InputError: the lease was lost.
        """
        if self.lost:
            reason = (
                f"{self.place} could not be written to for {self.expiry_s:g} s, or another build took it over"
            )
            raise InputError(reason, "look whether one is at work, then type the same command again")

    def _list(self, folder: str) -> list[dict[str, Any]]:  # of what fsspec tells
        self.fs.invalidate_cache()
        try:
            found: list[dict[str, Any]] = self.fs.ls(f"{self.root}/{folder}", detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [item for item in found if str(item["name"]).rstrip("/") != f"{self.root}/{folder}"]

    def _make_folder(self, name: str) -> None:
        """Where a file system has folders."""
        self.fs.makedirs(f"{self.root}/{name}".rpartition("/")[0], exist_ok=True)


class _Segments:
    """A journal as numbered objects: nothing can be appended to one."""

    def __init__(self, store: Remote, name: str) -> None:
        self.store, self.name = store, name
        self.number = len(store.names(name))
        self.lines, self.since = io.StringIO(), time.monotonic()

    def add(self, line: str) -> None:
        self.lines.write(line + "\n")
        if time.monotonic() - self.since > FLUSH_S:
            self._flush()

    def close(self) -> None:
        self._flush()

    def _flush(self) -> None:
        if text := self.lines.getvalue():
            self.store.write(f"{self.name}/{self.number:06d}", text.encode())
            self.number += 1
        self.lines, self.since = io.StringIO(), time.monotonic()
