"""A Ray cluster of several nodes on this machine, whose nodes and workers are killed, and a build on it."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from conftest import ROOT, fill
from s3 import environment

FAULTS = ("node", "worker", "driver", "disk")


class Nodes:
    """One node with the cluster's own processes, which stays, and others that come and go."""

    def __init__(self, number: int, cpus: int, home: str) -> None:
        from ray.cluster_utils import Cluster

        self.cpus, self.home, self.number = cpus, home, 10
        head = {"num_cpus": 1, "include_dashboard": False, "temp_dir": tempfile.mkdtemp(dir=home)}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.others = [self.add() for _ in range(number - 1)]

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self) -> object:
        """With an address and a folder of its own, as machines have: the driver is at the first node, and one
        that goes takes the code that it was sent along.
        """
        self.number += 1
        folder, address = tempfile.mkdtemp(dir=self.home), f"127.0.0.{self.number}"
        return self.cluster.add_node(num_cpus=self.cpus, temp_dir=folder, node_ip_address=address)

    def remove(self, chance: random.Random) -> None:
        """Kill a node, as a spot machine is, and give the cluster another one."""
        gone = self.others.pop(chance.randrange(len(self.others)))
        self.cluster.remove_node(gone, allow_graceful=False)
        self.others.append(self.add())

    def workers(self) -> list[psutil.Process]:
        """Those that are at work on shards, whatever node they are on."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            with suppress(psutil.Error):
                if "ray::_Serving" in " ".join(process.info["cmdline"] or ()):
                    found.append(process)
        return found

    def close(self) -> None:
        self.cluster.shutdown()


@contextmanager
def nodes(number: int, cpus: int = 1) -> Iterator[Nodes]:
    """With a HOME and a temporary folder of its own, and no look-up of clouds."""
    from builder.executors.ray import NO_CLOUD, QUIET

    with tempfile.TemporaryDirectory(prefix="rc-") as home:
        Path(home, NO_CLOUD[0]).write_text(NO_CLOUD[1])
        Path(home, "ray").mkdir()  # where Ray notes the cluster's address
        os.environ.setdefault(
            "RAY_AUTH_TOKEN", secrets.token_hex(32)
        )  # a process of Ray's keeps its first one
        with environment(QUIET | {"HOME": home, "RAY_TMPDIR": home}):
            found = Nodes(number, cpus, home)
            try:
                yield found
            finally:
                found.close()


class Driver:
    """A build as a user types it, killed and typed again."""

    def __init__(self, *arguments: object, log: Path) -> None:
        self.command = [sys.executable, "-m", "builder.cli", *map(str, arguments), "--json"]
        self.log = log
        self.start()

    def start(self) -> None:
        with open(self.log, "ab") as err:
            self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=err, cwd=ROOT)

    def end(self, timeout_s: float) -> dict[str, object]:
        """What it says at its end. Ray has been seen to end a driver that was begun right after one that was
        killed, with status 0 and without a word (perhaps what was meant for the other): then the same is
        typed again.
        """
        out, _ = self.process.communicate(timeout=timeout_s)
        if self.process.returncode == 0 and not out:
            self.start()
            out, _ = self.process.communicate(timeout=timeout_s)
        assert self.process.returncode == 0, self.log.read_text()[-3000:]
        found: dict[str, object] = json.loads(out)
        return found

    def meets_a_full_disk(self, disk: Path) -> bool:
        """Until it says so; then room is made, and the same typed again. False where it ends without."""
        ballast = fill(disk, kib_left=0)
        self.process.communicate(timeout=300)
        ballast.unlink()
        if self.process.returncode == 0:
            self.start()  # its answer has been read
            return False
        said = self.log.read_text()
        assert self.process.returncode == 2, said[-3000:]
        assert f"the disk of {disk}" in said, said[-3000:]
        self.start()
        return True

    def kill(self) -> None:
        """And type the same again."""
        self.process.kill()
        self.process.communicate()
        self.start()


def harm(kind: str, cluster: Nodes, driver: Driver, chance: random.Random, disk: Path | None = None) -> bool:
    """One fault; False where there was nothing to harm. `disk` is a small one, for scratch."""
    if driver.process.poll() is not None:
        return False
    if kind == "disk":
        assert disk is not None
        return driver.meets_a_full_disk(disk)
    if kind == "node":
        cluster.remove(chance)
    elif kind == "driver":
        driver.kill()
    else:
        there = cluster.workers()
        if not there:
            return False
        with suppress(psutil.Error):
            os.kill(chance.choice(there).pid, signal.SIGKILL)
    return True


def wait_for_records(run: Path, number: int, driver: Driver, timeout_s: float = 200) -> None:
    """Until so many shards more are done, or the build has ended."""
    end, there = time.monotonic() + timeout_s, len(list(run.glob("*/*/*.json")))
    while driver.process.poll() is None and time.monotonic() < end:
        if len(list(run.glob("*/*/*.json"))) >= there + number:
            return
        time.sleep(0.1)
