"""Special tokens in text that is not ours: what a server's tokenizer would take for one is broken up."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from builder.files import read_file
from builder.typed import from_json

TAG = re.compile(  # special tokens as models are known to write them, where the tokenizer is not
    r"<[|｜][^<>\n]{1,64}[|｜]>|</?[A-Za-z_][\w:.-]{0,63}>|<</?SYS>>"
    r"|\[/?(?:INST|IMG\w*|TOOL_\w+|AVAILABLE_TOOLS|SYSTEM_PROMPT|THINK|ARGS|CALL_ID|AUDIO|BEGIN_AUDIO"
    r"|PREFIX|MIDDLE|SUFFIX|BOS|EOS|CLS|SEP|PAD|UNK|g?MASK)\]"
)


def specials_of(folder: Path | None) -> re.Pattern[str]:
    """Matches the special tokens of the tokenizer in a folder; where there is none, those that models are
    known to have.
    """
    if folder is None or not (path := folder / "tokenizer.json").exists():
        return TAG
    found = _special(from_json(dict[str, Any], read_file(path), what=str(path)).get("added_tokens"))
    if (path := folder / "tokenizer_config.json").exists():
        config = from_json(dict[str, Any], read_file(path), what=str(path))
        added = config.get("added_tokens_decoder")
        found |= _special(list(added.values()) if isinstance(added, dict) else [])
        named = (value for name, value in config.items() if name.endswith("_token"))
        found |= {value["content"] if isinstance(value, dict) else value for value in named if value}
    return _pattern(frozenset(token for token in found if isinstance(token, str)))


def _special(added: object) -> set[str]:
    """Of tokens that were added to a vocabulary. Those that are not special are left alone, as the engine in
    this process does, unless they look it.
    """
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    texts = ((str(token.get("content", "")), token.get("special")) for token in tokens)
    return {text for text, special in texts if text and (special or TAG.fullmatch(text))}


def _pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(filter(str.strip, tokens), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def joined(parts: Iterable[tuple[str, bool]], specials: Iterable[str] | re.Pattern[str]) -> tuple[str, int]:
    """A message of (text, whether it is ours), and how many special tokens were broken up in it. What is ours
    may hold some; the rest may not, nor may one come about where two parts meet.

    Into each goes a space, behind its first character: `< image>`. A space shows, so that whoever reads the
    prompt sees what the model saw, and all tokenizers know it; a character without width is rare to models,
    and gone where a tokenizer normalizes, which would put the token together again.
    """
    pattern = specials if isinstance(specials, re.Pattern) else _pattern(specials)
    known = list(parts)
    text = "".join(part for part, _ in known)
    ours = [is_ours for part, is_ours in known for _ in part]
    number = 0
    while found := [span for span in _matches(pattern, text) if not all(ours[slice(*span)])]:
        number += len(found)  # breaking one may make another, of those that hold a space: look again
        for start, end in reversed(found):
            token = text[start:end]
            first = start + len(token) - len(token.lstrip())
            if len(token.strip()) == 1:  # cannot be broken up
                text = text[:first] + " " + text[first + 1 :]
            else:
                text = text[: first + 1] + " " + text[first + 1 :]
                ours.insert(first + 1, False)
    return text, number


def _matches(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    """All of them, also those that overlap."""
    start = 0
    while found := pattern.search(text, start):
        yield found.span()
        start = found.start() + 1
