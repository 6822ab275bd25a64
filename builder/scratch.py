"""Folders of a machine's own disk, where tasks have their files while they are at work."""

from __future__ import annotations

import os
import shutil
import tempfile
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


class Scratch:
    """Folders of tasks, below one folder. Those of processes that have ended are nobody's."""

    def __init__(self, root: Path, gib: float | None) -> None:
        self.root, self.gib = root, gib

    def new(self) -> Path:
        if not self.root.exists():
            self.root.mkdir(parents=True)
        self._clean()
        return Path(tempfile.mkdtemp(prefix=f"{digest(where())}-{os.getpid()}-", dir=self.root))

    def _clean(self) -> None:
        """What is of other machines is left alone."""
        with os.scandir(self.root) as entries:
            parts = [(entry.path, *entry.name.split("-")) for entry in entries]
        for path, machine, *rest in parts:
            if machine == digest(where()) and not Path("/proc", rest[0]).exists():
                shutil.rmtree(path, ignore_errors=True)

    def has_room(self) -> bool:
        return self.gib is None or self.bytes() < self.gib * 2**30

    def bytes(self) -> int:
        total = 0
        for folder, _, names in os.walk(self.root):
            for name in names:
                with suppress(OSError):  # it went meanwhile
                    total += os.lstat(os.path.join(folder, name)).st_size
        return total


def digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:8]
