"""download: every URL gets a right status, in bounded time and memory, and never leads where it must not."""

from __future__ import annotations

import gzip
import hashlib
import io
import ipaddress
import json
import re
import socket
import struct
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty import Page, Visit, Web, redirect, response
from nameserver import NOBODY, SILENCE, A, Nameserver
from PIL import Image
from webdataset import TarWriter
from webdataset.tariterators import group_by_keys, tar_file_expander

import builder.stages.network
import builder.stages.questions
from builder.commit import commit, working
from builder.core import RUN, Recipe, Record, Stage, Status, Task
from builder.errors import InputError
from builder.executors.work import in_this_process
from builder.files import sha256_file, write_parquet
from builder.run import Run, build
from builder.stages import source
from builder.stages.dedup import Dedup
from builder.stages.download import SCHEMA, Download, _Fetcher
from builder.stages.imagetar import images
from builder.stages.network import Outage, has_default_route
from builder.stages.questions import Measured, Uids
from builder.stages.source import Source
from builder.store import Folder
from recipes.demo import web as demo_web

LOOPBACK, KEY = ("127.0.0.1/32",), "ab" * 32
Row = dict[str, Any]


@dataclass
class Done:
    """What the stage made of one shard."""

    rows: list[Row]
    counts: Counter[str]
    parquet: Path
    tar: Path
    seconds: float  # without loading

    @property
    def statuses(self) -> list[str]:
        return [row["status"] for row in self.rows]

    @property
    def images(self) -> dict[str, bytes]:
        """The pictures in the tar by uid."""
        with tarfile.open(self.tar) as tar:
            jpgs = {
                name.removesuffix(".jpg"): tar.extractfile(name).read()
                for name in tar.getnames()
                if name.endswith(".jpg")
            }  # type: ignore[union-attr]
        return {row["uid"]: jpgs[row["key"]] for row in self.rows if row["key"] in jpgs}

    def pixels(self, uid: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        with Image.open(io.BytesIO(self.images[uid])) as image:
            return np.asarray(image.convert("RGB")).astype(np.int64)


def sourced(run: Path, rows: list[Row], shard: int = 0) -> dict[str, str]:
    """A shard of the source with these rows, as the inputs of a task."""
    name = f"source/00000/{shard:05d}.{shard:08x}.parquet"
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    write_parquet(pa.Table.from_pylist(rows, source.SCHEMA), run / name)
    return {name: sha256_file(run / name)}


def record_of(run: Path, stage: Stage, block: str, name: str, inputs: Mapping[str, str]) -> Record:
    """Do one task of any stage, as a worker does."""
    task = Task(stage.name, block, name, KEY, inputs=inputs)
    with stage.open() as work, working(Folder(run), task) as here:
        return commit(Folder(run), stage, here, work(here), 0)


def download(run: Path, rows: Sequence[str | Row], *, shard: int = 0, **settings: Any) -> Done:
    """Run the stage over one shard of source rows, given as URLs or as more columns; uids are their numbers.

    Names are asked of nobody unless `nameservers` says of whom: no packet leaves this machine.
    """
    table = [
        {"uid": str(n), "org_caption": f"caption {n}"} | ({"url": row} if isinstance(row, str) else row)
        for n, row in enumerate(rows)
    ]
    stage = Download(**{"allow_private": LOOPBACK, "nameservers": (NOBODY,), **settings})
    task = Task("download", "00000", f"{shard:05d}", KEY, inputs=sourced(run, table, shard))
    with stage.open() as work, working(Folder(run), task) as here:
        start = time.monotonic()
        counts = work(here)
        seconds = time.monotonic() - start
        record = commit(Folder(run), stage, here, counts, seconds)
    parquet, tar = (run / record.output(suffix) for suffix in (".parquet", ".tar"))
    done = Done(pq.read_table(parquet).to_pylist(), Counter(record.rows), parquet, tar, seconds)
    assert [(row["uid"], row["url"]) for row in done.rows] == [
        (row["uid"], row["url"]) for row in table
    ]  # one row per source row, in order
    assert done.counts == Counter(done.statuses)
    assert set(done.statuses) <= set(Status)
    assert all(
        (row["error"] is None) == (row["status"] == "ok") for row in done.rows
    )  # a reason wherever there is no image
    assert list(done.images) == [row["uid"] for row in done.rows if row["status"] == "ok"]
    return done


def statuses(run: Path, urls: dict[str, str], **settings: Any) -> dict[str, str]:
    """Status by name, all of them in one shard."""
    return dict(zip(urls, download(run, list(urls.values()), **settings).statuses, strict=True))


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as web:
        yield web


def picture(
    width: int = 64,
    height: int = 48,
    colour: str | tuple[int, ...] = "teal",
    mode: str = "RGB",
    kind: str = "JPEG",
    **options: Any,
) -> bytes:
    return encoded(Image.new(mode, (width, height), colour), kind, **options)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, lines: Iterable[bytes]) -> bytes:
    """A PNG put together by hand, line by line.

    In kinds that Pillow does not write, and in sizes that must not be held in memory.
    """
    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(b"\0" + line) for line in lines) + packer.flush()
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0),
        b"IDAT": data,
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks.items()
    )


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


JPG = picture()


# --- the faults of the demo web -----------------------------------------------------------------------------

EXPECT = {  # fault -> status with sha256 verified, status without
    "ok": ("ok", "ok"),
    "flaky": ("ok", "ok"),
    "redirect": ("ok", "ok"),
    "gone": ("dead_link", "dead_link"),
    "slow": ("timeout", "timeout"),
    "private": ("blocked", "blocked"),
    "noai": ("opted_out", "opted_out"),
    "placeholder": ("hash_mismatch", "duplicate_image"),
    "changed": ("hash_mismatch", "ok"),
    "html": ("undecodable", "undecodable"),
    "empty": ("undecodable", "undecodable"),
    "truncated": ("undecodable", "undecodable"),
    "bomb": ("too_large", "too_large"),
}


@pytest.mark.parametrize("verify", [True, False])
def test_every_fault_of_the_demo_web_gets_its_status(tmp_path: Path, verify: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert set(EXPECT) == set(demo_web.FAULTS)
    demo_web.bomb()  # drawn before the clock runs
    folder, run = tmp_path / "web", tmp_path / "run"
    demo_web.make(folder, rows=20, port=port, num_files=1)
    (metadata,) = (folder / "metadata").iterdir()
    faults = [*EXPECT, *["placeholder"] * 6, "ok"]
    rows = pq.read_table(metadata, columns=["uid", "sha256"]).to_pylist()
    rows = [
        row | {"url": f"http://127.0.0.1:{port}/{fault}/{row['uid']}.jpg"}
        for row, fault in zip(rows, faults, strict=True)
    ]
    with demo_web.serve(folder, port) as seen:
        done = download(run, rows, verify_sha256=verify, timeout_s=2.5)
    images = placeholders(run)
    is_one = [row["status"] == "ok" and row["image_sha256"][:32] in images for row in done.rows]
    after = ["duplicate_image" if one else row["status"] for one, row in zip(is_one, done.rows, strict=True)]
    assert list(zip(faults, after, strict=True)) == [(fault, EXPECT[fault][not verify]) for fault in faults]
    assert seen[f"/gone/{rows[3]['uid']}.jpg"] == 1
    assert seen[f"/flaky/{rows[1]['uid']}.jpg"] == 2


def placeholders(run: Path) -> set[str]:
    """Images that the whole run finds behind too many URLs, as select asks for them: half of each sha256."""
    stage = Measured(max_urls=Dedup().max_urls)
    downloaded = Record.from_json((run / "download/00000/00000.json").read_bytes())
    assert downloaded is not None
    part = record_of(run, stage, "00000", "part", downloaded.outputs)
    answer = record_of(run, stage, RUN, "00000", part.outputs)
    found = pq.read_table(run / answer.output(".parquet")).to_pylist()
    return {f"{row['high']:016x}{row['low']:016x}" for row in found}


# --- time ---------------------------------------------------------------------------------------------------


def test_no_server_holds_a_url_longer_than_its_deadline(tmp_path: Path, web: Web) -> None:
    """Neither dripping nor silence nor the time of the retries stretches it."""
    whole = response(JPG)

    def busy_then_silent(visit: Visit) -> None:
        if visit.number == 1:
            visit.send(response(status="503 Busy"))
        else:
            visit.sleep(60)

    pages: dict[str, Callable[[Visit], Any]] = {
        "/headers": lambda visit: visit.drip(whole),
        "/body": lambda visit: (visit.send(whole.partition(JPG)[0]), visit.drip(JPG)),
        "/silent": lambda visit: visit.sleep(60),
        "/busy-then-silent": busy_then_silent,
        "/drips-after-a-redirect": lambda visit: visit.send(redirect("/body")),
    }
    done = download(tmp_path, [web.put(path, page) for path, page in pages.items()], timeout_s=2, retries=9)
    assert done.statuses == ["timeout"] * 5
    assert {row["error"] for row in done.rows} == {"nothing complete within 2 s"}
    assert 2 <= done.seconds < 4
    assert web.requests["/busy-then-silent"] == 2
    assert web.requests["/silent"] == 1


def test_urls_do_not_wait_for_a_slow_neighbour_longer_than_they_must(tmp_path: Path, web: Web) -> None:
    """With two at a time, one of them stuck, all others are fetched meanwhile."""
    urls = [
        web.put("/silent", lambda visit: (visit.sleep(60), None)[1]),
        *[web.put(f"/{n}", response(JPG)) for n in range(20)],
    ]
    done = download(tmp_path, urls, timeout_s=5, concurrency=2)
    assert done.statuses == ["timeout"] + ["ok"] * 20
    assert done.seconds < 8


def test_a_server_that_asks_for_more_patience_than_there_is_gets_none(tmp_path: Path, web: Web) -> None:
    urls = [
        web.put(f"/{status[:3]}", response(b"", "Retry-After: 3600", status=status))
        for status in ("503 Busy", "429 Too Many Requests")
    ]
    done = download(tmp_path, urls, timeout_s=30, retries=3)
    assert done.statuses == ["unavailable"] * 2
    assert [row["error"] for row in done.rows] == ["HTTP 503", "HTTP 429"]
    assert done.seconds < 5
    assert web.requests == {"/503": 1, "/429": 1}


def test_a_retry_comes_no_earlier_than_the_server_asks(tmp_path: Path, web: Web) -> None:
    def page(visit: Visit) -> None:
        visit.send(response(b"", "Retry-After: 1", status="503 Busy") if visit.number == 1 else response(JPG))

    done = download(tmp_path, [web.put("/busy", page)])
    assert done.statuses == ["ok"]
    assert done.seconds >= 1


# --- retries ------------------------------------------------------------------------------------------------


def test_what_may_pass_is_asked_again_and_what_will_not_is_not(tmp_path: Path, web: Web) -> None:
    """With two retries: three requests at most."""

    def busy_once(visit: Visit) -> None:
        visit.send(response(status="503 Busy") if visit.number == 1 else response(JPG))

    def cut_once(visit: Visit) -> None:
        visit.send(response(JPG[:200], length=len(JPG)) if visit.number == 1 else response(JPG))

    pages: dict[str, tuple[Page, str, int]] = {  # path -> page, status, requests
        "/ok": (response(JPG), "ok", 1),
        "/busy-once": (busy_once, "ok", 2),
        "/cut-once": (cut_once, "ok", 2),
        "/429": (response(status="429 Too Many Requests"), "unavailable", 3),
        "/500": (response(status="500 Oops"), "unavailable", 3),
        "/503": (response(status="503 Busy"), "unavailable", 3),
        "/always-cut": (response(JPG[:200], length=len(JPG)), "undecodable", 3),
        "/chunks-cut": (
            response(b"c8\r\n" + JPG[:200], "Transfer-Encoding: chunked").replace(
                b"Content-Length", b"X-Length"
            ),
            "undecodable",
            3,
        ),
        "/400": (response(status="400 Bad Request"), "dead_link", 1),
        "/403": (response(status="403 Forbidden"), "dead_link", 1),
        "/404": (response(status="404 Not Found"), "dead_link", 1),
        "/410": (response(JPG, status="410 Gone"), "dead_link", 1),
        "/204": (b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n", "dead_link", 1),
        "/html": (response(b"<!doctype html>"), "undecodable", 1),
        "/empty": (response(b""), "undecodable", 1),
    }
    urls = [web.put(path, page) for path, (page, _, _) in pages.items()]
    done = download(tmp_path, urls, retries=2)
    got = {path: (status, web.requests[path]) for path, status in zip(pages, done.statuses, strict=True)}
    assert got == {path: (status, requests) for path, (_, status, requests) in pages.items()}


def test_a_server_that_hangs_up_is_unavailable(tmp_path: Path, web: Web) -> None:
    """aiohttp itself asks a second time each time, since the connection might have been an old one."""
    assert statuses(tmp_path, {"hangs up": web.put("/", b"")}, retries=1) == {"hangs up": "unavailable"}
    assert web.requests["/"] <= 4


def test_a_connection_that_is_refused_is_unavailable(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    assert statuses(tmp_path, {"refused": f"http://127.0.0.1:{port}/x.jpg"}, retries=1) == {
        "refused": "unavailable"
    }


RUBBISH = {  # answers that are none
    "not-http": b"SSH-2.0-OpenSSH_9.6\r\n",
    "nul": b"\0" * 1000,
    "no-status": b"HTTP/1.1\r\n\r\n",
    "endless-header": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    "length-is-a-word": b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nabc",
    "length-is-negative": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nabc",
    "chunk-is-a-word": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nmany\r\nabc\r\n",
    "nonsense-headers": (
        b"HTTP/1.1 200 OK\r\nSet-Cookie: ;;=;\r\nContent-Type: \xff/\xfe\r\n"
        b"Content-Encoding: none\r\nContent-Length: 3\r\n\r\nabc"
    ),
    "retry-after-is-no-number": b"HTTP/1.1 503 Busy\r\nRetry-After: \xc2\xb2\r\nContent-Length: 0\r\n\r\n",
    "retry-after-is-a-date": (
        b"HTTP/1.1 503 Busy\r\nRetry-After: Fri, 31 Dec 2100 23:59:59 GMT\r\nContent-Length: 0\r\n\r\n"
    ),
    "to-no-url": redirect("http://["),
    "to-no-host": redirect("http://"),
    "to-empty-label": redirect("http://a..b/"),
    "to-no-port": redirect("http://127.0.0.1:99999/"),
    "to-nothing": redirect(""),
    "without-location": response(status="302 Found"),
}


def test_rubbish_costs_its_own_row_only(tmp_path: Path, web: Web) -> None:
    urls = {name: web.put(f"/{name}", page) for name, page in RUBBISH.items()}
    got = statuses(tmp_path, urls | {"ok": web.put("/ok", response(JPG))}, retries=0)
    assert got.pop("ok") == "ok"
    assert set(got.values()) <= {"unavailable", "dead_link", "undecodable"}
    assert {name: status for name, status in got.items() if name.startswith("retry-after")} == {
        "retry-after-is-no-number": "unavailable",
        "retry-after-is-a-date": "unavailable",
    }
    assert {status for name, status in got.items() if name.startswith("to-")} == {"dead_link"}


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"HTTP/1.1 302 Found\r\nLocation: http://\xff\xfe/\r\nContent-Length: 0\r\n\r\n", "dead_link"),
        (b"HTTP/1.1 302 Found\r\nLocation: \xff\xfe://x/\r\nContent-Length: 0\r\n\r\n", "dead_link"),
        (b"HTTP/1.1 200 OK\r\nX-Robots-Tag: noai, \xff\xfe\r\nContent-Length: 0\r\n\r\n", "opted_out"),
    ],
    ids=["host", "scheme", "robots"],
)
def test_headers_that_are_not_utf_8_cost_their_own_row_only(
    tmp_path: Path, web: Web, answer: bytes, status: str
) -> None:
    """What a server writes ends up in the reason, and a reason has to be text."""
    assert statuses(tmp_path, {"bytes": web.put("/bytes", answer), "ok": web.put("/ok", response(JPG))}) == {
        "bytes": status,
        "ok": "ok",
    }


def test_a_picture_without_any_header_is_a_picture(tmp_path: Path, web: Web) -> None:
    assert statuses(tmp_path, {"bare": web.put("/", b"HTTP/1.0 200 OK\r\n\r\n" + JPG)}) == {"bare": "ok"}


def test_redirects_are_followed_but_not_for_ever(tmp_path: Path, web: Web) -> None:
    web.put("/ok", response(JPG))
    for number in range(100):
        web.put(f"/deeper{number}", redirect(f"/deeper{number + 1}"))
    urls = {
        "moved": web.put("/moved", redirect("/ok", status="301 Moved Permanently")),
        "found": web.put("/found", redirect(f"{web.base}/ok", status="302 Found")),
        "see other": web.put("/other", redirect("/ok", status="303 See Other")),
        "temporary": web.put("/temporary", redirect("ok", status="307 Temporary Redirect")),
        "permanent": web.put("/permanent", redirect("/ok", status="308 Permanent Redirect")),
        "itself": web.put("/itself", redirect("/itself")),
        "deeper": f"{web.base}/deeper0",
    }
    got = statuses(tmp_path, urls)
    assert got == {
        **dict.fromkeys(("moved", "found", "see other", "temporary", "permanent"), "ok"),
        "itself": "dead_link",
        "deeper": "dead_link",
    }
    assert web.requests["/itself"] <= 20
    assert sum(number for path, number in web.requests.items() if path.startswith("/deeper")) <= 20


# --- names -------------------------------------------------------------------------------------------------


def test_names_that_nobody_answers_do_not_hold_up_their_neighbours(tmp_path: Path, web: Web) -> None:
    """As many as there are places, before those that are fine; they are given up within their deadline."""
    web.put("/", response(JPG))
    dead, fine = [f"dead{n}.example" for n in range(64)], [f"fine{n}.example" for n in range(20)]
    with Nameserver(dict.fromkeys(dead, SILENCE) | {name: ["127.0.0.1"] for name in fine}) as server:
        urls = [f"http://{name}:{web.port}/" for name in [*dead, *fine]]
        done = download(tmp_path, urls, timeout_s=2, nameservers=(server.address,))
    assert done.statuses == ["unavailable"] * 64 + ["ok"] * 20
    assert {row["error"].partition(":")[0] for row in done.rows[:64]} == {"no answer from the resolver"}
    assert done.seconds < 3


def test_only_a_name_server_can_say_that_a_host_does_not_exist(tmp_path: Path, web: Web) -> None:
    web.put("/", response(JPG))
    names = {
        "fine.example": ["127.0.0.1"],
        "no-address.example": ["ns.example"],
        "nothing.example": "NXDOMAIN",
        "broken.example": "SERVFAIL",
        "refused.example": "REFUSED",
        "silent.example": SILENCE,
    }
    with Nameserver(names) as server:
        urls = [f"http://{name}:{web.port}/" for name in names]
        done = download(tmp_path / "a", urls, timeout_s=1, nameservers=(server.address,))
    assert done.statuses == ["ok", "dead_link", "dead_link", "unavailable", "unavailable", "unavailable"]
    assert [row["error"] for row in done.rows[1:3]] == ["the host name does not resolve"] * 2
    assert [row["error"].partition(":")[0] for row in done.rows[3:]] == ["no answer from the resolver"] * 3
    nobody = download(tmp_path / "b", [*urls[:1], web.base + "/"], nameservers=(NOBODY,))
    assert nobody.statuses == ["unavailable", "ok"]


def test_a_name_is_asked_for_again_where_that_may_help(tmp_path: Path, web: Web) -> None:
    asked = []
    for retries in (0, 2):
        with Nameserver({"broken.example": "SERVFAIL"}) as server:
            urls = ["http://broken.example/", "http://nothing.example/", web.base + "/"]
            download(tmp_path / str(retries), urls, retries=retries, nameservers=(server.address,))
            asked.append({name: server.asked[name, A] for name in ("broken.example", "nothing.example")})
    once, thrice = asked
    assert once["broken.example"] > 0
    assert thrice == {"broken.example": 3 * once["broken.example"], "nothing.example": 1}


def test_a_name_that_takes_longer_than_others_is_waited_for(tmp_path: Path, web: Web) -> None:
    web.put("/", response(JPG))
    names = {name: ["127.0.0.1"] for name in [*(f"quick{n}.example" for n in range(20)), "slow.example"]}
    with Nameserver(names, late_s={"slow.example": 0.7}) as server:
        urls = [f"http://{name}:{web.port}/" for name in names]
        done = download(tmp_path, urls, concurrency=1, retries=0, nameservers=(server.address,))
    assert done.statuses == ["ok"] * 21


def test_names_are_whole(tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search domain that answers for whatever is in it does not bring dead hosts to life."""
    web.put("/", response(JPG))
    monkeypatch.setenv("LOCALDOMAIN", "wildcard.example")
    with Nameserver({"gone.example.wildcard.example": ["127.0.0.1"]}) as server:
        urls = [f"http://gone.example:{web.port}/", web.base + "/"]
        done = download(tmp_path, urls, nameservers=(server.address,))
        assert {name for name, _ in server.asked} == {"gone.example"}
    assert done.statuses == ["dead_link", "ok"]


def test_names_of_this_machine_need_no_name_server(tmp_path: Path, web: Web) -> None:
    web.put("/", response(JPG))
    lines = [line.partition("#")[0].split() for line in Path("/etc/hosts").read_text().splitlines()]
    names = {name for address, *names in filter(None, lines) if address == "127.0.0.1" for name in names}
    names |= {"localhost"}
    done = download(tmp_path, [f"http://{name}:{web.port}/" for name in sorted(names)], nameservers=(NOBODY,))
    assert done.statuses == ["ok"] * len(names)


def test_no_answer_of_a_name_server_leads_to_an_address_that_is_not_public(tmp_path: Path) -> None:
    with ExitStack() as stack:
        web, other, v6 = (stack.enter_context(Web(host)) for host in ("127.0.0.3", "127.0.0.2", "::1"))
        names = {
            "loopback.example": ["127.0.0.2"],
            "v6.example": ["::1"],
            "mapped.example": ["::ffff:127.0.0.2"],
            "both.example": ["127.0.0.2", "::1"],
            "private.example": ["10.0.0.1"],
            "cloud.example": ["169.254.169.254"],
        }
        server = stack.enter_context(Nameserver(names | {"fine.example": ["127.0.0.3"]}))
        ports = {"v6.example": v6.port}
        urls = {name: f"http://{name}:{ports.get(name, other.port)}/secret" for name in names}
        redirects = {f"to {name}": web.put(f"/{name}", redirect(url)) for name, url in urls.items()}
        web.put("/", response(JPG))
        fine = {"fine": f"http://fine.example:{web.port}/"}
        got = statuses(
            tmp_path,
            urls | redirects | fine,
            allow_private=("127.0.0.3/32",),
            nameservers=(server.address,),
        )
        assert got == dict.fromkeys([*urls, *redirects], "blocked") | {"fine": "ok"}
        assert [somebody.connections for somebody in (other, v6)] == [0, 0]


def test_a_name_server_is_named_by_its_address() -> None:
    Download(nameservers=("127.0.0.1", "127.0.0.1:5353", "::1", "[::1]:5353")).check()
    for server in ("", "ns.example", "127.0.0.1:99999", "127.0.0.1,127.0.0.2", "127.0.0.1#53", "é"):
        with pytest.raises(InputError, match="nameservers"):
            Download(nameservers=(server,)).check()


def test_what_is_this_machine_s_is_neither_in_the_key_nor_published() -> None:
    here = Download(nameservers=("127.0.0.1:53",), accept_failures=True)
    assert here.settings() == Download().settings()
    assert here.portable() == Download(accept_failures=True)
    assert (
        "accept_failures" not in Recipe("r", (here,)).to_json()
    )  # the next build of RUN/recipe.json does not go on so


# --- an outage of this machine -----------------------------------------------------------------------------


ENDING = "; the shard is not committed: see to the network, then type the same command again "
ENDING += "(--accept-failures takes it as it is)"


def outage(run: Path, rows: Sequence[str | Row], **settings: Any) -> str:
    """The message with which the shard fails, after which nothing is left of it."""
    with pytest.raises(Outage) as raised:
        download(run, rows, **settings)
    assert [path.parent.parent.name for path in run.rglob("*") if path.is_file()] == ["source"]
    assert str(raised.value).endswith(ENDING)
    assert "\n" not in str(raised.value)
    return str(raised.value).removesuffix(ENDING)


@pytest.mark.parametrize("hosts", [40, 1])
@pytest.mark.parametrize("reply", ["SERVFAIL", SILENCE, None])
def test_a_machine_without_a_resolver_commits_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hosts: int,
    reply: str | None,
) -> None:
    """And not a shard of dead links; whoever insists may have it."""
    monkeypatch.setattr(builder.stages.network, "PROBE_S", 0.5)
    names = [f"host{n}.example" for n in range(hosts)]
    urls = [f"http://{names[n % hosts]}/{n}.jpg" for n in range(40)]
    with Nameserver(dict.fromkeys(["", *names], reply or SILENCE)) as server:
        # not less: on a busy machine a row whose first look-up takes all of its time is a `timeout`
        settings: Row = {"timeout_s": 3, "nameservers": (server.address if reply else NOBODY,)}
        message = outage(tmp_path / "a", urls, **settings)
        done = download(tmp_path / "b", urls, accept_failures=True, **settings)
    why = "the resolver gives no answer for the root either"
    assert message == f"{hosts} of {hosts} hosts could not be reached, and {why}"
    assert done.counts == {"unavailable": 40}


def test_one_dead_domain_behind_a_working_resolver_is_the_web_s(tmp_path: Path) -> None:
    with Nameserver({"broken.example": "SERVFAIL"}) as server:
        done = download(tmp_path, ["http://broken.example/x.jpg"] * 3, nameservers=(server.address,))
        assert server.asked["", 2] == 1
    assert done.statuses == ["unavailable"] * 3


@pytest.mark.parametrize("root", ["NXDOMAIN", "SERVFAIL"])
def test_a_shard_of_dead_names_is_data(tmp_path: Path, web: Web, root: str) -> None:
    """Names that do not exist say that the resolver works, whatever it makes of the root."""
    web.put("/", response(JPG))
    names = [f"host{n}.example" for n in range(60)]
    with Nameserver({"": root} | {name: ["127.0.0.1"] for name in names[:20]}) as server:
        urls = [f"http://{name}:{web.port}/" for name in names]
        done = download(tmp_path, urls, nameservers=(server.address,))
    assert done.statuses == ["ok"] * 20 + ["dead_link"] * 40


def test_half_of_the_hosts_is_not_most_of_them(tmp_path: Path, web: Web) -> None:
    web.put("/", response(JPG))
    fine, broken = ([f"{kind}{n}.example" for n in range(21)] for kind in ("fine", "broken"))
    names = {name: ["127.0.0.1"] for name in fine} | dict.fromkeys(["", *broken], "SERVFAIL")
    with Nameserver(names) as server:
        urls = [f"http://{name}:{web.port}/" for name in (*fine, *broken)]
        done = download(tmp_path / "half", urls, nameservers=(server.address,))
        assert done.counts == {"ok": 21, "unavailable": 21}
        message = outage(tmp_path / "most", urls[1:], nameservers=(server.address,))
    assert message.startswith("21 of 41 hosts ")


def test_a_machine_without_a_route_commits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses that refuse are the web's as long as there is a way out."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    urls = [f"http://127.0.0.{n}:{port}/x.jpg" for n in range(10, 30)]
    settings: Row = {"retries": 0, "allow_private": ("127.0.0.0/8",)}
    monkeypatch.setattr(builder.stages.network, "has_default_route", lambda: True)
    assert download(tmp_path / "route", urls, **settings).counts == {"unavailable": 20}
    monkeypatch.setattr(builder.stages.network, "has_default_route", lambda: False)
    message = outage(tmp_path / "none", urls, **settings)
    assert message == "20 of 20 hosts could not be reached, and this machine has no default route"
    assert download(tmp_path / "few", urls[1:], **settings).counts == {"unavailable": 19}
    assert download(tmp_path / "b", urls, accept_failures=True, **settings).counts == {"unavailable": 20}


def test_a_host_that_spoke_once_is_no_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An HTTP status, a redirect, a body that stops: all of them came over a network that works."""
    monkeypatch.setattr(builder.stages.network, "has_default_route", lambda: False)

    def stops(visit: Visit) -> None:
        visit.send(response(JPG)[:-100])
        visit.sleep(60)

    with ExitStack() as stack:
        webs = [stack.enter_context(Web(f"127.0.0.{n}")) for n in range(10, 31)]
        for n, web in enumerate(webs):
            pages = [stops, response(status="404 Gone"), response(status="503 Busy"), redirect("/nowhere")]
            web.put("/", pages[n % 4])
            web.put("/nowhere", b"")
        urls = [f"{web.base}/" for web in webs]
        done = download(tmp_path, urls, timeout_s=1, retries=0, allow_private=("127.0.0.0/8",))
    assert done.counts == {"timeout": 6, "dead_link": 5, "unavailable": 10}


def test_hosts_that_are_not_public_are_no_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder.stages.network, "has_default_route", lambda: False)
    done = download(tmp_path, [f"http://10.0.0.{n}/x.jpg" for n in range(40)])
    assert done.counts == {"blocked": 40}


def test_the_demo_s_web_may_be_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is one host, given by its address."""
    monkeypatch.setattr(builder.stages.network, "has_default_route", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    done = download(tmp_path, [f"http://127.0.0.1:{port}/{n}.jpg" for n in range(40)], retries=0)
    assert done.counts == {"unavailable": 40}


ANY = "0" * 32
ROUTES = {  # IPv4 table, IPv6 table, whether there is a way out
    "default": ("eth0 00000000 010200C0 0003 0 0 0 00000000 0 0 0", "", True),
    "default without a gateway": ("tun0 00000000 00000000 0001 0 0 0 00000000 0 0 0", "", True),
    "of a network": ("eth0 000200C0 00000000 0001 0 0 0 00FFFFFF 0 0 0", "", False),
    "rejecting": ("* 00000000 00000000 0200 0 0 0 00000000 0 0 0", "", False),
    "down": ("eth0 00000000 010200C0 0002 0 0 0 00000000 0 0 0", "", False),
    "v6": ("", f"{ANY} 00 {ANY} 00 fe80{ANY[5:]}1 00000400 00000002 00000000 00000003 eth0", True),
    "v6, on every machine": ("", f"{ANY} 00 {ANY} 00 {ANY} ffffffff 00000001 00000000 00200200 lo", False),
    "v6, of a network": ("", f"fd{ANY[2:]} 40 {ANY} 00 {ANY} 00000100 00000001 00000000 00000001 lan", False),
}


@pytest.mark.parametrize("name", ROUTES)
def test_a_route_to_everywhere_is_found_in_the_kernel_s_tables(tmp_path: Path, name: str) -> None:
    ipv4, ipv6, expected = ROUTES[name]
    head = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT"
    (tmp_path / "route").write_text(f"{head}\n{ipv4}")
    (tmp_path / "ipv6_route").write_text(ipv6)
    assert has_default_route(tmp_path / "route", tmp_path / "ipv6_route") is expected


def test_a_kernel_that_shows_no_routes_is_believed_to_have_one(tmp_path: Path) -> None:
    assert has_default_route(tmp_path / "route", tmp_path / "ipv6_route")


# --- where it may connect to --------------------------------------------------------------------------------


def test_no_redirect_and_no_name_leads_to_an_address_that_is_not_public(tmp_path: Path) -> None:
    """The web is 127.0.0.3, the only address allowed; somebody listens on all others and must stay alone."""
    with ExitStack() as stack:
        web, other, local, v6 = (
            stack.enter_context(Web(host)) for host in ("127.0.0.3", "127.0.0.2", "127.0.0.1", "::1")
        )
        targets = {
            "loopback": f"{other.base}/secret",
            "a name": f"http://localhost:{local.port}/secret",
            "any address": f"http://0.0.0.0:{local.port}/secret",
            "v6": f"{v6.base}/secret",
            "v6 any": f"http://[::]:{v6.port}/secret",
            "v4 in v6": f"http://[::ffff:127.0.0.2]:{other.port}/secret",
            "v4 in v6, hexadecimal": f"http://[::ffff:7f00:2]:{other.port}/secret",
            "private": "http://10.0.0.1/secret",
            "metadata of a cloud": "http://169.254.169.254/latest/meta-data/",
            "file": "file:///etc/passwd",
            "ftp": f"ftp://127.0.0.2:{other.port}/secret",
            "data": "data:image/png;base64,AAAA",
        }
        redirects = {name: web.put(f"/{n}", redirect(url)) for n, (name, url) in enumerate(targets.items())}
        twice = {"in two steps": web.put("/twice", redirect(redirects["loopback"]))}
        itself = {"ok": web.put("/ok", response(JPG))}
        got = statuses(
            tmp_path / "redirects", redirects | twice | itself, allow_private=("127.0.0.3/32",), retries=2
        )
        assert got == dict.fromkeys([*targets, *twice], "blocked") | {"ok": "ok"}
        assert {web.requests[f"/{n}"] for n in range(1, len(targets))} == {
            1
        }  # it will be no better the next time

        direct = {name: url for name, url in targets.items() if url.startswith("http")}
        got = statuses(tmp_path / "direct", direct, allow_private=("127.0.0.3/32",), retries=2)
        assert got == dict.fromkeys(direct, "blocked")
        assert [somebody.connections for somebody in (other, local, v6)] == [0, 0, 0]


def test_nothing_private_is_allowed_unless_it_is_named(tmp_path: Path, web: Web) -> None:
    assert statuses(tmp_path, {"loopback": web.put("/ok", response(JPG))}, allow_private=()) == {
        "loopback": "blocked"
    }
    assert web.connections == 0


PUBLIC = [
    "93.184.216.34",
    "1.1.1.1",
    "2606:2800:220:1:248:1893:25c8:1946",
    "2001:4860:4860::8888",
    "64:ff9b::5db8:d822",
    "2002:5db8:d822::1",
]
NOT_PUBLIC = {
    "private": [
        "10.0.0.1",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "fc00::1",
        "fd12:3456::1",
        "fec0::1",
    ],
    "carrier-grade NAT": ["100.64.0.1", "100.127.255.255"],
    "loopback": ["127.0.0.1", "127.255.255.254", "::1"],
    "link-local": ["169.254.169.254", "fe80::1"],
    "multicast": ["224.0.0.1", "239.255.255.250", "ff02::1", "ff0e::1"],
    "unspecified, broadcast, reserved": ["0.0.0.0", "0.1.2.3", "::", "255.255.255.255", "240.0.0.1"],
    "documentation, benchmarks": ["192.0.2.1", "198.51.100.1", "203.0.113.1", "198.18.0.1", "2001:db8::1"],
    "mapped": ["::ffff:10.0.0.1", "::ffff:127.0.0.1", "::ffff:169.254.169.254"],
    "compatible, translated": ["::127.0.0.1", "::10.0.0.1", "::ffff:0:127.0.0.1"],
    "6to4": ["2002:7f00:1::", "2002:a00:1::1", "2002:a9fe:a9fe::1"],
    "NAT64": ["64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b:1::7f00:1", "64:ff9b:1::a00:1"],
    "Teredo": [
        "2001:0:4136:e378:8000:63bf:f5ff:fffe",
        "2001:0:4136:e378:8000:63bf:80ff:fffe",
    ],  # the client is ~0a000001, ~7f000001
}


@pytest.mark.parametrize("kind", NOT_PUBLIC)
def test_addresses_that_are_not_public(kind: str) -> None:
    may_connect = _Fetcher(Download()).may_connect
    assert [address for address in NOT_PUBLIC[kind] if may_connect(ipaddress.ip_address(address))] == []


def test_addresses_that_are_public() -> None:
    may_connect = _Fetcher(Download()).may_connect
    assert [address for address in PUBLIC if not may_connect(ipaddress.ip_address(address))] == []


def test_allowed_networks_are_allowed_in_any_clothes_and_no_others() -> None:
    may_connect = _Fetcher(Download(allow_private=("10.1.0.0/16", "fd00::/64"))).may_connect
    table = {
        "10.1.2.3": True,
        "10.2.0.1": False,
        "127.0.0.1": False,
        "::ffff:10.1.2.3": True,
        "fd00::5": True,
        "fd00:0:0:1::5": False,
    }
    assert {address: may_connect(ipaddress.ip_address(address)) for address in table} == table


def test_what_is_no_url_is_never_connected_to(tmp_path: Path, web: Web) -> None:
    no_urls = [
        "", " ", "not a url", "ftp://x/y", "http://", "https://", "http:///x.jpg", "//127.0.0.1/x.jpg",
        "/x.jpg", "http://host:99999/", "http://host:port/", "http://[::1", "http://[x]/", "http://a..b/",
        f"http://{'a' * 64}.com/", "http://" + "x" * 2_000_000, "x" * 2_000_000, "javascript:alert(1)",
        "data:image/png;base64,AAAA", "file:///etc/passwd", f"{web.base}/nul\x00.jpg",
        f"{web.base}/x\r\nHost: other/.jpg", "http://127.0.0.1\x00.example/",
    ]  # fmt: skip
    done = download(tmp_path, no_urls)
    assert [row["url"][:40] for row in done.rows if row["status"] != "invalid_url"] == []
    assert max(len(row["error"]) for row in done.rows) < 200
    assert web.connections == 0


def test_a_url_that_no_server_would_read_is_never_sent(tmp_path: Path, web: Web) -> None:
    """Two megabytes of path."""
    assert statuses(tmp_path, {"long": f"{web.base}/{'x' * 2_000_000}"}) == {"long": "invalid_url"}
    assert web.connections == 0


def test_a_url_arrives_as_the_metadata_writes_it(tmp_path: Path, web: Web) -> None:
    """Signed URLs break when written in another way; letters outside ASCII become UTF-8 in percents."""
    paths = {
        path: path
        for path in (
            "/a%2Fb.jpg?sig=x%2By%3D&t=1",
            "/a+b.jpg",
            "/a,b;c=d/@e.jpg?u=http://x/y?z",
            "/%E2%82%AC.jpg",
        )
    }
    paths |= {"/grün.jpg": "/gr%C3%BCn.jpg", "/a b.jpg": "/a%20b.jpg"}
    for sent in paths.values():
        web.put(sent, response(JPG))
    got = statuses(tmp_path, {path: web.base + path for path in paths})
    assert got == dict.fromkeys(paths, "ok")
    assert set(web.requests) == set(paths.values())


# --- who may not be used, and who we say we are -------------------------------------------------------------


def test_robots_tags_are_obeyed_where_they_are_meant_for_us(tmp_path: Path, web: Web) -> None:
    tags = {
        ("noai",): "opted_out",
        ("noimageai",): "opted_out",
        ("noindex",): "opted_out",
        ("NoAI, nofollow",): "opted_out",
        ("nofollow,noimageindex",): "opted_out",
        ("recapkit: noai",): "opted_out",
        ("RecapKit: noai",): "opted_out",
        ("otherbot: noai", "noai"): "opted_out",
        ("otherbot: noai", "recapkit: nofollow, noindex"): "opted_out",
        ("otherbot: noai",): "ok",
        ("otherbot: noai", "thirdbot: noindex"): "ok",
        ("nofollow, noarchive",): "ok",
        ("all",): "ok",
        ("",): "ok",
    }
    urls = {
        tag: web.put(f"/{n}", response(JPG, *[f"X-Robots-Tag: {line}" for line in tag]))
        for n, tag in enumerate(tags)
    }
    done = download(tmp_path, list(urls.values()))
    assert dict(zip(tags, done.statuses, strict=True)) == tags
    assert all(
        "noai" in row["error"].lower()
        for row, tag in zip(done.rows, tags, strict=True)
        if tag in [("noai",), ("RecapKit: noai",)]
    )


def test_the_reason_names_the_tag_that_was_meant_for_us(tmp_path: Path, web: Web) -> None:
    done = download(
        tmp_path,
        [web.put("/", response(JPG, "X-Robots-Tag: otherbot: nosnippet", "X-Robots-Tag: noimageai"))],
    )
    assert [(row["status"], "noimageai" in row["error"]) for row in done.rows] == [("opted_out", True)]


def test_a_reason_stays_short_however_long_the_tag(tmp_path: Path, web: Web) -> None:
    done = download(tmp_path, [web.put("/", response(JPG, f"X-Robots-Tag: noai, {'x' * 5000}"))])
    assert [(row["status"], len(row["error"]) < 200) for row in done.rows] == [("opted_out", True)]


def test_one_may_listen_for_another_name_and_other_directives(tmp_path: Path, web: Web) -> None:
    urls = {
        line: web.put(f"/{n}", response(JPG, f"X-Robots-Tag: {line}"))
        for n, line in enumerate(["MyBot: notdm", "recapkit: notdm", "noai"])
    }
    got = statuses(tmp_path / "a", urls, user_agent_token="MyBot", disallowed_directives=("NoTDM",))
    assert got == {"MyBot: notdm": "opted_out", "recapkit: notdm": "ok", "noai": "ok"}
    assert set(statuses(tmp_path / "b", urls, disallowed_directives=()).values()) == {"ok"}


def test_a_request_says_who_asks_and_wants_plain_bytes(tmp_path: Path, web: Web) -> None:
    download(tmp_path, [web.put("/ok", response(JPG))])
    headers = dict(line.lower().split(": ", 1) for line in web.headers["/ok"])
    assert "recapkit" in headers["user-agent"]
    assert headers["accept-encoding"] == "identity"
    assert not {"cookie", "authorization", "referer"} & set(headers)


# --- bytes --------------------------------------------------------------------------------------------------


def test_max_bytes_is_a_border(tmp_path: Path, web: Web) -> None:
    size = len(JPG)
    urls = {str(extra): web.put(f"/{extra}", response(JPG + b"\0" * extra)) for extra in (0, 1)}
    assert statuses(tmp_path, urls, max_bytes=size) == {"0": "ok", "1": "too_large"}


def test_no_more_than_max_bytes_is_read(tmp_path: Path, web: Web) -> None:
    """Whether the server owns up to the size or not; both of these would send for ever."""
    sent: Counter[str] = Counter()

    def endless(name: str, *headers: str) -> Callable[[Visit], None]:
        def page(visit: Visit) -> None:
            visit.send("\r\n".join(["HTTP/1.1 200 OK", *headers, "", ""]).encode())
            chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
            while not visit.sleep(0):
                visit.send(chunk)
                sent[name] += len(chunk)

        return page

    urls = {
        "length": web.put("/length", endless("length", "Content-Length: 100000000000")),
        "chunked": web.put("/chunked", endless("chunked", "Transfer-Encoding: chunked")),
        "until it ends": web.put("/bare", endless("until it ends")),
    }
    assert statuses(tmp_path, urls, max_bytes=1_000_000, timeout_s=10) == dict.fromkeys(urls, "too_large")
    assert max(sent.values()) < 20_000_000  # a million and what sockets hold
    assert set(web.requests.values()) == {1}


def test_the_hash_is_of_the_bytes_as_served(tmp_path: Path, web: Web) -> None:
    """Compressed bytes are not unpacked: a hash of anything else could be compared with nobody's."""
    packed = gzip.compress(JPG)
    rows = [
        {"url": web.put("/ok", response(JPG))},
        {"url": web.put("/gzip", response(packed, "Content-Encoding: gzip"))},
    ]
    done = download(
        tmp_path / "a", [*rows, rows[1] | {"sha256": sha256(JPG)}, rows[0] | {"sha256": sha256(JPG)}]
    )
    assert done.statuses == ["ok", "undecodable", "undecodable", "ok"]
    assert [row["image_sha256"] for row in done.rows] == [
        sha256(JPG),
        sha256(packed),
        sha256(packed),
        sha256(JPG),
    ]


def test_another_image_than_the_metadata_s(tmp_path: Path, web: Web) -> None:
    """Out when hashes are verified, kept under its own hash when not.

    Metadata without a hash cannot be held against it.
    """
    url = web.put("/", response(JPG))
    rows = [{"url": url, "sha256": claimed} for claimed in (sha256(b"another"), sha256(JPG), None, "")]
    strict = download(tmp_path / "strict", rows)
    assert strict.statuses == ["hash_mismatch", "ok", "ok", "ok"]
    lax = download(tmp_path / "lax", rows, verify_sha256=False)
    assert lax.statuses == ["ok"] * 4
    assert {row["image_sha256"] for row in strict.rows + lax.rows} == {sha256(JPG)}


SOFT_404 = {  # what a server sends in place of the image, and with which reason it is out
    "a page": (b"<!doctype html><title>Not found</title>", "undecodable", "UnidentifiedImageError"),
    "nothing": (b"", "undecodable", "empty body"),
    "a bomb": (picture(101, 100), "too_large", "101x100 pixels, over 10000"),
    "another image": (JPG, "hash_mismatch", "not the image of the metadata"),
    "another image, without its pixels": (
        JPG[: JPG.index(b"\xff\xda")],
        "hash_mismatch",
        "not the image of the metadata",
    ),
    "another image of 16 bits, without its pixels": (
        png(40, 30, 16, 2, []),
        "hash_mismatch",
        "not the image of the metadata",
    ),
}


def test_what_is_no_image_is_not_called_another_image(tmp_path: Path, web: Web) -> None:
    """A header is read before the hash is compared, pixels only after that."""
    claimed = {"sha256": sha256(b"the image of the metadata")}
    urls = [web.put(f"/{n}", response(body)) for n, (body, _, _) in enumerate(SOFT_404.values())]
    rows = [{"url": url} | claimed for url in urls]
    done = download(tmp_path, rows, max_pixels=10_000)
    got = {name: (row["status"], row["error"]) for name, row in zip(SOFT_404, done.rows, strict=True)}
    assert got == {name: (status, reason) for name, (_, status, reason) in SOFT_404.items()}
    assert [row["image_sha256"] for row in done.rows] == [sha256(body) for body, _, _ in SOFT_404.values()]
    assert (done.rows[3]["image_width"], done.rows[3]["image_height"]) == (64, 48)


# --- pixels -------------------------------------------------------------------------------------------------


def test_a_bomb_is_never_unpacked(tmp_path: Path, web: Web) -> None:
    """20000 x 20000 pixels are 400 MB, in a file of some 200 kB."""
    bomb = png(20_000, 20_000, 1, 0, (bytes(2500) for _ in range(20_000)))
    assert len(bomb) < 1_000_000
    with Download().open():
        pass  # libraries are loaded
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # from now on VmHWM is the highest since now
    (row,) = download(tmp_path, [web.put("/", response(bomb))]).rows
    assert (row["status"], row["error"]) == ("too_large", "20000x20000 pixels, over 64000000")
    assert (row["image_width"], row["image_height"], row["image_sha256"]) == (20_000, 20_000, sha256(bomb))
    assert _memory("VmHWM") - before < 100_000_000


def _memory(name: str) -> int:
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


def test_max_pixels_is_a_border(tmp_path: Path, web: Web) -> None:
    urls = {
        f"{w}x{h}": web.put(f"/{w}x{h}", response(picture(w, h)))
        for w, h in ((100, 50), (1, 5001), (5001, 1))
    }
    assert statuses(tmp_path, urls, max_pixels=5000) == {
        "100x50": "ok",
        "1x5001": "too_large",
        "5001x1": "too_large",
    }


def test_the_longest_side_becomes_image_px_and_nothing_is_enlarged(tmp_path: Path, web: Web) -> None:
    sizes = {
        (1000, 500): (512, 256),
        (500, 2000): (128, 512),
        (512, 512): (512, 512),
        (513, 10): (512, 10),
        (300, 200): (300, 200),
        (1, 1): (1, 1),
    }
    urls = [web.put(f"/{n}", response(picture(*size, kind="PNG"))) for n, size in enumerate(sizes)]
    done = download(tmp_path / "512", urls)
    assert done.statuses == ["ok"] * len(sizes)
    assert {
        (row["image_width"], row["image_height"]): (row["width"], row["height"]) for row in done.rows
    } == sizes
    for row in done.rows:
        with Image.open(io.BytesIO(done.images[row["uid"]])) as image:
            assert (image.format, image.size) == ("JPEG", (row["width"], row["height"]))
    small = download(tmp_path / "64", urls, image_px=64)
    assert [(row["width"], row["height"]) for row in small.rows] == [
        (64, 32),
        (16, 64),
        (64, 64),
        (64, 1),
        (64, 43),
        (1, 1),
    ]


def test_a_line_of_pixels_keeps_a_width(tmp_path: Path, web: Web) -> None:
    """1 x 3000 made 512 high would be a sixth of a pixel wide."""
    done = download(tmp_path, [web.put("/", response(picture(1, 3000, kind="PNG")))])
    assert [(row["status"], row["width"], row["height"]) for row in done.rows] == [("ok", 1, 512)]


GREY = Image.new("RGB", (40, 30), (128, 128, 128))
KINDS = {  # pictures that are grey in the middle of the scale, in every way the web has for it
    "jpeg": encoded(GREY, "JPEG"),
    "progressive jpeg": encoded(GREY, "JPEG", progressive=True),
    "jpeg, grey": encoded(GREY.convert("L"), "JPEG"),
    "jpeg, cmyk": encoded(GREY.convert("CMYK"), "JPEG"),
    "png": encoded(GREY),
    "png, alpha": encoded(GREY.convert("RGBA")),
    "png, grey": encoded(GREY.convert("L")),
    "png, grey, alpha": encoded(GREY.convert("LA")),
    "png, palette": encoded(GREY.quantize(2)),
    "png, 16 bit": png(40, 30, 16, 2, [b"\x80\x80" * 3 * 40] * 30),
    "png, 16 bit, alpha": png(40, 30, 16, 6, [(b"\x80\x80" * 3 + b"\xff\xff") * 40] * 30),
    "png, 16 bit, grey": png(40, 30, 16, 0, [b"\x80\x80" * 40] * 30),
    "webp": encoded(GREY, "WEBP"),
    "webp, alpha": encoded(GREY.convert("RGBA"), "WEBP", lossless=True),
    "gif, animated": encoded(
        GREY.quantize(2), "GIF", save_all=True, append_images=[Image.new("P", GREY.size)]
    ),
    "bmp": encoded(GREY, "BMP"),
    "tiff": encoded(GREY, "TIFF"),
    "ico": encoded(GREY, "ICO"),
    "avif": encoded(GREY, "AVIF"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_of_any_kind_looks_like_itself_or_is_undecodable(
    tmp_path: Path, web: Web, kind: str
) -> None:
    done = download(tmp_path, [web.put("/kind", response(KINDS[kind])), web.put("/ok", response(JPG))])
    assert done.statuses[0] in ("ok", "undecodable")
    assert done.statuses[1] == "ok"
    if done.statuses[0] == "ok":
        assert (done.rows[0]["width"], done.rows[0]["height"]) == (40, 30)
        assert abs(done.pixels("0") - 128).max() <= 4
    if kind.split(",")[0] in ("jpeg", "png", "webp"):
        assert done.statuses[0] == "ok" or "16 bit" in kind


def test_what_shines_through_is_white(tmp_path: Path, web: Web) -> None:
    """And not the colour that an editor left behind where nothing is to be seen."""
    done = download(
        tmp_path, [web.put("/", response(picture(colour=(200, 0, 0, 0), mode="RGBA", kind="PNG")))]
    )
    assert done.pixels("0").min() >= 253


def test_of_an_animation_the_first_picture_is_taken(tmp_path: Path, web: Web) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "green")]
    done = download(
        tmp_path, [web.put("/", response(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])))]
    )
    red, green, blue = done.pixels("0").mean(axis=(0, 1))
    assert red > 240
    assert max(green, blue) < 15


def test_the_size_in_the_row_is_the_size_in_the_tar_however_exif_turns_it(tmp_path: Path, web: Web) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show it
    done = download(tmp_path, [web.put("/", response(picture(64, 32, exif=exif)))])
    with Image.open(io.BytesIO(done.images["0"])) as image:
        assert image.size == (done.rows[0]["width"], done.rows[0]["height"])
        assert sorted(image.size) == [32, 64]


DDS = encoded(GREY, "DDS")
BROKEN = {  # each makes Pillow or OpenCV complain in another way
    "jpeg": JPG[:30],
    "jpeg, only a header": JPG[: JPG.index(b"\xff\xda")],
    "png": encoded(GREY)[:20],
    "png, no pixels": encoded(GREY)[:33],
    "gif": b"GIF89a" + b"\xff" * 20,
    "webp": KINDS["webp"][:30],
    "tiff": b"II*\0" + b"\xff" * 100,
    "avif": KINDS["avif"].replace(b"iloc", b"xloc"),
    "dds": DDS[:80] + bytes(4) + DDS[84:],
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
    "text": b"P6 9999999999999999999999 1 255 ",
    "nul": bytes(1000),
    "0 pixels": png(0, 0, 8, 2, []),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_broken_picture_costs_its_own_row_only(tmp_path: Path, web: Web, kind: str) -> None:
    done = download(tmp_path, [web.put("/broken", response(BROKEN[kind])), web.put("/ok", response(JPG))])
    assert done.statuses == ["undecodable", "ok"]
    assert done.rows[0]["image_sha256"] == sha256(BROKEN[kind])


@pytest.mark.parametrize(
    "body",
    [
        png(3_000_000_000, 1, 8, 2, []),
        png(1, 3_000_000_000, 8, 2, []),
        b"Image type: RGB image\r\nImage size (x*y): 1.5*3\r\n".ljust(511, b"\0") + b"\x1a",
    ],
    ids=["too wide for an int32", "too high for an int32", "one and a half pixels"],
)
def test_a_size_that_is_none_costs_its_own_row_only(tmp_path: Path, web: Web, body: bytes) -> None:
    """A header can claim anything, also what fits into no column."""
    done = download(tmp_path, [web.put("/size", response(body)), web.put("/ok", response(JPG))])
    assert done.statuses[0] in ("too_large", "undecodable")
    assert done.statuses[1] == "ok"


# --- faces --------------------------------------------------------------------------------------------------


def noise(px: int) -> bytes:
    return encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (px, px, 3), dtype=np.uint8)))


def test_a_face_is_blurred_and_nothing_else(tmp_path: Path, web: Web) -> None:
    """img2dataset grows a box by a tenth of its longer side and fades over another; JPEG smears blocks of 16.

    A quarter of 256 px from (64, 64) to (128, 128) becomes 57..134, with the fading 50..141, with the blocks
    48..144.
    """
    row = {"url": web.put("/", response(noise(256))), "face_bboxes": [[0.25, 0.25, 0.5, 0.5]]}
    blurred, again, plain = (
        download(tmp_path / name, [row], blur_faces=blur)
        for name, blur in (("blurred", True), ("again", True), ("plain", False))
    )
    change = abs(blurred.pixels("0") - plain.pixels("0")).max(axis=2)
    change[48:144, 48:144] = 0
    assert change.max() <= 4  # rounding
    assert blurred.pixels("0")[64:128, 64:128].std() < plain.pixels("0")[64:128, 64:128].std() / 4
    assert blurred.tar.read_bytes() == again.tar.read_bytes()


def test_every_face_is_blurred_where_it_is_after_resizing(tmp_path: Path, web: Web) -> None:
    row = {
        "url": web.put("/", response(noise(512))),
        "face_bboxes": [[0.0, 0.0, 0.25, 0.25], [0.75, 0.75, 1.0, 1.0]],
    }
    blurred, plain = (
        download(tmp_path / str(blur), [row], blur_faces=blur, image_px=256).pixels("0")
        for blur in (True, False)
    )
    for y, x in ((0, 0), (192, 192)):
        assert blurred[y : y + 60, x : x + 60].std() < plain[y : y + 60, x : x + 60].std() / 3
    assert abs(blurred - plain)[96:160].max() <= 4


def test_metadata_without_faces_changes_nothing(tmp_path: Path, web: Web) -> None:
    url = web.put("/", response(noise(64)))
    done = download(tmp_path, [{"url": url, "face_bboxes": boxes} for boxes in (None, [])])
    assert done.images["0"] == done.images["1"]


NAN, INF = float("nan"), float("inf")
NO_BOXES: dict[str, list[Any]] = {
    "in pixels": [[10, 20, 50, 60]],
    "one of two in pixels": [[0.1, 0.1, 0.2, 0.2], [10, 20, 50, 60]],
    "left and right swapped": [[0.9, 0.1, 0.1, 0.9]],
    "top and bottom swapped": [[0.1, 0.9, 0.9, 0.1]],
    "of no width": [[0.5, 0.5, 0.5, 0.9]],
    "beside the image": [[1.1, 0.1, 1.2, 0.2]],
    "not a number": [[0.1, 0.1, NAN, 0.2]],
    "infinite": [[0.1, 0.1, INF, 0.2]],
    "too big": [[-1, -1, 2, 2]],
    "three numbers": [[0.1, 0.1, 0.2]],
    "five numbers": [[0.1, 0.1, 0.2, 0.2, 0.9]],
    "a null among them": [[0.1, None, 0.2, 0.2]],
    "null": [None],
    "empty": [[]],
}


def test_an_image_whose_faces_cannot_be_blurred_is_not_kept(tmp_path: Path, web: Web) -> None:
    url = web.put("/", response(noise(64)))
    rows = [{"url": url, "face_bboxes": boxes} for boxes in NO_BOXES.values()]
    done = download(tmp_path / "blurred", rows)
    assert dict(zip(NO_BOXES, done.statuses, strict=True)) == dict.fromkeys(NO_BOXES, "undecodable")
    reasons = dict(zip(NO_BOXES, (row["error"] for row in done.rows), strict=True))
    assert reasons["in pixels"] == "face_bboxes: [10.0, 20.0, 50.0, 60.0] is not [x0, y0, x1, y1] in 0..1"
    assert reasons["one of two in pixels"] == reasons["in pixels"]
    assert all(reason.endswith(" is not [x0, y0, x1, y1] in 0..1") for reason in reasons.values())
    assert {row["image_width"] for row in done.rows} == {64}
    plain = download(tmp_path / "plain", rows, blur_faces=False)
    assert plain.statuses == ["ok"] * len(rows)


def test_a_reason_about_a_box_stays_short_however_long_the_box(tmp_path: Path, web: Web) -> None:
    row = {"url": web.put("/", response(noise(64))), "face_bboxes": [[1 / 3] * 1000]}
    (row,) = download(tmp_path, [row]).rows
    assert len(row["error"]) == 100
    assert row["error"].endswith("... is not [x0, y0, x1, y1] in 0..1")


def test_boxes_do_not_hide_what_became_of_the_link(tmp_path: Path, web: Web) -> None:
    face = {"face_bboxes": [[10, 20, 50, 60]]}
    rows = {
        "dead_link": {"url": f"{web.base}/gone"},
        "hash_mismatch": {"url": web.put("/other", response(noise(64))), "sha256": sha256(b"another")},
        "too_large": {"url": web.put("/bomb", response(picture(101, 100)))},
    }
    done = download(tmp_path, [row | face for row in rows.values()], max_pixels=10_000)
    assert done.statuses == list(rows)


def test_a_face_at_the_border_may_reach_over_it(tmp_path: Path, web: Web) -> None:
    url = web.put("/", response(noise(256)))
    rows = [{"url": url, "face_bboxes": [box]} for box in ([0.75, 0.75, 1.2, 1.5], [0.75, 0.75, 1.0, 1.0])]
    done = download(tmp_path, rows)
    assert done.images["0"] == done.images["1"]
    plain = download(tmp_path / "plain", rows, blur_faces=False)
    assert done.pixels("0")[192:, 192:].std() < plain.pixels("0")[192:, 192:].std() / 4


@pytest.mark.parametrize(
    ("x", "y", "size"),
    [(30.2, 30.2, 0.6), (10.1, 30, 0.2), (63.4, 63.4, 0.6), (63.999, 0, 0.001), (0, 63.2, 0.5)],
)
def test_a_face_of_less_than_a_pixel_is_blurred(
    tmp_path: Path,
    web: Web,
    x: float,
    y: float,
    size: float,
) -> None:
    """A black picture with a white pixel where the face is; img2dataset alone leaves it white."""
    image = Image.new("RGB", (64, 64))
    image.putpixel((int(x), int(y)), (255, 255, 255))
    box = [x / 64, y / 64, (x + size) / 64, (y + size) / 64]
    row = {"url": web.put("/", response(encoded(image))), "face_bboxes": [box]}
    blurred = download(tmp_path / "blurred", [row], encode_quality=100).pixels("0")
    plain = download(tmp_path / "plain", [row], encode_quality=100, blur_faces=False).pixels("0")
    assert plain[int(y), int(x)].min() > 200
    assert blurred[int(y), int(x)].max() < 0.75 * 255


def test_a_face_in_a_line_of_pixels_is_blurred(tmp_path: Path, web: Web) -> None:
    lines = np.random.default_rng(0).integers(0, 256, (64, 1, 3), dtype=np.uint8)
    url = web.put("/", response(encoded(Image.fromarray(lines))))
    row = {"url": url, "face_bboxes": [[0.0, 0.25, 1.0, 0.75]]}
    blurred = download(tmp_path / "blurred", [row]).pixels("0")
    plain = download(tmp_path / "plain", [row], blur_faces=False).pixels("0")
    assert blurred[20:44].std() < 0.75 * plain[20:44].std()


def test_grey_pictures_have_faces_too(tmp_path: Path, web: Web) -> None:
    grey = encoded(Image.open(io.BytesIO(noise(256))).convert("L"))
    row = {"url": web.put("/", response(grey)), "face_bboxes": [[0.25, 0.25, 0.5, 0.5]]}
    blurred, plain = (
        download(tmp_path / str(blur), [row], blur_faces=blur).pixels("0") for blur in (True, False)
    )
    assert blurred[64:128, 64:128].std() < plain[64:128, 64:128].std() / 4


# --- the files ----------------------------------------------------------------------------------------------


def test_the_tar_is_what_img2dataset_would_write(tmp_path: Path, web: Web) -> None:
    """Samples in row order, keys of shard and row in nine digits, holes where there is no image, no clock."""
    ok, gone = web.put("/ok", response(JPG)), f"{web.base}/gone"
    done = download(
        tmp_path,
        [{"url": ok, "org_caption": "a café"}, gone, {"url": ok, "org_caption": ""}, gone, ok],
        shard=42,
    )
    keys = ["000420000", "000420001", "000420002", "000420003", "000420004"]
    assert [row["key"] for row in done.rows] == keys
    with tarfile.open(done.tar) as tar:
        members = tar.getmembers()
    assert [member.name.partition(".")[0] for member in members] == [
        key for key in keys[::2] for _ in range(3)
    ]
    assert [{m.name.partition(".")[2] for m in members[n : n + 3]} for n in (0, 3, 6)] == [
        {"jpg", "txt", "json"}
    ] * 3
    assert {member.mtime for member in members} == {0}

    with open(done.tar, "rb") as file:
        samples = list(group_by_keys(tar_file_expander([{"url": "42", "stream": file}])))
    assert [sample["__key__"] for sample in samples] == keys[::2]
    assert [sample["txt"].decode() for sample in samples] == ["a café", "", "caption 4"]
    about = [json.loads(sample["json"]) for sample in samples]
    assert [(a["uid"], a["key"], a["url"], a["org_caption"]) for a in about] == [
        ("0", keys[0], ok, "a café"), ("2", keys[2], ok, ""), ("4", keys[4], ok, "caption 4")
    ]  # fmt: skip
    assert all((a["width"], a["height"], a["image_sha256"]) == (64, 48, sha256(JPG)) for a in about)


def test_the_same_answers_are_the_same_bytes_in_whatever_order_they_come(tmp_path: Path, web: Web) -> None:
    late = {"/2"}

    def page(number: int) -> Callable[[Visit], None]:
        body = picture(32, 32, (30 * number,) * 3)

        def answer(visit: Visit) -> None:
            visit.sleep(0.6 if f"/{number}" in late else 0)
            visit.send(response(body))

        return answer

    rows = [
        {"url": web.put(f"/{n}", page(n)), "face_bboxes": [[0.2, 0.2, 0.7, 0.7]] if n % 2 else []}
        for n in range(8)
    ]
    first = download(tmp_path / "first", rows)
    late = {"/5"}
    second = download(tmp_path / "second", rows, concurrency=3)
    assert "/2" not in web.answered[:7]  # it came last the first time
    assert "/5" not in web.answered[8:15]
    assert first.statuses == ["ok"] * 8
    assert all(abs(first.pixels(str(n)) - 30 * n).max() <= 3 for n in range(8))
    assert first.tar.read_bytes() == second.tar.read_bytes()
    assert first.parquet.read_bytes() == second.parquet.read_bytes()


def test_the_columns(tmp_path: Path, web: Web) -> None:
    done = download(tmp_path, [web.put("/ok", response(JPG)), f"{web.base}/gone"])
    assert pq.read_schema(done.parquet).equals(SCHEMA)
    ok, gone = done.rows
    assert (ok["image_width"], ok["image_height"], ok["image_sha256"], ok["error"]) == (
        64,
        48,
        sha256(JPG),
        None,
    )
    assert [gone[name] for name in ("status", "error", "image_sha256", "image_width", "width")] == [
        "dead_link",
        "HTTP 404",
        None,
        None,
        None,
    ]


def test_one_worker_does_many_shards(tmp_path: Path, web: Web) -> None:
    """With an empty one among them; nothing of the one before is in the next."""
    web.put("/ok", response(JPG))
    with Download(allow_private=LOOPBACK).open() as work:
        for shard, number in enumerate([3, 0, 2]):
            rows = [
                {"uid": f"{shard}-{n}", "url": f"{web.base}/ok", "org_caption": ""} for n in range(number)
            ]
            task = Task("download", "00000", f"{shard:05d}", KEY, inputs=sourced(tmp_path, rows, shard))
            with working(Folder(tmp_path), task) as here:
                assert work(here) == ({"ok": number} if number else {})
                assert pq.read_table(here.output())["uid"].to_pylist() == [row["uid"] for row in rows]
                with tarfile.open(here.output(".tar")) as tar:
                    assert len(tar.getnames()) == 3 * number
                assert {path.name for path in here.scratch.iterdir()} == {"out.parquet", "out.tar"}
            assert not here.scratch.exists()


@pytest.mark.parametrize("range_rows", [1, 20_000_000])
def test_a_uid_that_occurs_twice_is_found_in_one_block_or_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, range_rows: int
) -> None:
    """However many rows are grouped at a time."""
    monkeypatch.setattr(builder.stages.questions, "RANGE_ROWS", range_rows)
    inputs = [
        sourced(tmp_path, [{"uid": uid, "shard": shard, "row": n} for n, uid in enumerate(uids)], shard)
        for shard, uids in enumerate((["a", "b"], ["c", "a"], ["d", "e", "f"]))
    ]

    def answer(*blocks: Sequence[int]) -> Mapping[str, int]:
        parts: dict[str, str] = {}
        for number, shards in enumerate(blocks):
            of_block = {name: sha256 for shard in shards for name, sha256 in inputs[shard].items()}
            parts |= record_of(tmp_path, Uids(), f"{number:05d}", "part", of_block).outputs
        return record_of(tmp_path, Uids(), RUN, "00000", parts).rows

    for blocks in ([[0, 1]], [[0], [1]], [[2, 0], [1]]):
        with pytest.raises(InputError, match="uid a occurs twice: shard 0 row 0 and shard 1 row 1"):
            answer(*blocks)
    for blocks, rows in (([[0]], 2), ([[0, 2]], 5), ([[1], [2]], 5)):
        assert answer(*blocks) == {"rows": rows}


def test_a_uid_that_occurs_twice_stops_the_run_before_it_starts(tmp_path: Path) -> None:
    """Whatever its two rows are: nothing is asked of any server, in whichever block."""
    rows = [{"uid": uid, "url": f"http://127.0.0.1/{n}", "text": "x"} for n, uid in enumerate("abcad")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    recipe = Recipe("r", (Source(files=str(tmp_path / "in.parquet"), rows_per_shard=1), Download()))
    assert Download().asks() == (Uids(),)
    with pytest.raises(InputError, match="uid a occurs twice: shard 0 row 0 and shard 3 row 0"):
        build(recipe, tmp_path / "run", executor=in_this_process)
    assert len(Run.open(tmp_path / "run").files("source")) == len(rows)
    assert not (tmp_path / "run" / "download").exists()


@pytest.mark.parametrize("mtime", [0, 0.0])
def test_the_images_of_a_tar_are_those_that_tarfile_finds(tmp_path: Path, mtime: float) -> None:
    """With or without pax headers, which a time that is no whole number brings; and damage is told."""
    rng = np.random.default_rng(0)
    with TarWriter(str(tmp_path / "a.tar"), mtime=mtime, encoder=False) as tar:
        for n, size in enumerate([0, 1, 511, 512, 513, 40_000]):
            jpg = rng.bytes(size)
            tar.write({"__key__": f"{n:09d}", "jpg": jpg, "txt": b"a.jpg", "json": b"{}"})
    with tarfile.open(tmp_path / "a.tar") as tar:
        found = {m.name: tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")}  # type: ignore[union-attr]
    assert {f"{key}.jpg": image for key, image in images(tmp_path / "a.tar")} == found
    assert len(found) == 6
    whole = (tmp_path / "a.tar").read_bytes()
    for damaged in (whole[:30_000], whole[:700], b"x" + whole[1:], b"no tar", whole[:512] + whole[513:]):
        (tmp_path / "b.tar").write_bytes(damaged)
        with pytest.raises(tarfile.ReadError, match=r"b.tar is damaged at byte \d"):
            list(images(tmp_path / "b.tar"))
