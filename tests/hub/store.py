"""What the stand-in for the Hub remembers: repositories as commits and refs, contents by hash, Xet stores.

    DIR/users.json                      token -> name
    DIR/repos/datasets/me/demo/         repo.json (refs, discussions), commits/OID.json
    DIR/content/ab/abcd...              one content; by sha256, a regular file by its git blob id
    DIR/incoming/                       uploads that are not complete
    DIR/wrong.json                      announced sha256 -> the sha256 that is stored (fault "wrong_bytes")
    DIR/cas, DIR/cas-1, ...             Xet stores; one process at a time can open one, a second gets another
    DIR/views/N                         a store as a read token found it: files linked, the database copied

Every change is written before it is answered for, so a server that is killed goes on where it stood.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

_DOWNLOAD = """
import hf_xet, json, sys
endpoint, wanted = sys.argv[1], json.load(sys.stdin)
with hf_xet.XetSession().new_file_download_group(
    endpoint=endpoint, token="-", token_expiry_unix_secs=9999999999
) as group:
    for hash, size, path in wanted:
        group.start_download_file(hf_xet.XetFileInfo(hash, size), path)
"""


class Refused(Exception):
    """An answer that says no; `code` is the Hub's X-Error-Code."""

    def __init__(
        self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


@dataclass(frozen=True)
class File:
    """`sha256` is that of the stored content; None for a regular file, one that is not in LFS."""

    size: int
    sha256: str | None
    oid: str  # git blob id: of the content, for LFS of the pointer
    xet: str | None = None  # Xet hash, where it was stored that way

    @property
    def key(self) -> str:
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    parents: tuple[str, ...]
    title: str
    message: str
    author: str
    date: str
    files: dict[str, File]


@dataclass
class Discussion:
    num: int
    title: str
    author: str
    status: str  # draft, open, closed, merged
    is_pull_request: bool
    date: str
    base: str  # the commit of main that a pull request was opened on
    events: list[dict[str, Any]] = field(default_factory=list)
    merge_commit: str | None = None


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + f".{time.time_ns() // 1_000_000 % 1000:03d}Z"


def blob_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def lfs_file(sha256: str, size: int, xet: str | None = None) -> File:
    return File(size, sha256, blob_oid(pointer(sha256, size)), xet)


def flip(path: Path) -> None:
    """One byte in the middle of a file becomes another."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, data: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    part.write_text(json.dumps(data))
    part.replace(path)


def read_json(path: Path, default: Any) -> Any:
    return json.loads(path.read_text()) if path.exists() else default


class Repo:
    """One repository; `kind` is "datasets" or "models"."""

    def __init__(self, store: Store, kind: str, id: str) -> None:
        self.store, self.kind, self.id = store, kind, id
        self.folder = store.folder / "repos" / kind / id
        saved = read_json(self.folder / "repo.json", {"refs": {}, "discussions": []})
        self.refs: dict[str, str] = saved["refs"]
        self.discussions: dict[int, Discussion] = {d["num"]: Discussion(**d) for d in saved["discussions"]}
        self.commits: dict[str, Commit] = {}
        for path in (self.folder / "commits").glob("*.json"):
            data = json.loads(path.read_text())
            files = {name: File(*file) for name, file in data.pop("files").items()}
            self.commits[path.stem] = Commit(**data | {"parents": tuple(data["parents"]), "files": files})

    def save(self) -> None:
        write_json(
            self.folder / "repo.json",
            {"refs": self.refs, "discussions": [asdict(d) for d in self.discussions.values()]},
        )

    def ref(self, revision: str) -> str:
        """The full name of a ref that `revision` means, existing or not."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), names[1])

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag, refs/... or the (start of the) id of a commit names."""
        oid = self.refs.get(self.ref(revision)) or next(
            (oid for oid in self.commits if len(revision) >= 7 and oid.startswith(revision)), None
        )
        if oid is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def log(self, revision: str) -> list[Commit]:
        """From the head to the root, along first parents."""
        commits = [self.at(revision)]
        while commits[-1].parents:
            commits.append(self.commits[commits[-1].parents[0]])
        return commits

    def read(self, path: str, revision: str) -> bytes:
        return self.store.path(self.at(revision).files[path]).read_bytes()

    def commit(
        self,
        ref: str,
        files: dict[str, File],
        title: str,
        message: str,
        author: str,
        parents: tuple[str, ...] | None = None,
    ) -> Commit:
        """Move `ref` to a new commit that holds `files`; the caller saves the repository."""
        if parents is None:
            parents = (self.refs[ref],) if ref in self.refs else ()
        data = {"parents": parents, "title": title, "message": message, "author": author, "date": now()}
        rows = {name: list(asdict(files[name]).values()) for name in sorted(files)}
        oid = hashlib.sha1(json.dumps([data, rows, time.time_ns()]).encode()).hexdigest()
        write_json(self.folder / "commits" / f"{oid}.json", data | {"oid": oid, "files": rows})
        self.commits[oid] = Commit(oid, parents, title, message, author, data["date"], files)  # type: ignore[arg-type]
        self.refs[ref] = oid
        for discussion in self.discussions.values():
            if ref == f"refs/pr/{discussion.num}":
                self.event(discussion, "commit", author, {"subject": title, "oid": oid})
        return self.commits[oid]

    def event(self, discussion: Discussion, kind: str, author: str, data: dict[str, Any]) -> dict[str, Any]:
        event = {
            "id": uuid.uuid4().hex[:24],
            "type": kind,
            "createdAt": now(),
            "author": {"name": author},
            "data": data,
        }
        discussion.events.append(event)
        return event

    def three_way(self, discussion: Discussion) -> tuple[dict[str, File], list[str]]:
        """main with a pull request's changes, and the paths that both changed to different contents."""
        main, theirs = self.log("main"), self.log(f"refs/pr/{discussion.num}")
        ids = {commit.oid for commit in main}
        base = next((commit for commit in theirs if commit.oid in ids), self.commits[discussion.base]).files
        ours, wanted = main[0].files, theirs[0].files
        changed = {path for path in {*base, *wanted} if base.get(path) != wanted.get(path)}
        conflicts = [
            path for path in sorted(changed) if ours.get(path) not in (base.get(path), wanted.get(path))
        ]
        kept = {path: file for path, file in ours.items() if path not in changed}
        return kept | {path: wanted[path] for path in changed if path in wanted}, conflicts

    def last_change(self, path: str, revision: str) -> Commit:
        """The commit that gave a file or a folder the content it has."""

        def below(commit: Commit) -> dict[str, File]:
            return {
                name: file
                for name, file in commit.files.items()
                if name == path or name.startswith(f"{path}/")
            }

        log = self.log(revision)
        return next(
            new
            for new, old in zip(log, [*log[1:], None], strict=True)
            if old is None or below(new) != below(old)
        )


class Store:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.users: dict[str, str] = read_json(folder / "users.json", {})
        self.wrong: dict[str, str] = read_json(folder / "wrong.json", {})
        self.repos = {
            (path.parts[-4], f"{path.parts[-3]}/{path.parts[-2]}"): Repo(
                self, path.parts[-4], f"{path.parts[-3]}/{path.parts[-2]}"
            )
            for path in sorted((folder / "repos").glob("*/*/*/repo.json"))
        }
        self.xet: dict[str, tuple[str, int, Path]] = {}  # sha256 -> Xet hash, size, store
        self.shards: set[Path] = set()  # those that were read
        self.owners: dict[Path, int | None] = {}  # the process that a store was given to
        (folder / "incoming").mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "views", ignore_errors=True)

    def add(self, path: Path, key: str) -> None:
        """Take a file into the content store."""
        place = self._place(key)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)

    def add_lfs(self, path: Path, announced: str, real: str) -> None:
        """Take an uploaded file whose sha256 is `real`, whatever was announced."""
        if real == announced:
            self.wrong.pop(announced, None)
        else:
            self.wrong[announced] = real
        write_json(self.folder / "wrong.json", self.wrong)
        self.add(path, real)

    def add_regular(self, data: bytes) -> File:
        part = self.incoming()
        part.write_bytes(data)
        self.add(part, blob_oid(data))
        return File(len(data), None, blob_oid(data))

    def incoming(self) -> Path:
        return self.folder / "incoming" / uuid.uuid4().hex

    def has(self, sha256: str) -> bool:
        """Whether an upload of this content is not needed."""
        return sha256 not in self.wrong and self.find(sha256) is not None

    def find(self, announced: str) -> File | None:
        """The file that was uploaded under a sha256, if any."""
        sha256 = self.wrong.get(announced, announced)
        if sha256 not in self.xet and not self._place(sha256).exists():
            self._read_shards()
        if sha256 in self.xet:
            xet, size, cas = self.xet[sha256]
            return lfs_file(sha256, size, xet if cas.name == "cas" else None)
        return lfs_file(sha256, self._place(sha256).stat().st_size) if self._place(sha256).exists() else None

    def path(self, file: File) -> Path:
        """Where a file's content lies.

        What only the Xet store holds is taken out of it, with all else that is there.
        """
        place = self._place(file.key)
        if not place.exists():
            cas = self.xet[file.key][2]
            missing = {sha256: (xet, size, self.incoming()) for sha256, (xet, size, at) in self.xet.items()
                       if at == cas and not self._place(sha256).exists()}  # fmt: skip
            self._download(cas, [(xet, size, str(part)) for xet, size, part in missing.values()])
            for sha256, (_, _, part) in missing.items():
                assert sha256_of(part) == sha256, f"the Xet store holds other bytes than {sha256}"
                self.add(part, sha256)
        return place

    def view(self, cas: Path) -> Path:
        """A copy of a Xet store that can be opened while a client has the store open."""
        view = self.folder / "views" / uuid.uuid4().hex[:8]
        if (cas / "xet/xorbs").exists():
            for name in ("xorbs", "shards"):
                shutil.copytree(cas / "xet/xorbs" / name, view / "xet/xorbs" / name, copy_function=os.link)
            for path in (cas / "xet/xorbs").glob("*.redb"):
                shutil.copy(path, view / "xet/xorbs")
        view.mkdir(parents=True, exist_ok=True)
        return view

    def writable(self, port: int) -> Path:
        """A Xet store for the process at the other end of a connection.

        It is the one that it got before, or one that no other has open.
        """
        pid = next(
            (
                c.pid
                for c in psutil.net_connections("tcp4")
                if c.laddr and c.laddr.port == port and c.status == "ESTABLISHED"
            ),
            None,
        )
        for cas in [self.folder / "cas", *(self.folder / f"cas-{n}" for n in range(1, 1000))]:
            if self.owners.get(cas) == pid or (
                not _runs(self.owners[cas]) if cas in self.owners else not _is_open(cas)
            ):
                self.owners[cas] = pid
                cas.mkdir(exist_ok=True)
                return cas
        raise AssertionError("a thousand clients at once")

    def _place(self, key: str) -> Path:
        return self.folder / "content" / key[:2] / key

    def _download(self, cas: Path, wanted: list[tuple[str, int, str]]) -> None:
        env = os.environ | {"HF_HOME": str(self.folder / "hf-server")}
        for attempt in range(10):  # the database is copied while its owner may be writing it
            view = self.view(cas)
            command = [sys.executable, "-c", _DOWNLOAD, f"local://{view.absolute()}"]
            done = subprocess.run(
                command, env=env, input=json.dumps(wanted), text=True, capture_output=True, check=False
            )
            shutil.rmtree(view, ignore_errors=True)
            if done.returncode == 0:
                return
            time.sleep(0.1 * (attempt + 1))
        raise AssertionError(f"the Xet store cannot be read: {done.stderr}")

    def _read_shards(self) -> None:
        for shard in self.folder.glob("cas*/xet/xorbs/shards/*.mdb"):
            if shard not in self.shards:
                for sha256, xet, size in _files_of(shard.read_bytes()):
                    self.xet.setdefault(sha256, (xet, size, shard.parents[3]))
                self.shards.add(shard)


def _files_of(shard: bytes) -> Iterator[tuple[str, str, int]]:
    """(sha256, Xet hash, size) of the files that a Xet shard describes."""
    at = 48  # after the header
    while at < len(shard) and shard[at : at + 32] != b"\xff" * 32:
        file, flags, count = (
            shard[at : at + 32],
            *(int.from_bytes(shard[i : i + 4], "little") for i in (at + 32, at + 36)),
        )
        at += 48
        size = sum(int.from_bytes(shard[i + 36 : i + 40], "little") for i in range(at, at + 48 * count, 48))
        at += 48 * count * (2 if flags >> 31 else 1)  # the segments, and as many verification entries
        if flags >> 30 & 1:
            yield _hex(shard[at : at + 32]), _hex(file), size
            at += 48


def _hex(hash: bytes) -> str:
    return "".join(hash[i : i + 8][::-1].hex() for i in range(0, 32, 8))


def _runs(pid: int | None) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_open(cas: Path) -> bool:
    database = next((cas / "xet/xorbs").glob("*.redb"), None)
    if database is None:
        return False
    with database.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
