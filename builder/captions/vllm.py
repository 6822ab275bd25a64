"""vLLM in this process, with a steady number of requests in flight: the next shard's are fed while the last
of one finish.

So decoding images overlaps with generating, and the engine does not drain at the end of a shard.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

from PIL import Image

from builder.captions.replies import Reply, reply_key
from builder.errors import InputError
from builder.model import hub_model, identity, model_folder

if TYPE_CHECKING:
    from vllm import SamplingParams

    from builder.stages.caption import Caption

log = logging.getLogger(__name__)
PREPARED = 64  # requests that are made ready at a time
MAX_QUOTED_CHARACTERS = 20_000  # of the row in a prompt; what no model reads need not be tokenized
_MARKED = re.compile("\ue000([a-zA-Z_]\\w*)\ue001")  # a placeholder; the template may have braces of its own


@dataclass(eq=False)  # each is itself
class Job:
    """What is asked for one shard: (uid, image, row) each. `deliver` gets what became of it, in any order."""

    requests: Iterator[tuple[str, bytes, Mapping[str, Any]]]
    known: Mapping[str, Reply]  # replies that are there already, by their keys
    deliver: Callable[[str, Reply], None]
    more: bool = True  # requests that nobody has looked at yet
    ready: deque[_Ready] = field(default_factory=deque)
    asked: int = 0  # requests in the engine
    is_broken: bool = False  # begun ahead of its time, and then its input could not be read

    def is_done(self) -> bool:
        return not self.more and not self.ready and not self.asked


@dataclass(frozen=True)
class _Ready:
    """A request as the engine takes it: its image decoded, its prompt in tokens."""

    uid: str
    params: SamplingParams
    key: str
    prompt_cut: bool
    rendered: Any = None


@dataclass(frozen=True)
class _Asked:
    """A request in the engine."""

    job: Job
    uid: str
    engines_id: str  # the engine's own name of it
    key: str
    prompt_cut: bool


def _refusal(error: Exception) -> Reply:
    return Reply(error=f"the model does not take it: {str(error).splitlines()[0][:200]}")


def begins(tokenizer: Any) -> list[int]:
    """The token, if any, that a tokenizer begins a text with; a chat template may leave it to the tokenizer
    or write it.
    """
    first: list[int] = tokenizer.encode("a")[:1]
    return first if first == [tokenizer.bos_token_id] else []


@lru_cache(maxsize=64)
def _encoded(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Of what a prompt says in every row."""
    return tuple(tokenizer.encode(text, add_special_tokens=False))


class Engine:
    """One model and one prompt."""

    def __init__(self, settings: Caption) -> None:
        settings.check()
        self.settings = settings
        folder = model_folder(settings.model)
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(settings.kv_cache()))
        os.environ["VLLM_COMPUTE_NANS_IN_LOGITS"] = "1"  # counted beside each request's tokens; vLLM goes on
        import torch

        on_gpu = torch.cuda.is_available()
        if not on_gpu:  # a second process would only take turns with the first one
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from transformers import AutoProcessor
        from vllm import LLM, SamplingParams
        from vllm.exceptions import VLLMClientError

        name, revision = (str(folder), None) if folder else hub_model(settings.model)
        self.llm = LLM(
            model=name, revision=revision, tokenizer_revision=revision, dtype=settings.dtype,
            max_model_len=settings.max_model_len, gpu_memory_utilization=settings.gpu_memory_utilization,
            limit_mm_per_prompt={"image": 1}, mm_processor_cache_gb=0, enable_prefix_caching=False,
            disable_log_stats=True, seed=0, enforce_eager=not on_gpu,
        )  # fmt: skip
        self.engine = self.llm.llm_engine
        template = AutoProcessor.from_pretrained(name, revision=revision)
        self.tokenizer, self.refused = template.tokenizer, (ValueError, VLLMClientError)
        self.begins = begins(self.tokenizer)
        self.made_by = f"{identity(settings.model)} {settings.dtype}"
        marked = re.sub(r"\{([a-zA-Z_]\w*)\}", "\ue000\\1\ue001", settings.prompt)
        content = [{"type": "image"}, {"type": "text", "text": marked}]
        message = [{"role": "user", "content": content}]
        self.rendered = template.apply_chat_template(message, add_generation_prompt=True)
        self.sampling = SamplingParams(
            temperature=settings.temperature, top_k=settings.top_k,
            max_tokens=settings.max_tokens, min_tokens=settings.min_tokens,
        )  # fmt: skip
        self.jobs: list[Job] = []
        self.asked: dict[str, _Asked] = {}
        self.number = 0
        self.room = 0  # tokens that are left for what a prompt quotes
        self._watch()
        self._try_out()

    def _watch(self) -> None:
        """Note in `not_finite` the requests, by the engine's ids, that had logits that are not numbers."""
        self.not_finite: set[str] = set()
        core = self.engine.engine_core
        get_output = core.get_output

        def watched() -> Any:
            found = get_output()
            self.not_finite.update(output.request_id for output in found.outputs if output.num_nans_in_logits)
            return found

        core.get_output = watched

    def _try_out(self) -> None:
        """One token for an empty picture, to see that the prompt fits and that the weights are whole.

        Raises:
            InputError: it does not, or they are not.
        """
        picture, limit = Image.new("RGB", (64, 64)), self.engine.model_config.max_model_len
        prompt, _ = self.prompt(picture, dict.fromkeys(self.settings.quotes(), ""))
        (rendered,) = self.engine.renderer.render_cmpl([prompt])
        taken = len(rendered["prompt_token_ids"])
        self.room = limit - self.settings.max_tokens - taken
        if self.room < 0:
            name, reply = self.settings.name, self.settings.max_tokens
            reason = f"caption '{name}': prompt and picture take {taken} tokens, the reply {reply}"
            reason = f"{reason}, in all at most {limit}"
            raise InputError(reason, f"make the prompt or max_tokens smaller, or {name}.max_model_len larger")
        params = self.sampling.clone()
        params.max_tokens, params.min_tokens = 1, 1
        self.llm.generate([prompt], params, use_tqdm=False)
        if self.not_finite:
            reason = f"the logits of model {self.settings.model} are not finite: its weights are damaged"
            raise InputError(reason, "copy its *.safetensors again")

    def prompt(self, picture: Image.Image, row: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
        """What vLLM takes, and whether text of the row was cut to fit."""
        ids, cut = self.tokens(row)
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": picture}}, cut

    def tokens(self, row: Mapping[str, Any]) -> tuple[list[int], bool]:
        """The prompt, and whether text of the row was cut to fit.

        As tokens, for the chat template has put the special ones in place. Text of the row is data: in it
        special tokens and placeholders are characters like others.
        """
        ids: list[int] = []
        room, cut = self.room, False
        for number, part in enumerate(_MARKED.split(self.rendered)):
            if number % 2 == 0:
                ids += _encoded(self.tokenizer, part)
                continue
            text = str(row[part])
            known = text[:MAX_QUOTED_CHARACTERS]
            quoted = self.tokenizer.encode(known, add_special_tokens=False, split_special_tokens=True)
            cut = cut or len(quoted) > room or len(text) > MAX_QUOTED_CHARACTERS
            ids += quoted[:room]
            room -= len(quoted[:room])
        if ids[:1] != self.begins:
            ids = self.begins + ids
        return ids, cut

    def params(self, uid: str) -> SamplingParams:
        """How to decode a row's caption; where that is at random, the row's uid is the seed."""
        if not self.settings.temperature:
            return self.sampling
        params = self.sampling.clone()
        seed = hashlib.sha256(f"{self.settings.name} {uid}".encode()).digest()
        params.seed = int.from_bytes(seed[:4], "big")
        return params

    def replies(self, requests: Iterable[tuple[str, bytes, Mapping[str, Any]]]) -> dict[str, Reply]:
        """uid -> what the model says of each (uid, image, row)."""
        found: dict[str, Reply] = {}
        self.finish(Job(iter(requests), {}, found.__setitem__))
        return found

    def finish(self, job: Job, more: Callable[[], Job | None] = lambda: None) -> None:
        """Do a job to its end. Where it leaves room in the engine, `more` is asked for the next one, which is
        begun.

        Whatever goes wrong, no request is left in the engine.
        """
        if job not in self.jobs:
            self.jobs.append(job)
        try:
            while not job.is_done():
                self._fill(job, more)
                for output in self.engine.step() if self.asked else ():
                    if output.finished:
                        self._deliver(self.asked.pop(output.request_id), output.outputs[0])
            self.jobs.remove(job)
        except BaseException:
            self.engine.abort_request(list(self.asked))
            self.asked.clear()
            self.jobs.clear()
            raise

    def _fill(self, current: Job, more: Callable[[], Job | None]) -> None:
        """Ask until `in_flight` requests are in the engine."""
        for job in list(self.jobs):
            try:
                while (job.more or job.ready) and len(self.asked) < self.settings.in_flight:
                    self._ask(job)
            except Exception:
                if job is current:
                    raise
                log.info("a shard that was begun ahead is begun anew when its turn comes", exc_info=True)
                self._give_up(job)
        if len(self.asked) < self.settings.in_flight and (job_ahead := more()):
            self.jobs.append(job_ahead)

    def _give_up(self, job: Job) -> None:
        job.is_broken = True
        self.jobs.remove(job)
        names = [name for name, asked in self.asked.items() if asked.job is job]
        self.engine.abort_request(names)
        for name in names:
            del self.asked[name]

    def _ask(self, job: Job) -> None:
        """Put the next request of a job to the engine."""
        if not job.ready:
            self._prepare(job)
        if not job.ready:
            return
        ready = job.ready.popleft()
        self.number += 1
        name = str(self.number)
        try:
            engines_id = self.engine.add_request(name, ready.rendered, ready.params)
        except self.refused as error:
            job.deliver(ready.uid, _refusal(error))
            return
        job.asked += 1
        self.asked[name] = _Asked(job, ready.uid, engines_id, ready.key, ready.prompt_cut)

    def _prepare(self, job: Job) -> None:
        """The next requests of a job: answered by what is known, or made ready for the engine.

        A group at a time, and each step for all of it: one by one between the engine's steps they cost half
        as much again, for their data and code have left the caches.
        """
        group = list(islice(job.requests, PREPARED))
        job.more = len(group) == PREPARED
        unknown = [found for request in group if (found := self._look_up(job, *request))]
        pictures = [self._decode(job, ready.uid, image) for ready, _, image in unknown]
        for (ready, ids, _), picture in zip(unknown, pictures, strict=True):
            if picture is None:
                continue
            try:
                prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": picture}}
                (rendered,) = self.engine.renderer.render_cmpl([prompt])
            except self.refused as error:  # a picture of a size that takes more tokens than the model has
                job.deliver(ready.uid, _refusal(error))
            else:
                job.ready.append(replace(ready, rendered=rendered))

    def _look_up(
        self, job: Job, uid: str, image: bytes, row: Mapping[str, Any]
    ) -> tuple[_Ready, list[int], bytes] | None:
        """What is to be asked, prompt and image; None where the reply is known."""
        ids, cut = self.tokens(row)
        params = self.params(uid)
        sampling = {
            "temperature": params.temperature, "top_k": params.top_k, "max_tokens": params.max_tokens,
            "min_tokens": params.min_tokens, "seed": params.seed,
        }  # fmt: skip
        key = reply_key(self.made_by, ids, sampling, image)
        if known := job.known.get(key):
            job.deliver(uid, known if known.prompt_cut == cut else replace(known, prompt_cut=cut))
            return None
        return _Ready(uid, params, key, cut), ids, image

    def _decode(self, job: Job, uid: str, image: bytes) -> Image.Image | None:
        try:
            return Image.open(io.BytesIO(image)).convert("RGB")
        except (OSError, ValueError) as error:
            job.deliver(uid, Reply(error=f"the image cannot be decoded: {error}"))
            return None

    def _deliver(self, asked: _Asked, output: Any) -> None:
        asked.job.asked -= 1
        if asked.engines_id in self.not_finite:
            self.not_finite.discard(asked.engines_id)
            reply = Reply(error="the model's logits are not finite")
        else:
            number = len(output.token_ids)
            reply = Reply(output.text, output.finish_reason, number, asked.prompt_cut, asked.key)
        asked.job.deliver(asked.uid, reply)

    def close(self) -> None:
        self.engine.engine_core.shutdown()
