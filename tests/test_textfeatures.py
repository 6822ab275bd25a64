"""Features of texts are made once by a stage, joined with their own texts, trained on, drawn with their own
encoder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CLIP, a_version, recap_here, with_stage
from safetensors.numpy import load_file
from test_data import published_in
from test_dit import TINY, a_training, losses

import recipes.join
from builder.errors import InputError
from builder.run import Run
from builder.stages import tensors
from builder.stages.clip import Clip
from builder.stages.select import LEDGER
from builder.stages.textfeatures import TENSOR, Encoder, TextFeatures
from recipes.data import Mix, Pairs, Picture
from recipes.dit.sample import Drawer, sample
from recipes.dit.train import train
from recipes.join import join

CONTEXT = 50  # of which few texts have fewer, and no multiple of 16
MIX = Mix(p_original=0.5, drop=0.2)


@pytest.fixture(scope="module")
def run(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's, with one stage more."""
    return with_stage(
        demo_run,
        tmp_path_factory.mktemp("encoded") / "run",
        TextFeatures(model=str(CLIP), context=CONTEXT, batch=7),
    )


def a_folder(folder: Path, kind: str) -> Path:
    """A tiny encoder of transformers, of random weights, with the demo's words."""
    import transformers

    torch.manual_seed(0)
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(CLIP / "tokenizer.json"), pad_token="<pad>"
    )
    words.save_pretrained(folder)
    vocabulary = len(words)
    model: Any
    if kind == "clip":
        config = transformers.CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=16,
        )  # fmt: skip
        model = transformers.CLIPTextModel(config)
    else:
        t5 = transformers.T5Config(
            vocab_size=vocabulary, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2
        )
        model = transformers.T5EncoderModel(t5)
    model.save_pretrained(folder)
    return folder


def test_the_towers_last_feature_is_what_it_pools() -> None:
    encoder, clip = Encoder(str(CLIP), 80), Clip(str(CLIP))
    texts = ["a red star", "", "The scene contains two objects over a plain white background. " * 9]
    found = encoder.features(texts)
    assert [cut for _, cut in found] == [False, False, True] == clip.texts(texts)[1]
    assert [len(of) for of, _ in found][1:] == [2, 80]
    assert len(found[0][0]) < 9
    for text, (of, _) in zip(texts, found, strict=True):
        pooled = torch.from_numpy(of[-1]).float() @ clip.model.text_projection
        wanted = clip.texts([text])[0][0]
        torch.testing.assert_close(torch.nn.functional.normalize(pooled, dim=0), wanted, atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_transformers_encoders_say_what_they_say_alone(kind: str, tmp_path: Path) -> None:
    """With others beside it, and with padding, a text has the features that it has alone, without."""
    folder = a_folder(tmp_path / kind, kind)
    encoder = Encoder(str(folder), 16)
    found = encoder.features(["a red star", "a large blue circle at the top left"])
    ids = encoder.tower.tokenizer("a red star")["input_ids"]
    with torch.no_grad():
        alone = encoder.tower.model(input_ids=torch.tensor([ids]))[0][0]
    np.testing.assert_allclose(found[0][0], alone.numpy(), atol=2e-3)
    assert len(found[0][0]) == len(ids) < len(found[1][0])
    assert encoder.features(["word " * 40])[0][1]
    if kind == "clip":
        with pytest.raises(InputError, match=r"context=17, and .* reads 16 tokens"):
            Encoder(str(folder), 17)


def test_a_shard_has_what_the_encoder_says_of_its_texts(run: Path) -> None:
    opened, encoder = Run.open(run), Encoder(str(CLIP), CONTEXT)
    record = next(opened.done("text_features"))
    path = opened.local(record.output(".safetensors"))
    features, header = load_file(path)[TENSOR], tensors.read_header(path, TENSOR)
    assert header.number == len(features)
    empty = int(header.about["empty"])
    np.testing.assert_array_equal(features[:empty], encoder.features([""])[0][0])
    source = next(opened.done("source"))
    rows = pq.read_table(opened.local(record.output(".parquet"))).to_pylist()
    texts = pq.read_table(opened.local(source.output(".parquet")), columns=["org_caption"]).to_pylist()
    checked = 0
    for row, given in zip(rows, texts, strict=True):
        text = given["org_caption"]
        if row["status"] != "ok" or not text:
            assert row["org_caption_start"] is None
            continue
        assert row["org_caption_sha256"] == sha256(text.encode()).hexdigest()
        start, number = row["org_caption_start"], row["org_caption_tokens"]
        ((wanted, cut),) = encoder.features([text])
        assert cut == row["org_caption_cut"]
        np.testing.assert_allclose(features[start : start + number], wanted, atol=4e-3)
        checked += 1
    assert checked > 20
    names = ("org_caption_tokens", "re_caption_tokens")
    assert sum(row[name] or 0 for row in rows for name in names) + empty == len(features)


def test_a_training_sees_its_own_texts_features(run: Path, demo_run: Path, tmp_path: Path) -> None:
    version = str(published_in(demo_run))
    joined = join(version, str(run), tmp_path / "j", min_found=0.9, features="text_features")
    assert joined.features == {
        "encoder": Encoder(str(CLIP), 8).identity, "context": CONTEXT, "empty": 2, "width": 128,
        "precision": "fp32", "start": 8 + tensors.HEADER,
    }  # fmt: skip
    assert joined.audit.other_text == 0
    pairs = Pairs(joined, MIX, Picture(16), None, seed=0, batch=64)
    texts = Pairs(joined, MIX, Picture(16), _kept, seed=0, batch=64)
    encoder, seen = Encoder(str(CLIP), CONTEXT), pairs.at(0)
    said = [bytes(row[row > 0].tolist()).decode() for row in texts.at(0).texts]
    assert seen.texts.dtype == torch.float16
    assert said.count("") in range(4, 30)
    for features, (wanted, _) in zip(seen.texts, encoder.features(said), strict=True):
        number = int(features.any(-1).sum())
        np.testing.assert_allclose(features[:number].numpy(), wanted, atol=4e-3)


def _kept(texts: list[str]) -> tuple[torch.Tensor, int]:
    rows = [text.encode()[:400].ljust(400, b"\0") for text in texts]
    return torch.tensor([list(row) for row in rows]), 0


def test_a_training_on_features_draws_with_their_encoder_and_no_other(
    run: Path, demo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.training.REPORT_S", 0.0)
    net = replace(TINY, text_layers=1, vocabulary=0, context=CONTEXT, text_width=128)
    chosen = {"images": str(run), "tokenizer": "", "features": "text_features", "net": net, "mix": MIX}
    training = a_training(demo_run, samples=96, min_found=0.9, **chosen)
    there = train(training, tmp_path / "out", say=lambda _: None)
    assert json.loads((there / "config.json").read_text())["features"]["context"] == CONTEXT
    two = train(replace(training, workers=0), tmp_path / "two", say=lambda _: None)
    assert losses(tmp_path / "out") == losses(tmp_path / "two")
    assert two.name == there.name
    shutil.rmtree(tmp_path / "out" / "step-000000000096")
    again = train(training, tmp_path / "out", say=lambda _: None)
    assert losses(tmp_path / "out") == losses(tmp_path / "two")
    assert (again / "training.tensors").read_bytes() == (two / "training.tensors").read_bytes()
    way = replace(training, features="", encoder=str(CLIP))
    train(way, tmp_path / "way", say=lambda _: None)
    assert losses(tmp_path / "way") == pytest.approx(losses(tmp_path / "out"), rel=1e-3)
    Drawer(tmp_path / "way" / "latest")  # finds it where it was
    sample(there, ["a red star"], tmp_path / "drawn", encoder=str(CLIP), steps=2, say=lambda _: None)
    with pytest.raises(InputError, match="reads features of texts\n"):
        Drawer(there)
    other = a_folder(tmp_path / "other", "t5")
    said = recap_here("sample", there, "x", "--encoder", other, "--out", tmp_path / "b", check=2).stderr
    assert "features of texts of another model" in said
    drawer = Drawer(there, encoder=str(CLIP))
    with pytest.raises(InputError, match="more than the model's 50 tokens"):
        drawer.check(["word " * 90], drawer.usual())
    with pytest.raises(InputError, match="50 tokens, each 128 wide, the net reads 32 of 128"):
        train(replace(training, net=replace(net, context=32)), tmp_path / "c", say=lambda _: None)
    for both in ({"features": ""}, {"encoder": "x"}, {"tokenizer": "x"}):
        with pytest.raises(InputError, match="features of texts, or a frozen encoder"):
            replace(training, **both)
    with pytest.raises(InputError, match="there are none of a sentence"):
        replace(training, mix=Mix(one_sentence=True))


def test_other_texts_have_no_features(
    run: Path, demo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows whose features are of another text than the version's are not trained on."""
    version = str(published_in(demo_run))
    kept, changed = recipes.join.shards_of, 0

    def others(*what: str) -> Iterator[tuple[Path, Path, tensors.Shard]]:
        nonlocal changed
        for path, table, shard in kept(*what):
            rows = pq.read_table(table).to_pylist()
            for row in rows[::2]:
                changed += row["re_caption_sha256"] is not None
                row["re_caption_sha256"] = row["re_caption_sha256"] and "0" * 64
            copy = tmp_path / table.name
            pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(table)), copy)
            yield path, copy, shard

    monkeypatch.setattr("recipes.join.shards_of", others)
    with pytest.raises(InputError, match="features of other texts"):
        join(version, str(run), tmp_path / "b", features="text_features")
    joined = join(version, str(run), tmp_path / "b", min_found=0.1, features="text_features")
    assert 2 * joined.audit.other_text == changed > 40  # joined twice
    assert joined.audit.found + joined.audit.other_text > 0.9 * joined.audit.rows


def test_of_a_text_that_is_white_alone_no_features_are_asked(
    run: Path, demo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = published_in(demo_run).glob("data/train-*.parquet")
    rows = pq.read_table(path).to_pylist()
    for row in rows[::3]:
        row["org_caption"] = " \u3000\n"
    white = {row["uid"] for row in rows[::3]}
    ledger = pa.table({"uid": [], "url": [], "status": [], "error": []}, LEDGER)
    version = a_version(tmp_path / "version", pa.Table.from_pylist(rows), ledger)
    kept = recipes.join.shards_of

    def without(*what: str) -> Iterator[tuple[Path, Path, tensors.Shard]]:
        for path, table, shard in kept(*what):
            found = pq.read_table(table).to_pylist()
            for row in found:
                if row["uid"] in white:
                    row |= {f"org_caption_{kind}": None for kind in ("start", "tokens", "cut", "sha256")}
            copy = tmp_path / table.name
            pq.write_table(pa.Table.from_pylist(found, pq.read_schema(table)), copy)
            yield path, copy, shard

    monkeypatch.setattr("recipes.join.shards_of", without)
    joined = join(str(version), str(run), tmp_path / "a", min_found=0.9, features="text_features")
    assert joined.audit.other_text == 0
    uids = {uid for number in range(len(joined.rows)) for uid in joined.shard(number)["uid"].to_pylist()}
    assert len(uids & white) > 20
    Pairs(joined, Mix(p_original=1.0), Picture(16), None, seed=0, batch=64).at(0)


def test_what_is_no_encoder_is_told(tmp_path: Path) -> None:
    for name, text, said in (
        ("none", None, "has neither"), ("other", '{"model_type": "bert"}', "is of bert"),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / "config.json").write_text(text)
        with pytest.raises(InputError, match=said):
            TextFeatures(model=str(tmp_path / name)).check()
    bare = a_folder(tmp_path / "t5", "t5")
    for path in bare.glob("tokenizer*"):
        path.unlink()  # as diffusers has them, beside it
    with pytest.raises(InputError, match="has no tokenizer"):
        Encoder(str(bare), 16)
    with pytest.raises(InputError, match="context=2 holds no text"):
        Encoder(str(CLIP), 2)
    assert [cut for _, cut in Encoder(str(CLIP), 3).features(["", "a red star"])] == [False, True]
