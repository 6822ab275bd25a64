"""vLLM in this process: one model, for every column that it makes."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from PIL import Image

from builder.captions.asking import PREPARED, Asking, Job, Ready, Request
from builder.captions.feeder import AT_A_TIME, NO_PICTURE, Failure, Feeder, decoded, not_decoded
from builder.captions.kinds import PLACEHOLDER, Kind
from builder.captions.replies import Reply, reply_key
from builder.errors import InputError
from builder.machine import Machine
from builder.model import hub_model, model_folder

if TYPE_CHECKING:
    from builder.stages.caption import Caption

MAX_QUOTED_CHARACTERS = 20_000  # of the row in a prompt; what no model reads need not be tokenized
_SEEING = ("*vision*", "*visual*", "*projector*", "*connector*", "*merger*")  # modules, by vLLM's names
_MARKED = re.compile("\ue000([a-zA-Z_]\\w*)\ue001")  # a placeholder; the template may have braces of its own


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


class Prompt:
    """What a kind of caption asks, in the chat format of a model."""

    def __init__(self, kind: Kind, template: Any) -> None:
        """`template` is the model's processor, or the tokenizer of one that only reads.

        Raises:
            InputError: it has no chat template.
        """
        self.tokenizer = getattr(template, "tokenizer", template)
        self.begins = begins(self.tokenizer)
        self.room = 0  # tokens that are left for what a prompt quotes
        marked = PLACEHOLDER.sub("\ue000\\1\ue001", kind.prompt)
        content: Any = marked
        if template is not self.tokenizer:
            picture = [{"type": "image"}] if kind.image else []
            content = [*picture, {"type": "text", "text": marked}]
        message = [{"role": "user", "content": content}]
        try:
            self.rendered: str = template.apply_chat_template(
                message, add_generation_prompt=True, tokenize=False
            )
        except (ValueError, TypeError) as error:
            reason = f"the chat template of the model cannot be used: {str(error).splitlines()[0][:200]}"
            raise InputError(
                reason, "copy chat_template.jinja from the one that it was trained from"
            ) from error

    def tokens(self, row: Mapping[str, Any]) -> tuple[list[int], bool]:
        """The prompt for a row, and whether text of the row was cut to fit.

        As tokens, for the chat template has put the special ones in place. Text of the row is data: in it
        special tokens and placeholders are characters like others.
        """
        ids: list[int] = []
        room, cut = self.room, False
        parts = _MARKED.split(self.rendered)
        for number, part in enumerate(parts):
            if number % 2 == 0:
                ids += _encoded(self.tokenizer, part)
                continue
            text = str(row[part])
            known = text[:MAX_QUOTED_CHARACTERS]
            quoted = self.tokenizer.encode(known, add_special_tokens=False, split_special_tokens=True)
            share = room // ((len(parts) - number) // 2)  # of what is left, and as many quotes to come
            cut = cut or len(quoted) > share or len(text) > MAX_QUOTED_CHARACTERS
            ids += quoted[:share]
            room -= len(quoted[:share])
        if ids[:1] != self.begins:
            ids = self.begins + ids
        return ids, cut


class Engine(Asking):
    """One model, and the columns that it makes; the first says how it is loaded."""

    def __init__(self, *columns: Caption, **more: Any) -> None:
        """`more` is for vLLM's `LLM`."""
        settings = columns[0]
        settings.check()
        super().__init__(settings.in_flight, len(columns))
        folder = model_folder(settings.model)
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(settings.kv_cache()))
        os.environ["VLLM_COMPUTE_NANS_IN_LOGITS"] = "1"  # counted beside each request's tokens; vLLM goes on
        import torch

        on_gpu = torch.cuda.is_available()
        if not on_gpu:  # a second process would only take turns with the first one
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from transformers import AutoProcessor, AutoTokenizer
        from vllm import LLM
        from vllm.exceptions import VLLMClientError

        name, revision = (str(folder), None) if folder else hub_model(settings.model)
        looking = sum(column.image for column in columns)
        of_images: dict[str, Any] = {}
        if looking:
            of_images = {"limit_mm_per_prompt": {"image": 1}, "mm_processor_cache_gb": 0}
        if looking > 1:  # what is before the first difference of two columns' prompts, their image above all
            of_images |= {"enable_prefix_caching": True} | ({} if on_gpu else {"block_size": 32})
        if settings.quantization:  # of the language model: what sees the image stays as it is
            of_images |= {"quantization": "fp8_per_channel", "quantization_config": {"ignore": list(_SEEING)}}
        self.llm = LLM(
            model=name, revision=revision, tokenizer_revision=revision, dtype=settings.dtype,
            max_model_len=settings.max_model_len, gpu_memory_utilization=settings.gpu_memory_utilization,
            **{"enable_prefix_caching": False, **of_images, **more},
            tensor_parallel_size=settings.tensor_parallel_size,
            # Without white space: within the grammar of JSON a model may write it for ever.
            structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
            disable_log_stats=True, seed=0, enforce_eager=not on_gpu,
            # On a CPU vLLM's sampler cannot take back a seeded draw, which it does for a part of a prompt.
            enable_chunked_prefill=on_gpu,
        )  # fmt: skip
        self.engine = self.llm.llm_engine
        if looking and not self.engine.model_config.is_multimodal_model:
            reason = f"model {settings.model} sees no pictures"
            raise InputError(reason, f"name another for {columns[0].name}.model, or set image=false")
        # By what the model is, whichever columns it makes: a prompt is the same in all company.
        loader = AutoProcessor if self.engine.model_config.is_multimodal_model else AutoTokenizer
        self.template = loader.from_pretrained(name, revision=revision)
        self.refused = (ValueError, VLLMClientError)
        self.model = settings.model
        self.made_by = settings.made_by()
        # Of a picture that several columns are made of, which take turns.
        self._decoded = lru_cache(maxsize=2 * PREPARED if looking > 1 else 0)(decoded)
        self.threads = ThreadPoolExecutor(
            max(1, int(Machine.here().cpus)), "decode"
        )  # the engine waits meanwhile
        self.prompts: dict[Kind, Prompt] = {}
        self.greedy: dict[Kind, Any] = {}  # their sampling, as vLLM takes it: the same for every row
        self.engines_ids: dict[str, str] = {}  # the engine's own names of the requests in it -> ours
        self._watch()
        for column in columns:
            self.prompt_of(column)
        number = settings.num_feeders() if looking else 0
        self.feeder = Feeder(self.engine.vllm_config, number, again=looking > 1) if number else None
        # Between the engine's steps code and data leave the caches: large groups, seldom. Where columns take
        # turns the pictures of a group are kept, so it is smaller.
        self.at_a_time = AT_A_TIME if self.feeder else PREPARED if looking > 1 else 4 * PREPARED
        self.waited_s = 0.0  # with nothing in the engine

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

    def prompt_of(self, kind: Kind) -> Prompt:
        """The prompt of a kind, tried out with an empty picture and one token, to see that it fits and that
        the weights are whole.

        Raises:
            InputError: it does not, or they are not.
        """
        if kind in self.prompts:
            return self.prompts[kind]
        prompt = Prompt(kind, self.template)
        empty, _ = prompt.tokens(dict.fromkeys(kind.quotes(), ""))
        limit = self.engine.model_config.max_model_len
        request, taken = _to_render(empty), len(empty)
        if kind.image:
            picture = Image.new("RGB", (64, 64))
            request = _to_render(empty, picture, "empty")
            (rendered,) = self.engine.renderer.render_cmpl([request])
            (place,) = rendered["mm_placeholders"]["image"]
            ids, after = rendered["prompt_token_ids"], place.offset + place.length
            largest = self._tokens_of_an_image(limit)
            taken = len(ids) - place.length + max(place.length, largest)
            if (
                ids[: place.offset] != empty[: place.offset]
                or ids[after:] != empty[len(empty) - len(ids) + after :]
            ):
                # Else vLLM has made text of it and tokens of that again: a row's special tokens would count.
                reason = f"vLLM does not find the image's place in the prompt of {self.model}"
                raise InputError(reason, "see that its chat template writes one image token for an image")
        prompt.room = limit - kind.max_tokens - taken
        if prompt.room < 0:
            reason = (
                f"caption '{kind.name}': prompt and picture take {taken} tokens, the reply {kind.max_tokens}"
            )
            reason = f"{reason}, in all at most {limit}"
            hint = f"make the prompt or max_tokens smaller, or {kind.name}.max_model_len larger"
            raise InputError(reason, hint)
        params = self.params(kind.sampling(""))
        params.max_tokens, params.min_tokens = 1, 1
        try:
            self.llm.generate([request], params, use_tqdm=False)
        except self.refused as error:  # a JSON schema that the engine cannot guide by
            said = str(error).splitlines()[0][:200]
            reason = f"model {self.model} does not take caption '{kind.name}': {said}"
            raise InputError(reason, "change its json_schema") from error
        if self.not_finite:
            reason = f"the logits of model {self.model} are not finite: its weights are damaged"
            raise InputError(reason, "copy its *.safetensors again")
        self.prompts[kind] = prompt
        return prompt

    def _tokens_of_an_image(self, limit: int) -> int:
        """At most, for where they depend on its size; 0 where the model does not say."""
        info = self.engine.renderer.get_mm_processor().info
        found = info.get_mm_max_tokens_per_item(limit, {"image": 1})
        return int((found or {}).get("image", 0))

    def params(self, sampling: Mapping[str, Any]) -> Any:
        """`sampling` as vLLM takes it."""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        given = dict(sampling)
        if schema := given.pop("json_schema", ""):
            given["structured_outputs"] = StructuredOutputsParams(json=schema)
        return SamplingParams(**given)

    def prepare(self, job: Job, requests: Sequence[Request]) -> None:
        """A group at a time, and each step for all of it: one by one between the engine's steps they cost
        half as much again, for their data and code have left the caches.
        """
        prompt = self.prompt_of(job.kind)
        unknown = [found for request in requests if (found := self._look_up(job, prompt, request))]
        if self.feeder and job.kind.image:
            for ready in unknown:
                image = ready.request.image
                assert image is not None  # then it is not looked up
                job.preparing.append((ready, self.feeder.submit(ready.request.sha256, image, ready.prompt)))
            return
        for first in range(0, len(unknown), PREPARED):
            group = unknown[first : first + PREPARED]
            pictures = self.threads.map(self._picture, group) if job.kind.image else [None] * len(group)
            for ready, picture in zip(group, pictures, strict=True):
                if isinstance(picture, Failure):
                    job.came(ready.request, Reply(error=picture.reason))
                    continue
                try:
                    request = _to_render(ready.prompt, picture, ready.request.sha256)
                    (rendered,) = self.engine.renderer.render_cmpl([request])
                except self.refused as error:  # a picture of a size that takes more tokens than the model has
                    job.came(ready.request, _refusal(error))
                else:
                    job.ready.append(replace(ready, prompt=rendered))

    def has_room(self, job: Job) -> bool:
        if self.feeder and job.kind.image:
            # Not all the room there is: columns take turns, and a retry may come while others wait.
            share = max(AT_A_TIME, self.feeder.room() // (self.columns + 1))
            return len(job.preparing) + AT_A_TIME <= share and self.feeder.has_room(AT_A_TIME)
        return super().has_room(job)

    def collect(self, job: Job, *, wait: bool = False) -> None:
        while job.preparing and self.feeder:
            ready, pending = job.preparing[0]
            if not wait and not self.feeder.is_ready(pending):
                return
            start = time.monotonic()
            made, wait = self.feeder.result(pending), False
            self.waited_s += time.monotonic() - start if not self.asked else 0.0
            job.preparing.popleft()
            if isinstance(made, Failure):
                job.came(ready.request, Reply(error=made.reason))
            else:
                job.ready.append(replace(ready, prompt=made))

    def _look_up(self, job: Job, prompt: Prompt, request: Request) -> Ready | None:
        """What is to be asked, its prompt as tokens; None where the reply is known, or there can be none."""
        if job.kind.image and request.image is None:
            job.came(request, Reply(error="its image is not in the tar"))
            return None
        ids, cut = prompt.tokens(request.row)
        sampling = job.kind.sampling(request.uid, request.attempt)
        key = reply_key(self.made_by, ids, sampling, bytes.fromhex(request.sha256), request.attempt)
        if known := job.known.get(key):
            job.came(request, known if known.prompt_cut == cut else replace(known, prompt_cut=cut))
            return None
        if sampling["seed"] is not None:
            return Ready(request, key, cut, self.params(sampling), ids)
        if job.kind not in self.greedy:
            self.greedy[job.kind] = self.params(sampling)
        return Ready(request, key, cut, self.greedy[job.kind], ids)

    def _picture(self, ready: Ready) -> Image.Image | Failure:
        try:
            return self._decoded(ready.request.sha256, ready.request.image or b"")
        except NO_PICTURE as error:
            return Failure(not_decoded(error))

    def put(self, name: str, ready: Ready) -> Reply | None:
        try:
            self.engines_ids[name] = self.engine.add_request(name, ready.prompt, ready.sampling)
        except self.refused as error:
            return _refusal(error)
        return None

    def step(self) -> Iterator[tuple[str, Reply]]:
        for output in self.engine.step():
            if output.finished:
                name, said = output.request_id, output.outputs[0]
                engines_id = self.engines_ids.pop(name)
                _, ready = self.asked[name]
                if engines_id in self.not_finite:
                    self.not_finite.discard(engines_id)
                    yield name, Reply(error="the model's logits are not finite")
                else:
                    number = len(said.token_ids)
                    yield name, Reply(said.text, said.finish_reason, number, ready.prompt_cut, ready.key)

    def abort(self, names: Sequence[str]) -> None:
        self.engine.abort_request(list(names))
        for name in names:
            self.engines_ids.pop(name, None)

    def close(self) -> None:
        if self.feeder:
            self.feeder.close()
        self.threads.shutdown()
        self.engine.engine_core.shutdown()


def _to_render(ids: list[int], picture: Image.Image | None = None, name: str = "") -> dict[str, Any]:
    """`name` is by which the engine knows a picture that it has encoded: nothing but its hash will do."""
    if picture is None:
        return {"prompt_token_ids": ids}
    of_image = {"multi_modal_data": {"image": picture}, "multi_modal_uuids": {"image": [name]}}
    return {"prompt_token_ids": ids, **of_image}
