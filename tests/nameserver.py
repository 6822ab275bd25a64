"""A DNS server on loopback that answers what a test wants or not at all, and remembers what it was asked."""

from __future__ import annotations

import socket
import struct
import threading
from collections import Counter
from collections.abc import Mapping
from types import TracebackType

A, NS, AAAA = 1, 2, 28
RCODES = {"SERVFAIL": 2, "NXDOMAIN": 3, "REFUSED": 5}
SILENCE = "silence"
NOBODY = "127.0.0.1:9"  # discard: a name server that refuses whoever asks

Reply = str | list[str]  # addresses, a code of `RCODES`, or SILENCE


class Nameserver:
    """Answers by name, in UDP, until the block ends; `""` is the root, other names than given are NXDOMAIN.

    `late_s` are the seconds that an answer for a name takes.
    """

    def __init__(self, names: Mapping[str, Reply], late_s: Mapping[str, float] | None = None) -> None:
        self.names, self.late_s = {"": ["a.root-servers.net"], **names}, late_s or {}
        self.asked: Counter[tuple[str, int]] = Counter()  # (name, type of record)
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.socket.getsockname()[1]}"
        self.late: list[threading.Timer] = []
        self.thread = threading.Thread(target=self.serve, daemon=True)

    def serve(self) -> None:
        while True:
            query, client = self.socket.recvfrom(4096)
            if not query:
                return
            name, kind = question(query)
            self.asked[name, kind] += 1
            reply = self.names.get(name, "NXDOMAIN")
            if reply == SILENCE:
                continue
            answer = message(query, kind, reply)
            if name in self.late_s:
                self.late.append(threading.Timer(self.late_s[name], self.socket.sendto, (answer, client)))
                self.late[-1].start()
            else:
                self.socket.sendto(answer, client)

    def __enter__(self) -> Nameserver:
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.socket.sendto(b"", self.socket.getsockname())
        self.thread.join()
        for timer in self.late:
            timer.cancel()
            timer.join()
        self.socket.close()


def question(query: bytes) -> tuple[str, int]:
    """The name and the type of record that a query asks for."""
    labels, place = [], 12
    while length := query[place]:
        labels.append(query[place + 1 : place + 1 + length].decode().lower())
        place += 1 + length
    return ".".join(labels), int.from_bytes(query[place + 1 : place + 3], "big")


def message(query: bytes, kind: int, reply: Reply) -> bytes:
    """The answer to a query (RFC 1035, 4.1); a name without a record of that type has an empty one."""
    name, _ = question(query)
    asked = query[12 : 12 + (len(name) + 2 if name else 1) + 4]
    values = [value for value in ([] if isinstance(reply, str) else map(packed, reply)) if value[0] == kind]
    heads = [b"\xc0\x0c" + struct.pack(">HHIH", kind, 1, 60, len(data)) for kind, data in values]
    records = b"".join(head + data for head, (_, data) in zip(heads, values, strict=True))
    flags = 0x8180 | RCODES.get(reply if isinstance(reply, str) else "", 0)  # a server's that recurses
    return query[:2] + struct.pack(">HHHHH", flags, 1, len(values), 0, 0) + asked + records


def packed(value: str) -> tuple[int, bytes]:
    """Type and data of a record: an address, or the name of a name server."""
    if ":" in value:
        return AAAA, socket.inet_pton(socket.AF_INET6, value)
    if value.replace(".", "").isdigit():
        return A, socket.inet_aton(value)
    return NS, b"".join(bytes([len(label)]) + label.encode() for label in value.split(".")) + b"\0"
