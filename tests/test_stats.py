"""stats: numbers worked out by hand, and by other means on real captions; and what bad tables are told."""

from __future__ import annotations

import html
import itertools
import json
import math
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import regex
from conftest import CAPTIONER, FULL, a_version, recap, recap_here
from open_clip.tokenizer import SimpleTokenizer
from tokenizers import Tokenizer

from analysis import report, select, tokens, views
from analysis.diff import diff_columns
from analysis.report import Options
from builder.core import Status
from builder.errors import InputError
from builder.places import parts
from builder.stages.select import LEDGER, SCHEMA

QUERIES = report.QUERIES
Row = dict[str, Any]


def ask(
    place: Path, *queries: str, captions: Sequence[str] = (), options: Options | None = None
) -> dict[str, list[Row]]:
    """The rows of these queries alone: others take their time. Near duplicates of the first 2,000 rows."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for query in queries:
            shutil.copy(QUERIES / f"{query}.sql", folder)
        patch.setattr(report, "QUERIES", Path(folder))
        patch.setattr(report, "NEAR_ROWS", 2_000)
        return {
            query: answer["rows"] for query, answer in report.stats(parts(place, captions), options).items()
        }


def one(place: Path, query: str, captions: Sequence[str] = (), options: Options | None = None) -> list[Row]:
    return ask(place, query, captions=captions, options=options)[query]


def table(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def version(
    folder: Path,
    rows: Sequence[Row],
    ledger: Sequence[Row] = ({"uid": "0", "url": "http://h.example/0", "status": "ok"},),
) -> Path:
    """A published version with these rows and this ledger."""
    return a_version(
        folder, pa.Table.from_pylist(list(rows), SCHEMA), pa.Table.from_pylist(list(ledger), LEDGER)
    )


# --- worked out by hand: any captions -----------------------------------------------------------------------


def test_lengths_count_words_between_white_space_of_any_kind(tmp_path: Path) -> None:
    """No-break (U+00A0) and ideographic (U+3000) spaces part words, a zero-width space (U+200B) does not."""
    place = table(
        tmp_path / "a.parquet",
        text=["a cat sits on a mat", "A dog", "two\u00a0birds  fly\u3000home", "", None],
    )
    found = ask(place, "lengths", "length_histogram")
    words = {
        "words_mean": (6 + 2 + 4 + 0) / 4,
        "words_p05": 0,
        "words_median": 2,
        "words_p95": 6,
        "words_max": 6,
    }
    characters = {
        "characters_mean": (19 + 5 + 19 + 0) / 4,
        "characters_p05": 0,
        "characters_median": 5,
        "characters_p95": 19,
        "characters_max": 19,
    }
    assert found["lengths"] == [{"caption": "text", "captions": 4} | words | characters]
    bins = {0: 2, 4: 2}  # 2 and 0 words; 6 and 4 words
    assert found["length_histogram"] == [
        {"caption": "text", "words": words, "captions": number} for words, number in bins.items()
    ]
    texts = [f"a{chr(code)}b" for code in range(1, 0x10000) if not 0xD800 <= code < 0xE000] + [
        "a b",
        " ab",
        "ab ",
        "a  b",
        " a b ",
        "a b c",
        " ",
    ]
    with views.connect(parts(table(tmp_path / "b.parquet", text=texts))) as con:
        counted = con.sql("select text, count_words(text) from captions").fetchall()
    assert counted == [(text, len(text.split())) for text in texts]


def test_characters_are_code_points(tmp_path: Path) -> None:
    place = table(tmp_path / "a.parquet", text=["e\u0301", "👩‍👩‍👧"])
    (row,) = one(place, "lengths")
    assert (row["characters_mean"], row["characters_max"]) == (
        (2 + 5) / 2,
        5,
    )  # two women, a girl, two joiners


def test_words_are_letters_and_digits_in_lower_case(tmp_path: Path) -> None:
    place = table(
        tmp_path / "a.parquet", org_caption=["A cat, a CAT!", "dog-2", None], re_caption=["a bird", None, ""]
    )
    found = ask(place, "vocabulary", "top_words", "words_gained")
    assert found["vocabulary"] == [  # a cat a cat dog 2; a bird; together a, cat, dog, 2, bird
        {"caption": "org_caption", "distinct_words": 4, "words": 6, "joint_vocabulary_percent": 100 * 4 / 5},
        {"caption": "re_caption", "distinct_words": 2, "words": 2, "joint_vocabulary_percent": 100 * 2 / 5},
    ]
    assert [tuple(row.values()) for row in found["top_words"]] == [
        ("org_caption", "a", 2, 333.333),  # 1000 * 2 / 6
        ("org_caption", "cat", 2, 333.333),
        ("org_caption", "2", 1, 166.667),  # 1000 * 1 / 6
        ("org_caption", "dog", 1, 166.667),
        ("re_caption", "a", 1, 500.0),
        ("re_caption", "bird", 1, 500.0),
    ]
    assert [tuple(row.values()) for row in found["words_gained"]] == [
        ("re_caption", "gained", "bird", 1, 1),
        ("re_caption", "lost", "cat", 2, 3),  # cat, 2, dog
        ("re_caption", "lost", "2", 1, 3),
        ("re_caption", "lost", "dog", 1, 3),
    ]


def test_distinct_trigrams_of_few_captions(tmp_path: Path) -> None:
    place = table(
        tmp_path / "a.parquet", text=["a b c d", None, "A, B: c", "x y", ""]
    )  # abc, bcd; abc; none; none
    assert one(place, "trigrams") == [
        {"caption": "text", "captions": 4, "distinct_trigrams": 2, "approximate": False}
    ]


def test_distinct_trigrams_against_subset_size(tmp_path: Path) -> None:
    """`a b <n>` is a trigram; every 1,200th caption repeats one. Exact up to 100,000, about right beyond."""
    few = table(tmp_path / "few.parquet", text=[f"a b {n % 1200}" for n in range(1500)])
    assert [tuple(row.values())[1:] for row in one(few, "trigrams")] == [
        (1000, 1000, False),
        (1500, 1200, False),
    ]
    many = table(tmp_path / "many.parquet", text=[f"a b {n}" for n in range(120_000)])
    *exact, last = one(many, "trigrams")
    assert [tuple(row.values())[1:] for row in exact] == [
        (number, number, False) for number in (1000, 10_000, 100_000)
    ]
    assert (last["captions"], last["approximate"]) == (120_000, True)
    assert last["distinct_trigrams"] == pytest.approx(120_000, rel=0.1)


def test_captions_too_short_for_a_trigram_have_none(tmp_path: Path) -> None:
    found = one(table(tmp_path / "a.parquet", text=["a", "b c"]), "trigrams")
    assert found == [{"caption": "text", "captions": 2, "distinct_trigrams": 0, "approximate": False}]


def test_a_caption_column_may_have_any_name(tmp_path: Path) -> None:
    place = table(
        tmp_path / "a.parquet",
        position=["one two", None],
        text=["x", "y"],
        **{'it\'s "mine"': ["a b c", "d"]},
    )
    found = one(place, "lengths", captions=["position", "text", 'it\'s "mine"'])
    assert {row["caption"]: row["words_mean"] for row in found} == {
        "position": 2.0,
        "text": 1.0,
        'it\'s "mine"': 2.0,
    }


def test_a_caption_that_few_rows_have_is_counted_by_its_own_captions(tmp_path: Path) -> None:
    """Not by rows: 1,100 captions behind 100,000 rows without one."""
    texts = pa.chunked_array([pa.nulls(100_000, pa.string()), pa.array([f"a b {n}" for n in range(1100)])])
    found = one(table(tmp_path / "a.parquet", text=texts), "trigrams")
    assert [tuple(row.values())[1:] for row in found] == [(1000, 1000, False), (1100, 1100, False)]


def test_sameness(tmp_path: Path) -> None:
    texts = ["a b c a b c", "a b c d a b c d", "The image shows it", "no"]
    place = table(tmp_path / "a.parquet", text=texts)
    # trigrams: abc bca cab abc | abc bcd cda dab abc bcd | the-image-shows image-shows-it | none
    # 4-grams: abca bcab cabc, all new | abcd bcda cdab dabc abcd, one of 5 said before | one | none
    distinct_3 = (3 + 3 + 2) / (4 + 6 + 2)  # abc bca cab, bcd cda dab, the last two
    rep_4 = (0 / 3 + 1 / 5 + 0 / 1) / 3
    assert one(place, "repetition") == [
        {
            "caption": "text",
            "distinct_3": round(distinct_3, 4),
            "rep_4_mean": round(rep_4, 4),
            "opener_percent": 100 * 1 / 4,
            "top_100_prefixes_percent": 100.0,
        }
    ]


def test_the_hundred_most_frequent_prefixes(tmp_path: Path) -> None:
    texts = ["a cat on the mat"] * 50 + [
        f"{n} is the number of it" for n in range(100)
    ]  # 101 prefixes: the last one is left out
    (row,) = one(table(tmp_path / "a.parquet", text=texts), "repetition")
    assert row["top_100_prefixes_percent"] == round(100 * (50 + 99) / 150, 2)


OPENERS = [
    "The image shows a cat", "the photo is old", "This picture depicts it", "A photograph captures it",
    "Image features a cat", '"The scene presents', "The image displays", "image contains",
    "The picture portrays",
]  # fmt: skip
NO_OPENERS = [
    "The image of a cat", "Photographers are here", "In the image is a cat", "The picture shown",
    "A cat is in the image", "imagery is", "The images show", "an image of", "",
]  # fmt: skip


def test_openers(tmp_path: Path) -> None:
    columns = {f"c{n}": [text] for n, text in enumerate(OPENERS + NO_OPENERS)}
    found = {
        row["caption"]: row["opener_percent"]
        for row in one(table(tmp_path / "a.parquet", **columns), "repetition", tuple(columns))
    }
    assert [text for name, (text,) in columns.items() if found[name]] == OPENERS
    assert len(found) == len(columns)


def test_grounding_and_concreteness_by_given_tables(tmp_path: Path) -> None:
    place = table(tmp_path / "a.parquet", text=["a cat on a mat", "CATS", "cat a", "!"])
    (tmp_path / "words.txt").write_text("\ufeff# seen\ncat\n\nMat \ncat\n")
    (tmp_path / "concrete.tsv").write_text("\ufeffWord\tConc.M\ncat\t5.0\nA\t1.5\n")
    options = Options(tmp_path / "words.txt", tmp_path / "concrete.tsv")
    grounding = (
        2 / 5 + 0 / 1 + 1 / 2
    ) / 3  # cat, mat of 5; none of 1; cat of 2; a caption without words has no share
    concreteness = ((1.5 + 5.0 + 1.5) / 3 + (5.0 + 1.5) / 2) / 2  # words without a score count for nothing
    rows = [
        {
            "caption": "text",
            "captions": 3,
            "grounding_ratio_mean": round(grounding, 4),
            "concreteness_mean": round(concreteness, 4),
        }
    ]
    assert one(place, "grounding", options=options) == rows
    (row,) = one(place, "grounding")  # the default vocabulary: cat, cats, cat; no concreteness
    assert row["concreteness_mean"] is None
    assert row["grounding_ratio_mean"] >= round((1 / 5 + 1 / 2) / 3, 4)


HOSTILE = [
    "", " ", "<start_of_text> a <end_of_text>", "İstanbul ſ's I'VE", "Ã© café &amp;amp; x", "a\tb\nc",
    "👍🏽 👨‍👩‍👧", "日本語のテキスト", "\x00\x01 ctl",
    "½ ² ٣ x²", "don't 'S 'Re", "\u200b zero", "e\u0301", "'''s'll", "_a_b", "…—–", "<|endoftext|>",
    "a" * 300,
]  # fmt: skip


def test_clip_tokens_of_odd_texts_are_open_clips() -> None:
    encode = SimpleTokenizer().encode
    assert tokens.counter()[1](HOSTILE) == [len(encode(text)) + 2 for text in HOSTILE]


@pytest.mark.full
@pytest.mark.parametrize("name", ["capsfusion", "web"])
def test_clip_tokens_are_open_clips(real: dict[str, Real], name: str) -> None:
    encode = SimpleTokenizer().encode
    for texts in real[name].texts.values():
        some = [text for text in texts[: 1500 if FULL else 300] if text]
        assert tokens.counter()[1](some) == [len(encode(text)) + 2 for text in some]


def test_tokens_of_a_given_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    texts = ["a red circle", "two blue squares on a striped ground", "é"]
    (row,) = one(
        table(tmp_path / "a.parquet", text=texts),
        "tokens",
        options=Options(tokenizer=CAPTIONER / "tokenizer.json"),
    )
    expected = [len(ids) for ids in AutoTokenizer.from_pretrained(CAPTIONER)(texts)["input_ids"]]
    assert row["tokenizer"] == str(CAPTIONER / "tokenizer.json")
    fixed = Tokenizer.from_file(str(CAPTIONER / "tokenizer.json"))
    fixed.enable_padding(length=64)
    fixed.enable_truncation(3)
    fixed.save(str(tmp_path / "fixed.json"))
    (same,) = one(
        table(tmp_path / "a.parquet", text=texts),
        "tokens",
        options=Options(tokenizer=tmp_path / "fixed.json"),
    )
    assert same["tokens_mean"] == row["tokens_mean"]
    assert (row["captions"], row["tokens_mean"], row["tokens_max"]) == (
        3,
        round(sum(expected) / 3, 4),
        max(expected),
    )


def test_duplicates_letter_for_letter_and_near(tmp_path: Path) -> None:
    """One word of six differs: 3 of 5 trigrams in common, Jaccard 0.6, is not near."""
    texts = [
        "a cat on the mat",
        "a cat on the mat",
        "A cat, on the mat!",
        "one two three four five six",
        "one two three four five seven",
    ]
    assert one(table(tmp_path / "a.parquet", text=texts), "duplicates") == [
        {
            "caption": "text",
            "captions": 5,
            "distinct_captions": 4,
            "repeated_percent": 100 * 2 / 5,
            "most_repeated": 2,
            "near_duplicate_percent": 100 * 3 / 5,
            "near_duplicate_sample": 5,
        }
    ]


RESIDUE = {
    "escapes": [r"caf\xc3\xa9", r"caf\u00e9", r"two\nlines"],
    "mojibake": ["cafÃ©", "itâ€™s", "Â£5", "caf\ufffd"],
    "html": [
        "fish &amp; chips",
        "it&#39;s",
        "it&#x27;s",
        "<b>bold",
        "caf&eacute;",
        "&copy; us",
        "a<br/>b",
        "x&sup2;",
    ],
    "email": ["to a.b+c@mail.example.org", "a@b.de"],
    "phone": ["call (212) 555-0147", "212-555-0147", "+1 212.555.0147"],
    "url": ["see http://a.b", "HTTPS://A.B/c", "WWW.example.com"],
}
INNOCENT = [
    "a < b and c > d", "I <3 cats", "AT&T; R&D", "fish & chips", "5 x 7 in; 10 & 20", "SÃO PAULO", "Ângela",
    "amanhã", "meet @noon", "@user", "2010-2011", "1995-08-24", "ISBN 978-3-16-148410-0", "a/b", "e\u0301",
    "at 12:30", "awww", "https", "naïve café", "3 000 000", "½ price", "",
]  # fmt: skip


def test_residue_of_each_kind_and_of_none(tmp_path: Path) -> None:
    expected = [(text, kind) for kind, texts in RESIDUE.items() for text in texts] + [
        (text, "") for text in INNOCENT
    ]
    columns = {f"c{n}": [text] for n, (text, _) in enumerate(expected)}
    found = {
        row["caption"]: row
        for row in one(table(tmp_path / "a.parquet", **columns), "residue", tuple(columns))
    }
    kinds = [f"{kind}_percent" for kind in RESIDUE]
    assert [
        (text, [name for name in kinds if found[f"c{n}"][name]]) for n, (text, _) in enumerate(expected)
    ] == [(text, [f"{kind}_percent"] if kind else []) for text, kind in expected]
    (row,) = one(
        table(tmp_path / "b.parquet", text=["a cat", "caf\ufffd", "http://a.b www.c.d", "a dog"]), "residue"
    )
    assert [row[name] for name in ("captions", *kinds)] == [4, 0, 25, 0, 0, 0, 25]


def test_languages(tmp_path: Path) -> None:
    english = [
        "A black cat is sleeping on the old wooden chair",
        "Two young women are walking in the park with their dogs",
        "The man who is here",
    ]
    texts = [*english, "Un chat noir dort sur la vieille chaise de la cuisine", "1998 - 2001"]
    assert [tuple(row.values()) for row in one(table(tmp_path / "a.parquet", text=texts), "languages")] == [
        ("text", "en", 3, 60.0), ("text", "fr", 1, 20.0), ("text", "none", 1, 20.0),
    ]  # fmt: skip


# --- worked out by hand: a published version ----------------------------------------------------------------


def test_cosines_and_clip_s(tmp_path: Path) -> None:
    pairs = [(0.1, 0.2), (0.3, 0.2), (-0.2, 0.4), (None, 0.6)]
    rows = [
        {"org_caption": "a", "re_caption": "b", "org_clip_score": org, "re_clip_score": re}
        for org, re in pairs
    ]
    found = ask(version(tmp_path / "v", rows), "cosines", "cosine_histogram")
    org = {
        "scored": 3,
        "cosine_mean": round((0.1 + 0.3 - 0.2) / 3, 4),
        "cosine_p05": -0.2,
        "cosine_median": 0.1,
        "cosine_p95": 0.3,
    }
    new = {
        "scored": 4,
        "cosine_mean": (0.2 + 0.2 + 0.4 + 0.6) / 4,
        "cosine_p05": 0.2,
        "cosine_median": 0.2,
        "cosine_p95": 0.6,
    }
    assert found["cosines"] == [
        {"caption": "org_caption"} | org | {"clip_s_mean": round(2.5 * (0.1 + 0.3 + 0) / 3, 4)},
        {"caption": "re_caption"} | new | {"clip_s_mean": round(2.5 * 1.4 / 4, 4)},
    ]
    bins = [
        ("org_caption", -0.2, 1),
        ("org_caption", 0.1, 1),
        ("org_caption", 0.3, 1),
        ("re_caption", 0.2, 2),
        ("re_caption", 0.4, 1),
    ]
    assert [tuple(row.values()) for row in found["cosine_histogram"]] == [*bins, ("re_caption", 0.6, 1)]


def test_a_cosine_on_an_edge_lies_above_it(tmp_path: Path) -> None:
    """0.58 / 0.02 is 28.999999999999996 in binary, and yet 0.58 begins a bin."""
    edges = [round(k / 50, 2) for k in range(-50, 51)]
    rows = [{"org_caption": "a", "re_caption": "b", "re_clip_score": edge} for edge in (*edges, 0.599, -0.01)]
    found = {row["cosine"]: row["captions"] for row in one(version(tmp_path / "v", rows), "cosine_histogram")}
    assert found == dict.fromkeys(edges, 1) | {0.58: 2, -0.02: 2}


def test_preference(tmp_path: Path) -> None:
    """Cosines that differ by 0.01 are 1 apart before the softmax: 1 / (1 + e^-1) = 0.7311."""
    rows = [
        {
            "org_clip_score": org,
            "re_clip_score": re,
            "org_gpt4v_score": before,
            "re_gpt4v_score": after,
            "org_caption": "a",
            "re_caption": "b",
        }
        for org, re, before, after in [
            (0.2, 0.21, 1, 5),
            (0.3, 0.31, 2, 4),
            (0.21, 0.2, None, 4),
            (0.25, 0.25, 2, None),
            (None, 0.9, 5, 1),
        ]
    ]
    near = 1 / (1 + math.exp(-1))
    assert one(version(tmp_path / "v", rows), "preference") == [
        {
            "rows": 4,
            "recaption_nearer_percent": 100 * 2 / 4,
            "original_nearer_percent": 100 * 1 / 4,
            "recaption_softmax_percent": round(100 * (near + near + (1 - near) + 0.5) / 4, 2),
            "recaption_judge_mean": round((5 + 4 + 4) / 3, 4),
            "original_judge_mean": round((1 + 2 + 2) / 3, 4),
        }
    ]


def test_endings(tmp_path: Path) -> None:
    captions = [
        ("A cat.", "stop"),
        ("A cat on", "length"),
        ('He says "stop."', "stop"),
        ("Really?!", "stop"),
        ("No stop,", "stop"),
        ("", "length"),
    ]
    cuts = [(True, False), (False, False), (True, True), (None, None), (True, False), (False, None)]
    rows = [
        {
            "org_caption": "a",
            "re_caption": text,
            "re_finish_reason": reason,
            "re_clip_cut": re,
            "org_clip_cut": org,
        }
        for (text, reason), (re, org) in zip(captions, cuts, strict=True)
    ]
    assert one(version(tmp_path / "v", rows), "endings") == [
        {
            "captions": 6,
            "stopped_at_limit": 2,
            "without_full_stop": 3,
            "recaptions_cut_in_scoring": 3,
            "originals_cut_in_scoring": 1,
        }
    ]


def test_images(tmp_path: Path) -> None:
    sizes = [("a", 400, 200), ("a", 400, 200), ("b", 100, 400), ("c", 300, 300)]
    rows = [
        {"org_caption": "a", "re_caption": "b", "sha256": name, "width": width, "height": height}
        for name, width, height in sizes
    ]
    expected = {
        "rows": 4,
        "distinct_images": 3,
        "rows_of_most_frequent_image": 2,
        "width_px_median": 300,  # of 100 300 400 400
        "height_px_median": 200,  # of 200 200 300 400
        "short_side_px_p05": 100,
        "long_side_px_p95": 400,
        "aspect_mean": (2 + 2 + 4 + 1) / 4,
        "aspect_over_3_percent": 100 * 1 / 4,
    }
    assert one(version(tmp_path / "v", rows), "images") == [expected]


def test_images_of_no_name_are_not_one_image(tmp_path: Path) -> None:
    place = table(
        tmp_path / "a.parquet", text=["x"] * 3, sha256=[None, None, "a"], width=[0, 2, 6], height=[0, 1, 2]
    )
    (row,) = one(place, "images")
    assert (row["rows"], row["distinct_images"], row["rows_of_most_frequent_image"], row["aspect_mean"]) == (
        3,
        1,
        1,
        (2 + 3) / 2,
    )


def test_an_image_with_one_side_unknown_has_no_aspect(tmp_path: Path) -> None:
    place = table(
        tmp_path / "a.parquet",
        text=["x"] * 3,
        sha256=["a", "b", "c"],
        width=[None, 2, 6],
        height=[7, None, 2],
    )
    (row,) = one(place, "images")
    assert (row["rows"], row["aspect_mean"], row["width_px_median"]) == (3, 3.0, 2)


def test_addresses_have_no_top_level_domain(tmp_path: Path) -> None:
    """And no host can pass for one: it ends at white space."""
    urls = ["http://127.0.0.1:80/a", "http://[::1]:80/a", "http://example.com./a", "http://x.an IP address/"]
    found = one(
        version(
            tmp_path / "v", [], [{"uid": str(n), "url": url, "status": "ok"} for n, url in enumerate(urls)]
        ),
        "links",
    )
    assert [(row["what"], row["name"]) for row in found] == [
        ("tld", "an IP address"), ("tld", "an"), ("tld", "com"),
        ("host", "127.0.0.1"), ("host", "[::1]"), ("host", "example.com"), ("host", "x.an"),
    ]  # fmt: skip


def test_links_by_top_level_domain_and_host(tmp_path: Path) -> None:
    links = [
        ("http://a.example.com/1", "ok"), ("https://A.Example.com:8080/2", "dead_link"),
        ("http://user:pw@b.org/x", "ok"), ("http://c.org?q=http://d.net", "duplicate_image"),
        ("http://a.example.com/3", "timeout"), (None, "removed"),
    ]  # fmt: skip
    place = version(
        tmp_path / "v",
        [],
        [{"uid": str(n), "url": url, "status": status} for n, (url, status) in enumerate(links)],
    )
    found = ask(place, "links", "rows_by_status")
    assert [tuple(row.values()) for row in found["links"]] == [
        ("tld", "com", 3, round(100 * 1 / 3, 2), 0.0), ("tld", "org", 2, 50.0, 0.0),
        ("host", "a.example.com", 3, round(100 * 1 / 3, 2), 0.0), ("host", "b.org", 1, 100.0, 0.0),
        ("host", "c.org", 1, 0.0, 0.0),
    ]  # fmt: skip
    statuses = {"ok": 2, "dead_link": 1, "duplicate_image": 1, "removed": 1, "timeout": 1}
    assert found["rows_by_status"] == [
        {"status": name, "rows": rows, "percent": round(100 * rows / 6, 2)} for name, rows in statuses.items()
    ]


def test_a_link_is_alive_only_where_the_image_came(tmp_path: Path) -> None:
    """A host a status: whoever answered with anything else is not alive; another image is a changed one."""
    hosts = {status: status.replace("_", "-") for status in Status}
    ledger = [{"uid": status, "url": f"http://{host}/1", "status": status} for status, host in hosts.items()]
    links = [row for row in one(version(tmp_path / "v", [], ledger), "links") if row["what"] == "host"]
    shares = {row["name"]: (row["alive_percent"], row["changed_percent"]) for row in links}
    alive = {"ok": (100.0, 0.0), "caption-failed": (100.0, 0.0)}
    assert shares == dict.fromkeys(hosts.values(), (0.0, 0.0)) | alive | {"hash-mismatch": (0.0, 100.0)}


def test_the_twenty_most_frequent_hosts(tmp_path: Path) -> None:
    ledger = [
        {"uid": f"{n}-{k}", "url": f"http://h{n}.t{n}/{k}", "status": "ok"}
        for n in range(25)
        for k in range(n + 1)
    ]
    found = one(version(tmp_path / "v", [], ledger), "links")
    names = [("tld", "t{0}"), ("host", "h{0}.t{0}")]
    expected = [(what, name.format(n), n + 1, 100.0, 0.0) for what, name in names for n in range(24, 4, -1)]
    assert [tuple(row.values()) for row in found] == expected


def test_noise_against_diversity_of_a_strategy(tmp_path: Path) -> None:
    texts = {"a b c": 0.4, "A b, c": 0.3, "x y z": 0.2, "q r s t": 0.1}
    rows = [
        {"uid": text, "org_caption": text, "re_caption": "d", "org_clip_score": cosine, "re_clip_score": 0.0}
        for text, cosine in texts.items()
    ]
    found = {
        (row.pop("strategy"), row.pop("fraction")): row
        for row in one(version(tmp_path / "v", rows), "noise_diversity")
    }
    everything = {"captions": 4, "concatenated": 0, "cosine_mean": 0.25}
    everything |= {"distinct_trigrams": 4, "distinct_trigrams_per_1000": 1000.0}  # abc xyz qrs rst
    assert found["no_filter", 1.0] == everything
    top = {"captions": 3, "concatenated": 0, "cosine_mean": 0.3}
    top |= {"distinct_trigrams": 2, "distinct_trigrams_per_1000": round(1000 * 2 / 3, 1)}
    assert found["raw_top", 0.5] == top  # the threshold is number int(4 * 0.5) = 2 from 0, descending: 0.2


def test_concatenations_are_counted_for_their_cosine_is_borrowed(tmp_path: Path) -> None:
    """The top three by the original's cosine are concatenated; the fourth's recaption reaches 0.2, too."""
    scores = [(0.4, 0.1), (0.3, 0.35), (0.2, 0.25), (0.1, 0.3)]
    texts = [{"uid": f"{n}", "org_caption": "a b", "re_caption": f"c d {n}"} for n in range(4)]
    cosines = [{"org_clip_score": raw, "re_clip_score": new} for raw, new in scores]
    rows = [text | cosine for text, cosine in zip(texts, cosines, strict=True)]
    found = one(version(tmp_path / "v", rows), "noise_diversity")
    (half,) = [row for row in found if row["strategy"].startswith("concat") and row["fraction"] == 0.5]
    assert (half["captions"], half["concatenated"]) == (4, 3)
    assert half["cosine_mean"] == (0.4 + 0.35 + 0.25 + 0.3) / 4  # the greater of the two
    assert half["distinct_trigrams"] == 2 + 3 + 1  # a b c d: abc, bcd; 0, 1 and 2 after c d; c d 3
    assert {row["strategy"] for row in found if row["concatenated"]} == {"concat_top_synthetic_rest"}


def test_nouns_of_a_column_are_counted_up_to_its_own_captions(tmp_path: Path) -> None:
    """1,000 captions beside 150: there are no 1,000 of these, whatever the other column has."""
    long, short = [f"noun {n // 2}" for n in range(1000)], [*(f"noun {n}" for n in range(150)), *[None] * 850]
    place = table(tmp_path / "a.parquet", org_caption=long, re_caption=short)
    said = [
        {"caption": name, "nth": nth, "noun": text}
        for name, texts in (("org_caption", long), ("re_caption", short))
        for nth, text in enumerate(texts, 1)
        if text
    ]
    with views.connect(parts(place)) as con:
        con.register("nouns", pa.Table.from_pylist(said))
        found = con.sql((QUERIES / "nouns.sql").read_text()).fetchall()
    assert found == [("org_caption", 100, 50), ("org_caption", 1000, 500), ("re_caption", 100, 100)]


# --- two columns, row by row --------------------------------------------------------------------------------


def test_a_diff_of_two_columns_counts_words_as_lengths_does(tmp_path: Path) -> None:
    """`red-haired man's dog` has three words, between white space, and says five, of letters and digits."""
    columns = {
        "alt": ["a red-haired man's dog", "猫、犬 と 鳥", "e-mail: x@y.example !", None],
        "recaption": ["a man with a dog", "猫 犬 鳥 魚", "no mail", "not compared"],
    }
    place = table(tmp_path / "a.parquet", **columns)
    found = diff_columns(parts(place), "alt", "recaption")
    both = [(a, b) for a, b in zip(*columns.values(), strict=True) if a and b]
    numbers = [[len(text.split()) for text in texts] for texts in zip(*both, strict=True)]
    assert numbers == [[4, 3, 3], [5, 4, 2]]
    assert found["words_mean"] == (10 / 3, 11 / 3)
    assert (found["rows"], found["equal"], found["b_longer"]) == (3, 0, 2)
    means = {row["caption"]: row["words_mean"] for row in one(place, "lengths", ("alt",))}
    assert means == {"alt": round(found["words_mean"][0], 4)}
    said = [[set(words(text)) for text in pair] for pair in both]
    shared = [100 * len(a & b) / len(a | b) for a, b in said]
    assert found["shared_words_percent"] == pytest.approx(sum(shared) / 3)
    of_a, of_b = (set().union(*(pair[side] for pair in said)) for side in (0, 1))
    assert found["vocabulary"] == (len(of_a), len(of_b), len(of_a & of_b))


# --- the same numbers by other means, on real captions ------------------------------------------------------


@dataclass(frozen=True)
class Real:
    place: Path
    texts: Mapping[str, list[str]]
    answers: dict[str, list[Row]] = field(default_factory=dict)

    def by_caption(self, query: str) -> dict[str, Row]:
        return {
            row["caption"]: {name: value for name, value in row.items() if name != "caption"}
            for row in self.answers[query]
        }


ON_REAL = (
    "lengths", "length_histogram", "vocabulary", "top_words", "words_gained", "trigrams", "repetition",
    "duplicates", "residue", "grounding",
)  # fmt: skip
REAL = ["capsfusion", "flickr8k", "blip2", "web"]


@pytest.fixture(scope="module")
def given_tables(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """MS-COCO's objects and their synonyms; Brysbaert's concreteness of words."""
    folder = tmp_path_factory.mktemp("vocabulary")
    synonyms = (shared / "data" / "vocab" / "chair" / "synonyms.txt").read_text()
    (folder / "words.txt").write_text("".join(f"{word}\n" for word in re.split(r"[,\n]\s*", synonyms)))
    (ratings,) = (shared / "data" / "vocab" / "concreteness").glob("Concreteness*.txt")
    rated = pd.read_csv(ratings, sep="\t", keep_default_na=False)
    rated[rated["Bigram"] == 0][["Word", "Conc.M"]].to_csv(folder / "concreteness.tsv", sep="\t", index=False)
    return Options(folder / "words.txt", folder / "concreteness.tsv")


@pytest.fixture(scope="module")
def real(shared: Path, given_tables: Options, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Real]:
    data, folder = shared / "data", tmp_path_factory.mktemp("real")
    fused = json.loads((data / "capsfusion" / "example_data.json").read_text(encoding="utf-8"))
    flickr = [
        text
        for texts in json.loads((data / "flickr8k" / "captions.json").read_text(encoding="utf-8")).values()
        for text in texts
    ]
    blip2 = pd.read_csv(
        data / "flickr8k-blip2" / "generated_captions_comparison.csv",
        encoding="utf-8-sig",
        keep_default_na=False,
    )
    web = pd.read_parquet(data / "alt-text" / "web_alt_text_10000.parquet")
    found = {
        "capsfusion": Real(
            data / "capsfusion" / "example_data.json",
            {name: [row[name] for row in fused] for name in fused[0]},
        ),
        "flickr8k": Real(table(folder / "flickr8k.parquet", caption=flickr), {"caption": flickr}),
        "blip2": Real(
            data / "flickr8k-blip2" / "generated_captions_comparison.csv",
            {name: list(blip2[name]) for name in ("base_caption", "given_caption")},
        ),
        "web": Real(data / "alt-text" / "web_alt_text_10000.parquet", {"TEXT": list(web["TEXT"])}),
    }
    for one_of_them in found.values():
        one_of_them.answers.update(
            ask(one_of_them.place, *ON_REAL, captions=tuple(one_of_them.texts), options=given_tables)
        )
    return found


def words(text: str) -> list[str]:
    """By module `regex`, which shares nothing with RE2.

    DuckDB makes İ one i; Python adds a dot, which would cut the word in two.
    """
    return regex.findall(r"[\p{L}\p{N}]+", text.replace("İ", "i").lower())


def percentile(values: Sequence[int], q: float) -> int:
    """The smallest value that at least this share of the values does not exceed."""
    return int(np.quantile(values, q, method="inverted_cdf"))


def test_captions_are_seen_row_for_row(real: dict[str, Real]) -> None:
    for name, rows in (("capsfusion", 10_000), ("flickr8k", 40_455), ("blip2", 2_000), ("web", 10_000)):
        with views.connect(parts(real[name].place, tuple(real[name].texts))) as con:
            for caption, texts in real[name].texts.items():
                found = con.execute(
                    "select position, text from captions where caption = ? order by position", [caption]
                ).fetchall()
                assert len(found) == rows
                assert found == list(enumerate(texts, 1))


def test_capsfusion_has_the_lengths_of_its_paper(real: dict[str, Real]) -> None:
    means = {name: row["words_mean"] for name, row in real["capsfusion"].by_caption("lengths").items()}
    assert {name: round(mean, 1) for name, mean in means.items()} == {
        "laion_2b": 10.8,
        "laion_coco": 9.0,
        "capsfuion_official": 22.7,
    }


@pytest.mark.parametrize("name", REAL)
def test_lengths_as_pandas_counts_them(real: dict[str, Real], name: str) -> None:
    for caption, texts in real[name].texts.items():
        expected: Row = {"captions": len(texts)}
        column = pd.Series(texts, dtype=object)
        for what, values in (("words", column.str.split().str.len()), ("characters", column.str.len())):
            expected[f"{what}_mean"] = round(float(values.mean()), 4)
            expected |= {
                f"{what}_{label}": percentile(values.tolist(), q)
                for label, q in (("median", 0.5), ("p05", 0.05), ("p95", 0.95))
            }
            expected[f"{what}_max"] = int(values.max())
        assert real[name].by_caption("lengths")[caption] == expected
        bins = Counter(len(text.split()) // 4 * 4 for text in texts)
        found = {
            row["words"]: row["captions"]
            for row in real[name].answers["length_histogram"]
            if row["caption"] == caption
        }
        assert found == bins


def test_real_alt_text_has_white_space_that_re2_does_not_know(real: dict[str, Real]) -> None:
    for name, caption in (("capsfusion", "laion_2b"), ("web", "TEXT")):
        texts = real[name].texts[caption]
        ascii_only = sum(len(re.findall(r"\S+", text, re.ASCII)) for text in texts) / len(texts)
        assert real[name].by_caption("lengths")[caption]["words_mean"] > round(ascii_only, 4)


@pytest.mark.parametrize("name", REAL)
def test_vocabulary_and_frequent_words_as_nltk_counts_them(real: dict[str, Real], name: str) -> None:
    from nltk import FreqDist

    counts = {
        caption: FreqDist(word for text in texts for word in words(text))
        for caption, texts in real[name].texts.items()
    }
    joint = set().union(*counts.values())
    assert real[name].by_caption("vocabulary") == {
        caption: {
            "distinct_words": count.B(),
            "words": count.N(),
            "joint_vocabulary_percent": round(100 * count.B() / len(joint), 2),
        }
        for caption, count in counts.items()
    }
    for caption, count in counts.items():
        top = sorted(count.items(), key=lambda item: (-item[1], item[0].encode()))[:30]
        found = [row for row in real[name].answers["top_words"] if row["caption"] == caption]
        assert [(row["word"], row["times"], row["per_thousand"]) for row in found] == [
            (w, n, round(1000 * n / count.N(), 3)) for w, n in top
        ]


def test_words_that_people_have_and_blip2_has_not(real: dict[str, Real]) -> None:
    machine, human = (
        Counter(word for text in texts for word in words(text)) for texts in real["blip2"].texts.values()
    )
    for change, there, not_there in (("gained", human, machine), ("lost", machine, human)):
        only = {word: times for word, times in there.items() if word not in not_there}
        top = sorted(only.items(), key=lambda item: (-item[1], item[0].encode()))[:30]
        found = [row for row in real["blip2"].answers["words_gained"] if row["change"] == change]
        assert [(row["word"], row["times"], row["distinct_words"]) for row in found] == [
            (word, times, len(only)) for word, times in top
        ]


@pytest.mark.parametrize("name", REAL)
def test_ngrams_as_nltk_makes_them(real: dict[str, Real], name: str) -> None:
    from nltk import ngrams

    for caption, texts in real[name].texts.items():
        threes, fours = ([list(ngrams(words(text), n)) for text in texts] for n in (3, 4))
        sizes = [size for size in (1000, 10_000, 100_000) if size <= len(texts)] + (
            [len(texts)] if len(texts) not in (1000, 10_000) else []
        )
        found = [row for row in real[name].answers["trigrams"] if row["caption"] == caption]
        assert [(row["captions"], row["distinct_trigrams"], row["approximate"]) for row in found] == [
            (size, len({gram for grams in threes[:size] for gram in grams}), False) for size in sizes
        ]
        prefixes = Counter(" ".join(words(text)[:4]) for text in texts)
        noun, verb = (
            r"(image|picture|photo|photograph|scene)",
            r"(is|shows|showcases|depicts|features|displays|captures|presents|contains|portrays)",
        )
        opener = re.compile(rf"\W*((the|this|an|a)\s+)?{noun}\s+{verb}\b", re.IGNORECASE | re.ASCII)
        assert real[name].by_caption("repetition")[caption] == {
            "distinct_3": round(len({gram for grams in threes for gram in grams}) / sum(map(len, threes)), 4),
            "rep_4_mean": round(
                float(np.mean([1 - len(set(grams)) / len(grams) for grams in fours if grams])), 4
            ),
            "opener_percent": round(100 * sum(bool(opener.match(text)) for text in texts) / len(texts), 2),
            "top_100_prefixes_percent": round(
                100 * sum(times for _, times in prefixes.most_common(100)) / len(texts), 2
            ),
        }


@pytest.mark.parametrize("name", REAL)
def test_repeated_captions_as_pandas_finds_them(real: dict[str, Real], name: str) -> None:
    for caption, texts in real[name].texts.items():
        column, found = pd.Series(texts, dtype=object), real[name].by_caption("duplicates")[caption]
        assert found["distinct_captions"] == column.nunique()
        assert found["repeated_percent"] == round(100 * float(column.duplicated(keep=False).mean()), 2)
        assert found["most_repeated"] == int(column.value_counts().iloc[0])


def test_near_duplicates_against_every_pair(real: dict[str, Real]) -> None:
    """MinHash estimates; so many are near when each of 2 million pairs is compared exactly."""
    for caption, texts in real["blip2"].texts.items():
        sets = [
            {tuple(w[k : k + 3]) for k in range(max(1, len(w) - 2))}
            for w in (re.findall(r"\w+", text.lower()) for text in texts)
        ]
        near: set[int] = set()
        for a, b in itertools.combinations(range(len(sets)), 2):
            if (common := len(sets[a] & sets[b])) and common / (len(sets[a]) + len(sets[b]) - common) >= 0.8:
                near |= {a, b}
        found = real["blip2"].by_caption("duplicates")[caption]
        assert found["near_duplicate_sample"] == 2000
        assert found["near_duplicate_percent"] == pytest.approx(100 * len(near) / 2000, abs=0.5)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags += 1

    def handle_endtag(self, tag: str) -> None:
        self.tags += 1


def has_html(text: str) -> bool:
    """Tags as Python's HTML parser sees them, entities as `html.unescape` does if they end in a semicolon."""
    parser = Tags()
    parser.feed(text)
    return bool(parser.tags) or any(
        html.unescape(entity) != entity for entity in re.findall(r"&[^\s;&]+;", text)
    )


@pytest.mark.parametrize("name", REAL)
def test_residue_as_other_parsers_find_it(real: dict[str, Real], name: str) -> None:
    for caption, texts in real[name].texts.items():
        latin = {chr(code).encode().decode("latin-1") for code in range(0xA0, 0x100)}  # é as Ã©, £ as Â£
        expected = {
            "html_percent": sum(map(has_html, texts)),
            "url_percent": sum(
                bool(re.search(r"(?<![a-z0-9_])(https?://[^\s]|www\.[a-z0-9_])", text.lower(), re.ASCII))
                for text in texts
            ),
            "mojibake_percent": sum(
                "\ufffd" in text or "â€" in text or any(pair in text for pair in latin) for text in texts
            ),
        }
        found = real[name].by_caption("residue")[caption]
        assert {kind: found[kind] for kind in expected} == {
            kind: round(100 * number / len(texts), 4) for kind, number in expected.items()
        }


@pytest.mark.parametrize("name", REAL)
def test_grounding_and_concreteness_in_plain_python(
    real: dict[str, Real], given_tables: Options, name: str
) -> None:
    assert given_tables.vocabulary is not None
    assert given_tables.concreteness is not None
    visual = {
        line.strip().lower() for line in given_tables.vocabulary.read_text().split("\n") if line.strip()
    }
    rated = pd.read_csv(given_tables.concreteness, sep="\t", keep_default_na=False)
    scores = dict(zip(rated["Word"].str.lower(), rated["Conc.M"], strict=True))
    for caption, texts in real[name].texts.items():
        split = [found for found in map(words, texts) if found]
        concrete = [
            np.mean(found)
            for found in ([scores[word] for word in each if word in scores] for each in split)
            if found
        ]
        found = real[name].by_caption("grounding")[caption]
        assert found["captions"] == len(split)
        assert found["grounding_ratio_mean"] == pytest.approx(
            np.mean([sum(word in visual for word in each) / len(each) for each in split]), abs=1e-4
        )
        assert found["concreteness_mean"] == pytest.approx(np.mean(concrete), abs=1e-4)


# --- every query, on one small version, against plain Python ------------------------------------------------

CAPTIONS = {"org_caption": "org_clip_score", "re_caption": "re_clip_score"}
VISUAL = {line for line in report.VISUAL_WORDS.read_text().splitlines() if not line.startswith("#")}
KINDS = ("dead_link", "hash_mismatch", "caption_failed", "duplicate_image", "removed")
ODD = (r"caf\u00e9 <b>", "see http://a.b", "x@y.example", "call 212-555-0147", "cafÃ© &amp;")
SIGNS = {"escapes": r"\\u", "html": "[<&]", "url": "http:", "email": "@", "phone": "555-", "mojibake": "Ã"}
Answers = dict[str, list[Row]]


def small_version() -> tuple[list[Row], list[Row]]:
    """120 rows, a ledger of 145. Captions come twice, in the same letters or others; no cosine is an edge."""
    rng, rows = Random(0), list[Row]()
    lexicon = [*sorted(VISUAL)[:200:8], "the", "of", "very", "quietly", "because", "thing", "12", "shows"]
    for n in range(120):
        row: Row = {"uid": f"{n:032x}", "url": f"http://h{n % 23}.t{n % 21}/{n}", "sha256": f"{n // 2:064x}"}
        for name, length in (("org_caption", 8), ("re_caption", 16)):
            text = " ".join(rng.choices(lexicon, k=length + n % 3))
            again = rows[n - 9][name].upper() if n % 10 == 9 else text
            row[name] = f"The image shows {text}." if n % 6 == 5 else again
        row |= {score: (2 * rng.randrange(100) + 1) / 500 for score in CAPTIONS.values()}
        row |= {"width": rng.randrange(90, 512), "height": rng.randrange(90, 512), "re_clip_cut": n % 8 == 0}
        row |= {"org_clip_cut": None if n % 9 else True, "re_finish_reason": "stop" if n % 7 else "length"}
        row |= {"re_defects": (None, "boilerplate", "truncated,boilerplate", "identical")[n % 4]}
        row |= {"re_rejected": (None, "loop", "loop,short;short", None, None)[n % 5]}
        row |= {"re_blind": (None, None, True, False)[n % 4]}
        rows.append(row | {"org_gpt4v_score": n % 4 + 1, "re_gpt4v_score": n % 5 + 1})
    rows[0]["re_caption"], rows[1]["org_caption"] = "cat " * 90, rows[3]["org_caption"]
    rows[2]["re_clip_score"], rows[99]["org_caption"] = None, "unheard of before"  # a new word in the 100th
    for row, text in zip(rows[10:], ODD, strict=False):
        row["org_caption"] = text
    ledger = [{"uid": row["uid"], "url": row["url"], "status": "ok"} for row in rows]
    for n, kind in enumerate((kind for times, kind in enumerate(KINDS, 3) for _ in range(times)), 120):
        url = None if kind == "removed" else f"http://h1.t1/{n}"
        failed = kind == "caption_failed"
        reason = ("re_caption: loop: 0.9 of 4-grams repeat", "re_caption: its image: x")[n % 2]
        ledger.append({"uid": f"{n:032x}", "url": url, "status": kind, "error": reason if failed else None})
    return rows, ledger


def percent(part: float, whole: float, digits: int = 2) -> float:
    return round(100 * part / whole, digits)


def mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return round(math.fsum(known) / len(known), 4)


def ngrams(texts: Iterable[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(said[k : k + n]) for said in map(words, texts) for k in range(len(said) - n + 1)]


def most(counts: Mapping[str, int], number: int = 30) -> list[tuple[str, int]]:
    """The most frequent, of equal ones the first by bytes."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0].encode()))[:number]


def lengths_in_python(texts: list[str]) -> Row:
    found: Row = {"captions": len(texts)}
    numbers = {"words": [len(text.split()) for text in texts], "characters": [len(text) for text in texts]}
    for what, values in numbers.items():
        found |= {f"{what}_mean": mean(values), f"{what}_max": max(values)}
        for name, q in (("p05", 0.05), ("median", 0.5), ("p95", 0.95)):
            found[f"{what}_{name}"] = percentile(values, q)
    return found


def tokens_in_python(texts: list[str]) -> Row:
    encode = SimpleTokenizer().encode
    long = [len(encode(text)) + 2 for text in texts]
    found: Row = {"tokenizer": tokens.counter()[0], "captions": len(texts), "tokens_mean": mean(long)}
    found |= {"tokens_median": percentile(long, 0.5), "tokens_p95": percentile(long, 0.95)}
    cuts = {at: sum(n > at for n in long) for at in (64, 77, 128, 248)}
    cut = {f"cut_at_{at}_percent": percent(n, len(long)) for at, n in cuts.items()}
    return found | {"tokens_max": max(long)} | cut


def repetition_in_python(texts: list[str]) -> Row:
    threes, fours = ngrams(texts, 3), [grams for text in texts if (grams := ngrams([text], 4))]
    prefixes = Counter(" ".join(words(text)[:4]) for text in texts).most_common(100)
    openers = sum(text.lower().startswith("the image shows") for text in texts)
    return {
        "distinct_3": round(len(set(threes)) / len(threes), 4),
        "rep_4_mean": mean(1 - len(set(grams)) / len(grams) for grams in fours),
        "opener_percent": percent(openers, len(texts)),
        "top_100_prefixes_percent": percent(sum(n for _, n in prefixes), len(texts)),
    }


def duplicates_in_python(texts: list[str]) -> Row:
    """Here captions are near that have the same words; others have hardly a trigram in common."""
    same, near = Counter(texts), Counter(" ".join(words(text)) for text in texts)
    return {
        "captions": len(texts),
        "distinct_captions": len(same),
        "repeated_percent": percent(sum(n for n in same.values() if n > 1), len(texts)),
        "most_repeated": max(same.values()),
        "near_duplicate_percent": percent(sum(n for n in near.values() if n > 1), len(texts)),
        "near_duplicate_sample": len(texts),
    }


def cosines_in_python(scores: list[float]) -> Row:
    found: Row = {"scored": len(scores), "cosine_mean": mean(scores)}
    for name, q in (("p05", 0.05), ("median", 0.5), ("p95", 0.95)):
        found[f"cosine_{name}"] = float(np.quantile(scores, q, method="inverted_cdf"))
    return found | {"clip_s_mean": round(2.5 * math.fsum(scores) / len(scores), 4)}


def a_caption_in_python(texts: list[str], scores: list[float]) -> Answers:
    """What is asked of one caption column; rows without its name."""
    said, number = [words(text) for text in texts], len(texts)
    counts = Counter(word for each in said for word in each)
    bins = Counter(len(text.split()) // 4 * 4 for text in texts)
    cosine_bins = Counter(round(1000 * score) // 20 for score in scores)
    signs = {kind: sum(bool(re.search(sign, text)) for text in texts) for kind, sign in SIGNS.items()}
    residue = {f"{kind}_percent": percent(n, number, 4) for kind, n in signs.items()}
    languages = most(Counter(map(select.language, texts)))
    thousands = counts.total() / 1000
    top = [{"word": word, "times": n, "per_thousand": round(n / thousands, 3)} for word, n in most(counts)]
    visual = mean(sum(word in VISUAL for word in each) / len(each) for each in said)
    nouns = {word for each in said[:100] for word in each}
    trigrams = set(ngrams(texts, 3))
    return {
        "lengths": [lengths_in_python(texts)],
        "length_histogram": [{"words": low, "captions": n} for low, n in sorted(bins.items())],
        "tokens": [tokens_in_python(texts)],
        "vocabulary": [{"distinct_words": len(counts), "words": counts.total()}],
        "top_words": top,
        "trigrams": [{"captions": number, "distinct_trigrams": len(trigrams), "approximate": False}],
        "repetition": [repetition_in_python(texts)],
        "duplicates": [duplicates_in_python(texts)],
        "residue": [{"captions": number, **residue}],
        "grounding": [{"captions": number, "grounding_ratio_mean": visual, "concreteness_mean": None}],
        "nouns": [{"captions": 100, "distinct_nouns": len(nouns)}],
        "languages": [{"language": k, "captions": n, "percent": percent(n, number)} for k, n in languages],
        "cosines": [cosines_in_python(scores)],
        "cosine_histogram": [{"cosine": low / 50, "captions": n} for low, n in sorted(cosine_bins.items())],
    }


def words_gained_in_python(original: Counter[str], new: Counter[str]) -> list[Row]:
    found = []
    for change, there, missing in (("gained", new, original), ("lost", original, new)):
        only = {word: n for word, n in there.items() if word not in missing}
        about = {"caption": "re_caption", "change": change, "distinct_words": len(only)}
        found += [about | {"word": word, "times": n} for word, n in most(only)]
    return found


def preference_in_python(rows: list[Row]) -> Row:
    scored = [row for row in rows if row["re_clip_score"] is not None]
    gains = [row["re_clip_score"] - row["org_clip_score"] for row in scored]
    return {
        "rows": len(scored),
        "recaption_nearer_percent": percent(sum(gain > 0 for gain in gains), len(scored)),
        "original_nearer_percent": percent(sum(gain < 0 for gain in gains), len(scored)),
        "recaption_softmax_percent": percent(sum(1 + math.tanh(50 * g) for g in gains) / 2, len(scored)),
        "recaption_judge_mean": mean(row["re_gpt4v_score"] for row in scored),
        "original_judge_mean": mean(row["org_gpt4v_score"] for row in scored),
    }


def endings_in_python(rows: list[Row]) -> Row:
    return {
        "captions": len(rows),
        "stopped_at_limit": sum(row["re_finish_reason"] == "length" for row in rows),
        "without_full_stop": sum(not row["re_caption"].endswith(".") for row in rows),
        "recaptions_cut_in_scoring": sum(row["re_clip_cut"] is True for row in rows),
        "originals_cut_in_scoring": sum(row["org_clip_cut"] is True for row in rows),
    }


def defects_in_python(rows: list[Row], ledger: list[Row]) -> list[Row]:
    first, kept, failed = Counter[str](), Counter[str](), Counter[str]()
    for row in rows:
        defects = row["re_defects"].split(",") if row["re_defects"] else []
        before = row["re_rejected"].split(";")[0].split(",") if row["re_rejected"] else defects
        kept.update(defects)
        first.update(defect for defect in before if defect != "identical")
    for row in ledger:
        if row["status"] == "caption_failed" and (found := re.match(r"re_caption: (\w+): ", row["error"])):
            failed[found[1]] += 1
    about = {
        "caption": "re_caption",
        "captions": len(rows),
        "again": sum(len(row["re_rejected"].split(";")) for row in rows if row["re_rejected"]),
        "looked_at": sum(row["re_blind"] is not None for row in rows),
        "blind": sum(row["re_blind"] is True for row in rows),
    }
    told = [
        about
        | {"defect": kind, "first": first[kind] + failed[kind], "kept": kept[kind], "failed": failed[kind]}
        for kind in first | kept | failed
    ]
    return sorted(told, key=lambda row: (-row["first"], row["defect"]))


def ratings_in_python(rows: list[Row], judge: str) -> Row:
    ratings = [row[judge] for row in rows]
    numbers = dict(zip(("ones", "twos", "threes", "fours", "fives"), range(1, 6), strict=True))
    found = {"judge": judge, "captions": len(ratings), "mean": round(sum(ratings) / len(ratings), 3)}
    return found | {name: ratings.count(n) for name, n in numbers.items()} | {"without": 0}


def images_in_python(rows: list[Row]) -> Row:
    images = Counter(row["sha256"] for row in rows)
    short, long = ([side(row["width"], row["height"]) for row in rows] for side in (min, max))
    aspects = [b / a for a, b in zip(short, long, strict=True)]
    return {
        "rows": len(rows),
        "distinct_images": len(images),
        "rows_of_most_frequent_image": max(images.values()),
        "width_px_median": percentile([row["width"] for row in rows], 0.5),
        "height_px_median": percentile([row["height"] for row in rows], 0.5),
        "short_side_px_p05": percentile(short, 0.05),
        "long_side_px_p95": percentile(long, 0.95),
        "aspect_mean": mean(aspects),
        "aspect_over_3_percent": percent(sum(aspect > 3 for aspect in aspects), len(rows)),
    }


def links_in_python(ledger: list[Row]) -> list[Row]:
    hosts = [(row["url"].split("/")[2], row["status"]) for row in ledger if row["url"]]
    domains = [(host.split(".")[1], status) for host, status in hosts]
    found = []
    for what, links in (("tld", domains), ("host", hosts)):
        for name, n in most(Counter(name for name, _ in links), 20):
            kinds = Counter(status for each, status in links if each == name)
            row = {"what": what, "name": name, "links": n}
            row |= {"alive_percent": percent(kinds["ok"] + kinds["caption_failed"], n)}
            found.append(row | {"changed_percent": percent(kinds["hash_mismatch"], n)})
    return found


def noise_diversity_in_python(place: Path, rows: list[Row], strategy: str, fraction: float) -> Row:
    """Of what the strategy selects, which is tested in test_strategies."""
    by_uid, texts, cosines, joined = {row["uid"]: row for row in rows}, [], [], 0
    for each in select.select(parts(place), [strategy], select.Given(fraction)).to_pylist():
        row, names = by_uid[each["uid"]], each["caption"].split("+")
        texts.append(" ".join(row[name] for name in names))
        cosines.append(max((row[CAPTIONS[name]] for name in names if row[CAPTIONS[name]]), default=None))
        joined += len(names) == 2
    distinct = len(set(ngrams(texts, 3)))
    found: Row = {"strategy": strategy, "fraction": fraction, "captions": len(texts), "concatenated": joined}
    found |= {"cosine_mean": mean(cosines), "distinct_trigrams": distinct}
    return found | {"distinct_trigrams_per_1000": round(1000 * distinct / len(texts), 1)}


def in_python(place: Path, rows: list[Row], ledger: list[Row]) -> Answers:
    """Every query's rows."""
    found: Answers = {}
    for name, score in CAPTIONS.items():
        scores = [row[score] for row in rows if row[score] is not None]
        for query, answer in a_caption_in_python([row[name] for row in rows], scores).items():
            found.setdefault(query, []).extend({"caption": name} | row for row in answer)
    original, new = (Counter(word for row in rows for word in words(row[name])) for name in CAPTIONS)
    for row in found["vocabulary"]:
        row["joint_vocabulary_percent"] = percent(row["distinct_words"], len(original | new))
    statuses, number = most(Counter(row["status"] for row in ledger)), len(ledger)
    strategies = [("concat_top_synthetic_rest", fraction) for fraction in report.FRACTIONS]
    strategies += [("no_filter", 1.0), *(("raw_top", fraction) for fraction in report.FRACTIONS)]
    return found | {
        "words_gained": words_gained_in_python(original, new),
        "preference": [preference_in_python(rows)],
        "endings": [endings_in_python(rows)],
        "defects": defects_in_python(rows, ledger),
        "ratings": [ratings_in_python(rows, judge) for judge in ("org_gpt4v_score", "re_gpt4v_score")],
        "images": [images_in_python(rows)],
        "links": links_in_python(ledger),
        "rows_by_status": [{"status": k, "rows": n, "percent": percent(n, number)} for k, n in statuses],
        "noise_diversity": [noise_diversity_in_python(place, rows, *strategy) for strategy in strategies],
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answers, Answers]:
    """What the queries answer, and what Python does. Every word is a noun: there may be no spaCy pipeline."""
    rows, ledger = small_version()
    place = version(tmp_path_factory.mktemp("small") / "v", rows, ledger)
    texts = [(name, nth, row[name]) for name in CAPTIONS for nth, row in enumerate(rows, 1)]
    said = [{"caption": name, "nth": nth, "noun": word} for name, nth, text in texts for word in words(text)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(report._MADE, "nouns", lambda _: pa.Table.from_pylist(said))
        return ask(place, *(path.stem for path in QUERIES.glob("*.sql"))), in_python(place, rows, ledger)


@pytest.mark.parametrize("query", sorted(path.stem for path in QUERIES.glob("*.sql")))
def test_every_query_answers_what_python_counts(small: tuple[Answers, Answers], query: str) -> None:
    found, expected = (answers[query] for answers in small)
    if query == "noise_diversity":
        found = [row for row in found if row["strategy"] in {row["strategy"] for row in expected}]
    assert expected
    assert found == expected


# --- tables that cannot be used -----------------------------------------------------------------------------

GOOD = ["a cat", "a dog", "two birds"]
NOT_UTF8 = pa.array([b"fine", b"caf\xe9", b"a\xed\xa0\x80b"], pa.binary()).view(pa.string())


@dataclass(frozen=True)
class Bad:
    place: Path
    says: str
    arguments: tuple[str, ...] = ()

    @property
    def captions(self) -> tuple[str, ...]:
        return tuple(self.arguments[1].split(",")) if self.arguments[:1] == ("--captions",) else ()

    @property
    def options(self) -> Options:
        given = dict(zip(self.arguments[::2], self.arguments[1::2], strict=True))
        return Options(
            *(
                Path(given[name]) if name in given else None
                for name in ("--vocabulary", "--concreteness", "--tokenizer")
            )
        )


BAD = [
    "missing", "renamed", "all null", "wanted null", "other columns", "other order", "text and numbers",
    "numbers and text", "text and bytes", "text and lists", "no rows", "no rows csv", "no files",
    "empty folder", "other files", "unfinished run", "utf8 parquet", "utf8 csv", "utf16 csv", "utf8 jsonl",
    "lone surrogate", "broken json", "no parquet", "cut off", "empty file", "one of two", "damaged pages",
    "other csvs", "no version", "concreteness", "concreteness nan", "no vocabulary", "vocabulary not utf8",
    "no tokenizer",
]  # fmt: skip
THROUGH_THE_COMMAND_LINE = [
    "missing",
    "text and numbers",
    "empty folder",
    "utf8 csv",
    "damaged pages",
    "concreteness",
]


def bad(name: str, at: Path) -> Bad:
    good = table(at / "good.parquet", caption=GOOD)
    whole = table(at / "whole.parquet", caption=[f"{n * n:x}" for n in range(5000)]).read_bytes()
    for folder in ("empty", "other", "run", "json"):
        (at / folder).mkdir()
    match name:
        case "missing":
            return Bad(
                good, "there is no caption column nope\n  text columns: caption", ("--captions", "nope")
            )
        case "renamed":
            return Bad(
                table(at / "a.parquet", foo=GOOD, bar=GOOD, n=[1, 2, 3]),
                "none of the columns .*\n  text columns: foo, bar; .*--captions foo,bar",
            )
        case "all null":
            return Bad(
                table(at / "a.parquet", caption=pa.nulls(3, pa.string())),
                "every caption is null in .*\n  name other columns: --captions",
            )
        case "wanted null":
            place = table(at / "a.parquet", caption=GOOD, text=pa.nulls(3, pa.string()))
            return Bad(place, "every caption is null in .*\n", ("--captions", "text"))
        case "other columns":
            table(at / "t" / "a.parquet", caption=GOOD)
            return Bad(
                table(at / "t" / "b.parquet", text=GOOD).parent,
                r"b\.parquet has other columns than .*a\.parquet: caption, text\n",
            )
        case "other order":
            table(at / "t" / "a.parquet", caption=GOOD, text=GOOD)
            return Bad(
                table(at / "t" / "b.parquet", text=GOOD, caption=GOOD).parent,
                r"b\.parquet has other columns than .*: their order\n",
            )
        case "text and numbers" | "numbers and text" | "text and bytes" | "text and lists":
            kinds = {
                "text": GOOD,
                "numbers": [1, 2, 3],
                "bytes": [b"a", b"caf\xc3\xa9", b"c"],
                "lists": [["a"], ["b"], ["c"]],
            }
            first, second = name.split(" and ")
            table(at / "t" / "a.parquet", caption=kinds[first])
            return Bad(
                table(at / "t" / "b.parquet", caption=kinds[second]).parent,
                r"caption is \S.* in .*b\.parquet and \S.* in .*a\.parquet\n",
            )
        case "no rows":
            return Bad(table(at / "a.parquet", caption=pa.array([], pa.string())), "the tables hold no row\n")
        case "no rows csv":
            (at / "a.csv").write_text("caption\n")
            return Bad(at / "a.csv", "the tables hold no row\n")
        case "no files":
            return Bad(at / "none-*.parquet", r"none-\*\.parquet holds neither .* nor tables .*\n  build one")
        case "empty folder":
            return Bad(at / "empty", "empty holds neither .* nor tables .*\n  build one")
        case "other files":
            (at / "other" / "a.txt").write_text("a cat")
            return Bad(at / "other", "other holds neither .* nor tables .*\n  build one")
        case "unfinished run":
            (at / "run" / "recipe.json").write_text('{"name": "demo", "text": "x"}')
            return Bad(at / "run", "run holds neither a run with finished shards .*\n  build one")
        case "utf8 parquet":
            return Bad(
                table(at / "a.parquet", caption=NOT_UTF8),
                r"a\.parquet cannot be read: .*UTF8.*\n  write its text as UTF-8",
            )
        case "utf8 csv":
            (at / "a.csv").write_bytes(b"caption\na cat\ncaf\xe9\n")
            return Bad(
                at / "a.csv", r"a\.csv cannot be read: .*Line: 3 .*not utf-8.*\n  write its text as UTF-8"
            )
        case "utf16 csv":
            (at / "a.csv").write_bytes("caption\ncafé\n".encode("utf-16"))
            return Bad(at / "a.csv", r"a\.csv cannot be read: .*not utf-8.*\n  write its text as UTF-8")
        case "utf8 jsonl":
            (at / "a.jsonl").write_bytes(b'{"caption": "caf\xe9"}\n')
            return Bad(at / "a.jsonl", r"a\.jsonl cannot be read: .*UTF-8.*\n  write its text as UTF-8")
        case "lone surrogate":
            (at / "json" / "a.json").write_text('[{"caption": "a \\ud800 b"}, {"caption": "c"}]')
            return Bad(at / "json", r"a\.json cannot be read: .*surrogate.*\n  write its text as UTF-8")
        case "broken json":
            (at / "json" / "a.json").write_text('[{"caption": "a')
            return Bad(at / "json", r"a\.json cannot be read: .*unexpected end.*\n  \S")
        case "no parquet" | "cut off" | "empty file":
            (at / "a.parquet").write_bytes(
                {"no parquet": b"<html>not found</html>", "cut off": whole[:-20], "empty file": b""}[name]
            )
            return Bad(at / "a.parquet", r"a\.parquet is not a parquet file, or not a whole one: .*\n  \S")
        case "one of two":
            table(at / "t" / "a.parquet", caption=GOOD)
            (at / "t" / "b.parquet").write_bytes(whole[:-20])
            return Bad(at / "t", r"b\.parquet is not a parquet file, or not a whole one: .*\n  \S")
        case "damaged pages":
            (at / "a.parquet").write_bytes(whole[:4] + b"\xff" * 5000 + whole[5004:])
            return Bad(at / "a.parquet", r"a\.parquet cannot be read: .*\n  \S")
        case "other csvs":
            (at / "other" / "a.csv").write_text("caption,x\na,1\n")
            (at / "other" / "b.csv").write_text("text\nb\n")
            return Bad(
                at / "other",
                r"a\.csv \.\.\. cannot be read: .*Schema mismatch.*\n  give whole tables of one schema",
            )
        case "no version":
            return Bad(at / "target@v1.0.0", "target has no version 1.0.0\n  it has: none")
        case "concreteness" | "concreteness nan":
            line = "dog 4.8" if name == "concreteness" else "dog\tnan"
            (at / "c.tsv").write_text(f"Word\tConc.M\ncat\t4.9\n{line}\n")
            return Bad(
                good,
                rf"c\.tsv, line 3: '{line}' is no word, tab, number\n  \S",
                ("--concreteness", str(at / "c.tsv")),
            )
        case "no tokenizer":
            (at / "words.txt").write_text("cat\n")
            return Bad(
                good,
                r"words\.txt is no tokenizer: .*\n  give a model's tokenizer\.json",
                ("--tokenizer", str(at / "words.txt")),
            )
        case "no vocabulary":
            return Bad(
                good,
                r"words\.txt cannot be read: .*No such file.*\n  \S",
                ("--vocabulary", str(at / "words.txt")),
            )
        case "vocabulary not utf8":
            (at / "words.txt").write_bytes(b"cat\ncaf\xe9\n")
            return Bad(
                good,
                r"words\.txt is not UTF-8; it looks like .*\n  \S",
                ("--vocabulary", str(at / "words.txt")),
            )
    raise AssertionError(name)


@pytest.mark.parametrize("name", BAD)
def test_a_table_that_cannot_be_used_is_a_users_mistake(tmp_path: Path, name: str) -> None:
    case = bad(name, tmp_path)
    with pytest.raises(InputError, match=case.says) as raised:
        ask(case.place, "grounding", captions=case.captions, options=case.options)
    assert len(str(raised.value).splitlines()) == 2


@pytest.mark.parametrize("name", THROUGH_THE_COMMAND_LINE)
def test_a_table_that_cannot_be_used_is_two_lines_on_the_command_line(tmp_path: Path, name: str) -> None:
    case = bad(name, tmp_path)
    done = recap_here("stats", case.place, *case.arguments, check=2)
    assert re.match(rf"recap: (.*[/ ])?{case.says}", done.stderr)
    assert len(done.stderr.splitlines()) == 2
    assert done.stdout == ""


def test_sql_says_the_same(tmp_path: Path) -> None:
    done = recap_here("sql", bad("utf8 csv", tmp_path).place, "from captions", check=2)
    assert re.match(r"recap: .*a\.csv cannot be read: .*\n  write its text as UTF-8\n$", done.stderr)


def test_a_column_of_nulls_is_left_out_among_good_ones(tmp_path: Path) -> None:
    place = table(
        tmp_path / "a.parquet",
        text=pa.nulls(3),
        caption=GOOD,
        re_caption=pa.nulls(3, pa.string()),
        org_caption=[None, None, "x"],
    )
    assert [(row["caption"], row["captions"]) for row in one(place, "lengths")] == [
        ("caption", 3),
        ("org_caption", 1),
    ]


def test_a_caption_that_is_asked_for_twice_counts_once(tmp_path: Path) -> None:
    place = table(tmp_path / "a.parquet", caption=GOOD)
    assert one(place, "lengths", ("caption", "caption")) == one(place, "lengths")


@pytest.mark.parametrize(
    "name", ["a[1].parquet", "it's.parquet", "d[1]/a.parquet", "*.PARQUET", "ü ö.parquet"]
)
def test_names_of_files_are_taken_as_they_are(tmp_path: Path, name: str) -> None:
    place = table(tmp_path / name, caption=GOOD)
    assert one(place, "lengths")[0]["captions"] == 3
    assert one(place.parent, "lengths")[0]["captions"] == 3


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_a_caption_of_a_megabyte(tmp_path: Path, ending: str) -> None:
    place, text = tmp_path / f"a.{ending}", "word " * 200_000
    if ending == "parquet":
        table(place, caption=[text, "b"])
    else:
        place.write_text(
            f"caption\n{text}\nb\n" if ending == "csv" else f'{{"caption": "{text}"}}\n{{"caption": "b"}}\n'
        )
    found = ask(place, "lengths", "vocabulary", "repetition", "duplicates", "residue")
    assert (found["lengths"][0]["words_mean"], found["lengths"][0]["characters_max"]) == (
        (200_000 + 1) / 2,
        1_000_000,
    )
    assert found["vocabulary"][0]["distinct_words"] == 2


def test_a_table_holds_no_lone_surrogates() -> None:
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        pa.array(["a \ud800 b"], pa.string())


def test_columns_of_other_types_and_numbers_that_are_none_stop_nothing(tmp_path: Path) -> None:
    """Somebody else's table: cosines and sizes as text; a score that is NaN. What is said is JSON."""
    columns = {"org_caption": GOOD, "re_caption": GOOD, "sha256": GOOD, "width": GOOD, "height": GOOD}
    scores = {"org_clip_score": GOOD, "re_clip_score": GOOD}
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path / "queries"
        folder.mkdir()
        for query in ("cosines", "images", "preference", "endings", "links", "lengths"):
            shutil.copy(QUERIES / f"{query}.sql", folder)
        patch.setattr(report, "QUERIES", folder)
        found = report.stats(parts(table(tmp_path / "a.parquet", **columns, **scores)))
        scored = {"org_clip_score": [0.1] * 3, "re_clip_score": [0.2, math.nan, 0.3]}
        numbers = report.stats(parts(table(tmp_path / "b.parquet", **columns, **scored)))
    assert {name: answer.get("absent", "")[:14] for name, answer in found.items()} == {
        "cosines": "columns of oth", "images": "columns of oth", "preference": "columns of oth",
        "endings": "no column re_f", "links": "no ledger here", "lengths": "",
    }  # fmt: skip
    assert (
        json.loads(report.to_json(numbers), parse_constant=pytest.fail)["cosines"]["rows"][1]["cosine_mean"]
        is None
    )


@pytest.mark.parametrize("rows", [[], [{"org_caption": "", "re_caption": ""}]], ids=["no row", "no word"])
def test_a_version_with_nothing_to_count_has_statistics(tmp_path: Path, rows: list[Row]) -> None:
    place = version(tmp_path / "v", rows, [{"uid": "0", "url": "http://a.b/c", "status": "dead_link"}])
    found = ask(place, *(path.stem for path in QUERIES.glob("*.sql") if path.stem not in ("tokens", "nouns")))
    assert found["rows_by_status"] == [{"status": "dead_link", "rows": 1, "percent": 100.0}]
    assert found["vocabulary"] == found["cosines"] == []
    assert [row["distinct_trigrams"] for row in found["trigrams"]] == [0, 0][: 2 * len(rows)]
    assert found["preference"][0] == dict.fromkeys(found["preference"][0]) | {"rows": 0}
    assert json.loads(json.dumps(found), parse_constant=pytest.fail) == found


# --- what queries and strategies declare --------------------------------------------------------------------


def named(query: str, *kinds: str) -> set[tuple[str, str]]:
    """(kind, name) of the tables that a query names; if they are asked for, of functions and variables too.

    As DuckDB's parser sees it, without the query's own tables (of `with`) and DuckDB's own functions.
    """
    with duckdb.connect() as con:
        ((tree,),) = con.execute("select json_serialize_sql($1)", [query]).fetchall()
        own = {name for (name,) in con.sql("select function_name from duckdb_functions()").fetchall()}

    def walk(node: Any, hidden: frozenset[str]) -> Iterable[tuple[str, str]]:
        if isinstance(node, list):
            for part in node:
                yield from walk(part, hidden)
        elif isinstance(node, dict):
            for table in node.get("cte_map", {}).get("map", []):
                yield from walk(table["value"], hidden)
                hidden |= {table["key"]}
            match node.get("type"):
                case "BASE_TABLE" if node["table_name"] not in hidden:
                    yield "table", node["table_name"]
                case "TABLE_FUNCTION" if node["function"]["function_name"] not in own:
                    yield "table", node["function"]["function_name"]
                case "FUNCTION" if node["function_name"] == "getvariable":
                    yield "variable", node["arguments"][0]["expression"]["literal"]["text"]
                case "FUNCTION" if node["function_name"] not in own:
                    yield "function", node["function_name"]
            if node.get("type") == "TABLE_FUNCTION":
                node = {"arguments": node["function"]["arguments"]}
            for part in (part for key, part in node.items() if key != "cte_map"):
                yield from walk(part, hidden)

    (statement,) = json.loads(tree)["statements"]
    return {(kind, name) for kind, name in walk(statement, frozenset()) if kind in ("table", *kinds)}


def test_what_a_query_names() -> None:
    query = """with words as (from words), captions as (from first_captions(3)), more as (from counted)
        select unnest(w), english(text), getvariable('x'), (select max(n) from scores, unnest([1]) as t(n))
        from words join captions using (caption) semi join (from "published", more) using (caption)
        where exists (from words, ledger) union all from pool"""
    tables = {"words", "first_captions", "counted", "scores", "published", "ledger", "pool"}
    assert named(query) == {("table", name) for name in tables}
    others = {("function", "english"), ("variable", "x")}
    assert named(query, "function", "variable") - named(query) == others


@pytest.mark.parametrize("query", sorted(path.stem for path in QUERIES.glob("*.sql")))
def test_a_query_declares_what_it_reads(query: str) -> None:
    tables = {name for _, name in named((QUERIES / f"{query}.sql").read_text())}
    (first, *_) = (QUERIES / f"{query}.sql").read_text().splitlines()
    assert first == f"-- reads: {', '.join(sorted(tables))}"


@pytest.mark.parametrize("strategy", select.names())
def test_a_strategy_declares_what_it_needs(strategy: str) -> None:
    text = (select.STRATEGIES / f"{strategy}.sql").read_text()
    always = {("table", "pool"), ("function", "threshold"), ("function", "count_words")}
    names = named(text, "function", "variable") - always
    shares = " or ".join(sorted(name for kind, name in names if kind == "variable"))
    others = {name for kind, name in names if kind != "variable"}
    needs = sorted(others | ({shares} if shares else set())) or ["nothing"]
    assert text.splitlines()[0] == f"-- needs: {', '.join(needs)}"


@pytest.mark.parametrize(
    ("first", "said"),
    [
        ("select 1 as number\n", "does not begin with what it reads"),
        ("\n-- reads: captions\nselect 1 as number", "does not begin with what it reads"),
        ("-- reads:\nselect 1 as number", "does not begin with what it reads"),
        ("-- needs: captions\nselect 1 as number", "does not begin with what it reads"),
        ("-- reads: captions, \nselect 1 as number", "reads what there is not: "),
        ("-- reads: captions, capitals\nselect 1 as number", "reads what there is not: capitals"),
        ("-- reads: nothing\nfrom languages", "languages does not exist"),
        ("-- reads: captions\nfrom first_capitals(3)", "first_capitals does not exist"),
    ],
)
def test_a_wrong_declaration_of_a_query_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, said: str
) -> None:
    (tmp_path / "wrong.sql").write_text(first)
    monkeypatch.setattr(report, "QUERIES", tmp_path)
    with pytest.raises(InputError, match=rf"wrong\.sql.*{re.escape(said)}"):
        report.stats(parts(table(tmp_path / "a.parquet", text=["a"])))


@pytest.mark.parametrize(
    ("first", "said"),
    [
        ("select uid, 'org_caption' as caption from pool", "does not begin with what it needs"),
        (
            "-- needs: cosines\nselect uid, 'org_caption' as caption from pool",
            "needs what there is not: cosines",
        ),
        (
            "-- needs: nothing\nselect uid, 'org_caption' as caption from pool where english(org_caption)",
            "english does not exist",
        ),
    ],
)
def test_a_wrong_declaration_of_a_strategy_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, said: str
) -> None:
    (tmp_path / "wrong.sql").write_text(first)
    monkeypatch.setattr(select, "STRATEGIES", tmp_path)
    texts = {"uid": ["0" * 32], "org_caption": ["a"], "re_caption": ["b"]}
    place = table(tmp_path / "a.parquet", **texts, org_clip_score=[0.1], re_clip_score=[0.2])
    with pytest.raises(InputError, match=rf"wrong\.sql.*{re.escape(said)}"):
        one(place, "noise_diversity")


# --- a DuckDB shell of one's own ----------------------------------------------------------------------------

SHELL = "\n".join(line for line in str(views.__doc__).partition("In a shell of your own")[2].splitlines()[1:])
MADE_IN_PYTHON = {  # query -> what it reads that a shell has not
    "duplicates": {"near_duplicates"},
    "grounding": {"visual_words", "concreteness"},
    "languages": {"languages"},
    "noise_diversity": {"selections", "pool"},
    "nouns": {"nouns"},
    "tokens": {"tokens"},
}


def test_queries_run_in_a_shell_of_duckdb_too(tmp_path: Path) -> None:
    """All that read no table that is made in Python, after the statements in the docstring of views.py."""
    place = version(tmp_path / "v", *small_version())
    queries = {path.stem: path.read_text() for path in sorted(QUERIES.glob("*.sql"))}
    reads = {name: {what for _, what in named(sql)} - views.NAMES for name, sql in queries.items()}
    assert {name: tables for name, tables in reads.items() if tables} == MADE_IN_PYTHON
    plain = {name: sql for name, sql in queries.items() if name not in MADE_IN_PYTHON}
    expected = ask(place, *plain)
    with duckdb.connect() as con:
        con.execute(SHELL.replace("V/", f"{place}/"))
        found = {name: con.sql(sql).to_arrow_table().to_pylist() for name, sql in plain.items()}
    assert [name for name, rows in found.items() if not rows] == []
    assert found == expected


# --- on the command line, with a spaCy pipeline -------------------------------------------------------------

TRAINING = [
    ("A dog chases two dogs .", "DET NOUN VERB NUM NOUN PUNCT"),
    ("Cats sleep on Monday", "NOUN VERB ADP PROPN"),
    ("She runs quickly .", "PRON VERB ADV PUNCT"),
    ("The red boat is old .", "DET ADJ NOUN AUX ADJ PUNCT"),
]
LEMMAS = {"dogs": "dog", "Cats": "cat", "Monday": "Monday"}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with a spaCy pipeline: a tagger trained on 4 sentences, lemmas by a table."""
    import spacy
    from spacy.lookups import Lookups
    from spacy.training import Example

    spacy.util.fix_random_seed(0)
    nlp = spacy.blank("en")
    nlp.add_pipe("morphologizer")
    examples = [
        Example.from_dict(
            nlp.make_doc(text),
            {"words": text.split(), "pos": tags.split(), "morphs": [""] * len(tags.split())},
        )
        for text, tags in TRAINING
    ]
    optimizer = nlp.initialize(lambda: examples)
    for _ in range(30):
        nlp.update(examples, sgd=optimizer)
    lookups = Lookups()
    lookups.add_table("lemma_lookup", LEMMAS)
    nlp.add_pipe("lemmatizer", config={"mode": "lookup"}).initialize(lookups=lookups)
    folder = tmp_path_factory.mktemp("installed")
    nlp.to_disk(folder / "en_four_sentences")
    (folder / "en_four_sentences" / "__init__.py").write_text(
        "from pathlib import Path\nimport spacy\n\n"
        "def load(**settings):\n    return spacy.load(Path(__file__).parent, **settings)\n"
    )
    (folder / "en_four_sentences-1.0.dist-info").mkdir()
    (folder / "en_four_sentences-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: en_four_sentences\nVersion: 1.0\n"
    )
    (folder / "en_four_sentences-1.0.dist-info" / "entry_points.txt").write_text(
        "[spacy_models]\nen_four_sentences = en_four_sentences\n"
    )
    return folder


def test_stats_as_json_with_nouns_and_tokens(
    tmp_path: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 captions: dog, cat and monday; the 100th has no noun. A boat comes after them."""
    texts = [TRAINING[0][0], TRAINING[1][0], *[TRAINING[2][0]] * 98, TRAINING[3][0]]
    texts += [" ".join(["cat"] * times) for times in (70, 80, 130, 300)]
    place = table(tmp_path / "a.parquet", caption=texts)
    monkeypatch.setenv("PYTHONPATH", str(pipeline), prepend=":")
    found = json.loads(recap("stats", place, "--json").stdout, parse_constant=pytest.fail)
    assert list(found) == sorted(path.stem for path in QUERIES.glob("*.sql"))
    for name, answer in found.items():
        assert answer["sha256"] == sha256((QUERIES / f"{name}.sql").read_bytes()).hexdigest()
        assert set(answer) in ({"sha256", "rows"}, {"sha256", "absent"})
        assert all(
            isinstance(value, str | int | float | None)
            for row in answer.get("rows", [])
            for value in row.values()
        )
    absent = {name: answer["absent"] for name, answer in found.items() if "absent" in answer}
    assert {name for name, why in absent.items() if why == "no ledger here"} == {"links", "rows_by_status"}
    assert {name for name, why in absent.items() if why == "no scores here"} == {
        "cosines",
        "cosine_histogram",
    }
    assert found["nouns"]["rows"] == [{"caption": "caption", "captions": 100, "distinct_nouns": 3}]
    short = [
        6 + 2,
        4 + 2,
        *[4 + 2] * 98,
        6 + 2,
    ]  # every word and full stop here is a token of CLIP's; begin and end
    tokens = [*short, 70 + 2, 80 + 2, 130 + 2, 300 + 2]
    (row,) = found["tokens"]["rows"]
    assert (row["captions"], row["tokens_mean"], row["tokens_max"]) == (105, round(sum(tokens) / 105, 4), 302)
    assert (row["tokens_median"], row["tokens_p95"]) == (6, 8)  # the 53rd and the 100th of 105
    cuts = {64: 4, 77: 3, 128: 2, 248: 1}
    assert {at: row[f"cut_at_{at}_percent"] for at in cuts} == {
        at: round(100 * number / 105, 2) for at, number in cuts.items()
    }


def test_without_a_pipeline_there_are_no_nouns_but_the_way_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spacy.util.get_installed_models", list)
    (tmp_path / "queries").mkdir()
    shutil.copy(QUERIES / "nouns.sql", tmp_path / "queries")
    monkeypatch.setattr(report, "QUERIES", tmp_path / "queries")
    found = report.stats(parts(table(tmp_path / "a.parquet", caption=GOOD)))
    assert (
        found["nouns"]["absent"]
        == "no spaCy pipeline is installed; add one: python -m spacy download en_core_web_sm"
    )
