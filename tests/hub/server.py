"""A stand-in for the Hub on this machine, for the real `huggingface_hub`, `hf_xet` and `datasets`.

Set HF_ENDPOINT and go.

    python tests/hub/server.py DIR [--port N]     to try things out; state stays in DIR
    with Hub(folder) as hub: ...                  in tests; `hub.faults` makes calls go wrong,
                                                  `hub.repo("me/demo")` shows the state

There is (names as in `Call.route` and `Fault.route`; data sets and models):

    whoami, create_repo, delete_repo, info, validate_yaml        lists of repositories, settings, likes,
                                                                 private repositories: 501
    preupload, lfs_batch, lfs_put, lfs_part, lfs_complete,       any token may write anywhere; LFS content is
    lfs_verify, lfs_duplicate, xet_token, commit                 shared by all repositories; .gitignore is not
                                                                 looked at
    branch, delete_branch, tag, delete_tag, refs, super_squash   converts: none
    commits, tree, paths_info, resolve                           security scans, folder sizes, 302 to a CDN:
                                                                 no
    create_discussion, discussions, discussion, comment,         editing and hiding of comments, diffs: no
    status_change, title_change, merge
    dataset_viewer                                               always 404: `datasets` asks it for loads of
                                                                 main (see Hub.env)
    unknown                                                      anything else: 501

Xet: a client gets a `local://` store of hf_xet, so contents do not pass through this server and are in no
byte count. hf_xet lets one process at a time open a store and keeps it open to its end: a second process that
uploads meanwhile gets a store of its own, whose files are served over plain HTTP only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote

import uvicorn
from starlette.requests import ClientDisconnect, Request

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
from hub.api import Api
from hub.store import Refused, write_json
from hub.wire import NO_TOKEN, ROUTES, Answer, Ask, answer, refusal


@dataclass
class Call:
    method: str
    route: str
    path: str  # as it was asked for, with the query
    status: int = 0  # 0 until there is an answer, and for good where the connection was closed without one


@dataclass(frozen=True)
class Fault:
    """What goes wrong at the `call`-th call of a route since the fault was appended, or at every one (0).

    Route "*" is any. The actions:

    status               answer `status`, `headers` and `message`, without applying the call
    applied_then_status  apply the call, then answer `status` (504)
    drop, drop_after     close the connection without an answer, before or after applying
    truncate             the right Content-Length and half of the body
    slow                 wait `wait_s`, then go on
    expired              401 as for a token that has expired
    rate_limit           429 that asks to wait `wait_s`
    second_writer        somebody else changes `path` ("other.txt") on main before the call is handled
    wrong_bytes          one byte of what is uploaded is stored flipped; in a commit that of `path`, or of its
                         first file
    call, call_after     `function()` in a thread, before or after handling. A call whose client dies
                         meanwhile is applied all the same, but for an upload, whose body is read after
                         `call`; with a "drop" at the same call it is not

    Several may meet at one call. A HEAD of a file counts as a call of "resolve".
    """

    route: str
    call: int
    action: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "a fault that a test asked for"
    wait_s: float = 0
    path: str = ""
    function: Callable[[], object] = lambda: None


class Hub(Api):
    """The server; state lies in `folder`."""

    def __init__(self, folder: Path | str, port: int = 0) -> None:
        super().__init__(Path(folder).absolute())
        self.lock = threading.RLock()
        self.calls: list[Call] = []
        self.faults: list[Fault] = []
        self.socket = socket.create_server(("127.0.0.1", port), backlog=128)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else every answer takes 40 ms
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.token = self.user("me")
        self._seen: dict[int, tuple[Fault, int]] = {}
        config = uvicorn.Config(
            self,
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            timeout_graceful_shutdown=2,
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), name="hub")

    def __enter__(self) -> Hub:
        self.thread.start()
        while self.thread.is_alive() and not self.server.started:
            time.sleep(0.005)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.should_exit = True
        self.thread.join()

    # --- for tests ------------------------------------------------------------------------------------------

    def user(self, name: str) -> str:
        """The token of a user, who is there from then on."""
        token = f"hf_{hashlib.sha256(name.encode()).hexdigest()[:34]}"
        self.store.users[token] = name
        write_json(self.folder / "users.json", self.store.users)
        return token

    def env(self) -> dict[str, str]:
        """What to add to the environment of a client."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(self.folder / "client"),
            "HF_DATASETS_CACHE": str(self.folder / "client" / "datasets"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            # `datasets` counts loads by a request to a bucket of Amazon's unless it is told not to.
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            # For a load of main it asks http://datasets-server.127.0.0.1:PORT, and nothing turns that off
            # (datasets.config.USE_PARQUET_EXPORT is no variable). As the proxy for all names but its own this
            # server answers that itself, and nobody looks the name up.
            "http_proxy": self.url,
            "no_proxy": "127.0.0.1,localhost",
        }

    # --- HTTP -----------------------------------------------------------------------------------------------

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        raw_path, raw_query = scope["raw_path"].decode(), scope["query_string"].decode()
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        found = (
            (name, match)
            for name, verb, pattern in ROUTES
            if verb == method and (match := pattern.fullmatch(raw_path))
        )
        route, match = next(found, ("unknown", None))
        fields = (
            {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
            if match
            else {}
        )
        query = {key: values[-1] for key, values in parse_qs(raw_query, keep_blank_values=True).items()}
        ask = Ask(scope["method"], raw_path, fields, query, request.headers, scope["client"][1])
        call = Call(scope["method"], route, f"{raw_path}?{raw_query}" if raw_query else raw_path)
        with self.lock:
            self.calls.append(call)
            faults = {fault.action: fault for fault in self._due(route)}
        transport = (
            send.__self__.transport
        )  # uvicorn's own: closing a connection without an answer is not in ASGI
        try:
            if method != "PUT":
                ask.body = await request.body()
            if "call" in faults:
                await asyncio.to_thread(faults["call"].function)
            if "drop" in faults:
                transport.abort()
                return
            if method == "PUT":
                await self._receive(request, ask)
            if "slow" in faults:
                end = time.monotonic() + faults["slow"].wait_s
                while time.monotonic() < end and not self.server.should_exit:
                    await asyncio.sleep(0.02)
            done = await asyncio.to_thread(self._handle, route, ask, faults)
            self.bytes_in += ask.regular_bytes  # byte counts change in this thread only
            if "call_after" in faults:
                await asyncio.to_thread(faults["call_after"].function)
            if "drop_after" in faults:
                transport.abort()
                return
            call.status = done.status
            await self._send(send, done, scope["method"] == "HEAD", "truncate" in faults)
        except ClientDisconnect:
            pass
        finally:
            if ask.upload:
                ask.upload.unlink(missing_ok=True)

    async def _receive(self, request: Request, ask: Ask) -> None:
        ask.upload, digest = self.store.incoming(), hashlib.sha256()
        with ask.upload.open("wb") as file:
            async for chunk in request.stream():
                file.write(chunk)
                digest.update(chunk)
                self.bytes_in += len(chunk)
        ask.sha256 = digest.hexdigest()

    async def _send(self, send: Any, done: Answer, head: bool, truncate: bool) -> None:
        length = len(done.body) if isinstance(done.body, bytes) else done.stop - done.start
        headers = done.headers | {"content-length": str(length)}
        await send(
            {
                "type": "http.response.start",
                "status": done.status,
                "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
            }
        )
        left = length // 2 if truncate else length
        if isinstance(done.body, bytes):
            await send(
                {"type": "http.response.body", "body": done.body[:left], "more_body": truncate and not head}
            )
            return
        if not head:
            with done.body.open("rb") as file:
                file.seek(done.start)
                while left and (chunk := file.read(min(left, 2**18))):
                    left -= len(chunk)
                    self.bytes_out += len(chunk)
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        if head or not truncate:  # uvicorn closes the connection of an answer that is not complete
            await send({"type": "http.response.body", "body": b""})

    def _due(self, route: str) -> list[Fault]:
        """The faults that this call meets."""
        here = {id(fault) for fault in self.faults}
        self._seen = {key: seen for key, seen in self._seen.items() if key in here}
        due = []
        for fault in self.faults:
            if fault.route in (route, "*"):
                number = self._seen.get(id(fault), (fault, 0))[1] + 1
                self._seen[id(fault)] = (fault, number)
                if fault.call in (0, number):
                    due.append(fault)
        return due

    def _handle(self, route: str, ask: Ask, faults: dict[str, Fault]) -> Answer:
        """Apply a call, wholly or not at all, and say so."""
        if route == "unknown":
            return answer({"error": f"not in this stand-in for the Hub: {ask.raw_path}"}, 501)
        with self.lock:
            if fault := faults.get("second_writer"):
                self._second_writer(ask, fault)
            if fault := faults.get("status"):
                return answer({"error": fault.message}, fault.status or 500, fault.headers)
            if "expired" in faults:
                return refusal(Refused(401, 'User Access Token "test" is expired'))
            if fault := faults.get("rate_limit"):
                wait = str(round(fault.wait_s))
                limits = {
                    "ratelimit": f'"api";r=0;t={wait}',
                    "ratelimit-policy": '"fixed window";"api";q=500;w=300',
                    "retry-after": wait,
                }
                return refusal(Refused(429, "We had to rate limit you", headers=limits))
            ask.wrong = faults["wrong_bytes"].path if "wrong_bytes" in faults else None
            try:
                self._authorize(route, ask)
                done: Answer = getattr(self, f"_{route}")(ask)
            except Refused as refused:
                done = refusal(refused)
            if (fault := faults.get("applied_then_status")) and done.status < 400:
                return answer({"error": fault.message}, fault.status or 504, fault.headers)
            return done

    def _authorize(self, route: str, ask: Ask) -> None:
        scheme, _, token = ask.headers.get("authorization", "").partition(" ")
        ask.user = self.store.users.get(token, "")
        if scheme and not ask.user:
            raise Refused(401, "Invalid credentials in Authorization header")
        reads = (
            next(verb for name, verb, _ in ROUTES if name == route) == "GET"
            and route != "whoami"
            and ask.fields.get("what") != "write"
        )
        if not ask.user and not reads and route not in NO_TOKEN:
            raise Refused(401, "Invalid username or password.")

    def _second_writer(self, ask: Ask, fault: Fault) -> None:
        repos = (
            [self.store.repos.get((ask.fields.get("kind", "models"), ask.fields["repo"]))]
            if "repo" in ask.fields
            else self.store.repos.values()
        )
        path = fault.path or "other.txt"
        for repo in filter(None, repos):
            file = self.store.add_regular(f"written by somebody else at {time.time_ns()}\n".encode())
            repo.commit(
                "refs/heads/main", repo.at("main").files | {path: file}, f"Upload {path}", "", "somebody-else"
            )
            repo.save()


def main() -> None:
    parser = argparse.ArgumentParser(description="A stand-in for the Hub on this machine.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    with Hub(arguments.folder, arguments.port) as hub:
        print(f"{hub.url}\nexport HF_ENDPOINT={hub.url} HF_TOKEN={hub.token}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
