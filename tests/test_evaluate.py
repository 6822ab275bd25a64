"""Benchmarks against plain lines: the same hits, intervals that hold, nothing compared that is not alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import CLIP
from PIL import Image

from builder.errors import InputError
from builder.stages.clip import Clip
from recipes.evaluate import results
from recipes.evaluate.results import Result, compare, metric
from recipes.evaluate.retrieval import Pairs, karpathy, one_caption, recalls, retrieval, table
from recipes.evaluate.zeroshot import accuracies, image_folder, zeroshot


def unit(rows: int, seed: int) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=(rows, 8)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(3))
def test_recalls_are_those_of_a_few_plain_lines(seed: int) -> None:
    """Images have from none to seven captions, in no order."""
    of = np.random.default_rng(seed).integers(0, 40, 160)
    of = of[(of != 3) & (of != 39)]
    images, texts = unit(40, seed), unit(len(of), seed + 100)
    texts = texts + images[of] * 0.8
    found = {m.name: m.value for m in recalls(images, texts, of, ks=(1, 5))}
    scores = images @ texts.T
    for k in (1, 5):
        top = np.argsort(-scores, 1)[:, :k]
        there = [n for n in range(40) if (of == n).any()]
        assert found[f"I2T R@{k}"] == pytest.approx(
            100 * np.mean([(of[top[n]] == n).any() for n in there]), abs=1e-6
        )
        top = np.argsort(-scores.T, 1)[:, :k]
        assert found[f"T2I R@{k}"] == pytest.approx(100 * np.mean((top == of[:, None]).any(1)), abs=1e-6)


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    chance = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        found = metric("hits", chance.random(300) < 0.6)
        held += found.low <= 60 <= found.high
    assert 181 <= held <= 199  # 95 % of 200, and 3 sigma


def a_result(hits: list[float], **changed: object) -> Result:
    about = {"benchmark": "b", "protocol": "p", "model": "ours", "samples": {"images": len(hits)}} | changed
    return Result(metrics=(metric("R@1", hits),), **about)  # type: ignore[arg-type]


def test_two_models_are_compared_on_the_same_draws(tmp_path: Path) -> None:
    ours, theirs = [1.0] * 90 + [0.0] * 10, [1.0] * 80 + [0.0] * 20
    (row,) = compare(a_result(ours), a_result(theirs, model="theirs"))
    assert row["difference"] == 10
    assert 0 < row["low"] < 10 < row["high"] < 20  # unpaired it would hold 0
    (same,) = compare(a_result(ours), a_result(ours, model="theirs"))
    assert (same["low"], same["high"]) == (0, 0)
    with pytest.raises(InputError, match="protocol is p and q: not to be compared"):
        compare(a_result(ours), a_result(theirs, protocol="q"))
    results.write([a_result(ours)], tmp_path / "results.json")
    assert results.read(tmp_path / "results.json") == [a_result(ours)]
    (tmp_path / "results.json").write_text("[{}]")
    with pytest.raises(InputError, match=r"results\.json cannot be used"):
        results.read(tmp_path / "results.json")


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip(str(CLIP))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    from recipes.demo import world

    folder = tmp_path / "pictures"
    for n in range(8):
        scene = world.scene(world.HELD_OUT + n)
        (folder / scene.things[0].shape).mkdir(parents=True, exist_ok=True)
        for place in (folder / scene.things[0].shape / f"{n}.png", folder / f"{n}.png"):
            world.draw(scene, 96).save(place)
        (folder / f"{n}.txt").write_text(f"{world.terse(scene)}\nmore\n")
    return folder


def test_every_layout_gives_the_same_pairs(pictures: Path, tmp_path: Path, clip: Clip) -> None:
    names = [f"{n}.png" for n in range(8)]
    texts = [(pictures / f"{n}.txt").read_text().partition("\n")[0] for n in range(8)]
    images = [
        {"filename": n, "split": "test", "sentences": [{"raw": t}]} for n, t in zip(names, texts, strict=True)
    ]
    images.append({"filename": "not/there.jpg", "split": "train", "sentences": [{"raw": "a"}]})
    (tmp_path / "dataset.json").write_text(json.dumps({"images": images}))
    (tmp_path / "captions.json").write_text(
        json.dumps({n: [t] for n, t in zip(names, texts, strict=True)} | {"x": ["y"]})
    )
    (tmp_path / "test.txt").write_text("\n".join(names) + "\n")
    lines = [f'{n},"{t}"' for n, t in zip(names, texts, strict=True)]
    (tmp_path / "captions.txt").write_text("\n".join(["image,caption", *lines]) + "\n")
    found = [
        karpathy(tmp_path / "dataset.json", pictures),
        one_caption(pictures),
        table(tmp_path / "captions.json", pictures, tmp_path / "test.txt"),
        table(tmp_path / "captions.txt", pictures),
    ]
    assert {(pairs.images, pairs.captions, pairs.of) for pairs in found} == {
        (tuple(pictures / n for n in names), tuple(texts), tuple(range(8)))
    }
    result = retrieval(clip, "demo", "world", found[0])
    assert result.samples == {"images": 8, "captions": 8}
    assert result.metrics[0].value > 50  # by chance 12.5
    with pytest.raises(InputError, match=r"1 of 9 images are missing, the first is .*/x\n"):
        table(tmp_path / "captions.json", pictures)
    with pytest.raises(InputError, match="nothing to retrieve"):
        karpathy(tmp_path / "dataset.json", pictures, "val")


def test_real_photos_are_retrieved_as_by_plain_lines(shared: Path, clip: Clip) -> None:
    """Some of Flickr8k's test split of 1,000 images and 5,000 captions."""
    import torch

    place = shared / "data" / "flickr8k"
    pairs = table(place / "captions.json", place / "images", place / "splits" / "Flickr_8k.testImages.txt")
    assert (len(pairs.images), len(pairs.captions)) == (1000, 5000)
    few = Pairs(pairs.protocol, pairs.images[:40], pairs.captions[:200], pairs.of[:200])
    found = {m.name: m.value for m in retrieval(clip, "demo", "flickr8k", few).metrics}
    images = torch.cat(
        [clip.images([clip.preprocess(Image.open(path).convert("RGB"))]) for path in few.images]
    )
    texts = torch.cat([clip.texts([text])[0] for text in few.captions])
    nearest = (images @ texts.T).argmax(1).tolist()
    right = sum(few.of[text] == image for image, text in enumerate(nearest))
    assert found["I2T R@1"] == pytest.approx(
        100 * right / 40, abs=2.51
    )  # a batch is not a row: one may change


def test_classes_are_named_by_folder_or_by_order(pictures: Path, tmp_path: Path, clip: Clip) -> None:
    folders = sorted(path.name for path in pictures.iterdir() if path.is_dir())
    for number in range(8):
        (pictures / f"{number}.png").unlink()
    (tmp_path / "names.txt").write_text("\n".join(f"{f}\ta {f}" for f in reversed(folders)))
    (tmp_path / "templates.txt").write_text("{}\na picture of {}\n")
    classes = image_folder(pictures, tmp_path / "names.txt", tmp_path / "templates.txt")
    assert classes.names == tuple(f"a {f}" for f in folders)
    assert [folders[n] for n in classes.of] == [path.parent.name for path in classes.images]
    result = zeroshot(clip, "demo", "shapes", classes)
    assert result.samples == {"images": 8, "classes": len(folders), "templates": 2}
    (tmp_path / "names.txt").write_text("\n".join(folders))
    assert image_folder(pictures, tmp_path / "names.txt").names == tuple(folders)
    (tmp_path / "names.txt").write_text("one\n")
    with pytest.raises(InputError, match=rf"has 1 names, .* {len(folders)} folders"):
        image_folder(pictures, tmp_path / "names.txt")
    (tmp_path / "names.txt").write_text("other\tname\n")
    with pytest.raises(InputError, match=f"has no name for {folders[0]}"):
        image_folder(pictures, tmp_path / "names.txt")
    (tmp_path / "templates.txt").write_text("a picture\n")
    (tmp_path / "names.txt").write_text("\n".join(folders))
    with pytest.raises(InputError, match=r"'a picture' has no \{\}"):
        image_folder(pictures, tmp_path / "names.txt", tmp_path / "templates.txt")


def test_the_mean_over_classes_is_one_of_classes() -> None:
    top, mean = accuracies(np.array([0, 0, 0, 1, 0, 2]), np.array([0, 0, 0, 0, 1, 1]), 3)
    assert top.value == pytest.approx(100 * 4 / 6)
    assert mean.value == pytest.approx(100 * (3 / 4 + 1 / 2) / 2)
