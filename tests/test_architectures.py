"""Captions by other architectures than LLaVA, through vLLM's real engine; their weights alone are random."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image, ImageDraw

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

ASKED = "Describe this image. Its alt text was: "
SEEING: dict[Callable[[Path], None], str] = {
    tiny.llava: "<image>",
    tiny.smolvlm: "<image>",
    tiny.qwen_vl: "<|image_pad|>",
}


def _pictures() -> list[Image.Image]:
    """Three, of different shapes."""
    found = []
    for size, colour in (((96, 64), "red"), ((64, 160), "blue"), ((200, 200), "green")):
        picture = Image.new("RGB", size, "white")
        ImageDraw.Draw(picture).ellipse((8, 8, size[0] - 8, size[1] // 2), fill=colour)
        found.append(picture)
    return found


@contextmanager
def _engine(folder: Path, **settings: Any) -> Iterator[Any]:
    from vllm import LLM

    llm = LLM(
        model=str(folder), dtype="float32", max_model_len=1024, enable_prefix_caching=False, seed=0,
        enforce_eager=True, disable_log_stats=True, max_num_seqs=4, max_num_batched_tokens=1024, **settings,
    )  # fmt: skip
    try:
        yield llm.llm_engine
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def _tokens(tokenizer: Any, rendered: str, quoted: str) -> list[int]:
    """The prompt, the alt text put where it says so; special tokens in that are characters like others."""
    before, after = rendered.split("\ue000")
    encode = tokenizer.encode
    text = encode(quoted, add_special_tokens=False, split_special_tokens=True)
    return [*encode(before, add_special_tokens=False), *text, *encode(after, add_special_tokens=False)]


def _said(engine: Any, prompts: Sequence[Mapping[str, Any]], max_tokens: int = 12) -> list[str]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens, min_tokens=max_tokens)
    for number, prompt in enumerate(prompts):
        (rendered,) = engine.renderer.render_cmpl([prompt])
        engine.add_request(str(number), rendered, params)
    said: dict[int, Any] = {}
    while engine.has_unfinished_requests():
        said |= {int(output.request_id): output.outputs[0] for output in engine.step() if output.finished}
    assert [len(said[number].token_ids) for number in range(len(prompts))] == [max_tokens] * len(prompts)
    return [said[number].text for number in range(len(prompts))]


@pytest.mark.parametrize("write", SEEING, ids=lambda write: write.__name__)
def test_it_says_something_else_of_another_picture(write: Callable[[Path], None], tmp_path: Path) -> None:
    from transformers import AutoProcessor

    write(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    tokenizer, image = processor.tokenizer, SEEING[write]
    content = [{"type": "image"}, {"type": "text", "text": f"{ASKED}\ue000"}]
    rendered = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    ids = _tokens(tokenizer, rendered, f"a {image} in <|im_end|> words")
    assert ids.count(tokenizer.convert_tokens_to_ids(image)) == 1  # the template's, not the alt text's
    prompts = [{"prompt_token_ids": ids, "multi_modal_data": {"image": picture}} for picture in _pictures()]
    with _engine(tmp_path, limit_mm_per_prompt={"image": 1}, mm_processor_cache_gb=0) as engine:
        assert engine.model_config.is_multimodal_model
        for prompt in prompts:
            (seen,) = engine.renderer.render_cmpl([prompt])
            (place,) = seen["mm_placeholders"]["image"]
            start = ids.index(tokenizer.convert_tokens_to_ids(image))
            assert place.offset == start
            around = [*ids[:start], *ids[start + 1 :]]  # all but the placeholder is as it was
            assert (
                seen["prompt_token_ids"][:start] + seen["prompt_token_ids"][start + place.length :] == around
            )
        captions = _said(engine, prompts)
        assert len(set(captions)) == 3
        assert captions == _said(engine, prompts)


def test_a_model_that_sees_nothing_rewrites(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tiny.llama(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    message = [{"role": "user", "content": f"{ASKED}\ue000"}]
    rendered = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    texts = ("a red circle", "free shipping <|eot_id|>", "東京の夜景")
    prompts = [{"prompt_token_ids": _tokens(tokenizer, rendered, text)} for text in texts]
    ends = [
        prompt["prompt_token_ids"].count(tokenizer.convert_tokens_to_ids("<|eot_id|>")) for prompt in prompts
    ]
    assert ends == [1, 1, 1]
    with _engine(tmp_path) as engine:
        assert not engine.model_config.is_multimodal_model
        assert len(set(_said(engine, prompts))) == 3
