"""Scores agree with open_clip used by hand, and cut texts are counted."""

from __future__ import annotations

import io
from pathlib import Path

import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CLIP
from PIL import Image

from builder.errors import InputError
from builder.run import Run
from builder.stages.clip import Clip, Tokens
from builder.stages.imagetar import images


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip(str(CLIP))


def test_scores_are_open_clips_cosines(demo_run: Path) -> None:
    """Row for row, one image and one text at a time, against the batched stage."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{CLIP}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{CLIP}")
    model.eval()
    run = Run.open(demo_run)
    stages = {
        name: pq.read_table(run.local(run.files(name)[0])).to_pylist()
        for name in ("source", "download", "re_caption", "score")
    }
    pictures = dict(images(run.local(run.files("download", ".tar")[0])))
    compared = 0
    for source, download, caption, score in zip(*stages.values(), strict=True):
        if score["status"] != "ok":
            assert score["re_caption_cosine"] is None
            assert score["org_caption_cosine"] is None
            continue
        with torch.inference_mode():
            image = model.encode_image(
                preprocess(Image.open(io.BytesIO(pictures[download["key"]]))).unsqueeze(0), normalize=True
            )
            for name, text in (("org_caption", source["org_caption"]), ("re_caption", caption["re_caption"])):
                if not text:
                    assert score[f"{name}_cosine"] is None
                    continue
                cosine = (image @ model.encode_text(tokenizer([text]), normalize=True).T).item()
                assert score[f"{name}_cosine"] == pytest.approx(cosine, abs=1e-5)
                compared += 1
        if compared > 60:
            break
    assert compared > 60


def test_texts_longer_than_the_context_are_counted(clip: Clip) -> None:
    """BOS and EOS take two places of the context's 80: 78 words of one token fit, 79 do not."""
    word = " red"
    assert len(clip.tokenizer.tokenizer.tokenize(word * 10)) == 10
    fits, longer = (word * 78), (word * 79)
    units, cut = clip.texts([fits, longer, "", "a\x00b", "写真" * 5000])
    assert cut == [False, True, False, False, True]
    assert units.norm(dim=1).tolist() == pytest.approx([1.0] * 5, abs=1e-5)
    alone, _ = clip.texts([fits])
    assert torch.allclose(alone[0], units[0], atol=1e-5)  # that another text is cut changes nothing


@pytest.mark.parametrize("ends", [False, True])
def test_tokens_are_open_clips_own(ends: bool) -> None:
    tokenizer = open_clip.get_tokenizer(f"local-dir:{CLIP}", strip_sep_token=ends)
    tokenizer.tokenizer.sep_token = tokenizer.tokenizer.eos_token
    texts = [
        "a red star",
        "",
        " A  large\n&amp;amp; red ",
        "word " * 500,
        "a\x00b",
        "写真",
        "star " * 12,
        "star " * 13,
    ]
    for some in (texts, texts[:3]):
        tokens, _ = Tokens(tokenizer, 16)(some)
        assert torch.equal(tokens, tokenizer(some, context_length=16))


def test_a_folder_that_is_no_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no open_clip_config\.json"):
        Clip(str(tmp_path))
    with pytest.raises(InputError, match="no model folder"):
        Clip(str(tmp_path / "nowhere"))
