"""Workers on the nodes of a Ray cluster. The only file that imports Ray, which is an extra: `recapkit[ray]`.

The nodes say themselves what machines they are and what stages need there. A worker is an actor that is bound
to its node. Ray places, starts and loses actors; who does what is decided here, as on one machine, and what
is done the run's own records say.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.util.metrics import Counter
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import builder
from builder.core import Resources, Stage, Task
from builder.errors import InputError, UserError
from builder.executors.pool import Node, Pool, Worker, can_be_done
from builder.executors.work import Serving
from builder.machine import Machine, differences, software
from builder.schedule import Outcome, Schedule
from builder.store import Folder, Store

# Told not to report, Ray reports that: so it does that to nobody.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/"}
# With this file in its HOME a Ray does not ask the clouds' metadata services which one it runs in.
NO_CLOUD = ("ray_bootstrap_config.yaml", "provider: {type: local}\n")
LOCAL = "ray"  # `--on ray`: one that is started here, and ends with the build
LOOK_S = 15.0  # for nodes that came or went
CONNECT_S = 10.0
ALONE_S = 3.0  # that a node may take to go after its workers
GONE_S = 15.0  # that a cluster may take to see that a node is gone of which nobody answers
IDLE_S = 300.0  # without anything to do, after which a worker makes room
COMES_S = 5.0  # that a look waits for the answers of nodes that are new
MORE_S = 600.0  # that a build waits for a node where the last that it needs has gone
LEAVE_S = 60.0  # for a worker to unload its model
OBJECTS_BYTES = 100 << 20  # of Ray's store, through which nothing but tasks and outcomes passes
BROKEN = (ray.exceptions.RayTaskError, ray.exceptions.RuntimeEnvSetupError)  # not the node: what is on it
log = logging.getLogger(__name__)


def on_ray(address: str) -> Callable[[Schedule], Iterator[Outcome]]:
    """An executor on the cluster at an address: `ray` starts one here, `auto` finds one, else HOST:PORT, or
    ray://HOST:PORT from a machine outside.
    """
    return partial(_carry_out, address)


def _carry_out(address: str, schedule: Schedule) -> Iterator[Outcome]:
    with connected(address):
        cluster, counters = _Cluster(schedule), _Counters()
        pool = Pool(schedule, cluster.nodes, cluster.speaking, IDLE_S, cluster.look_for_more)
        cluster.look(at_first=True)
        try:
            for outcome in pool.carry_out():
                counters.add(outcome)
                yield outcome
        finally:
            cluster.ask_for_nothing()


def on_every_node(address: str, function: Callable[..., Any], *arguments: Any) -> Iterator[tuple[str, Any]]:
    """(node's address, what the function gives there, or the error)."""
    with connected(address):
        there = ray.remote(num_cpus=0, max_retries=0)(lambda: function(*arguments))
        asked = []
        for node in ray.nodes():
            if node["Alive"]:
                where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                asked.append((node["NodeManagerAddress"], there.options(scheduling_strategy=where).remote()))
        for name, answer in asked:
            try:
                yield name, ray.get(answer)
            except ray.exceptions.RayError as error:
                yield name, RuntimeError(_last(error))


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Whoever builds from Python may have connected before: then that is used.

    Raises:
        InputError: no Ray is there.
    """
    if ray.is_initialized():
        yield
        return
    given: dict[str, Any] = {"namespace": "recapkit", "log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        given |= {"address": "local"}  # also where a Ray is up already
        given |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        given |= {"num_gpus": len(Machine.here().gpus), "object_store_memory": OBJECTS_BYTES}
        given |= {"runtime_env": {"env_vars": {"HOME": os.environ.get("HOME", "/")}}}  # the workers' is ours
    else:
        given |= {"address": address, "runtime_env": _environment()}
    try:
        if address not in (LOCAL, "auto"):  # Ray itself takes minutes to say that nobody is there
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), CONNECT_S).close()
        ray._private.worker.print_to_stdstream = _say  # stdout is for data
        with _quiet(starts=address == LOCAL):
            ray.init(**given)
    except (OSError, RuntimeError, ValueError) as error:
        hint = "see that it is up: ray status; or have one started here: --on ray"
        raise InputError(f"there is no Ray at {address}: {_last(error)}", hint) from error
    try:
        yield
    finally:
        ray.shutdown()


def _say(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    """What Ray has to tell, of nodes that went above all: its first line."""
    log.info("Ray: %s", next(iter("".join(data["lines"]).splitlines()), ""))


@contextmanager
def _quiet(*, starts: bool) -> Iterator[None]:
    """What Ray asks and tells by itself it asks and tells as whoever runs it has set; unset, nothing."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not starts:
        yield
        return
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # its processes have it from here
    before = os.environ.get("HOME")
    with tempfile.TemporaryDirectory(prefix="recap-ray-") as home:
        name, text = NO_CLOUD
        Path(home, name).write_text(text)
        os.environ["HOME"] = home
        try:
            yield
        finally:
            if before is None:
                del os.environ["HOME"]
            else:
                os.environ["HOME"] = before


def _environment() -> dict[str, Any]:
    """The driver's code, where it is a checkout and not an installed package."""
    root = Path(builder.__file__).resolve().parents[1]
    variables = QUIET
    if not (root / "pyproject.toml").exists():
        return {"env_vars": variables}
    away = [".venv", ".uv", ".git", "runs", "tests", "benchmarks/results", "**/__pycache__"]
    return {"env_vars": variables, "working_dir": str(root), "excludes": away}


def _about(stages: list[Stage]) -> tuple[Machine, dict[str, Any], dict[str, int], dict[str, str]]:
    """Run on a node: what it is, what stages need on it and how many workers they may have, and versions."""
    needs = {stage.name: stage.resources() for stage in stages}
    return Machine.here(), needs, {stage.name: stage.num_workers() for stage in stages}, software()


class _Counters:
    """For Prometheus, beside Ray's own: every node of Ray exports what it has."""

    def __init__(self) -> None:
        self.rows = Counter("recap_rows_total", "Rows of finished shards", ("stage", "status"))
        self.counts = Counter("recap_counts_total", "What stages count besides rows", ("stage", "what"))
        self.failures = Counter("recap_failed_shards_total", "Shards given up", ("stage",))

    def add(self, outcome: Outcome) -> None:
        stage = outcome.task.stage
        if outcome.record is None:
            self.failures.inc(tags={"stage": stage})
            return
        for status, number in outcome.record.rows.items():
            if number:
                self.rows.inc(number, tags={"stage": stage, "status": status})
        for what, number in outcome.record.counts.items():
            if number:
                self.counts.inc(number, tags={"stage": stage, "what": what})


class _Cluster:
    """The nodes that are there now."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.nodes: list[Node] = []
        self.looked_at = 0.0
        self.asked_for = 0
        self.has_lost = False  # a node
        self.refused: set[str] = set()  # nodes that were looked at and are not used
        self.needs: dict[str, float] = {}  # GPUs of a worker by stage, on any node that was there
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
            known[name].close()
            if not known[name].workers:
                self.nodes.remove(known[name])
            self.has_lost = True
        about = ray.remote(num_cpus=0, max_retries=0)(_about)
        stages = list(self.schedule.stages.values())
        asked = {
            name: about.options(scheduling_strategy=NodeAffinitySchedulingStrategy(name, soft=False)).remote(
                stages
            )
            for name in alive.keys() - known.keys() - self.refused
        }
        # One that comes later is asked again at the next look, until it has set itself up.
        ready, _ = ray.wait(
            list(asked.values()), num_returns=len(asked), timeout=None if at_first else COMES_S
        )
        for name, answer in ((name, answer) for name, answer in asked.items() if answer in ready):
            try:
                machine, needs, most, versions = ray.get(answer)
            except ray.exceptions.RayError as error:
                if at_first and isinstance(error, BROKEN):
                    reason = f"node {alive[name]['NodeManagerAddress']} cannot be used: {_last(error)}"
                    raise InputError(reason, "see that recapkit is installed there as it is here") from error
                log.warning("node %s is not used: %s", alive[name]["NodeManagerAddress"], _last(error))
                self.refused.add(name)
                continue
            if differ := differences(versions):
                told = f"node {alive[name]['NodeManagerAddress']} has {differ[0]}"
                if at_first:
                    raise InputError(told, "install the same versions on all nodes")
                log.warning("%s: it is not used", told)
                self.refused.add(name)
                continue
            there = alive[name]["Resources"]
            machine = Machine(
                there.get("CPU", 0.0),
                machine.gpus[: int(there.get("GPU", 0))] or tuple(map(str, range(int(there.get("GPU", 0))))),
                there.get("memory", machine.memory_gib * 2**30) / 2**30,
            )
            start = partial(_Actor, self.schedule.store, name, needs)
            if machine.cpus:
                self.nodes.append(Node(self.schedule, machine, needs, most, start, name))
            else:  # a head may be told to do no work
                self.refused.add(name)
        if at_first and not self.nodes:
            raise InputError("the cluster has no nodes", "see: ray status")
        self._gpus_first()
        self._ask_for_more()

    def look_for_more(self, stage: Stage) -> bool:
        """Wait a while for a node that can do a stage, where there was one, or the cluster is to grow."""
        self.look()
        if not self.has_lost and math.isinf(stage.bounds()[1]):
            return can_be_done(self.nodes, stage)
        log.warning(
            "no node is there that can do stage %s; waiting %g minutes for one", stage.name, MORE_S / 60
        )
        end = time.monotonic() + MORE_S
        while time.monotonic() < end:
            if can_be_done(self.nodes, stage):
                return True
            time.sleep(1)
            self.look()
        return False

    def _ask_for_more(self) -> None:
        """GPUs of a cluster that grows by itself, where the user has set a number of workers to grow to."""
        wanted = 0
        for sharing in {self.schedule.sharing(stage) for stage in self.schedule.stages.values()}:
            first = sharing[0]
            here = max((node.needs[first.name].gpus for node in self.nodes), default=0.0)
            needs = self.needs[first.name] = max(here, self.needs.get(first.name, 0.0))
            most = min(stage.bounds()[1] for stage in sharing)
            if needs and math.isfinite(most):
                there = sum(first in worker.stages for node in self.nodes for worker in node.workers)
                workers = min(int(most), there + sum(map(self.schedule.num_ready, sharing)))
                wanted += workers * round(needs) if needs >= 1 else -(-workers // int(1 / needs + 1e-9))
        if wanted != self.asked_for:
            self.asked_for = wanted
            request_resources(bundles=[{"GPU": 1}] * wanted)

    def ask_for_nothing(self) -> None:
        """A cluster keeps what it was asked for until it is asked for something else."""
        if self.asked_for:
            request_resources(bundles=[])

    def _gpus_first(self) -> None:
        """What wants a GPU on some node is not done without one on another."""
        for name in self.schedule.stages:
            wanted = [node.needs[name].gpus > 0 and bool(node.machine.gpus) for node in self.nodes]
            for node, wants in zip(self.nodes, wanted, strict=True):
                if any(wanted) and not wants:
                    node.most = {**node.most, name: 0}
                    node.version += 1

    def speaking(self, busy: list[Worker]) -> list[Worker]:
        actors: dict[Any, _Actor] = {}
        for worker in (worker for worker in busy if isinstance(worker, _Actor)):
            actors[worker.said[0]] = worker
            if worker.loading is not None:
                actors[worker.loading] = worker
        ready, _ = ray.wait(list(actors), num_returns=1, timeout=LOOK_S, fetch_local=False)
        if ready:  # and whoever else has
            ready, _ = ray.wait(list(actors), num_returns=len(actors), timeout=0, fetch_local=False)
        if time.monotonic() - self.looked_at > LOOK_S:
            self.look()
        return list({id(worker): worker for worker in map(actors.__getitem__, ready)}.values())


def _is_gone(node: str, is_silent: bool) -> bool:
    """Is a node no more? Where nobody answers there the cluster may not have seen it yet."""
    end = time.monotonic() + (GONE_S if is_silent else ALONE_S)
    while any(one["NodeID"] == node and one["Alive"] for one in ray.nodes()):
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True


def _last(error: BaseException) -> str:
    if isinstance(cause := getattr(error, "cause", None), UserError):  # of a task's error
        return cause.message
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:200]


class _Actor(Worker):
    """An actor on a node."""

    def __init__(
        self,
        store: Store,
        node: str,
        needs: Mapping[str, Resources],
        stages: tuple[Stage, ...],
        gpus: tuple[str, ...],
    ) -> None:
        super().__init__(stages, gpus)
        made = ray.remote(
            num_cpus=0,
            num_gpus=min(needs[self.name].gpus, 1.0) if len(gpus) == 1 else len(gpus),
            max_restarts=0,
            concurrency_groups={"inbox": 1, "loading": 1},
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )(_Serving)
        self.node_id, self.actor = node, made.remote(stages, store)
        self.dead = False
        self.said: deque[Any] = deque([self.actor.open.remote()])  # what it will say, in this order
        self.looks_ahead = any(stage.ahead for stage in stages)
        self.loading: Any = self.actor.loading.remote() if self.looks_ahead else None
        self.leaves: Any = None

    def send(self, task: Task) -> None:
        if self.looks_ahead:
            self.actor.take.remote(task)
            self.said.append(self.actor.do.remote())
        else:
            self.said.append(self.actor.do.remote(task))

    def hear(self) -> Outcome | None:
        self._hear_of_loading()
        if self.looks_ahead and not ray.wait([self.said[0]], timeout=0)[0]:
            return None  # it spoke of what it loads
        try:
            heard = ray.get(self.said.popleft())
        except ray.exceptions.RayError as error:
            self.dead = True
            self._hear_of_loading()
            if "owner has died" in str(error):
                reason = "the node that this command is connected to has left the cluster"
                raise InputError(reason, "type the same command again") from None
            lost = _is_gone(self.node_id, isinstance(error, ray.exceptions.ActorUnavailableError))
            if not self.is_open and not lost:
                reason = f"stage {self.name} cannot start: its worker process died: {_last(error)}"
                raise InputError(reason, "it may have run out of memory; see Ray's logs") from None
            heard = Outcome(self.tasks[0], error=f"a worker process died: {_last(error)}", lost=lost)
        return self.heard(heard)

    def _hear_of_loading(self) -> None:
        """Whether it is about to load what may be too large for it, or has."""
        while self.loading is not None and ray.wait([self.loading], timeout=0)[0]:
            try:
                self.is_open = ray.get(self.loading)
            except ray.exceptions.RayError:
                self.loading = None  # it has died, which is told by what it was doing
            else:
                self.loading = self.actor.loading.remote()

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
        with suppress(ray.exceptions.RayError):  # it may have gone with its node
            ray.kill(self.actor)
        self.dead = True


# --- in the worker ------------------------------------------------------------------------------------------


class _Serving:
    """An actor: tasks come into its inbox while it does one."""

    def __init__(self, stages: tuple[Stage, ...], store: Store) -> None:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        self.inbox = SimpleQueue[Task]()
        self.loads = SimpleQueue[bool]()
        self.serving = Serving(store, stages, self._poll, self.inbox.get, self.loads.put)
        self.is_over = False

    def _poll(self) -> Task | None:
        with suppress(Empty):
            return self.inbox.get_nowait()
        return None

    def open(self) -> UserError | bool:
        return self.serving.open(f"more of it is in Ray's logs on {socket.gethostname()}") or True

    @ray.method(concurrency_group="inbox")  # type: ignore[untyped-decorator]
    def take(self, task: Task) -> None:
        self.inbox.put(task)

    @ray.method(concurrency_group="loading")  # type: ignore[untyped-decorator]
    def loading(self) -> bool:
        return self.loads.get()

    def do(self, task: Task | None = None) -> Outcome | UserError | None:
        """The task given, or the next that was taken."""
        if self.is_over:
            return None  # to nobody: whoever heard the error before has ended it
        if task:
            self.inbox.put(task)
        outcome = self.serving.do()
        self.is_over = not isinstance(outcome, Outcome) or bool(outcome.error)
        return outcome

    def leave(self) -> None:
        self.serving.close()
