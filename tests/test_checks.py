"""Defects of captions: what is found, and what only looks like one."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.captions.checks import Checks, Defect, find, repeated, whole_sentences

ANY, ENGLISH = Checks(), Checks(language="en")
LABELLED = ROOT / "benchmarks" / "defects" / "labelled.jsonl"
GOOD = "A woman in a long red coat crosses a wet street. Behind her, a tram waits at the lights."


def kinds(text: str, checks: Checks = ANY, finish_reason: str | None = "stop") -> set[str]:
    return {str(defect) for defect in find(text, finish_reason, checks)}


@pytest.mark.parametrize(
    "text",
    [
        "A church with a cross cross cross cross cross on it.",
        "There is a dog on the the the grass.",
        "A man is holding a a a a",
        "aaaaaa",
        "The sky is bluuuuuuuue and the sea is grey.",
        "A hahahahahahahaha sign",
        "crosscrosscrosscrosscross",
        "Cross, cross, cross, cross, cross.",
        "A dog runs on the beach. A dog runs on the beach. A dog runs on the beach.",
        "A dog runs on the beach. The sun is low. A dog runs on the beach.",
        "a man in a red shirt in a red shirt in a red shirt",
        "The black square is square is square is square.",
        "A large black ring sits large black ring sits at the top.",
        "There. There. There. There. There.",
        "! ! ! ! ! ! ! ! ! ! ! !",
        "!!!!!!!!!!!!!!!!",
        "0 0 0 0 0 0 0 0 0 0 0 0",
        "left left\nleft left\nleft left",
        "一只狗在草地上跑，一只狗在草地上跑，一只狗在草地上跑。",
        "一个一个一个一个一个一个一个",
        "红红红红红红红",
        "猫が座っています。猫が座っています。猫が座っています。",
        "Une femme marche dans la rue dans la rue dans la rue.",
        "Собака бежит бежит бежит по траве.",
        GOOD + " " + GOOD,
    ],
)
def test_a_loop(text: str) -> None:
    assert "loop" in kinds(text)


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "a man in a red shirt and a man in a blue shirt and a man in a green shirt",
        "Two dogs, one white and brown, one white and black.",
        "A very very long pier.",
        "Duran Duran on a stage in New York, New York.",
        'The cover of the book "Brown Bear, Brown Bear, What Do You See?"',
        "Black and white photo of a black and white cat.",
        "A plate of cous cous.",
        "A dog is in front of the house. The house is white. The roof of the house is red. The dog is brown.",
        "Four plates on a grey table. There is a large blue plate on the left. There is a large blue plate "
        "on the right. A small black cup stands behind them, and a spoon lies beside it.",
        "A sign with the number 1000000 and the date 11.11.1111.",
        "Wait... what is that ... thing?",
        "On the left of the table is a lamp, on the right of the table is a book.",
        "一只黑色的狗和一只棕色的狗在草地上玩耍。",
        "一个穿红衣服的男人和一个穿蓝衣服的男人慢慢地走在街上。",
        "赤いシャツを着た男性が白い犬と公園を散歩しています。",
        "ผู้ชายใส่เสื้อสีแดงกำลังเดินกับสุนัขสีขาวในสวนสาธารณะ",
        "한 남자가 빨간 셔츠를 입고 공원에서 개와 함께 걷고 있다.",
        "एक आदमी लाल कमीज़ पहने हुए पार्क में कुत्ते के साथ चल रहा है।",
        "رجل يرتدي قميصا أحمر يمشي مع كلبه في الحديقة.",
    ],
)
def test_no_defect(text: str) -> None:
    assert kinds(text) == set()


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, but I can’t assist with identifying people.",
        "I am sorry, I cannot describe this image.",
        "Sorry, but I can't see any picture.",
        "As an AI language model, I do not have eyes.",
        "As a large language model, I cannot see.",
        "I'm just a text-based assistant.",
        "I cannot assist with this request.",
        "I am unable to view images directly.",
        "I'm not able to identify the person.",
        "Unfortunately, I can't provide a description.",
        "A nice question! However, I cannot view images.",
        "I apologize, but there is no image.",
        "I apologize for the confusion.",
        "It seems that no image was attached. Please upload it.",
        "Please provide the image that you want me to describe.",
        "I don't have the ability to see pictures.",
        '"I can\'t describe it."',
        "I won't be able to\nI'm sorry, I do not see it.",
    ],
)
def test_a_refusal(text: str) -> None:
    assert "refusal" in kinds(text)


@pytest.mark.parametrize(
    "text",
    [
        "The dog is sorry for the broken vase.",
        "A boy says he is sorry, but his sister can't hear him.",
        'A T-shirt that says "I\'m sorry for being late".',
        "A man holds a sign that says I can not help you.",
        "An AI chip on a circuit board; as an accelerator it is small.",
        "A model walks down the runway. She is unable to see the steps.",
        "I can see a house and a tree.",
        "Sorry is a board game.",
        "A visual assistant robot based on wheels.",
        "A person who cannot swim holds on to a raft.",
    ],
)
def test_no_refusal(text: str) -> None:
    assert "refusal" not in kinds(text)


@pytest.mark.parametrize(
    "text",
    [
        "The image shows a dog.",
        "This image features a dog.",
        "The picture depicts two men.",
        "**The photograph captures** a harbour.",
        "An image shows a stamp.",
        "This is a photo of a cat.",
        "This is a black-and-white photograph of a cat.",
        "In this image, a man walks.",
        "In the photo there is a man.",
        "Here is a caption: a man walks.",
        "Here's a detailed description of the image:",
        "Sure! A man walks.",
        "Certainly, here it is.",
        "Caption: a man walks.",
    ],
)
def test_boilerplate(text: str) -> None:
    assert kinds(text) == {"boilerplate"}


@pytest.mark.parametrize(
    "text",
    [
        "A man shows an image to a dog.",
        "A picture hangs on the wall.",
        "Images of saints on a wall.",
        "A photo album is on the table.",
        "Sure-footed goats climb a rock.",
        "Here is where the river bends.",
        "In this town, all roofs are red.",
        "This is a dog.",
    ],
)
def test_no_boilerplate(text: str) -> None:
    assert kinds(text) == set()


@pytest.mark.parametrize("text", ["", " \n\t", "...", "—", "!?"])
def test_no_words_at_all_is_short(text: str) -> None:
    assert "short" in kinds(text)


def test_short_is_fewer_words_than_asked_for() -> None:
    assert kinds("A dog.", Checks(min_words=3)) == {"short"}
    assert kinds("A brown dog.", Checks(min_words=3)) == set()
    assert kinds("Dog", ANY) == set()
    assert kinds("一只狗", Checks(min_words=3)) == set()


@pytest.mark.parametrize(
    "text",
    [
        "A dog\x00 runs.", "A dog\x1b[0m runs.", "A dog\x7f.", "A dog\x85.", "A dog � runs.", "A dog\ud83d.",
        "A dog runs.<|eot_id|>", "<s>A dog runs.</s>", "<image>\nA dog runs.", "[INST] A dog [/INST]",
        "A dog runs.<|im_end|>", "<|endoftext|>", "<start_of_turn>model", "A dog<0x0A>runs", "<pad><pad>",
        "A dog.<｜end▁of▁sentence｜>", "<unk> dog", "A dog.\nUSER: and now?", "ASSISTANT: A dog.",
        "[SEP] dog",
    ],
)  # fmt: skip
def test_control(text: str) -> None:
    assert "control" in kinds(text)


@pytest.mark.parametrize(
    "text",
    [
        "A dog\n\truns.",
        "A sign: <- left | right ->",
        "A screen with 3 < 4 and a heart <3",
        "A page with an <h1> headline.",
        "A button [INSTALL] on a screen.",
        "A family 👨‍👩‍👧 on a beach, 100 % happy.",
        "A note: USER: is written in it.",
    ],
)
def test_no_control(text: str) -> None:
    assert kinds(text) == set()


@pytest.mark.parametrize(
    "text", ["naïve café — it’s", "Ein Bär in Österreich – „schön“", "Обычная подпись к фото"]
)
@pytest.mark.parametrize("codec", ["latin-1", "cp1252"])
def test_mojibake_as_it_arises(text: str, codec: str) -> None:
    broken = text.encode().decode(codec, errors="ignore")
    assert "mojibake" in kinds(broken)
    assert "mojibake" not in kinds(text)


@pytest.mark.parametrize(
    "text",
    [
        "LEGOÂ® set",
        "itâ€™s a dog",
        "cafÃ© terrace",
        r"LEGO\xc2\xae set",
        r"caf\u00e9 terrace",
        "a heart ðŸ˜€",
    ],
)
def test_mojibake(text: str) -> None:
    assert kinds(text) == {"mojibake"}


@pytest.mark.parametrize(
    "text",
    [
        "naïve café — it’s",
        "A sign “CAFÉ” and one “MAÇÔ, “MAÇÔ",
        "He said “café’” and left… “voilà…”",
        "ÂNGELO’S and João’s and SÃO PAULO",
        "A Windows path C:\\users\\xavier",
        "Motörhead® on stage, 20 °C, ½ price, £5, ¿qué?",
        "Tiếng Việt: một người đàn ông",
    ],
)
def test_no_mojibake(text: str) -> None:
    assert "mojibake" not in kinds(text)


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", GOOD),
        ("de", "Eine Frau in einem langen roten Mantel überquert eine nasse Straße."),
        ("fr", "Une femme vêtue d'un long manteau rouge traverse une rue mouillée."),
        ("es", "Una mujer con un largo abrigo rojo cruza una calle mojada."),
        ("ru", "Женщина в длинном красном пальто переходит мокрую улицу."),
        ("zh", "一位穿着红色长大衣的女士正在穿过湿漉漉的街道。"),
        ("ja", "長い赤いコートを着た女性が濡れた道を渡っています。"),
        ("ko", "긴 빨간 코트를 입은 여자가 젖은 거리를 건너고 있다."),
        ("ar", "امرأة ترتدي معطفا أحمر طويلا تعبر شارعا مبتلا."),
        ("hi", "लंबा लाल कोट पहने एक महिला गीली सड़क पार कर रही है।"),
        ("th", "ผู้หญิงใส่เสื้อโค้ทสีแดงตัวยาวกำลังข้ามถนนที่เปียก"),
    ],
)
def test_language(language: str, text: str) -> None:
    assert kinds(text, Checks(language=language)) == set()
    other = "de" if language == "en" else "en"
    assert kinds(text, Checks(language=other)) == {"language"}
    assert kinds(text) == set()


def test_language_is_not_told_by_few_words() -> None:
    assert kinds("Ein Hund", ENGLISH) == set()
    assert kinds("12345678901234567890 1234567890", ENGLISH) == set()
    assert kinds("一位穿着红色长大衣的女士正在穿过街道。", Checks(language="zh-CN")) == set()


def test_truncated_is_told_by_the_finish_reason_alone() -> None:
    assert kinds("A dog runs on the") == set()
    assert kinds("A dog runs on the", finish_reason=None) == set()
    assert kinds("A dog runs.", finish_reason="length") == {"truncated"}


def test_what_was_seen_is_told_shortly() -> None:
    found = find("The image shows a a a\x00 dog <|eot_id|> " * 50, "length", ENGLISH)
    assert found[Defect.LOOP].endswith("of 4-grams repeat")
    assert found[Defect.BOILERPLATE] == "'The image shows'"
    assert found[Defect.CONTROL] == r"'\x00'"
    assert all(len(seen) < 80 and seen.isprintable() for seen in found.values())
    assert list(found) == sorted(found, key=list(Defect).index)


def test_repeated() -> None:
    assert repeated("") == repeated("a dog") == 0
    assert repeated("one two three four five six seven eight") == 0
    assert repeated("one two three four one two three four") == pytest.approx(1 / 5)
    assert repeated("One, two: three four. ONE TWO three - four") == pytest.approx(1 / 5)
    assert repeated("cross " * 20) == pytest.approx(16 / 17)
    assert repeated("one two one two", 2) == pytest.approx(1 / 3)
    assert repeated("红色的狗在跑步。" * 2) == 0  # seven characters are no 4 words
    assert repeated("红色的狗在跑步着呢" * 2) == pytest.approx(2 / 11)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("A dog runs. A cat sits on the", "A dog runs."),
        ("A dog runs. A cat sits.", "A dog runs. A cat sits."),
        ("A dog runs.  ", "A dog runs."),
        ("A dog runs", "A dog runs"),
        ("", ""),
        ("Dr. Smith", "Dr. Smith"),
        ("A man smiles. He is Dr. Smith of", "A man smiles."),
        ("A man smiles. Beside him is Mr.", "A man smiles."),
        ("A pole is 3.5 m", "A pole is 3.5 m"),
        ("A pole stands here. It is 3.5 m high and", "A pole stands here."),
        ("It was made in the U.S. The car is", "It was made in the U.S."),
        ("A jeep. It is of the U.S. Army and", "A jeep."),
        ("A clock shows 5 p.m. The sun", "A clock shows 5 p.m."),
        ("A man, J. Smith, waves. He", "A man, J. Smith, waves."),
        ("Fruit, e.g. Apples", "Fruit, e.g. Apples"),
        ('A sign says "Stop!" It is', 'A sign says "Stop!"'),
        ('A sign says "Stop!" in red and', 'A sign says "Stop!" in red and'),
        ("He said “Stop.” Then he", "He said “Stop.”"),
        ("A dog (it is brown.) It", "A dog (it is brown.)"),
        ("**A dog runs.** It", "**A dog runs.**"),
        ("Is it a dog? It", "Is it a dog?"),
        ("A dog waits… It", "A dog waits…"),
        ("A dog waits... then it", "A dog waits... then it"),
        ("... a dog", "... a dog"),
        ("a dog runs. a cat sits on", "a dog runs."),
        ("1. A dog\n2. A cat\n3.", "1. A dog\n2. A cat\n3."),
        ("1. A dog runs.\n2. A cat", "1. A dog runs."),
        ("一只狗在跑。一只猫", "一只狗在跑。"),
        ("他说：“停。”然后他", "他说：“停。”"),
        ("犬が走る！猫は", "犬が走る！"),
        ("एक कुत्ता दौड़ता है। एक बिल्ली", "एक कुत्ता दौड़ता है।"),
    ],
)
def test_whole_sentences(text: str, whole: str) -> None:
    assert whole_sentences(text) == whole


PIECES = [
    "a", "the", "dog", "Dog", "runs", ".", "!", "?", "…", "。", ",", "Dr.", "U.S.", "e.g.", "3.5", "1.",
    "I", "I'm", "sorry", "can't", '"', "”", ")", "'", "’", "*", "\n", "<|eot_id|>", "Ã©", "\\xc2", "狗", "在",
    "cross",
]  # fmt: skip
NEARLY_CAPTIONS = st.tuples(st.sampled_from(["", " "]), st.lists(st.sampled_from(PIECES), max_size=40)).map(
    lambda drawn: drawn[0].join(drawn[1])
)
TEXTS = st.one_of(st.text(st.characters(exclude_categories=[])), NEARLY_CAPTIONS)  # with halves of pairs


@given(text=TEXTS, finish_reason=st.sampled_from([None, "stop", "length"]))
@settings(max_examples=300, deadline=None)
def test_any_text_is_judged(text: str, finish_reason: str | None) -> None:
    found = find(text, finish_reason, ENGLISH)
    assert (Defect.TRUNCATED in found) == (finish_reason == "length")
    assert Defect.UNPARSABLE not in found
    assert all(seen.isprintable() and 0 < len(seen) < 600 for seen in found.values())
    assert find(text, finish_reason, ENGLISH) == found
    assert 0 <= repeated(text) <= 1


@given(text=TEXTS)
@settings(max_examples=500, deadline=None)
def test_whole_sentences_are_the_beginning_and_stay_whole(text: str) -> None:
    whole = whole_sentences(text)
    assert text.startswith(whole)
    assert whole_sentences(whole) == whole
    assert bool(whole) == bool(text)


HOSTILE = [
    "a", "a ", ". ", "Dr. ", "U.S. ", "<|", "<|a", "I can ", "I'm sorry ", "i am ", "the ", "one two ", "\\x",
    "Ã", "â€", '."', '. "', "..", "红色", "\n", " ", "the image ", "here is a ", "\x00", "[", "ab", "'", "a'",
    "_", "*", "é1 ", "w-", "A dog runs fast here. ", "<aaaaaaaaaaaaaaaaa", "ผู้", "！", "A ", "aA", "\ud83d",
]  # fmt: skip


@pytest.mark.parametrize("unit", HOSTILE)
def test_a_megabyte_takes_no_second(unit: str) -> None:
    text = (unit * 1_000_000)[:1_000_000] + "x"
    for judge in (lambda: find(text, "stop", ENGLISH), lambda: whole_sentences(text), lambda: repeated(text)):
        start = time.process_time()
        judge()
        assert time.process_time() - start < 5  # of a machine that is slow; what is not linear takes minutes


def test_a_megabyte_without_a_loop_takes_no_second() -> None:
    text = " ".join(f"w{n} v{n * 7 % 99_991}." for n in range(65_000))
    start = time.process_time()
    assert kinds(text) == set()
    whole_sentences(text)
    assert time.process_time() - start < 5  # of a machine that is slow; what is not linear takes minutes


def labelled() -> list[dict[str, Any]]:
    return [json.loads(line) for line in LABELLED.read_text(encoding="utf-8").splitlines()]


def test_the_loops_labelled_by_hand_are_found() -> None:
    rows = labelled()
    found = ["loop" in kinds(row["caption"]) for row in rows if "loop" in row["labels"]]
    assert len(found) >= 200
    assert sum(found) / len(found) >= 0.95
    wrong = ["loop" in kinds(row["caption"]) for row in rows if not {"loop", "garbled"} & set(row["labels"])]
    assert len(wrong) >= 40
    assert sum(wrong) <= 2
    for row in rows:
        of_finish = {"truncated"} & kinds(row["caption"], ANY, row["finish_reason"])
        assert of_finish == {"truncated"} & set(row["labels"])


def good(data: Path) -> dict[str, list[str]]:
    flickr = json.loads((data / "flickr8k" / "captions.json").read_text(encoding="utf-8"))
    with open(data / "flickr8k-blip2" / "generated_captions_comparison.csv", encoding="utf-8-sig") as file:
        blip = list(csv.DictReader(file))
    iiw = [
        json.loads(line)
        for path in (data / "imageinwords").glob("*/data.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return {
        "flickr8k": [caption for five in flickr.values() for caption in five],
        **{name: [row[name] for row in blip] for name in ("base_caption", "lora_caption", "given_caption")},
        "human": [row[name] for row in iiw for name in ("IIW", "DOCCI") if row.get(name)],
        "model": [row["IIW-P5B"] for row in iiw if row.get("IIW-P5B")],
    }


def test_at_most_one_good_caption_in_a_hundred_is_flagged(shared: Path) -> None:
    for name, captions in good(shared / "data").items():
        alarms = [kinds(caption, ENGLISH) - {"boilerplate"} for caption in captions]
        assert sum(map(bool, alarms)) <= len(captions) / 100, (name, list(filter(None, alarms)))
