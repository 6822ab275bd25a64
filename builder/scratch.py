"""Folders of a machine's own disk, where tasks have their files while they are at work."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from builder.lease import where


@dataclass(frozen=True)
class Local:
    """What a run may use of a machine's disk, where it is not the folder itself.

    `scratch` is a folder on each machine; while `scratch_gib` GiB or more lie there no task is begun.
    `single_driver` says that whoever builds sees to it himself that nobody else does.
    """

    scratch: Path | None = None
    scratch_gib: float | None = None
    single_driver: bool = False


ANYWHERE = Local()
OLD_S = 86400.0


class Scratch:
    """Folders of tasks, below one folder. Those of processes that have ended are nobody's."""

    def __init__(self, root: Path, gib: float | None) -> None:
        self.root, self.gib = root, gib

    def new(self) -> Path:
        self.root.mkdir(parents=True, exist_ok=True)
        self._clean()
        return Path(tempfile.mkdtemp(prefix="-".join((*_here(), str(os.getpid()), "")), dir=self.root))

    def _clean(self) -> None:
        """Of this machine what no process has, or was there before it was started; of others that share the
        folder, and other containers, what is a day old.
        """
        our_host, our_boot, ours = _here()
        with suppress(FileNotFoundError), os.scandir(self.root) as entries:
            for entry in list(entries):
                host, boot, container, pid, *_ = (*entry.name.split("-"), "", "", "", "")
                if not pid.isdecimal():
                    continue
                if container == ours:
                    gone = not Path("/proc", pid).exists()
                elif host == our_host and boot != our_boot:
                    gone = True
                else:
                    gone = time.time() - entry.stat(follow_symlinks=False).st_mtime > OLD_S
                if gone:
                    shutil.rmtree(entry.path, ignore_errors=True)

    def has_room(self) -> bool:
        if self.gib is None or self.bytes() < self.gib * 2**30:
            return True
        self._clean()
        return self.bytes() < self.gib * 2**30

    def bytes(self) -> int:
        total = 0
        for folder, _, names in os.walk(self.root):
            for name in names:
                with suppress(OSError):  # it went meanwhile
                    total += os.lstat(os.path.join(folder, name)).st_size
        return total


def _here() -> tuple[str, str, str]:
    """Names this machine, since when it is on, and this container of it."""
    host, _, rest = where().partition(" ")
    return digest(host), digest(rest.partition(" ")[0]), digest(where())


def digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:8]
