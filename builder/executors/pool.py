"""Who does a task: workers on nodes, each with its cores, GPUs and memory.

A worker opens a stage once, with those that share what it loads, and then does their tasks. A loaded stage
makes room for another only when nothing more is to come for it in the blocks at work. A worker that died or
raised is replaced: it costs its own task an attempt, and nothing that it left behind reaches another shard.
What a worker is, and how one is started, the executors say.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice

from builder.core import Resources, Stage, Task
from builder.errors import InputError, UserError
from builder.machine import Machine
from builder.schedule import Outcome, Schedule

ATTEMPTS = 3
LOST = 0.25  # of an attempt that ended with its whole machine, which many shards survive
LOOK_S = 0.5  # between looks for idle workers of many nodes
LOOKED_AT = 64  # tasks among which a worker looks for one of a shard that it has at hand
log = logging.getLogger(__name__)


class Worker(ABC):
    """It opens stages, says so, and then does the tasks that it is given, in their order."""

    def __init__(self, stages: tuple[Stage, ...], gpus: tuple[str, ...]) -> None:
        self.stages, self.name, self.gpus = stages, stages[0].name, gpus
        self.tasks: list[Task] = []  # the one that it does, and those that it may begin ahead
        self.shards = deque[tuple[str, str]](maxlen=4)  # the last that were given to it
        self.idle_since = time.monotonic()
        self.node: Node | None = None
        self.is_open = False  # has it opened its stages, and loaded what they need?

    def give(self, task: Task) -> None:
        self.tasks.append(task)
        self._changed()
        if _shard(task) not in self.shards:
            self.shards.append(_shard(task))
        self.send(task)

    @abstractmethod
    def send(self, task: Task) -> None:
        """Nothing is waited for."""

    @abstractmethod
    def hear(self) -> Outcome | None:
        """What became of its first task, which is taken off; None where it says something else.

        Raises:
            UserError: the worker's, or that it died while it opened the stage or loaded.
        """

    def heard(self, what: Outcome | UserError | bool) -> Outcome | None:
        """As `hear`, of what it said; a bool is whether it is open."""
        if isinstance(what, UserError):
            raise what
        if isinstance(what, bool):
            self.is_open = what
            return None
        self.tasks.pop(0)
        self._changed()
        self.idle_since = time.monotonic()
        return what

    def _changed(self) -> None:
        if self.node:
            self.node.version += 1

    @abstractmethod
    def dismiss(self) -> None:
        """It is given nothing more, and may go when it has unloaded its model; nothing is waited for."""

    @abstractmethod
    def leave(self) -> None:
        """Wait until it has gone, and end it if it takes too long."""

    @abstractmethod
    def kill(self) -> None:
        """End it, and what it has started."""

    @abstractmethod
    def is_alive(self) -> bool:
        """Does it still hold what it was given of its node?"""


class Node:
    """A machine, and the workers on it. `needs` and `most`, of workers on it, are by stage."""

    def __init__(
        self,
        schedule: Schedule,
        machine: Machine,
        needs: Mapping[str, Resources],
        most: Mapping[str, int],
        start: Callable[[tuple[Stage, ...], tuple[str, ...]], Worker],
        name: str = "this machine",
    ) -> None:
        self.schedule, self.machine, self.needs, self.most = schedule, machine, needs, most
        self.start, self.name = start, name
        self.workers: list[Worker] = []
        self.leaving: list[Worker] = []
        self.wanted = 0.0  # cores for which the deepest stage waits that has tasks and workers
        # Of many nodes few change between two questions: what was found is kept until a node does.
        self.version = 0
        self._found: dict[tuple[str, float], tuple[int, Sequence[Worker | Node], float]] = {}
        self._ahead: dict[str, tuple[int, Sequence[Worker]]] = {}
        self._busy = (-1, 0.0)

    def now(self, stage: Stage) -> Sequence[Worker | Node]:
        """Who may do a task of this stage now: idle workers, or the node, which starts one."""
        version, found, wanted = self._found.get(which := (stage.name, self.wanted), (-1, (), 0.0))
        if version != self.version:
            found = self._now(stage)
            if not self.is_waiting_for_room:
                self._found[which] = self.version, found, self.wanted
            return found
        self.wanted = wanted
        return found

    def _now(self, stage: Stage) -> Sequence[Worker | Node]:
        self.is_waiting_for_room = False  # which depends on what is to come for its workers, too
        needs = self.needs[stage.name]
        mine = [worker for worker in self.workers if stage in worker.stages]
        idle = [worker for worker in mine if not worker.tasks]
        if idle or (len(mine) < self.most[stage.name] and self._has_room(needs)):
            if self._has_cores(needs.cpus):
                return idle or [self]
            self.wanted = self.wanted or needs.cpus
        return []

    def ahead(self, stage: Stage) -> Sequence[Worker]:
        """Who may begin a task of this stage before it has done another."""
        if not stage.ahead or self.wanted:
            return []
        version, found = self._ahead.get(stage.name, (-1, ()))
        if version == self.version:
            return found
        mine = [worker for worker in self.workers if stage in worker.stages]
        found = [worker for worker in mine if self._may_begin(worker, stage)]
        if all(len(worker.stages) == 1 for worker in mine):  # others may have more to do meanwhile
            self._ahead[stage.name] = self.version, found
        return found

    def _may_begin(self, worker: Worker, stage: Stage) -> bool:
        """Has it room for a task that it begins ahead? Stages that share a worker take turns, so that it has
        the same shard of all of them at hand.
        """
        if not 0 < len(worker.tasks) < 2 * len(worker.stages):
            return False
        begun = Counter(task.stage for task in worker.tasks)
        others = [other for other in worker.stages if other is stage or self.schedule.has_ready(other)]
        return min(begun[other.name] for other in others) == begun[stage.name]

    def busy(self) -> float:
        """The share of its cores that is at work."""
        if self._busy[0] != self.version:
            cpus = sum(self.needs[worker.name].cpus for worker in self.workers if worker.tasks)
            self._busy = self.version, cpus / self.machine.cpus
        return self._busy[1]

    def _has_room(self, needs: Resources) -> bool:
        """Is there memory, and a GPU, for one more worker, if others that can be spared make room for it?"""
        if self._fits(needs, self.workers):
            return True
        self.is_waiting_for_room = True
        return self._fits(needs, self._needed())

    def _has_cores(self, cpus: float) -> bool:
        """Are there cores for a task, so that a deeper one that waits has to wait no longer for it?

        Small tasks would else keep a large one from ever being begun: beside what it waits for, the largest
        that is at work, there has to be room for both.
        """
        busy = [self.needs[worker.name].cpus for worker in self.workers if worker.tasks]
        if not busy:
            return True
        if sum(busy) + cpus > self.machine.cpus:
            return False
        return not self.wanted or sum(busy) - max(busy) + self.wanted + cpus <= self.machine.cpus

    def _needed(self) -> list[Worker]:
        """Workers that cannot be spared: at work, or with more to come for them."""
        return [w for w in self.workers if w.tasks or any(map(self.schedule.waits, w.stages))]

    def _fits(self, needs: Resources, beside: list[Worker]) -> bool:
        memory = sum(self.needs[worker.name].memory_gib for worker in beside)
        if beside and memory + needs.memory_gib > self.machine.memory_gib:
            return False
        return not needs.gpus or self._gpus(needs, beside) is not None

    def _gpus(self, needs: Resources, beside: list[Worker]) -> tuple[str, ...] | None:
        """GPUs for a worker: whole ones, or one with so large a share left. Where the machine has none it
        goes without.
        """
        if not needs.gpus or not self.machine.gpus:
            return ()
        share = min(needs.gpus, 1.0)
        left = dict.fromkeys(self.machine.gpus, 1.0)
        for worker in beside:
            for gpu in worker.gpus:
                left[gpu] -= min(self.needs[worker.name].gpus, 1.0)
        free = [gpu for gpu, rest in left.items() if rest + 1e-9 >= share]
        number = max(1, round(needs.gpus))
        return tuple(free[:number]) if len(free) >= number else None

    def worker_for(self, stage: Stage) -> Worker:
        """A new one."""
        needs = self.needs[stage.name]
        self.leaving = [worker for worker in self.leaving if worker.is_alive()]
        if not self._fits(needs, [*self.workers, *self.leaving]):
            for worker in self.leaving:
                worker.leave()
            self.leaving.clear()
        if not self._fits(needs, self.workers):
            needed = self._needed()
            for worker in [worker for worker in self.workers if worker not in needed]:
                self.end(worker, gently=True)
        gpus = self._gpus(needs, [*self.workers, *self.leaving])
        assert gpus is not None, f"{self.name} has no GPU free for stage {stage.name}"
        worker = self.start(self.schedule.sharing(stage), gpus)
        self.workers.append(worker)
        worker.node, self.version = self, self.version + 1
        return worker

    def end(self, worker: Worker, *, gently: bool = False, is_gone: bool = False) -> None:
        """`is_gone`: the machine is, and gets nothing more to do."""
        self.workers.remove(worker)
        self.version += 1
        if is_gone:
            self.close()
        for task in worker.tasks:  # what it had not begun is nobody's fault
            self.schedule.give_back(task)
        if gently:
            worker.dismiss()
            worker.leave()
        worker.kill()

    def close(self) -> None:
        """The machine is gone: nobody is started on it, and who has nothing to do there is forgotten."""
        self.most = dict.fromkeys(self.most, 0)
        self.version += 1
        for worker in [worker for worker in self.workers if not worker.tasks]:
            self.workers.remove(worker)
            worker.kill()

    def dismiss_idle(self, may_go: Callable[[Worker], bool]) -> None:
        """Those for which nothing more comes, or not for long, unload their models while the others go on."""
        for worker in [worker for worker in self.workers if not worker.tasks]:
            if not all(map(self.schedule.is_over, worker.stages)) and not may_go(worker):
                continue
            self.workers.remove(worker)
            self.version += 1
            self.leaving.append(worker)
            worker.dismiss()
        for worker in self.leaving:
            if not worker.is_alive():  # what it held is free for others, and so is its machine
                worker.kill()
        self.leaving = [worker for worker in self.leaving if worker.is_alive()]


class Pool:
    """The nodes. `wait` waits until at least one of the workers given has something to say, or died; a worker
    that has had nothing to do for `idle_s` goes, but for the least that its stage is to have. Where no node
    can do a stage, `look_for_more` may wait for one that can.
    """

    def __init__(
        self,
        schedule: Schedule,
        nodes: list[Node],
        wait: Callable[[list[Worker]], list[Worker]],
        idle_s: float = math.inf,
        look_for_more: Callable[[Stage], bool] = lambda _: False,
    ) -> None:
        self.schedule, self.nodes, self.wait, self.idle_s = schedule, nodes, wait, idle_s
        self.look_for_more = look_for_more
        self._chosen: Worker | Node | None = None  # for the task that is taken next
        self._looked = 0.0

    def carry_out(self) -> Iterator[Outcome]:
        """Do what is to do.

        Raises:
            UserError: from a worker, for what no other shard could survive either: a model that cannot be
            loaded, a full disk.
        """
        tries: dict[tuple[str, str, str], float] = defaultdict(float)
        try:
            while self._give_work():
                for worker in self.wait([w for w in self.workers() if w.tasks]):
                    outcome = worker.hear()
                    if outcome is None:
                        continue
                    task = outcome.task
                    which = (task.stage, task.block, task.name)
                    tries[which] += LOST if outcome.lost else 1
                    if outcome.error:
                        self._node_of(worker).end(worker, is_gone=outcome.lost)
                    if (
                        outcome.error
                        and not outcome.damaged
                        and not outcome.final
                        and tries[which] < ATTEMPTS
                    ):
                        number = int(tries[which]) + 1
                        log.info("%s; attempt %d of %d follows", _said(outcome), number, ATTEMPTS)
                        self.schedule.give_back(task)
                    else:
                        del tries[which]
                        self.schedule.done(outcome)
                        yield outcome
            for worker in self.workers():
                worker.dismiss()  # all of them at once
            for worker in self._all():
                worker.leave()
        finally:
            for worker in self._all():
                worker.kill()

    def workers(self) -> list[Worker]:
        return [worker for node in self.nodes for worker in node.workers]

    def _all(self) -> list[Worker]:
        return [worker for node in self.nodes for worker in (*node.workers, *node.leaving)]

    def _may_start(self, stage: Stage) -> bool:
        """May there be one more worker of this stage? A user may have said how many, on all machines."""
        most = stage.bounds()[1]
        return math.isinf(most) or sum(stage in worker.stages for worker in self.workers()) < most

    def _may_go(self, worker: Worker) -> bool:
        """It has had nothing to do for so long that its GPU is better off with others."""
        if time.monotonic() - worker.idle_since < self.idle_s:
            return False
        return sum(other.name == worker.name for other in self.workers()) > worker.stages[0].bounds()[0]

    def _tell(self) -> None:
        """Whoever looks at the run from elsewhere how many are at work."""
        if held := self.schedule.store.held:
            held.workers = dict(Counter(stage.name for worker in self.workers() for stage in worker.stages))

    def _node_of(self, worker: Worker) -> Node:
        return next(node for node in self.nodes if worker in node.workers)

    def _give_work(self) -> bool:
        """Give tasks to workers as long as the nodes have room for them; False where nobody has anything to
        do.
        """
        while True:
            self._give_what_can_be()
            if any(worker.tasks for worker in self.workers()):
                return True
            stage = next(iter(self.schedule.is_ready()), None)
            if stage is None:
                return False
            for node in self.nodes:  # all that is loaded is in the way of it
                for worker in list(node.workers):
                    node.end(worker, gently=True)
            if not can_be_done(self.nodes, stage) and not self.look_for_more(stage):
                raise self._has_no_room(stage)

    def _give_what_can_be(self) -> None:
        self._forget_wanted()
        while task := self.schedule.take(self._choose):
            chosen = self._chosen
            assert chosen is not None
            worker = (
                chosen.worker_for(self.schedule.stages[task.stage]) if isinstance(chosen, Node) else chosen
            )
            worker.give(task)
            self._forget_wanted()
        if len(self.nodes) == 1 or time.monotonic() - self._looked > LOOK_S:  # it takes its time for many
            self._looked = time.monotonic()
            self._tell()
            for node in self.nodes:
                node.dismiss_idle(self._may_go)

    def _has_no_room(self, stage: Stage) -> InputError:
        if not any(node.most[stage.name] for node in self.nodes):
            reason = f"stage {stage.name} can be done on no machine that is there: it needs a GPU"
            return InputError(reason, "add one; or install recapkit[cpu], whose vLLM needs none")
        largest = max(self.nodes, key=lambda node: (len(node.machine.gpus), node.machine.cpus))
        needs, there = largest.needs[stage.name], largest.machine
        wanted = f"{needs.cpus:g} cores, {needs.gpus:g} GPUs and {needs.memory_gib:g} GiB"
        has = f"{there.cpus:g}, {len(there.gpus)} and {there.memory_gib:.0f}"
        reason = f"stage {stage.name} needs {wanted} at once; {largest.name} has {has}"
        return InputError(reason, "build on another machine, or change the stage's settings")

    def _forget_wanted(self) -> None:
        for node in self.nodes:
            node.wanted = 0.0

    def _choose(self, stage: Stage, tasks: Iterable[Task]) -> Task | None:
        """A task of this stage that somebody does now, who is noted. Asked of the deepest stages first.

        Stages that share a worker make of a shard what others of them have decoded and computed already, so
        each worker keeps to shards of its own; but none is idle for that.
        """
        nodes = self.nodes if len(self.nodes) == 1 else sorted(self.nodes, key=Node.busy)
        found = [one for node in nodes if (there := node.now(stage)) for one in there]
        now: list[Worker | Node] = [one for one in found if isinstance(one, Worker)]
        if not now and self._may_start(stage):
            now = found
        may: Sequence[Worker | Node] = now or [
            one for node in nodes if (there := node.ahead(stage)) for one in there
        ]
        if not may:
            return None
        tasks = list(islice(tasks, LOOKED_AT))
        if len(self.schedule.sharing(stage)) == 1:
            self._chosen = may[0]
            return tasks[0]
        sharing = (w for w in self.workers() if len(w.stages) > 1 and stage in w.stages)
        whose = {shard: worker for worker in sharing for shard in worker.shards}
        for task in tasks:
            if (owner := whose.get(_shard(task))) and owner in may:
                self._chosen = owner
                return task
        self._chosen = may[0]
        of_nobody = (task for task in tasks if _shard(task) not in whose)
        return next(of_nobody, tasks[0] if now else None)


def can_be_done(nodes: Iterable[Node], stage: Stage) -> bool:
    """Is there a node that could do a task of it now?"""
    return any(node.now(stage) for node in nodes)


def _said(outcome: Outcome) -> str:
    return f"{outcome.task.stage} {outcome.task.name}: {outcome.error}"


def _shard(task: Task) -> tuple[str, str]:
    return task.block, task.name
