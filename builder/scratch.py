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
        return Path(tempfile.mkdtemp(prefix=f"{digest(where())}-{os.getpid()}-", dir=self.root))

    def _clean(self) -> None:
        """Of other machines that share the folder what is a day old, of this one what no process has."""
        with suppress(FileNotFoundError), os.scandir(self.root) as entries:
            for entry in list(entries):
                machine, _, rest = entry.name.partition("-")
                pid = rest.partition("-")[0]
                if machine == digest(where()):
                    gone = pid.isdecimal() and not Path("/proc", pid).exists()
                else:
                    gone = time.time() - entry.stat(follow_symlinks=False).st_mtime > OLD_S
                if gone and pid.isdecimal():
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


def digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:8]
