"""Where a run's files are: a folder, or any URL of fsspec. Nothing else in builder/ knows.

An object is a name below the run, `download/00000/00042.1f3a9c2b.tar`, and its bytes, there whole or not at
all. Stages see local files only: `fetch` brings an object, `put` takes a finished file over. Nobody renames,
appends to or globs over a run. A lease says who builds in it.

    Folder   objects are the files of a folder; put is a rename
    Remote   objects of an fsspec file system; put is one PUT, which does not replace what another build put
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import fsspec
from fsspec import AbstractFileSystem

from builder.errors import InputError
from builder.files import is_amazons, lock, part_of, read_file, sync, write_atomically
from builder.lease import BEAT_S, EXPIRY_S, Holder, Lease, busy, confirm, hold, leased
from builder.scratch import ANYWHERE, Local, Scratch, digest

SCRATCH = ".scratch"
OBJECTS = {"s3", "s3a", "gs", "gcs"}  # fsspec makes a conditional PUT of `mode="create"`
FILES = {"file", "local", "memory"}  # and opens these with O_EXCL, or in this process


class Journal(Protocol):
    """Lines that outlive the process that wrote them."""

    def add(self, line: str) -> None: ...

    def close(self) -> None: ...


class Store(Protocol):
    place: str
    local: Local
    held: Lease | None
    filesystem: AbstractFileSystem | None  # with which others read what `url` names; None where all can

    def url(self, name: str) -> str:
        """As a user names an object."""

    def exists(self) -> bool:
        """Is there a run, or anything else?"""

    def read(self, name: str) -> bytes | None:
        """All of a small object; None where there is none."""

    def read_all(self, names: Sequence[str]) -> Iterable[bytes | None]:
        """As `read`, of many."""

    def write(self, name: str, data: bytes) -> None:
        """A small object, whole or not at all."""

    def create(self, name: str, data: bytes) -> None:
        """A small object that must not be there yet.

        Raises:
            FileExistsError: it is, and stays as it is.
        """

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

    def delete_all(self, names: Sequence[str]) -> None:
        """Objects that are there."""

    def journal(self, name: str) -> Journal:
        """A journal to write on with."""

    def journaled(self, name: str) -> list[str]:
        """Its whole lines; what a crash cut off is not among them."""

    def scratch(self) -> Path:
        """A new local folder, on the disk of a local run; who asks removes it."""

    def has_room(self) -> bool:
        """May more be put into scratch folders?"""

    @property
    def logs(self) -> Path:
        """A local folder for what libraries print."""

    def is_conditional(self) -> bool:
        """Is of two that create an object one refused? Tried out, for some servers do not know of it."""

    def lease(self) -> AbstractContextManager[Lease]:
        """A context in which nobody else builds here; `held` is it.

        Raises:
            InputError: somebody else does.
        """


def store_of(place: str | Path, local: Local = ANYWHERE) -> Store:
    """The store that a path or a URL names.

    Raises:
        InputError: it is a URL of a kind that is not installed.
    """
    if str(place).startswith(("file://", "local://")):
        place = str(place).partition("://")[2]
    return Remote(str(place), local) if "://" in str(place) else Folder(Path(place), local)


class Folder:
    """A run that is a folder of this machine, or of a file system that it has mounted."""

    held: Lease | None = None
    filesystem = None

    def __init__(
        self, root: Path, local: Local = ANYWHERE, *, beat_s: float = BEAT_S, expiry_s: float = EXPIRY_S
    ) -> None:
        self.root, self.place, self.local = root, str(root), local
        self.beat_s, self.expiry_s = beat_s, expiry_s
        self._known: set[str] = set()  # folders that are there

    def url(self, name: str) -> str:
        return str(self.root / name)

    def exists(self) -> bool:
        return self.root.exists()

    def read(self, name: str) -> bytes | None:
        path = self.root / name
        try:
            return read_file(path)
        except InputError:
            if os.path.lexists(path):
                raise
            return None

    def read_all(self, names: Sequence[str]) -> Iterable[bytes | None]:
        return map(self.read, names)

    def write(self, name: str, data: bytes) -> None:
        hold(self)
        self._make_folder(name)
        write_atomically(self.root / name, data)

    def create(self, name: str, data: bytes) -> None:
        self._make_folder(name)
        with open(self.root / name, "xb") as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            except OSError:  # a full disk
                (self.root / name).unlink()
                raise

    def fetch(self, name: str, scratch: Path) -> Path:
        path = self.root / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
        return path

    def put(self, file: Path, name: str) -> None:
        hold(self)
        self._make_folder(name)
        if file.stat().st_dev != (self.root / name).parent.stat().st_dev:  # from scratch on another disk
            file = Path(shutil.move(file, self._part(name)))
        sync(file)
        os.replace(file, self.root / name)

    def _part(self, name: str) -> Path:
        self._make_folder(f"{SCRATCH}/any")
        return self.root / SCRATCH / f"{uuid.uuid4().hex}-{name.rpartition('/')[2]}"

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
        hold(self)
        for path in (self.root / name, part_of(self.root / name)):
            path.unlink(missing_ok=True)

    def delete_all(self, names: Sequence[str]) -> None:
        for name in names:
            self.delete(name)

    def journal(self, name: str) -> Journal:
        self._make_folder(name)
        return _File(self.root / name)

    def journaled(self, name: str) -> list[str]:
        return _whole_lines(self.read(name) or b"")

    def scratch(self) -> Path:
        return self._scratch.new()

    def has_room(self) -> bool:
        return self._scratch.has_room()

    @property
    def _scratch(self) -> Scratch:
        elsewhere = self.local.scratch and self.local.scratch / digest(self.place)
        return Scratch(elsewhere or self.root / SCRATCH, self.local.scratch_gib)

    @property
    def logs(self) -> Path:
        self._make_folder("logs/any")
        return self.root / "logs"

    def is_conditional(self) -> bool:
        return _refuses_a_second(self)

    @contextmanager
    def lease(self) -> Iterator[Lease]:
        """Of two on one machine the kernel's lock tells at once, and lets go when the process ends, however
        it ends; between machines that share the folder objects tell, or where there are no locks. Scratch
        folders of before are nobody's then.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        told, is_gone = busy(self), Holder.is_gone
        with ExitStack() as stack:
            with suppress(NotImplementedError):
                stack.enter_context(lock(self.root / ".lock", told.message, told.hint))
                is_gone = Holder.was_here  # or it would have the lock
            held = leased(self, beat_s=self.beat_s, expiry_s=self.expiry_s, is_gone=is_gone)
            self.held = stack.enter_context(held)
            try:
                self._clear()
                yield self.held
            finally:
                self._clear()
                self.held = None

    def _clear(self) -> None:
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


MANY = 1000  # objects that are read at a time
FLUSH_S = 5.0  # a remote journal is an object for each so many seconds; so much of it a crash costs


class Remote:
    """A run that is objects of an fsspec file system: no renaming, no appending, no locks."""

    held: Lease | None = None

    def __init__(
        self, place: str, local: Local = ANYWHERE, *, beat_s: float = BEAT_S, expiry_s: float = EXPIRY_S
    ) -> None:
        self.place, self.local, self.beat_s, self.expiry_s = place.rstrip("/"), local, beat_s, expiry_s
        try:
            self.filesystem, self.root = fsspec.core.url_to_fs(self.place)
        except (ImportError, ValueError) as error:
            kind = self.place.partition("://")[0]
            hint = f"pip install 'recapkit[{kind}]'" if kind == "s3" else "name a folder, or s3://BUCKET/PATH"
            raise InputError(f"{self.place} cannot be used: {error}", hint) from error
        self.root = self.root.rstrip("/")
        protocol = self.filesystem.protocol
        protocols = {protocol} if isinstance(protocol, str) else {*protocol}
        self._is_object_store = bool(protocols & OBJECTS)
        self._may_be_conditional = bool(protocols & (OBJECTS | FILES))
        self._is_plain = not set("*?[") & set(self.root)  # fsspec takes lists of paths for patterns

    def url(self, name: str) -> str:
        return f"{self.place}/{name}"

    def exists(self) -> bool:
        with self._telling():
            return bool(self.filesystem.exists(self.root))

    def read(self, name: str) -> bytes | None:
        with self._telling():
            try:
                data: bytes = self.filesystem.cat_file(f"{self.root}/{name}")
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                return None
        return data

    def read_all(self, names: Sequence[str]) -> Iterable[bytes | None]:
        for start in range(0, len(names), MANY):
            some, found = names[start : start + MANY], {}
            if self._is_plain:
                with self._telling():  # at the same time, where the file system can
                    found = self.filesystem.cat([f"{self.root}/{name}" for name in some], on_error="return")
            for name in some:
                data = found.get(f"{self.root}/{name}")
                yield data if isinstance(data, bytes) else self.read(name)  # or it is told

    def write(self, name: str, data: bytes) -> None:
        hold(self)
        with self._telling():
            self._make_folder(name)
            self.filesystem.pipe_file(f"{self.root}/{name}", data)

    def create(self, name: str, data: bytes) -> None:
        with self._telling():
            self._make_folder(name)
            try:
                if self._is_object_store or not self._may_be_conditional:
                    with _refusals():
                        self.filesystem.pipe_file(f"{self.root}/{name}", data, mode="create")
                else:  # of a file fsspec's `pipe_file` only looks whether it is there
                    with self.filesystem.open(f"{self.root}/{name}", "xb") as file:
                        file.write(data)
            except FileExistsError:
                if self.read(name) != data:  # or it was this one's, whose answer was lost
                    raise

    def fetch(self, name: str, scratch: Path) -> Path:
        path = scratch / "fetched" / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = part_of(path)
            with self._telling():
                self.filesystem.get_file(f"{self.root}/{name}", str(part))
            os.replace(part, path)
        return path

    def put(self, file: Path, name: str) -> None:
        hold(self)
        with self._telling():
            self._make_folder(name)
            if not self._is_object_store:
                self.filesystem.put_file(str(file), f"{self.root}/{name}")
            else:
                try:
                    with _refusals():
                        self.filesystem.put_file(str(file), f"{self.root}/{name}", mode="create")
                except FileExistsError:  # a crash left it, or another build has put it
                    confirm(self)
                    self.filesystem.put_file(str(file), f"{self.root}/{name}")
        file.unlink()

    def names(self, folder: str) -> list[str]:
        return sorted(self.sizes(folder))

    def sizes(self, folder: str) -> dict[str, int]:
        files = (item for item in self._list(folder) if item["type"] == "file")
        named = ((item["name"].rpartition("/")[2], item["size"]) for item in files)
        return {name: size for name, size in named if not name.startswith(".")}

    def folders(self, folder: str) -> list[str]:
        found = (item for item in self._list(folder) if item["type"] == "directory")
        names = (item["name"].rstrip("/").rpartition("/")[2] for item in found)
        return sorted(name for name in names if not name.startswith("."))

    def delete(self, name: str) -> None:
        hold(self)
        with self._telling():
            with suppress(FileNotFoundError, IsADirectoryError):
                self.filesystem.rm_file(f"{self.root}/{name}")
            for part in self.segments(name):
                self.filesystem.rm_file(f"{self.root}/{name}/{part}")

    def delete_all(self, names: Sequence[str]) -> None:
        hold(self)
        if not self._is_plain:
            for name in names:
                self.delete(name)
        elif names:
            with self._telling(), suppress(FileNotFoundError):
                self.filesystem.rm([f"{self.root}/{name}" for name in names])

    def journal(self, name: str) -> Journal:
        return _Segments(self, name)

    def journaled(self, name: str) -> list[str]:
        parts = (self.read(f"{name}/{part}") or b"" for part in self.segments(name))
        return [line for part in parts for line in _whole_lines(part)]

    def segments(self, name: str) -> list[str]:
        """Of a journal, where it is one. What is not there is not listed: s3fs would list all beside it."""
        if not name.endswith(".journal"):
            return []
        with self._telling():
            self.filesystem.invalidate_cache()
            is_one = self.filesystem.exists(f"{self.root}/{name}/{_segment(0)}")
        return self.names(name) if is_one else []

    def scratch(self) -> Path:
        return self._scratch.new()

    def has_room(self) -> bool:
        return self._scratch.has_room()

    @property
    def _scratch(self) -> Scratch:
        return Scratch(self._here() / "tasks", self.local.scratch_gib)

    def _here(self) -> Path:
        """A folder of this machine, of this run and this user: nothing in it is needed for long."""
        base = self.local.scratch or Path(tempfile.gettempdir(), f"recap-{os.getuid()}")
        return base / digest(self.place)

    @property
    def logs(self) -> Path:
        folder = self._here() / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextmanager
    def lease(self) -> Iterator[Lease]:
        if not self.local.single_driver:
            self._prove()
        with leased(self, beat_s=self.beat_s, expiry_s=self.expiry_s) as self.held:
            try:
                yield self.held
            finally:
                self.held = None

    def is_conditional(self) -> bool:
        return self._may_be_conditional and _refuses_a_second(self)

    def _prove(self) -> None:
        """Raises:
        InputError: the store cannot keep two builds apart.
        """
        if not self.is_conditional():
            reason = f"{self.place} has no conditional put: it cannot keep two builds apart"
            raise InputError(reason, "see that no other is at work, then say so: --single-driver")

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """What no other try would survive, in one line.

        Raises:
            InputError: credentials are missing, refused or expired.
        """
        try:
            yield
        except PermissionError as error:
            hint = "see that the credentials may read and write there, then type the same command again"
            if "skew" in f"{error} {error.__cause__}".lower():
                hint = "set this machine's clock, then type the same command again"
            raise InputError(f"{self.place} refuses: {_one_line(error)}", hint) from error
        except FileNotFoundError as error:
            if "bucket" not in str(error).lower():
                raise
            raise InputError(f"{self.place}: {_one_line(error)}", "create the bucket first") from error
        except Exception as error:
            if not is_amazons(error):
                raise
            if "Credentials" in type(error).__name__:
                hint = "set them, as AWS's tools want them: aws configure"
                raise InputError(f"{self.place} refuses: {_one_line(error)}", hint) from error
            raise OSError(_one_line(error)) from error  # no answer: another try may get one

    def _list(self, folder: str) -> list[dict[str, Any]]:  # of what fsspec tells
        path = f"{self.root}/{folder}".rstrip("/")
        with self._telling():
            self.filesystem.invalidate_cache()
            try:
                found: list[dict[str, Any]] = self.filesystem.ls(path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
        return [item for item in found if str(item["name"]).rstrip("/") != path]

    def _make_folder(self, name: str) -> None:
        """Where a file system has folders; an object store has none, and asked for one makes a bucket."""
        if not self._is_object_store:
            self.filesystem.makedirs(f"{self.root}/{name}".rpartition("/")[0], exist_ok=True)


def _refuses_a_second(store: Store) -> bool:
    name = f".lease/probe-{uuid.uuid4().hex}"
    try:
        store.create(name, b"first")
    except NotImplementedError:
        return False
    try:
        store.create(name, b"second")
    except FileExistsError:
        return True
    finally:
        store.delete(name)
    return False


@contextmanager
def _refusals() -> Iterator[None]:
    """Servers differ in how they say that a condition was not met.

    Raises:
        FileExistsError: it was not.
    """
    try:
        yield
    except OSError as error:
        code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
        if code in ("PreconditionFailed", "ConditionalRequestConflict"):
            raise FileExistsError(str(error)) from error
        raise


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _segment(number: int) -> str:
    return f"{number:06d}"


class _Segments:
    """A journal as numbered objects: nothing can be appended to one."""

    def __init__(self, store: Remote, name: str) -> None:
        self.store, self.name = store, name
        self.number = len(store.segments(name))
        self.lines, self.since = io.StringIO(), time.monotonic()

    def add(self, line: str) -> None:
        self.lines.write(line + "\n")
        if time.monotonic() - self.since > FLUSH_S:
            self._flush()

    def close(self) -> None:
        self._flush()

    def _flush(self) -> None:
        if text := self.lines.getvalue():
            self.store.write(f"{self.name}/{_segment(self.number)}", text.encode())
            self.number += 1
        self.lines, self.since = io.StringIO(), time.monotonic()
