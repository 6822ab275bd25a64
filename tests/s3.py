"""S3 on loopback: moto's server in a process of its own, and before it a proxy, faulty as a test wants."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_MAX_ATTEMPTS": "3",
}
SERVER = (
    "import sys; from moto.server import ThreadedMotoServer as S; s = S('127.0.0.1', 0, verbose=False); "
    "s.start(); print(s.get_host_and_port()[1], flush=True); sys.stdin.read()"
)


class S3:
    """`fault` sees each request, (method, path, headers), and says what becomes of it: None, an XML error as
    (status, code), or "cut": the connection ends in the middle of what is sent.
    """

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        self.backend = int(self.process.stdout.readline())
        self.fault: Callable[[str, str, object], tuple[int, str] | str | None] = lambda *_: None
        self.requests: list[str] = []
        self.drops: tuple[str, ...] = ()  # headers that the server is not told of
        self.lock = threading.Lock()
        self.proxy = _Proxy(("127.0.0.1", 0), _Handler)
        self.proxy.s3 = self
        threading.Thread(target=self.proxy.serve_forever, args=(0.05,), daemon=True).start()
        self.environment = KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxy.server_address[1]}"}

    def bucket(self) -> str:
        """The URL of a new one."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        connection = http.client.HTTPConnection("127.0.0.1", self.backend)
        connection.request("PUT", f"/{name}", headers={"Host": "s3.amazonaws.com"})
        assert connection.getresponse().status == 200
        return f"s3://{name}"

    def close(self) -> None:
        self.proxy.shutdown()
        self.proxy.server_close()
        self.process.communicate("")


class _Proxy(ThreadingHTTPServer):
    s3: S3
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes: the second would wait 40 ms
    server: _Proxy

    def forward(self) -> None:
        s3 = self.server.s3
        with s3.lock:
            s3.requests.append(f"{self.command} {self.path}")
            fault = s3.fault(self.command, self.path, self.headers)
        if self.headers.get("Expect") == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "cut" and self.command == "PUT":
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        body = (
            self._chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        )
        if isinstance(fault, tuple):
            status, code = fault
            text = f"<Error><Code>{code}</Code><Message>{code} on purpose</Message></Error>".encode()
            self._answer(status, {"Content-Type": "application/xml"}, text)
            return
        connection = http.client.HTTPConnection("127.0.0.1", s3.backend, timeout=60)
        hop = ("connection", "transfer-encoding", "expect", "content-length", *map(str.lower, s3.drops))
        headers = {name: value for name, value in self.headers.items() if name.lower() not in hop}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        found = answer.read()
        kept = {
            name: value for name, value in answer.getheaders() if name.lower() not in (*hop, "server", "date")
        }
        if self.command == "HEAD":
            kept["Content-Length"] = answer.getheader("Content-Length") or "0"
        if fault == "cut":
            self._answer(answer.status, kept, found[: len(found) // 2], length=len(found))
            self.close_connection = True
            return
        self._answer(answer.status, kept, found)

    def _chunked(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            continue
        return b"".join(parts)

    def _answer(self, status: int, headers: dict[str, str], body: bytes, length: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.command != "HEAD" and status != 204:
            self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def s3() -> Iterator[S3]:
    import fsspec

    server = S3()
    try:
        with environment(server.environment):
            yield server
    finally:
        with suppress(Exception):
            fsspec.get_filesystem_class("s3").clear_instance_cache()
        server.close()


if __name__ == "__main__":  # to try by hand: eval "$(python tests/s3.py)"
    server = S3()
    for name, value in server.environment.items():
        print(f"export {name}={value}")
    print(f"export BUCKET={server.bucket()}", flush=True)
    while True:
        time.sleep(3600)
