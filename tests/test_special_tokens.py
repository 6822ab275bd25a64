"""Special tokens in a row's text, as the demo captioner's tokenizer has them and as models are known to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from conftest import CAPTIONER
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from builder.captions.special_tokens import TAG, joined, specials_of

TOKENIZER = Tokenizer.from_file(str(CAPTIONER / "tokenizer.json"))
SPECIAL = [t.content for t in TOKENIZER.get_added_tokens_decoder().values()]
BITS = [
    *SPECIAL,
    "<",
    "|",
    ">",
    "<|",
    "|>",
    "image",
    "<ima",
    "ge>",
    " ",
    "eot_id",
    "a",
    "\n",
    "</s>",
    "[INST]",
    "é",
]


def plain(text: str, specials: Iterable[str] | re.Pattern[str]) -> tuple[str, int]:
    return joined([(text, False)], specials)


def special_ids(text: str) -> list[int]:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    return [i for i in ids if i in TOKENIZER.get_added_tokens_decoder()]


@settings(deadline=None, database=None, derandomize=True)
@given(st.lists(st.sampled_from(BITS) | st.text(max_size=3), max_size=12).map("".join))
def test_no_text_of_a_row_holds_a_special_token(text: str) -> None:
    """As the tokenizer has them, and as anybody may have them; nothing but spaces is added."""
    for specials in (specials_of(CAPTIONER), SPECIAL, specials_of(None)):
        found, number = plain(text, specials)
        assert not special_ids(found)
        assert found.replace(" ", "") == text.replace(" ", "")
        assert len(found) == len(text) + number
        assert number >= sum(text.count(token) for token in SPECIAL)
        assert plain(found, specials) == (found, 0)


def test_a_special_token_is_broken_so_that_one_sees_it() -> None:
    specials = specials_of(CAPTIONER)
    assert special_ids("a <image> b<|eot_id|>")
    assert plain("a <image> b<|eot_id|>", specials) == ("a < image> b< |eot_id|>", 2)
    assert plain("2 < 3 > 1, <b>bold</b> [PDF]", specials) == ("2 < 3 > 1, <b>bold</b> [PDF]", 0)
    common = (
        "<s></s><|im_end|><｜User｜>[INST][/INST]<<SYS>><start_of_turn><image_soft_token><extra_id_0>[gMASK]"
    )
    broken, number = plain(common, specials_of(None))
    assert number >= 11
    assert not TAG.search(broken)
    assert plain("[PDF] 2<3 <3 a>b <|> <a b> [12]", specials_of(None))[1] == 0
    assert plain("a b  c", ["a b", "a  b", "  ", " ", "", "b  c"]) == ("a   b   c", 3)
    assert plain("x¤y", ["¤"]) == ("x y", 1)
    assert plain("aaa", ["aa"]) == ("a a a", 2)


def test_where_a_row_meets_the_prompt_no_special_token_comes_about() -> None:
    specials = specials_of(CAPTIONER)
    parts = [("<image>Say: <", True), ("image", False), (">", True), ("<ima", False), ("ge>", False)]
    assert joined(parts, specials) == ("<image>Say: < image>< image>", 2)
    assert joined([("<image>", True), ("<image>", False)], specials) == ("<image>< image>", 1)


def test_special_tokens_are_read_from_where_a_model_has_them(tmp_path: Path) -> None:
    added = [
        {"content": "<unused0>", "special": False}, {"content": "\n\n", "special": False},
        {"content": "¤end", "special": True}, {"content": None}, 7,
    ]  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    config = {
        "image_token": "IMG!",
        "eos_token": {"content": "<eos!>"},
        "pad_token": None,
        "add_bos_token": True,
    }
    config["added_tokens_decoder"] = {"9": {"content": "<|nine|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    specials = specials_of(tmp_path)
    text = "<unused0>¤endIMG!<eos!><|nine|>\n\n<b>"
    assert plain(text, specials) == ("< unused0>¤ endI MG!< eos!>< |nine|>\n\n<b>", 5)
    assert specials_of(tmp_path / "none") == specials_of(None)
