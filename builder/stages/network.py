"""The network as one shard sees it.

Names are looked up without threads, and an outage of this machine is told from dead links.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import aiodns
import aiohttp
import pycares
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import AsyncResolver

from builder.errors import RecapError

NOT_PUBLIC = "not a public address"
RESOLVER_SHARE = 0.4  # of a URL's time, for one look-up: time for two where nobody answers
OUTAGE_HOSTS = 20  # fewer that fail are the web's doing, as far as the network alone can tell
PROBE_S = 5.0
_ABSENT = (pycares.errno.ARES_ENOTFOUND, pycares.errno.ARES_ENODATA, pycares.errno.ARES_EBADNAME)
_ANSWERS = (*_ABSENT, pycares.errno.ARES_EFORMERR, pycares.errno.ARES_ENOTIMP, pycares.errno.ARES_EBADRESP)


class Outage(RecapError):
    """It is this machine's network that failed, not the web: the shard says nothing of its URLs."""


class NoAnswer(OSError):
    """No name server said whether the host exists."""


class Network(AbstractResolver):
    """Looks up the names of one shard, and keeps which hosts were asked and of which ones something is known.

    A look-up takes no thread, so names that nobody answers do not keep others waiting.
    """

    def __init__(self, nameservers: tuple[str, ...], timeout_s: float) -> None:
        self.nameservers = nameservers or None
        self.patience_s = RESOLVER_SHARE * timeout_s
        self.resolver = AsyncResolver(
            nameservers=self.nameservers,
            timeout=self.patience_s / 4,
            # c-ares cuts `timeout` down to 0.25 s where the server was quick before, and doubles it with each
            # try: four are 2 s at least, for a name that takes the server longer than others
            tries=4,
            # a URL names a whole host: no search domains, in which a wildcard would bring the dead to life
            flags=pycares.ARES_FLAG_EDNS | pycares.ARES_FLAG_NOSEARCH,
        )
        self.asked: set[str] = set()
        # Gave, when asked last, an HTTP response, do not exist, or are none that we connect to.
        self.settled: set[str] = set()
        self.absent: set[str] = set()  # do not exist
        self.names_asked = self.names_answered = False

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_INET,
    ) -> list[ResolveResult]:
        """Addresses of a host.

        Raises:
            NoAnswer: no name server answered in time, or none that did knew.
            OSError: the host does not exist, or has no address.
        """
        self.names_asked = True
        try:
            async with asyncio.timeout(self.patience_s):
                addresses = await self.resolver.resolve(host, port, family)
        except TimeoutError:
            raise NoAnswer(f"nothing within {self.patience_s:g} s") from None
        except OSError as error:
            cause = error.__cause__  # none where the answer holds no address
            code = cause.args[0] if isinstance(cause, aiodns.error.DNSError) else pycares.errno.ARES_ENODATA
            if code not in _ABSENT:
                raise NoAnswer(pycares.errno.strerror(code)) from error
            self.settled.add(host)
            self.absent.add(host)
            self.names_answered |= code != pycares.errno.ARES_EBADNAME  # that one is never sent
            raise
        self.names_answered = True
        return addresses

    async def listen(
        self,
        request: aiohttp.ClientRequest,
        send: aiohttp.ClientHandlerType,
    ) -> aiohttp.ClientResponse:
        """Sees every request, those that redirects lead to too, and what comes of it."""
        host = request.url.raw_host or ""
        self.asked.add(host)
        try:
            response = await send(request)
        except OSError as error:
            if is_off_limits(error):
                self.settled.add(host)
            elif isinstance(error, aiohttp.ClientConnectorError) and host not in self.absent:
                self.settled.discard(host)  # it answered before: the network may have gone since
            raise
        self.settled.add(host)
        return response

    async def outage(self) -> str | None:
        """Why all this must be this machine's doing; None where it is not.

        It is where most hosts failed and a probe fails too, in which no web server has a part. A few hosts
        prove nothing unless the resolver gave no answer for any name.
        """
        failed, asked = len(self.asked - self.settled), len(self.asked)
        deaf = self.names_asked and not self.names_answered
        if 2 * failed <= asked or (failed < OUTAGE_HOSTS and not deaf):
            return None
        if self.names_asked and not await self.root_answers():
            probe = "the resolver gives no answer for the root either"
        elif not has_default_route():
            probe = "this machine has no default route"
        else:
            return None
        return (
            f"{failed} of {asked} hosts could not be reached, and {probe}; the shard is not committed: "
            "see to the network, then type the same command again (--accept-failures takes it as it is)"
        )

    async def root_answers(self) -> bool:
        """Whether a name server answers for the root; an error that takes a working server is an answer."""
        probe = aiodns.DNSResolver(nameservers=self.nameservers, timeout=1.0, tries=4)
        try:
            async with asyncio.timeout(PROBE_S):
                await probe.query_dns(".", "NS")
        except TimeoutError:
            return False
        except aiodns.error.DNSError as error:
            return error.args[0] in _ANSWERS
        finally:
            await probe.close()
        return True

    async def close(self) -> None:
        await self.resolver.close()


def is_off_limits(error: Exception) -> bool:
    """Whether it was `connect_to` that refused, not the other side, which may say what it likes."""
    refused = error.__cause__ if isinstance(error, aiohttp.ClientConnectorError) else error
    return isinstance(refused, PermissionError) and NOT_PUBLIC in str(refused)


def is_nameserver(text: str) -> bool:
    try:
        servers = pycares.Channel(servers=[text], sock_state_cb=lambda *_: None).servers
    except (pycares.AresError, UnicodeEncodeError):
        return False
    return len(servers) == 1 and servers != [""]


def has_default_route(
    ipv4: Path = Path("/proc/net/route"),
    ipv6: Path = Path("/proc/net/ipv6_route"),
) -> bool:
    """Whether the kernel knows a way to the rest of the world; true where it does not say.

    Sends nothing. The tables are those of proc_pid_net(5): hexadecimal, an IPv6 route in ten columns.
    """
    up, reject = 0x1, 0x200  # RTF_UP, RTF_REJECT
    routes = []  # destination, length or mask of its prefix, flags
    if ipv4.exists():
        routes += [(r[1], r[7], r[3]) for r in map(str.split, ipv4.read_text().splitlines()[1:])]
    if ipv6.exists():
        routes += [(r[0], r[1], r[8]) for r in map(str.split, ipv6.read_text().splitlines())]
    everywhere = [flags for place, prefix, flags in routes if int(place, 16) == int(prefix, 16) == 0]
    usable = any(int(flags, 16) & (up | reject) == up for flags in everywhere)
    return usable or not (ipv4.exists() or ipv6.exists())
