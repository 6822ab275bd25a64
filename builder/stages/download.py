"""download: URLs -> images in `<shard>.tar`, and one row for every URL with what became of it.

Reads   source.
Writes  `<shard>.tar` in img2dataset's webdataset layout (jpg, txt, json per sample, in row order);
        `<shard>.parquet` with the columns of `SCHEMA`.
Asks    no uid may occur twice in the whole run.
Raises  Outage, where it is this machine's network that failed and not the web: such a shard is not data.

Resizing, face blurring, X-Robots-Tag and the tar layout are img2dataset's. Ours is the fetching: one deadline
for a URL that a dripping server cannot stretch, names looked up without threads (c-ares) under a deadline of
their own, retries with back-off, no connection to an address that is not public, limits on bytes and pixels
before decoding, and a status with a reason for every URL. A body is judged in this order: is it an image, is
it too large, is it the image of the metadata, can its faces be blurred, can it be decoded.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import io
import ipaddress
import json
import math
import os
import random
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import aiohttp
import numpy as np
import pyarrow as pa
import yarl
from PIL import Image
from pydantic import Field

from builder.core import Count, Object, Question, Resources, Seconds, Stage, Status, Task, Work
from builder.errors import InputError, OutdatedError
from builder.files import read_rows, sha256_file, write_parquet
from builder.stages.imagetar import PILLOW_SAYS_NO, images
from builder.stages.network import (
    NOT_PUBLIC,
    RESOLVER_SHARE,
    Network,
    NoAnswer,
    Outage,
    is_nameserver,
    is_off_limits,
)
from builder.stages.questions import Uids
from builder.urls import as_fetched

SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("url", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("key", pa.string()),  # img2dataset's: a position in this download, not an identity
        ("image_sha256", pa.string()),  # measured, of the bytes as served
        ("image_width", pa.int32()),  # of the image as served
        ("image_height", pa.int32()),
        ("width", pa.int32()),  # of the image in the tar
        ("height", pa.int32()),
    ]
)
USER_AGENT = "Mozilla/5.0 (compatible; recapkit/0.1)"
RESIZE_MODES = ("no", "keep_ratio", "center_crop", "border", "keep_ratio_largest")  # img2dataset's


@dataclass(frozen=True, kw_only=True)
class Download(Stage):
    """How URLs become images. `timeout_s` covers all about one URL: DNS, redirects, retries and the body."""

    version: ClassVar[int] = 4
    costly: ClassVar[bool] = True
    effort: ClassVar[tuple[str, ...]] = (
        "timeout_s", "retries", "concurrency", "nameservers", "hold_above",
    )  # fmt: skip
    once: ClassVar[tuple[str, ...]] = ("accept_failures",)
    libraries: ClassVar[tuple[str, ...]] = (
        "pyarrow", "img2dataset", "aiohttp", "aiodns", "webdataset", "opencv-python-headless",
    )  # fmt: skip

    name: str = "download"
    image_px: Count = 512
    resize_mode: str = "keep_ratio_largest"  # img2dataset's names
    resize_only_if_bigger: bool = True
    encode_quality: Annotated[int, Field(ge=1, le=100)] = 95
    blur_faces: bool = True  # where the metadata has face_bboxes
    # Another image than the metadata's is hash_mismatch; off: kept under its measured hash.
    verify_sha256: bool = True
    timeout_s: Seconds = 10.0
    retries: Annotated[int, Field(ge=0)] = 2
    max_bytes: Count = 50_000_000
    max_pixels: Count = 64_000_000  # an image with alpha counts fourfold
    # Networks that may be connected to though they are not public, for example 127.0.0.1/32.
    allow_private: tuple[str, ...] = ()
    disallowed_directives: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    user_agent_token: str = "recapkit"
    concurrency: Count = 64  # URLs in flight per worker
    nameservers: tuple[str, ...] = ()  # IP or IP:PORT, asked instead of the system's
    # Rows of a block, as a share, that may fail by transport.
    hold_above: Annotated[float, Field(gt=0, le=1)] = 0.5
    accept_failures: bool = False  # commit also what looks like an outage of this machine's network

    def reads(self) -> tuple[str, ...]:
        return ("source",)

    def asks(self) -> tuple[Question, ...]:
        return (Uids(),)

    def resources(self) -> Resources:
        return Resources(cpus=0.5, memory_gib=0.7)  # it waits for the net half of its time, or more

    def portable(self) -> Stage:
        return replace(self, nameservers=(), workers=None)  # this machine's

    def num_workers(self) -> int:
        most = self.bounds()[1]
        return int(most) if math.isfinite(most) else os.cpu_count() or 1

    def check(self) -> None:
        if self.resize_mode not in RESIZE_MODES:
            hint = f"img2dataset has: {', '.join(RESIZE_MODES)}"
            raise InputError(f"there is no resize_mode '{self.resize_mode}'", hint)
        for network in self.allow_private:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                hint = "for example allow_private=127.0.0.1/32"
                raise InputError(f"allow_private: {error}", hint) from error
        for server in self.nameservers:
            if not is_nameserver(server):
                raise InputError(f"nameservers: '{server}' is no address", "for example nameservers=1.1.1.1")

    @contextmanager
    def open(self) -> Iterator[Work]:
        Image.MAX_IMAGE_PIXELS = None  # ours is the limit
        fetcher = _Fetcher(self)
        decoders = max(1, (os.cpu_count() or 1) // self.num_workers())
        with asyncio.Runner() as runner, ThreadPoolExecutor(decoders) as decoder:

            def work(task: Task) -> Mapping[str, int]:
                rows = list(read_rows(task.input("source")))
                with tempfile.TemporaryFile(dir=task.scratch) as spool:  # images in the order of arrival
                    kept = _kept(task, spool)
                    again = [row for row in rows if row["uid"] not in kept]
                    fetched = iter(runner.run(fetcher.shard(again, spool, decoder)))
                    return _write(task, rows, [kept.get(row["uid"]) or next(fetched) for row in rows], spool)

            yield work


@dataclass
class _Image:
    """What became of one URL."""

    status: Status
    error: str | None = None
    sha256: str | None = None
    served_size: tuple[int | None, int | None] = (None, None)
    size: tuple[int | None, int | None] = (None, None)
    span: tuple[int, int] = (0, 0)  # place in the spool
    retry_s: float = 0.0  # what another try takes before it can fail in the same way


class _Fetcher:
    def __init__(self, settings: Download) -> None:
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # img2dataset's blurring would ask the network for news
        from img2dataset import resizer
        from img2dataset.blurrer import BoundingBoxBlurrer
        from img2dataset.downloader import is_disallowed

        # It would redirect the whole process's output around each image, and two threads would undo one
        # another's redirection.
        resizer.SuppressStdoutStderr = nullcontext
        self.settings, self.is_disallowed = settings, is_disallowed
        self.allowed = [ipaddress.ip_network(network) for network in settings.allow_private]
        self.directives = {d.lower() for d in settings.disallowed_directives}
        self.resizer = resizer.Resizer(
            settings.image_px, settings.resize_mode, settings.resize_only_if_bigger,
            encode_quality=settings.encode_quality, blurrer=_Blurrer(BoundingBoxBlurrer()),
        )  # fmt: skip

    async def shard(
        self, rows: list[dict[str, Any]], spool: Any, decoder: ThreadPoolExecutor
    ) -> list[_Image]:
        """One result per row.

        Raises:
            Outage: the results are this machine's doing.
        """
        network = Network(self.settings.nameservers, self.settings.timeout_s)
        try:
            results = await self.fetch_all(network, rows, spool, decoder)
            if not self.settings.accept_failures and (reason := await network.outage()):
                raise Outage(reason)
            return results
        finally:
            await network.close()

    async def fetch_all(
        self, network: Network, rows: list[dict[str, Any]], spool: Any, decoder: ThreadPoolExecutor
    ) -> list[_Image]:
        """One result per row; `concurrency` URLs at a time."""
        results: list[_Image | None] = [None] * len(rows)
        queue = iter(enumerate(rows))
        loop = asyncio.get_running_loop()
        connector = aiohttp.TCPConnector(
            limit=0, ttl_dns_cache=300, socket_factory=self.connect_to, resolver=network
        )
        async with aiohttp.ClientSession(
            connector=connector,
            headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity", "Accept": "image/*,*/*;q=0.8"},
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            middlewares=(network.listen,),
        ) as session:

            async def worker() -> None:
                for index, row in queue:
                    body, result = await self.fetch(session, row)
                    if body is not None:
                        result, jpg = await loop.run_in_executor(decoder, self.decode, row, body)
                        if jpg is not None:
                            result.span = (spool.tell(), len(jpg))
                            spool.write(jpg)
                    results[index] = result

            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.settings.concurrency, len(rows))):
                    group.create_task(worker())
        return [result for result in results if result is not None]

    def connect_to(self, address: aiohttp.AddrInfoType) -> socket.socket:
        """A socket for the very address that is connected to: redirects and DNS answers all come here."""
        family, kind, proto, _, sockaddr = address
        if not self.may_connect(ipaddress.ip_address(sockaddr[0])):
            raise PermissionError(errno.EACCES, f"{sockaddr[0]} is {NOT_PUBLIC}")
        return socket.socket(family, kind, proto)

    def may_connect(self, ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
        public = ip.is_global and not ip.is_multicast
        if isinstance(ip, ipaddress.IPv6Address):
            # An IPv4 address in IPv6 clothes counts as what it leads to.
            inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
            if ip in ipaddress.ip_network("64:ff9b::/96"):
                inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
            if inner:
                return self.may_connect(inner)
            # All that is global unicast; Python's table lacks some that is not.
            public = public and ip in ipaddress.ip_network("2000::/3")
        return public or any(ip.version == net.version and ip in net for net in self.allowed)

    async def fetch(
        self, session: aiohttp.ClientSession, row: Mapping[str, Any]
    ) -> tuple[bytes | None, _Image]:
        """The body of a row's URL, or what stands in its way."""
        text, error = as_fetched(row["url"])
        if error := row["url_error"] or error:
            return None, _Image(Status.INVALID_URL, error)
        url = yarl.URL(text)
        deadline = time.monotonic() + self.settings.timeout_s
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                for attempt in range(self.settings.retries + 1):
                    body, failure, wait_s = await self.attempt(session, url)
                    if wait_s is None or attempt == self.settings.retries:
                        break
                    wait_s = max(wait_s, 0.25 * 2**attempt * random.uniform(0.75, 1.25))
                    if time.monotonic() + wait_s + failure.retry_s > deadline:
                        break  # the reason that is known says more than `timeout`
                    await asyncio.sleep(wait_s)
                return body, failure
        except TimeoutError:
            return None, _Image(Status.TIMEOUT, f"nothing complete within {self.settings.timeout_s:g} s")

    async def attempt(
        self, session: aiohttp.ClientSession, url: yarl.URL
    ) -> tuple[bytes | None, _Image, float | None]:
        """Body, failure, and how long to wait at least before trying again; None where that is no use."""
        body = bytearray()
        try:
            async with session.get(url, timeout=aiohttp.ClientTimeout(total=None)) as response:
                status = response.status
                if status == 429 or status >= 500:
                    after = response.headers.get("Retry-After", "")
                    wait_s = float(after) if after.isdecimal() else 0.0
                    return None, _Image(Status.UNAVAILABLE, f"HTTP {status}"), wait_s
                if status != 200:
                    return None, _Image(Status.DEAD_LINK, f"HTTP {status}"), None
                headers, token = _Headers(response.headers), self.settings.user_agent_token.lower()
                if self.directives and self.is_disallowed(headers, token, self.directives):
                    reason = f"X-Robots-Tag: {', '.join(response.headers.getall('X-Robots-Tag'))}"
                    return None, _Image(Status.OPTED_OUT, reason), None
                limit = self.settings.max_bytes
                if (response.content_length or 0) > limit:
                    reason = f"{response.content_length} bytes, over {limit}"
                    return None, _Image(Status.TOO_LARGE, reason), None
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > limit:
                        return None, _Image(Status.TOO_LARGE, f"over {limit} bytes"), None
                return bytes(body), _Image(Status.OK), None
        except aiohttp.ClientPayloadError:
            return None, _Image(Status.UNDECODABLE, f"the body ended early, after {len(body)} bytes"), 0.0
        except aiohttp.NonHttpUrlClientError as error:
            return None, _Image(Status.BLOCKED, f"leads to {str(error)[:100]}"), None
        except (aiohttp.InvalidURL, aiohttp.TooManyRedirects, ValueError) as error:
            return None, _Image(Status.DEAD_LINK, f"{type(error).__name__}: {str(error)[:100]}"), None
        except aiohttp.ClientConnectorDNSError as error:
            if isinstance(error.os_error, NoAnswer):
                reason = f"no answer from the resolver: {error.os_error}"
                again_s = 1.25 * RESOLVER_SHARE * self.settings.timeout_s  # this machine may be busy
                return None, _Image(Status.UNAVAILABLE, reason, retry_s=again_s), 0.0
            return None, _Image(Status.DEAD_LINK, "the host name does not resolve"), None
        except (aiohttp.ClientError, OSError) as error:
            if is_off_limits(error):
                return None, _Image(Status.BLOCKED, NOT_PUBLIC), None
            return None, _Image(Status.UNAVAILABLE, f"{type(error).__name__}: {str(error)[:100]}"), 0.0

    def decode(self, row: Mapping[str, Any], body: bytes) -> tuple[_Image, bytes | None]:
        """Check the header, the pixels, the hash and the faces, then decode, resize, blur and encode."""
        sha256 = hashlib.sha256(body).hexdigest()
        try:
            with Image.open(io.BytesIO(body)) as header:  # reads no pixels
                width, height = header.size
                if not all(isinstance(side, int) and 0 < side < 2**31 for side in (width, height)):
                    raise ValueError("impossible size")
                alpha = header.has_transparency_data
                limit = self.settings.max_pixels
                if width * height * (4 if alpha else 1) > limit:  # img2dataset flattens alpha in float64
                    reason = f"{width}x{height} pixels{' with alpha' if alpha else ''}, over {limit}"
                    return _Image(Status.TOO_LARGE, reason, sha256, (width, height)), None
                if self.settings.verify_sha256 and row["sha256"] and row["sha256"] != sha256:
                    reason = "not the image of the metadata"
                    return _Image(Status.HASH_MISMATCH, reason, sha256, (width, height)), None
                if ";16" in f"{header.mode} {header.tile}":
                    body = _eight_bits(header)
        except PILLOW_SAYS_NO as error:
            reason = type(error).__name__ if body else "empty body"
            return _Image(Status.UNDECODABLE, reason, sha256), None
        try:
            faces = _faces(row["face_bboxes"] or []) if self.settings.blur_faces else []
        except ValueError as error:  # unblurred it may not be kept
            return _Image(Status.UNDECODABLE, str(error), sha256, (width, height)), None
        jpg, new_width, new_height, _, _, trouble = self.resizer(io.BytesIO(body), faces or None)
        if jpg is None:
            return _Image(Status.UNDECODABLE, str(trouble)[:100], sha256, (width, height)), None
        return _Image(Status.OK, None, sha256, (width, height), (new_width, new_height)), jpg


class _Headers:
    """What `is_disallowed` expects of headers, over aiohttp's."""

    def __init__(self, headers: Any) -> None:
        self.headers = headers

    def get_all(self, name: str, default: list[str]) -> list[str]:
        return list(self.headers.getall(name, default))


def _faces(boxes: list[list[float | None] | None]) -> list[list[float]]:
    """Face boxes, in shares of the image, cut to it.

    Raises:
        ValueError: one of them is in pixels, has its corners swapped or is no box at all.
    """
    faces = []
    for box in boxes:
        # a face at the border may reach over it; a box in pixels must not pass for one
        corners = [min(max(x, 0.0), 1.0) for x in box or () if x is not None and -0.5 <= x <= 1.5]
        x0, y0, x1, y1 = corners if box and len(box) == len(corners) == 4 else (1.0, 1.0, 0.0, 0.0)
        if not (x0 < x1 and y0 < y1):
            text = str(box) if len(str(box)) <= 55 else f"{str(box)[:52]}..."  # all of it in 100 characters
            raise ValueError(f"face_bboxes: {text} is not [x0, y0, x1, y1] in 0..1")
        faces.append(corners)
    return faces


class _Blurrer:
    """img2dataset's blurring, of every pixel that a box touches.

    Alone it rounds corners down and ends a box before the last line of the image, so that a face thinner than
    a pixel, or in the last line, stays as it is.
    """

    def __init__(self, blur: Callable[..., np.ndarray[Any, Any]]) -> None:
        self.blur = blur

    def __call__(self, img: np.ndarray[Any, Any], bbox_list: list[list[float]]) -> np.ndarray[Any, Any]:
        height, width = img.shape[:2]
        one_more = np.pad(img, ((0, 1), (0, 1), (0, 0))[: img.ndim], "reflect")
        boxes = []
        for x0, y0, x1, y1 in bbox_list:
            left, top = min(int(x0 * width), width - 1), min(int(y0 * height), height - 1)
            right, bottom = max(math.ceil(x1 * width), left + 1), max(math.ceil(y1 * height), top + 1)
            # half a pixel more, so that rounding down gives back these very numbers
            corners = np.array([left, top, right, bottom]) + 0.5
            boxes.append((corners / [width + 1, height + 1, width + 1, height + 1]).tolist())
        return np.ascontiguousarray(self.blur(img=one_more, bbox_list=boxes)[:height, :width])


def _eight_bits(image: Image.Image) -> bytes:
    """A picture of 16 bits a channel as an 8-bit PNG; the resizer would saturate it to white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _kept(task: Task, spool: Any) -> dict[str, _Image]:
    """Of a shard some of whose rows are done again, by uid: the others, with their images in the spool."""
    if not task.again:
        return {}
    for name, sha256 in task.earlier.items():
        if name not in task.files or sha256_file(task.files[name]) != sha256:
            raise OutdatedError(
                f"{name} no longer has the bytes of its record; the next build makes it again", [name]
            )
    files = {Object.parse(name).suffix: task.files[name] for name in task.earlier}
    jpgs, kept = images(files[".tar"]), {}
    for row in read_rows(files[".parquet"]):
        image = _Image(
            Status(row["status"]), row["error"], row["image_sha256"],
            (row["image_width"], row["image_height"]), (row["width"], row["height"]),
        )  # fmt: skip
        if image.status is Status.OK:
            _, jpg = next(jpgs)
            image.span = (spool.tell(), len(jpg))
            spool.write(jpg)
        if row["status"] not in task.again:
            kept[row["uid"]] = image
    return kept


def _printable(reason: str | None) -> str | None:
    """A reason quotes what a server sent: cut, and valid Unicode."""
    return reason and reason[:100].encode("utf-8", "replace").decode()


def _write(task: Task, rows: list[dict[str, Any]], images: list[_Image], spool: Any) -> Mapping[str, int]:
    """Tar and parquet in row order, the same bytes for the same images."""
    import webdataset
    from img2dataset.downloader import compute_key

    digits = max(4, len(str(len(rows) - 1)))
    table = []
    with open(task.output(".tar"), "wb") as file, webdataset.TarWriter(file, mtime=0, encoder=False) as tar:
        for index, (row, image) in enumerate(zip(rows, images, strict=True)):
            key = compute_key(index, int(task.name), digits, 5)
            result = {
                "uid": row["uid"], "url": row["url"],
                "status": str(image.status), "error": _printable(image.error), "key": key,
                "image_sha256": image.sha256,
                "image_width": image.served_size[0], "image_height": image.served_size[1],
                "width": image.size[0], "height": image.size[1],
            }  # fmt: skip
            table.append(result)
            if image.status is Status.OK:
                spool.seek(image.span[0])
                about = {name: row[name] for name in ("uid", "url", "org_caption")} | {
                    name: result[name] for name in result if name != "error"
                }
                jpg, text = spool.read(image.span[1]), row["org_caption"].encode()
                more = json.dumps(about, indent=4).encode()
                tar.write({"__key__": key, "jpg": jpg, "txt": text, "json": more})
    write_parquet(pa.Table.from_pylist(table, SCHEMA), task.output())
    return Counter(str(image.status) for image in images)
