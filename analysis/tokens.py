"""Counting tokens: CLIP's, or those of a given tokenizer.

CLIP's byte-pair encoding runs in the library tokenizers over open_clip's own vocabulary, cleaned as
open_clip's SimpleTokenizer cleans: the same tokens (tests/test_stats.py), without the seconds that importing
open_clip takes.
"""

from __future__ import annotations

import gzip
import html
from collections.abc import Callable, Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import ftfy
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from builder.model import read_tokenizer

CLIP = "CLIP's (open_clip SimpleTokenizer)"
_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_MERGES = slice(1, 49152 - 256 - 2 + 1)

Counter = Callable[[Iterable[str]], list[int]]


def counter(tokenizer_json: Path | None = None) -> tuple[str, Counter]:
    """Name of the tokenizer, and what counts with it: the tokens of each text and the special ones it adds.

    Raises:
        InputError: the file is no tokenizer.
    """
    if tokenizer_json is None:
        return CLIP, lambda texts: [len(_clip().encode(_cleaned(text)).ids) + 2 for text in texts]
    given = read_tokenizer(tokenizer_json)
    given.no_truncation()
    given.no_padding()
    return str(tokenizer_json), lambda texts: [len(given.encode(text).ids) for text in texts]


def _cleaned(text: str) -> str:
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


@cache
def _clip() -> Tokenizer:
    spec = find_spec("open_clip")  # does not import it
    assert spec is not None
    assert spec.submodule_search_locations
    lines = (
        gzip.decompress(Path(spec.submodule_search_locations[0], "bpe_simple_vocab_16e6.txt.gz").read_bytes())
        .decode()
        .split("\n")
    )
    merges = [(first, second) for first, second in (line.split() for line in lines[_MERGES])]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *(first + second for first, second in merges),
    ]
    tokenizer = Tokenizer(
        models.BPE({word: number for number, word in enumerate(words)}, merges, end_of_word_suffix="</w>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens(["<start_of_text>", "<end_of_text>"])
    return tokenizer
