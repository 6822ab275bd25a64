"""Kinds of caption: what is asked about a row, how the reply is decoded, and what of it is kept.

A `Kind` says all of a caption column but who makes it; `Caption.of(kind, model=...)` is the stage that does.
Those of the papers stand at the end, each with its source.

Text of the row in a prompt is data: what looks like a special token in it is characters like others.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, Literal

import jsonschema
from pydantic import Field

from builder.captions.checks import Checks, Defect, find, whole_sentences
from builder.core import Count, Identifier, Json
from builder.errors import RecipeError

QUOTABLE = ("org_caption", "url")  # of the row; besides, every caption that a stage before makes
FAIL, NULL = "fail", "null"
PLACEHOLDER = re.compile(r"\{([a-zA-Z_]\w*)\}")
_RATING = re.compile(r"rating\W{0,4}(?<!-)([0-9]+(?:\.[0-9]+)?)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.-])([0-9]+(?:\.[0-9]+)?)(?![\w.]*\d|-)")
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class Kind(Checks):
    """One kind of caption.

    `prompt` may quote, in braces, `QUOTABLE` columns of the row and captions that are made before this one.
    `image`: the model sees the picture; without, it only rewrites. Temperature 0 is greedy, `top_k` 0 and
    `top_p` 1 restrict nothing; at random, the row's uid is the seed.

    `value` is what a reply becomes: `text`; `json`, one object, by `json_schema` where it is given, which
    also guides the decoding; or `rating`, an integer of 1 to 5.

    A reply with a defect that is not `tolerated` is asked for again, `retries` times at most, at random. One
    that is no good after that is `caption_failed` (`otherwise="fail"`), is left out (`null`), or the column
    that `otherwise` names stands in for it.

    Raises:
        RecipeError: the settings contradict one another.
    """

    name: Identifier
    prompt: str
    image: bool = True
    max_tokens: Count = 128
    min_tokens: Annotated[int, Field(ge=0)] = 1  # an empty caption is none
    temperature: Number = 0.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    value: Literal["text", "json", "rating"] = "text"
    json_schema: str = ""
    retries: Annotated[int, Field(ge=0, le=10)] = 2
    retry_temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.7
    retry_top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    tolerated: tuple[Defect, ...] = (Defect.TRUNCATED, Defect.BOILERPLATE)
    otherwise: str = FAIL

    def __post_init__(self) -> None:
        if self.name in (FAIL, NULL):
            raise RecipeError(f"a caption cannot be called '{self.name}'", "give it another name")
        if self.min_tokens > self.max_tokens:
            tokens = f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}"
            raise RecipeError(f"caption '{self.name}': {tokens}", "change one of them")
        if self.json_schema and self.value != "json":
            raise RecipeError(f"caption '{self.name}' has a json_schema and is no JSON", "set value=json")
        if self.json_schema:
            try:
                jsonschema.Draft202012Validator.check_schema(json.loads(self.json_schema))
            except (ValueError, jsonschema.SchemaError) as error:
                said = str(error).splitlines()[0]
                reason = f"caption '{self.name}': its json_schema is none: {said}"
                raise RecipeError(reason, "give a JSON schema, as text") from error

    def quotes(self) -> list[str]:
        """Columns of the row that the prompt quotes."""
        return list(dict.fromkeys(PLACEHOLDER.findall(self.prompt)))

    def check_quoted(self, made: Iterable[str]) -> None:
        """`made` are the captions that there are before this one.

        Raises:
            RecipeError: the prompt quotes, or `otherwise` names, what there is not.
        """
        there = dict.fromkeys((*QUOTABLE, *made))
        for name in (name for name in self.quotes() if name not in there):
            reason = f"the prompt of caption '{self.name}' quotes {{{name}}}"
            raise RecipeError(reason, f"a prompt may quote: {', '.join(there)}")
        if self.otherwise not in (FAIL, NULL, *there):
            reason = f"caption '{self.name}': otherwise={self.otherwise}, which there is not"
            raise RecipeError(reason, f"{FAIL}, {NULL}, or a column: {', '.join(there)}")

    def sampling(self, uid: str, attempt: int = 0) -> dict[str, Json]:
        """How a row's reply is decoded, as it enters the reply's key: what restricts nothing is left out."""
        temperature, top_p = self.temperature, self.top_p
        if attempt:  # hotter each time
            temperature = max(temperature, self.retry_temperature) + 0.15 * (attempt - 1)
            top_p = min(top_p, self.retry_top_p)
        seed = hashlib.sha256(f"{self.name} {uid}{f' {attempt}' if attempt else ''}".encode()).digest()
        found: dict[str, Json] = {
            "temperature": temperature, "top_k": self.top_k if temperature else 0,
            "max_tokens": self.max_tokens, "min_tokens": self.min_tokens,
            "seed": int.from_bytes(seed[:4], "big") if temperature else None,
        }  # fmt: skip
        if temperature and top_p < 1:
            found["top_p"] = top_p
        if self.json_schema:
            found["json_schema"] = self.json_schema
        return found

    def read(self, text: str, finish_reason: str | None) -> tuple[str | int | None, dict[Defect, str]]:
        """A reply's value, if it has one, and its defects with what was seen of each."""
        text = text.strip()
        if self.value == "text":
            defects = find(text, finish_reason, self)
            if Defect.TRUNCATED in defects:
                text = whole_sentences(text)
            return text or None, defects
        try:
            if self.value == "rating":
                return _rating(text), {}
            found = _object(text, self.json_schema)
        except ValueError as error:
            return None, {Defect.UNPARSABLE: str(error)}
        defects = {
            defect: seen
            for string in _strings(found)
            for defect, seen in find(string, None, self).items()
            if defect in _OF_STRINGS
        }
        value = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
        return value.encode("utf-8", "replace").decode(), defects  # JSON may hold halves of characters

    def retried(self, defects: Mapping[Defect, str]) -> bool:
        """Is a reply with these defects no good?"""
        return any(defect not in self.tolerated for defect in defects)


_OF_STRINGS = (Defect.LOOP, Defect.CONTROL, Defect.MOJIBAKE)  # of a JSON object


def _strings(found: Json) -> Iterator[str]:
    if isinstance(found, str):
        yield found
    elif isinstance(found, dict | list):
        for one in found.values() if isinstance(found, dict) else found:
            yield from _strings(one)


def _object(text: str, schema: str) -> dict[str, Json]:
    """One JSON object. A model may fence it as code.

    Raises:
        ValueError: it is none, or not of the schema.
    """
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL)
    try:
        # A guided engine lets control characters into strings.
        found = json.loads(fenced[1] if fenced else text, strict=False, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {str(error)[:80]}") from None
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    if schema and (wrong := next(_validator(schema).iter_errors(found), None)):
        raise ValueError(f"not of the schema: {wrong.message[:80]}")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


@lru_cache(maxsize=8)
def _validator(schema: str) -> Any:
    return jsonschema.Draft202012Validator(json.loads(schema))


def _rating(text: str) -> int:
    """The number after `Rating`, or the only one that there is.

    Raises:
        ValueError: there is none, or it is no integer of 1 to 5.
    """
    found = _RATING.findall(text[:2000]) or _NUMBER.findall(text[:2000])
    if len(set(found)) != 1:
        raise ValueError("no rating" if not found else f"{len(set(found))} numbers")
    if found[0] not in {"1", "2", "3", "4", "5"}:
        raise ValueError(f"the rating is {found[0]:.20}")
    return int(found[0])


# --- the papers' --------------------------------------------------------------------------------------------

# Recap-DataComp-1B, arXiv 2406.08478, section 3: prompt, greedy, 128 new tokens.
RECAP_V1 = Kind(
    name="re_caption",
    prompt="Please generate a detailed caption of this image. Please be as descriptive as possible.",
)

# Its second release, config `condition_diverse_topk`: conditioned on the alt text, weighted top-k sampling.
# Prompt and k are unpublished: both are ours; weighted means that the k are drawn by their probabilities.
RECAP_V2 = Kind(
    name="re_caption_condition_diverse_topk",
    prompt=(
        "The web page of this image describes it as: {org_caption}\n"
        "Please generate a detailed caption of this image, with what of that description can be seen in it. "
        "Please be as descriptive as possible."
    ),
    temperature=1.0,
    top_k=20,
)

# VeCLIP, arXiv 2310.07699, section 3: a short visual caption, then its fusion with the alt text by a language
# model that does not see the image; where that refuses, the alt text. Both prompts from memory, the second
# completed by us.
VEC = Kind(
    name="vec_caption",
    prompt="Describe the image concisely, less than 20 words.",
    max_tokens=40,
)
VECAP = Kind(
    name="vecap_caption",
    prompt=(
        "Rephrase the following two sentences into one short sentence, and keep to what the second one says "
        "is there. Answer with that sentence alone.\n1. {org_caption}\n2. {vec_caption}"
    ),
    image=False,
    max_tokens=77,
    otherwise="org_caption",
)

# CapsFusion, arXiv 2310.20550, section 3: raw and synthetic caption fused by a language model. The prompt
# from memory, shortened at its end.
CAPSFUSION = Kind(
    name="capsfusion_caption",
    prompt=(
        "Please merge and refine the information from the two given sentences. Sentence 1 provides detailed "
        "real-world knowledge, yet it suffers from flaws in sentence structure and grammar. Sentence 2 "
        "exhibits nice sentence structure, but lacking in-depth real-world details and may contain false "
        "information. Please combine them into a new sentence, ensuring a well-structured sentence while "
        "retaining the detailed real-world information provided in Sentence 1. Avoid simply concatenating "
        "the sentences.\n\nSentence 1: {org_caption}\nSentence 2: {short_caption}"
    ),
    image=False,
    otherwise="org_caption",
)

# "Improving multimodal datasets with image captioning", arXiv 2307.10350, section 3: top-k 50, 5 to 40
# tokens, four temperatures, the best by CLIP score. Its BLIP-2 took no prompt; a chat model needs one, which
# is ours.
NGUYEN_TEMPERATURES = (0.5, 0.75, 1.0, 1.5)
NGUYEN = Kind(
    name="caption_t075",
    prompt="Describe the image in one sentence.",
    temperature=0.75,
    top_k=50,
    min_tokens=5,
    max_tokens=40,
)


def nguyen(temperature: float) -> Kind:
    return replace(NGUYEN, name=f"caption_t{round(100 * temperature):03d}", temperature=temperature)


# In the manner of the releases of 2025 and 2026: a short, a long and a structured one. The prompts are ours.
SHORT = Kind(
    name="short_caption",
    prompt="Describe this image in one short sentence.",
    max_tokens=48,
)
LONG = Kind(
    name="long_caption",
    prompt=(
        "Describe this image in full, in plain sentences: what is in it and how much of it, colours, "
        "materials, actions, where things are, the background, light and style, and any text word for word. "
        "Say only what can be seen. Begin with the main subject."
    ),
    max_tokens=512,
)
_STRINGS = {"type": "array", "items": {"type": "string", "maxLength": 80}, "maxItems": 12}
STRUCTURED = Kind(
    name="structured_caption",
    prompt=(
        "List what is in this image as one JSON object: objects, each with its name and attributes; "
        "relations between them, each with subject, relation and object; text, each string that can be read."
    ),
    max_tokens=384,
    value="json",
    otherwise=NULL,
    json_schema=json.dumps(
        {
            "type": "object",
            "properties": {
                "objects": {
                    "type": "array",
                    "maxItems": 12,
                    "items": {
                        "type": "object",
                        "properties": {
                            "name": {"type": "string", "maxLength": 80},
                            "attributes": _STRINGS | {"maxItems": 6},
                        },
                        "required": ["name", "attributes"],
                        "additionalProperties": False,
                    },
                },
                "relations": {
                    "type": "array",
                    "maxItems": 12,
                    "items": {
                        "type": "object",
                        "properties": {
                            part: {"type": "string", "maxLength": 80}
                            for part in ("subject", "relation", "object")
                        },
                        "required": ["subject", "relation", "object"],
                        "additionalProperties": False,
                    },
                },
                "text": _STRINGS,
            },
            "required": ["objects", "relations", "text"],
            "additionalProperties": False,
        }
    ),
)


def judge(caption: str, judge: str) -> Kind:
    """A rating of 1 to 5 of a caption by a model that sees the image: the paper's prompt (arXiv 2406.08478,
    section 4), which it gave to GPT-4V. The column is named after who judges: `re_<judge>_score`.
    """
    return Kind(
        name=f"{caption.removesuffix('_caption')}_{judge}_score",
        prompt=(
            f"[Image Caption] {{{caption}}}\n"
            "Rate whether the caption is of high-quality and fluent and correctly matches the given image. "
            "The rating should be 1-5, where 1 is incorrect and not fluent at all, and 5 is correct and very "
            "fluent. Try to just give a numerical rating.\n"
            "Your response should be in the format: Rating: (int)"
        ),
        max_tokens=16,
        value="rating",
        otherwise=NULL,
    )
