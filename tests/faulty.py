"""A web server on loopback: it answers byte for byte what a test wants, however wrong, and notes who came."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType


@dataclass
class Visit:
    """One request for one path."""

    number: int  # how often the path has been asked for, this time included
    send: Callable[[bytes], object]  # raises OSError once the client has hung up
    sleep: Callable[[float], bool]  # true when the server is being shut down

    def drip(self, data: bytes) -> None:
        """A byte a second, for as long as somebody listens."""
        for byte in data:
            self.send(bytes([byte]))
            if self.sleep(1):
                break


Page = bytes | Callable[[Visit], None]


def response(body: bytes = b"", *headers: str, status: str = "200 OK", length: int | None = None) -> bytes:
    """A whole answer; `length` is the Content-Length where that should be a lie."""
    lines = [
        f"HTTP/1.1 {status}",
        f"Content-Length: {len(body) if length is None else length}",
        "Connection: close",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    return response(b"", f"Location: {location}", status=status)


class Web:
    """Serves `pages` by path until the block ends; any other path is 404."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        web = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                with web.lock:
                    web.connections += 1
                line = self.rfile.readline()
                headers = []
                while (header := self.rfile.readline()) not in (b"", b"\r\n"):
                    headers.append(header.decode("latin-1").strip())
                if not line:
                    return
                path = line.decode("latin-1").split(" ")[1]
                with web.lock:
                    web.requests[path] += 1
                    web.headers[path] = headers
                    number = web.requests[path]
                page = web.pages.get(path, response(status="404 Not Found"))
                if callable(page):
                    page(Visit(number, self.wfile.write, web.stop.wait))
                else:
                    self.wfile.write(page)
                web.answered.append(path)

        class Server(socketserver.ThreadingTCPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
            daemon_threads = True
            block_on_close = False
            request_queue_size = 64

            def handle_error(self, request: object, client_address: object) -> None:
                """A client that hangs up is what many tests are about."""

        self.pages: dict[str, Page] = {}
        self.requests: Counter[str] = Counter()
        self.headers: dict[str, list[str]] = {}  # of the last request for a path
        self.answered: list[str] = []  # paths in the order in which their answers were complete
        self.connections = 0
        self.lock, self.stop = threading.Lock(), threading.Event()
        self.server = Server((host, 0), Handler)
        self.port: int = self.server.server_address[1]
        self.base = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)

    def put(self, path: str, page: Page) -> str:
        """Serve a page; gives its URL."""
        self.pages[path] = page
        return self.base + path

    def __enter__(self) -> Web:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
