"""Requests made ready for vLLM in processes of their own: images decoded and resized ahead of the engine, in
whose process only `add_request` is left to do.

One process imports vLLM and makes the renderer of the engine's own configuration; the feeders are its forks,
so that one that dies is replaced at once and the memory of all but the first is their working set. An image
comes and an `EngineInput` goes in a memory file without a name, mapped where it is read: nothing is copied in
the engine's process, and whoever is killed leaves nothing behind. A feeder ends when its socket does.
"""

from __future__ import annotations

import gc
import io
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import traceback
import zlib
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from PIL import Image

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

AT_A_TIME = 8  # requests that are submitted together, at most: each feeder has room for them
AHEAD = 48  # requests in the hands of a feeder; a socket has room for more messages than that, 70
DEATHS = 2  # of feeders, by one image, until it is given up
MOST_DEATHS = 16  # of feeders in a row, none of which answered
_HEADER = struct.Struct("<QQ")  # bytes of all, and where the pickle begins
_ALIGNED = 64


NO_PICTURE = (OSError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Failure:
    """Why there is no request: of this image, not of the feeders."""

    reason: str


@dataclass(frozen=True)
class _Fault:
    """What a feeder did not expect."""

    traceback: str


@dataclass(eq=False)
class Pending:
    """A request that is being made ready."""

    name: str
    image: bytes
    ids: list[int]
    deaths: int = 0
    value: Any = None  # EngineInput, Failure or _Fault


@dataclass(eq=False)
class _Worker:
    socket: socket.socket
    asked: deque[Pending] = field(default_factory=deque)  # it answers in this order


class Feeder:
    """Made after the engine, so that no process of the engine's holds its sockets open.

    Args:
        config: the engine's, `llm.llm_engine.vllm_config`.
        processes: how many feeders there are to be.
        again: will the same pictures be asked for again soon?
    """

    def __init__(self, config: VllmConfig, processes: int, *, again: bool = False) -> None:
        self.again = again
        self.control, theirs = _pair()
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": "",  # vLLM finds its platform by NVML; no context can be made here
            "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }  # fmt: skip
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; import {__name__} as f; f._template({theirs.fileno()})"
        )
        with theirs:
            self.template = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=environment,
            )
        _send(self.control, config)
        self.deaths = 0  # of feeders since one answered
        self.workers = [self._worker() for _ in range(processes)]

    def has_room(self, number: int = 1) -> bool:
        """Can so many more be submitted? With more a feeder and this process may wait for each other."""
        return sum(len(worker.asked) for worker in self.workers) + number <= self.room()

    def room(self) -> int:
        """Requests that can be in their hands."""
        return AHEAD * len(self.workers)

    def submit(self, name: str, image: bytes, ids: list[int]) -> Pending:
        """Ask for a request. What has the same `name` is taken for the same picture."""
        pending = Pending(name, image, ids)
        self._ask(pending)
        return pending

    def is_ready(self, pending: Pending) -> bool:
        if pending.value is None:
            self._receive(wait=False)
        return pending.value is not None

    def result(self, pending: Pending) -> Any:
        """An EngineInput, or a Failure."""
        while pending.value is None:
            self._receive(wait=True)
        if isinstance(pending.value, _Fault):
            raise RuntimeError(f"in a feeder of the engine:\n{pending.value.traceback}")
        return pending.value

    def close(self) -> None:
        for worker in self.workers:
            worker.socket.close()
        self.control.close()
        self.template.wait()

    def _worker(self) -> _Worker:
        ours, theirs = _pair()
        with theirs:
            try:
                socket.send_fds(self.control, [b"f"], [theirs.fileno()])
            except OSError:
                self._fail()
        return _Worker(ours)

    def _ask(self, pending: Pending) -> None:
        # Of one that several columns are made of it was asked before: who decoded it then has it still.
        worker = self.workers[zlib.crc32(pending.name.encode()) % len(self.workers)]
        if len(worker.asked) >= AHEAD or not self.again:
            worker = min(self.workers, key=lambda one: len(one.asked))
        worker.asked.append(pending)
        # Its end is seen when it is read, and all that it was asked is asked of another.
        with suppress(BrokenPipeError, ConnectionResetError):
            _send(worker.socket, (pending.name, pending.image, pending.ids))

    def _receive(self, *, wait: bool) -> None:
        """Take what has come; with `wait` something has."""
        poll = select.poll()
        by_number = {worker.socket.fileno(): worker for worker in self.workers}
        for number in by_number:
            poll.register(number, select.POLLIN)
        for number, _ in poll.poll(None if wait else 0):
            worker = by_number[number]
            try:
                value = _received(worker.socket)
            except (EOFError, ConnectionResetError):
                self._replace(worker)
            else:
                worker.asked.popleft().value = value
                self.deaths = 0

    def _replace(self, worker: _Worker) -> None:
        worker.socket.close()
        self.deaths += 1
        if self.deaths > MOST_DEATHS or self.template.poll() is not None:
            self._fail()
        self.workers[self.workers.index(worker)] = self._worker()
        for number, pending in enumerate(worker.asked):
            pending.deaths += number == 0  # the one that it was at
            if pending.deaths < DEATHS:
                self._ask(pending)
            else:
                pending.value = Failure("the process that decoded the image died of it")

    def _fail(self) -> NoReturn:
        status = self.template.poll()
        what = (
            "they die before they answer" if status is None else f"their template ended, exit status {status}"
        )
        raise RuntimeError(f"the feeders of the engine are gone: {what}")


def _template(number: int) -> None:
    """The process that the feeders are forks of."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C the engine's process learns
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    control = socket.socket(fileno=number)
    import torch
    from vllm.renderers import renderer_from_config

    torch.set_num_threads(1)
    renderer = renderer_from_config(_received(control))
    renderer.warmup_mm()  # imports what only an image needs
    Image.init()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise RuntimeError("CUDA was initialized where requests are made ready")
    gc.collect()
    gc.freeze()
    while True:
        data, numbers, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            return
        if os.fork() == 0:
            control.close()
            _work(socket.socket(fileno=numbers[0]), renderer)
            os._exit(0)
        os.close(numbers[0])


def _work(own: socket.socket, renderer: Any) -> None:
    try:
        while True:
            asked = _received(own)
            try:
                answer = _made_ready(renderer, *asked)
            except Exception:  # noqa: BLE001 - it is raised where the engine is
                answer = _Fault(traceback.format_exc())
            _send(own, answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass


def decoded(_: str, image: bytes) -> Image.Image:
    """The picture of that name.

    Raises:
        NO_PICTURE: it is none.
    """
    return Image.open(io.BytesIO(image)).convert("RGB")


def not_decoded(error: Exception) -> str:
    """Without the address of an object, or the same rows would not be the same bytes."""
    return f"the image cannot be decoded: {str(error).partition(' <_io.')[0]}"


_decoded = lru_cache(maxsize=AHEAD)(decoded)


def _made_ready(renderer: Any, name: str, image: bytes, ids: list[int]) -> Any:
    from vllm.exceptions import VLLMClientError

    try:
        picture = _decoded(name, image)
    except NO_PICTURE as error:
        return Failure(not_decoded(error))
    # Without a name of ours it is numbered, in each process from 1: another's picture would be shown.
    prompt = {
        "prompt_token_ids": ids,
        "multi_modal_data": {"image": picture},
        "multi_modal_uuids": {"image": [name]},
    }
    try:
        (found,) = renderer.render_cmpl([prompt])
    except (ValueError, VLLMClientError) as error:  # it would take more tokens than the model has
        return Failure(f"the model does not take it: {str(error).splitlines()[0][:200]}")
    return found


class _Pickler(pickle.Pickler):
    """Tensors stand beside the pickle, each at a multiple of 64 bytes."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, 5)
        self.parts: list[Any] = []
        self.length = 0

    def persistent_id(self, obj: Any) -> Any:
        if type(obj).__name__ != "Tensor":
            return None
        flat, start = obj.contiguous().reshape(-1), self.length
        padding = _ALIGNED - flat.nbytes % _ALIGNED
        self.parts += [memoryview(flat.view(_torch().uint8).numpy()), bytes(padding)]
        self.length += flat.nbytes + padding
        return start, flat.nbytes, str(obj.dtype).removeprefix("torch."), tuple(obj.shape)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, mapped: torch.Tensor) -> None:
        super().__init__(file)
        self.mapped = mapped

    def persistent_load(self, pid: Any) -> torch.Tensor:
        start, length, dtype, shape = pid
        return self.mapped[start : start + length].view(getattr(_torch(), dtype)).view(shape)


def _torch() -> Any:
    import torch

    return torch


def _pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _send(to: socket.socket, message: Any) -> None:
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(message)
    parts = [part for part in [*pickler.parts, file.getbuffer()] if len(part)]
    number = os.memfd_create("recapkit")
    try:
        length = sum(map(len, parts))
        if os.writev(number, parts) != length:
            raise OSError(f"of {length} bytes not all could be written to memory")
        socket.send_fds(to, [_HEADER.pack(length, pickler.length)], [number])
    finally:
        os.close(number)


def _received(own: socket.socket) -> Any:
    header, numbers, _, _ = socket.recv_fds(own, _HEADER.size, 1)
    if not header:
        raise EOFError
    length, start = _HEADER.unpack(header)
    try:
        if not start:  # no tensors in it
            return pickle.loads(os.pread(numbers[0], length, 0))
        torch = _torch()  # it closes the file that it has mapped, which `mmap` does not
        mapped = torch.from_file(f"/proc/self/fd/{numbers[0]}", shared=True, size=length, dtype=torch.uint8)
        return _Unpickler(io.BytesIO(mapped[start:].numpy()), mapped).load()
    finally:
        os.close(numbers[0])
