"""On the path of every Python process that tests start: nothing may try to reach anything but this machine.

A process that tries is refused, and the attempt is written to the file named by RECAP_TEST_CONNECTIONS; the
run fails.
"""

import ipaddress
import itertools
import os
import sys


def _own_addresses() -> set[str]:
    """Of this machine, as its kernel routes them to itself; a cluster on one machine talks by them."""
    try:
        with open("/proc/net/fib_trie") as file:
            lines = [line.split() for line in file]
    except OSError:
        return set()
    pairs = itertools.pairwise(lines)
    return {line[1] for line, after in pairs if line[0] == "|--" and after == ["/32", "host", "LOCAL"]}


_OWN = _own_addresses()


def _is_local(host: object) -> bool:
    if isinstance(host, bytes):
        host = host.decode()
    if host in (None, "", "localhost"):
        return True
    try:
        ip = ipaddress.ip_address(str(host).partition("%")[0])
    except ValueError:
        return str(host).endswith((".invalid", ".localhost")) or host == os.uname().nodename
    return (
        str(ip) in _OWN
        or ip.is_loopback
        or ip.is_unspecified
        or bool(getattr(ip, "ipv4_mapped", None) and ip.ipv4_mapped.is_loopback)
    )


def _audit(event: str, arguments: tuple) -> None:
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    else:
        return
    if not _is_local(host):
        log = os.environ.get("RECAP_TEST_CONNECTIONS")
        if log:
            with open(log, "a") as file:
                file.write(f"{event} {arguments!r} by {' '.join(sys.argv)}\n")
        raise ConnectionRefusedError(f"the tests may not reach {host}")


sys.addaudithook(_audit)

if os.environ.get("RECAP_TEST_ASKED"):
    import asked  # noqa: F401
