"""A client of an endpoint that speaks OpenAI's chat completions: a vLLM somewhere else, or any other.

An event loop in a thread of its own keeps `concurrency` requests on their way, whatever the caller does
between two steps. What passes is tried again, a bounded number of times. What one row is to blame for is an
error of that row; what every row would meet stops the run, in one line.
"""

from __future__ import annotations

import asyncio
import base64
import email.utils
import json
import os
import random
import re
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import aiohttp
import yarl

from builder.errors import InputError, UserError

T = TypeVar("T")
FIRST_WAIT_S = 1.0  # before a request is sent again; doubled each time, and up to half of it less by chance
MAX_WAIT_S = 30.0
MAX_RETRY_AFTER_S = 120.0  # whatever the endpoint asks for
MAX_BODY_BYTES = 4 << 20
CONNECT_S = 10.0
KEEP_ALIVE_S = 4.0  # servers close an idle connection after 5 s: a request must not cross with that
MAX_SAID_CHARACTERS = 200  # of a server's own words in an error
PASSES = (408, 409, 425, 429)  # and 5xx
STOPS = (401, 402, 403, 404, 405, 407, 410)  # each row would get it
AGAIN = "then type the same command again"


@dataclass(frozen=True)
class Ask:
    """One request."""

    id: int
    text: str  # the user's message; text of the row in it went through special_tokens.py
    image: bytes | None  # a JPEG, which is sent as it is
    sampling: Mapping[str, Any]  # temperature, top_k, top_p, max_tokens, min_tokens, seed, json_schema


@dataclass(frozen=True)
class Answer:
    """What came of it; `error` is why there is none."""

    id: int
    text: str = ""
    finish_reason: str | None = None
    num_tokens: int | None = None
    prompt_tokens: int | None = None
    error: str = ""


class CeilingError(UserError):
    """As many tokens as `max_total_tokens` are used. What was on its way has been delivered."""


class _Fault(Exception):
    """It may pass. `after_s` is how long the endpoint wants to be left alone, `since` when it was asked."""

    since = 0.0

    def __init__(self, reason: str, after_s: float | None = None) -> None:
        super().__init__(reason)
        self.after_s = after_s


class _Refusal(Exception):
    """The endpoint does not take this row."""


class _Spent(Exception):
    """Not sent: the ceiling is reached."""


class Endpoint:
    """One model at one address. The key comes from the environment, and is told to nobody else."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        concurrency: int = 64,
        timeout_s: float = 120,
        retries: int = 5,
        max_total_tokens: int | None = None,
        key_variable: str = "RECAP_API_KEY",
    ) -> None:
        self.url, self.model = address(url), model
        self.concurrency, self.timeout_s, self.retries = concurrency, timeout_s, retries
        self.max_total_tokens, self.key_variable = max_total_tokens, key_variable
        self._key = os.environ.get(key_variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise InputError(f"{key_variable} holds what cannot be a key", f"export {key_variable}=KEY")
        self.total_tokens = 0  # of prompts and replies, as the endpoint counts them
        self.is_vllm = False  # as `check` finds it; vLLM takes the model's own sampling where nothing is said
        self._changed = threading.Condition()  # guards what follows
        self._waiting: deque[Ask] = deque()
        self._tasks: dict[asyncio.Task[None], int] = {}  # and what they ask for
        self._answers: list[Answer] = []
        self._failure: BaseException | None = None
        self._answered_at = self._not_before = float("-inf")  # of the loop's clock
        self._loop = asyncio.new_event_loop()
        self._trial = asyncio.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._thread.start()
        self._session: aiohttp.ClientSession = self._do(self._open())

    # --- for the caller's thread ----------------------------------------------------------------------------

    def check(self) -> None:
        """Ask for the list of models.

        Raises:
            InputError: the endpoint cannot be reached, does not take the key, or has not the model.
        """
        self._do(self._check())

    def try_out(self, ask: Ask) -> Answer:
        """The answer to one request, say to the prompt with an empty picture: whether its form is taken.

        Raises:
            InputError: it is not, or there is no answer.
        """
        answer: Answer = self._do(self._try_out(ask))
        return answer

    def add(self, ask: Ask) -> None:
        """Have it asked as soon as there is room; nothing is waited for."""
        with self._changed:
            self._waiting.append(ask)
        self._loop.call_soon_threadsafe(self._fill)

    def step(self) -> list[Answer]:
        """Wait for answers: those that came since the last step, in any order; none where nothing is asked.

        Raises:
            InputError: what every row would meet. Answers that came before it are given first.
            CeilingError: there is more to ask than there are tokens left.
        """
        with self._changed:
            while True:
                if self._answers:
                    answers, self._answers = self._answers, []
                    return answers
                if self._failure:
                    raise self._failure
                if not self._tasks:
                    if not self._waiting:
                        return []
                    if self._is_spent():
                        raise self._ceiling()
                self._changed.wait()

    def abort(self, ids: Set[int] | None = None) -> None:
        """Forget what was asked, all or some of it, and what came. Then it can be used anew."""
        self._do(self._abort(ids))

    def close(self) -> None:
        """Whatever is on its way is given up."""
        if self._loop.is_closed():
            return
        self._do(self._abort())
        self._do(self._session.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Awaitable[T]) -> T:
        async def done() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(done(), self._loop).result()

    # --- in the loop ----------------------------------------------------------------------------------------

    async def _open(self) -> aiohttp.ClientSession:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, resolver=aiohttp.ThreadedResolver(), keepalive_timeout=KEEP_ALIVE_S
            ),
            timeout=aiohttp.ClientTimeout(self.timeout_s, sock_connect=min(CONNECT_S, self.timeout_s)),
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,  # no proxy, no .netrc
        )

    def _fill(self) -> None:
        """Begin what waits, while there is room."""
        with self._changed:
            while (
                self._waiting
                and len(self._tasks) < self.concurrency
                and not (self._failure or self._is_spent())
            ):
                ask = self._waiting.popleft()
                task = self._loop.create_task(self._work(ask))
                self._tasks[task] = ask.id
                task.add_done_callback(self._done)
            self._changed.notify_all()

    async def _work(self, ask: Ask) -> None:
        try:
            answer = await self._answer(ask)
        except _Spent:
            with self._changed:
                self._waiting.appendleft(ask)
            return
        with self._changed:
            self._answers.append(answer)
            self._changed.notify_all()

    def _done(self, task: asyncio.Task[None]) -> None:
        with self._changed:
            self._tasks.pop(task, None)
            failure = None if task.cancelled() else task.exception()
            if failure and not self._failure:
                self._failure = failure
                for other in self._tasks:
                    other.cancel()
        self._fill()

    async def _abort(self, ids: Set[int] | None = None) -> None:
        with self._changed:
            self._waiting = deque(ask for ask in self._waiting if ids is not None and ask.id not in ids)
            tasks = [task for task, asked in self._tasks.items() if ids is None or asked in ids]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # for `_done`
        with self._changed:
            self._answers = [one for one in self._answers if ids is not None and one.id not in ids]
            if ids is None:
                self._failure = None

    def _is_spent(self) -> bool:
        return self.max_total_tokens is not None and self.total_tokens >= self.max_total_tokens

    def _ceiling(self) -> CeilingError:
        reason = f"{self.total_tokens} tokens are used, of at most {self.max_total_tokens}"
        return CeilingError(f"{self.url}: {reason}", f"make max_total_tokens larger, {AGAIN}")

    async def _check(self) -> None:
        hint = "see whether the address is right and the server is up"
        try:
            found = await self._tries(2, lambda: self._exchange("GET", "/models"))
        except (_Fault, _Refusal) as fault:
            raise InputError(f"{self.url}/models: {fault}", hint) from None
        models = found.get("data")
        if not isinstance(models, list):
            raise InputError(f"{self.url}/models lists no models", hint)
        served = {str(m.get("id")): m.get("owned_by") for m in models if isinstance(m, dict)}
        if self.model not in served:
            names = ", ".join(self._scrubbed(name) for name in list(served)[:5])
            more = f" and {len(served) - 5} more" if len(served) > 5 else ""
            hint = f"it has {names}{more}" if served else "it has none"
            raise InputError(f"{self.url} has no model {self.model}", hint)
        self.is_vllm = served[self.model] == "vllm"

    async def _try_out(self, ask: Ask) -> Answer:
        hint = "change the caption's settings, or the server's"
        try:
            return await self._tries(1 + self.retries, lambda: self._chat(ask.id, self._body(ask)))
        except _Refusal as refusal:
            raise InputError(f"{self.url} does not take the caption's request: {refusal}", hint) from None
        except _Fault as fault:
            raise self._gone(fault, 1 + self.retries) from None
        except _Spent:
            raise self._ceiling() from None

    async def _answer(self, ask: Ask) -> Answer:
        body = self._body(ask)
        try:
            return await self._tries(1 + self.retries, lambda: self._chat(ask.id, body))
        except _Refusal as refusal:
            return Answer(ask.id, error=f"the endpoint does not take it: {refusal}")
        except _Fault as fault:
            async with self._trial:
                if self._answered_at < fault.since:  # no other row fared better meanwhile
                    await self._try_anything(fault)
            return Answer(ask.id, error=f"no answer in {1 + self.retries} tries: {fault}")

    async def _try_anything(self, fault: _Fault) -> None:
        """See whether the endpoint answers at all, or it was the row that it cannot answer.

        Raises:
            InputError: it does not.
        """
        trial = self._body(Ask(0, "Say yes.", None, {"max_tokens": 1}))
        try:
            await self._tries(2, lambda: self._chat(0, trial))
        except _Refusal:
            return
        except _Fault as last:
            raise self._gone(last, 1 + self.retries) from fault

    def _gone(self, fault: _Fault, tries: int) -> InputError:
        reason = f"{self.url} is gone: in {tries} tries and more it answered nothing; the last one: {fault}"
        return InputError(reason, f"see that the server is up, {AGAIN}")

    async def _tries(self, number: int, once: Callable[[], Awaitable[T]]) -> T:
        """What `once` gives, called up to `number` times; faults are waited out."""
        last = _Fault("it was not asked")
        for attempt in range(number):
            if attempt:
                wait_s = min(MAX_WAIT_S, FIRST_WAIT_S * 2 ** (attempt - 1))
                await asyncio.sleep(wait_s * random.uniform(0.5, 1))
            while (wait_s := self._not_before - self._loop.time()) > 0:
                await asyncio.sleep(wait_s + random.uniform(0, FIRST_WAIT_S / 4))
            since = self._loop.time()
            try:
                return await once()
            except _Fault as fault:
                last, last.since = fault, since
                if fault.after_s:  # of the endpoint, so all requests wait
                    until = self._loop.time() + min(fault.after_s, MAX_RETRY_AFTER_S)
                    self._not_before = max(self._not_before, until)
        raise last

    async def _exchange(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        """Send it once.

        Raises:
            _Fault: it may pass.
            _Refusal: it is the row's.
            InputError: every row would meet it.
        """
        try:
            async with self._session.request(
                method, self.url + path, data=body, allow_redirects=False
            ) as response:
                status, headers = response.status, response.headers
                data = bytearray()
                async for chunk in response.content.iter_any():
                    data += chunk
                    if len(data) > MAX_BODY_BYTES:
                        raise _Fault(f"HTTP {status} with a body of more than {MAX_BODY_BYTES >> 20} MiB")
        except TimeoutError:
            raise _Fault(f"no answer within {self.timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _Fault(self._scrubbed(f"{error}") or type(error).__name__) from None
        if 200 <= status < 300:
            return self._parsed(data)
        raise self._error(status, headers, data)

    def _error(self, status: int, headers: Mapping[str, str], data: bytearray) -> Exception:
        """What an answer that is none means."""
        if status in (401, 403):  # servers quote the key, so they are not quoted
            wish = "does not accept the key in" if self._key else "wants a key, and there is none in"
            reason = f"{self.url} {wish} {self.key_variable} (HTTP {status})"
            return InputError(reason, f"export {self.key_variable}=KEY, {AGAIN}")
        said = f"HTTP {status}: {self._said(data)}".rstrip(": ")
        if 300 <= status < 400:
            place = self._scrubbed(headers.get("Location", ""))
            reason = f"{self.url} sends requests on to another address (HTTP {status})"
            return InputError(reason, f"see where it leads, and give that address: {place}")
        if status == 429 and b"insufficient_quota" in data:
            return InputError(f"{self.url} has no more quota for this key: {said}", f"top it up, {AGAIN}")
        if status in PASSES or status >= 500:
            return _Fault(said, _seconds(headers.get("Retry-After", "")))
        if status in STOPS:
            hint = f"see whether it is a chat completions endpoint, and has the model {self.model}"
            return InputError(f"{self.url}: {said}", hint)
        return _Refusal(said)

    def _parsed(self, data: bytearray) -> dict[str, Any]:
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            raise _Fault("the answer is no JSON") from None
        if not isinstance(found, dict):
            raise _Fault("the answer is no JSON object")
        return found

    async def _chat(self, number: int, body: bytes) -> Answer:
        if self._is_spent():
            raise _Spent
        try:
            found = await self._exchange("POST", "/chat/completions", body)
        except _Refusal:
            self._answered_at = self._loop.time()
            raise
        try:
            choice = found["choices"][0]
            message, finish_reason = choice["message"], choice.get("finish_reason")
            text, refusal = message.get("content"), message.get("refusal")
        except (LookupError, TypeError, AttributeError):
            said = self._said(json.dumps(found).encode())
            raise _Fault(f"the answer has no choices: {said}") from None
        if not isinstance(text, str | None) or not isinstance(finish_reason, str | None):
            raise _Fault("the answer's content is no text")
        self._answered_at = self._loop.time()
        prompt_tokens, num_tokens = self._count(found.get("usage"))
        if (model := found.get("model") or self.model) != self.model:
            name = self._scrubbed(str(model))
            reason = f"{self.url} answers as model {name}, and was asked for {self.model}"
            raise InputError(reason, f"name the model {name}, or see what the server serves")
        error = f"the model refuses: {self._scrubbed(str(refusal))}" if refusal and not text else ""
        return Answer(number, _encodable(text or ""), finish_reason, num_tokens, prompt_tokens, error)

    def _count(self, usage: object) -> tuple[int | None, int | None]:
        """Tokens of prompt and reply.

        Raises:
            InputError: there is a ceiling, and they are not told.
        """
        told = usage if isinstance(usage, dict) else {}
        counts = [told.get(name) for name in ("prompt_tokens", "completion_tokens")]
        prompt, reply = (n if isinstance(n, int) and n >= 0 else None for n in counts)
        if self.max_total_tokens is not None and (prompt is None or reply is None):
            reason = f"{self.url} does not tell how many tokens it used, so no ceiling can be kept"
            raise InputError(reason, "leave max_total_tokens out")
        self.total_tokens += (prompt or 0) + (reply or 0)
        return prompt, reply

    def _body(self, ask: Ask) -> bytes:
        """The request. What is neutral is left out, for others than vLLM do not know all of it. To vLLM all
        is said: else it takes what the model's generation_config.json says.
        """
        given = ask.sampling
        content: str | list[dict[str, Any]] = ask.text
        if ask.image is not None:  # first, as in the chat templates
            address = f"data:image/jpeg;base64,{base64.b64encode(ask.image).decode()}"
            picture = {"type": "image_url", "image_url": {"url": address}}
            content = [picture, {"type": "text", "text": ask.text}]
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        body |= {"temperature": given.get("temperature", 0), "max_tokens": given["max_tokens"]}
        neutral = {"top_p": 1, "top_k": 0, "min_tokens": 0}
        if self.is_vllm:
            body |= {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "min_p": 0}
        for name, value in neutral.items():
            if self.is_vllm or given.get(name, value) != value:
                body[name] = given.get(name, value)
        if given.get("seed") is not None:
            body["seed"] = given["seed"]
        if schema := given.get("json_schema"):
            described = {"name": "caption", "schema": json.loads(schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": described}
        return json.dumps(body).encode()

    def _scrubbed(self, text: str) -> str:
        """Of a server's words: one short line, without the key."""
        if self._key:
            text = text.replace(self._key, "***")
        line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return line if len(line) <= MAX_SAID_CHARACTERS else f"{line[:MAX_SAID_CHARACTERS]}..."

    def _said(self, data: bytes | bytearray) -> str:
        """An error's message."""
        text: Any = data[:65536].decode("utf-8", "replace")
        with suppress(ValueError, RecursionError):
            text = json.loads(data)
            while isinstance(text, dict):
                text = next((text[name] for name in ("error", "message", "detail") if text.get(name)), "")
        return self._scrubbed(str(text))


def address(url: str) -> str:
    """Where /models and /chat/completions are.

    Raises:
        InputError: it is no address, or holds a secret, which would be written down with it.
    """
    hint = "give it as http://HOST:PORT/v1; a key goes into the environment"
    try:
        parsed = yarl.URL(url)
    except ValueError:
        parsed = yarl.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError("the endpoint's address is none of http or https", hint)
    if parsed.user or parsed.password or parsed.query_string or parsed.fragment:
        raise InputError("the endpoint's address has more than a host, a port and a path", hint)
    whole = str(parsed).rstrip("/").removesuffix("/chat/completions")
    return whole if whole.endswith("/v1") else f"{whole}/v1"


def _seconds(text: str) -> float | None:
    """What a Retry-After says: seconds, or a date."""
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text.strip(), re.ASCII):
        return float(text)
    with suppress(ValueError, OverflowError):
        date = email.utils.parsedate_to_datetime(text)
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        return max(0.0, (date - datetime.now(UTC)).total_seconds())
    return None


def _encodable(text: str) -> str:
    """JSON may hold halves of characters; Parquet may not."""
    return text.encode("utf-8", "replace").decode()
