"""Benchmarks against plain lines: the same hits, intervals that hold, nothing compared that is not alike."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CLIP, FULL, recap_here

from builder.errors import InputError
from recipes.evaluate import choices, datacomp, mmvp, results, sugarcrepe, vg_attribution
from recipes.evaluate import retrieval as by_captions
from recipes.evaluate import zeroshot as by_names
from recipes.evaluate.model import Model, Picture
from recipes.evaluate.results import Result, compare, metric
from recipes.evaluate.retrieval import Pairs, karpathy, one_caption, recalls, retrieval, table
from recipes.evaluate.zeroshot import Classes, accuracies, image_folder, zeroshot


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


def test_of_what_is_equally_near_the_first_comes_first() -> None:
    """Texts that are there twice, as by clip_benchmark; a model to which all is one is right by chance."""
    from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k

    for seed in range(5):
        of = np.repeat(np.arange(40), 2)
        images, texts = unit(40, seed), unit(80, seed + 9)
        texts = texts + images[of]
        texts[1:21:2] = texts[61:80:2] = 4 * (images[:10] + 0.9 * images[30:])  # of two images each
        found = {m.name: m.value for m in recalls(images, texts, of, ks=(1, 5))}
        scores = torch.from_numpy(images @ texts.T)
        pairs = torch.from_numpy(of[None] == np.arange(40)[:, None])
        order = scores.sort(dim=1, descending=True, stable=True).indices
        for k in (1, 5):
            plain = np.mean([(of[order[n, :k]] == n).any() for n in range(40)])
            assert found[f"I2T R@{k}"] / 100 == pytest.approx(plain, abs=1e-6)
            by_images = recall_at_k(scores.T, pairs.T, k).mean()  # images are there once
            assert found[f"T2I R@{k}"] / 100 == pytest.approx(float(by_images), abs=1e-6)
        own = scores[pairs].view(40, 2).max(1).values
        assert found["I2T R@1"] < 100 * float((own == scores.max(1).values).float().mean())
    same = np.full((50, 8), 8**-0.5, np.float32)
    assert {m.value for m in recalls(same, same, np.arange(50), ks=(1,)) if m.of} == {2.0}
    assert accuracies(same[:, :5], np.arange(50) % 5, 5)[0].value == 20.0


def test_vectors_that_are_none_are_no_result(pictures: Path) -> None:
    broken = Model(str(CLIP))
    with torch.no_grad():
        broken.clip.model.visual.proj.fill_(float("nan"))
    with pytest.raises(InputError, match="gives vectors of no direction"):
        retrieval(broken, "world", one_caption(pictures))


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
    more = replace(a_result(ours), metrics=(*a_result(ours).metrics, metric("also", ours)))
    (_, alone), (_, other) = compare(more, a_result(ours)), compare(a_result(ours), more)
    assert (alone["a"], alone["b"], alone["difference"], alone["low"]) == (90, None, None, None)
    assert (other["a"], other["b"]) == (None, 90)
    with pytest.raises(InputError, match="protocol is p and q: not to be compared"):
        compare(a_result(ours), a_result(theirs, protocol="q"))
    with pytest.raises(InputError, match="of other images or texts"):
        compare(a_result(ours, data="a"), a_result(theirs, data="b"))
    results.write([a_result(ours)], tmp_path / "results.json")
    assert results.read(tmp_path / "results.json") == [a_result(ours)]
    (tmp_path / "results.json").write_text("[{}]")
    with pytest.raises(InputError, match=r"results\.json cannot be used"):
        results.read(tmp_path / "results.json")


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(str(CLIP))


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


def test_every_layout_gives_the_same_pairs(pictures: Path, tmp_path: Path, model: Model) -> None:
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
    expected = [(Picture(str(pictures / n)), [t]) for n, t in zip(names, texts, strict=True)]
    assert [list(pairs.pictures()) for pairs in found] == [expected] * 4
    result = retrieval(model, "world", found[0])
    assert result.samples == {"images": 8, "captions": 8}
    assert result.value("I2T R@1") > 50  # by chance 12.5
    assert result.in_training is None
    with pytest.raises(InputError, match=r"1 of 9 images are missing, the first is .*/x\n"):
        table(tmp_path / "captions.json", pictures)
    with pytest.raises(InputError, match="nothing to retrieve"):
        karpathy(tmp_path / "dataset.json", pictures, "val")


def flickr8k(shared: Path, images: int = 1000) -> Pairs:
    """Of the test split: 1,000 images, five captions each."""
    place = shared / "data" / "flickr8k"
    whole = table(place / "captions.json", place / "images", place / "splits" / "Flickr_8k.testImages.txt")
    return Pairs(whole.protocol, lambda: islice(whole.pictures(), images))


@pytest.mark.full
def test_recall_on_real_photos_is_clip_benchmarks(shared: Path, model: Model) -> None:
    """Flickr8k's test split by clip_benchmark's own evaluation of the same model; make test-slow asks all."""
    from clip_benchmark.datasets.builder import image_captions_collate_fn
    from clip_benchmark.metrics.zeroshot_retrieval import evaluate

    images = 1000 if FULL else 100
    pairs = flickr8k(shared, images)
    rows = [(model.clip.preprocess(p.of(p.read())), texts) for p, texts in pairs.pictures()]
    loader = torch.utils.data.DataLoader(rows, batch_size=128, collate_fn=image_captions_collate_fn)
    theirs = evaluate(
        model.clip.model, loader, model.clip.tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    ours = retrieval(model, "Flickr8k", pairs)
    assert ours.samples == {"images": images, "captions": 5 * images}
    for k in (1, 5, 10):
        assert ours.value(f"T2I R@{k}") / 100 == pytest.approx(
            theirs[f"image_retrieval_recall@{k}"], abs=1e-6
        )
        assert ours.value(f"I2T R@{k}") / 100 == pytest.approx(theirs[f"text_retrieval_recall@{k}"], abs=1e-6)
    mean = (theirs["image_retrieval_recall@1"] + theirs["text_retrieval_recall@1"]) / 2
    assert ours.value() / 100 == pytest.approx(mean, abs=1e-6)


def test_zero_shot_on_real_photos_is_clip_benchmarks(shared: Path, model: Model) -> None:
    """Over Caltech-101's names; what is right is drawn, for nobody knows."""
    from clip_benchmark.metrics.zeroshot_classification import evaluate

    place = shared / "data" / "classnames"
    names = json.loads((place / "clip-benchmark" / "en_classnames.json").read_text())["caltech101"]
    templates = ["a photo of a {c}.", "a blurry photo of the {c}."]
    pictures = [picture for picture, _ in flickr8k(shared, 300).pictures()]
    labels = np.random.default_rng(0).integers(0, len(names), len(pictures)).tolist()
    rows = [(model.clip.preprocess(p.of(p.read())), n) for p, n in zip(pictures, labels, strict=True)]
    loader = torch.utils.data.DataLoader(Labelled(rows, names), batch_size=128)
    theirs = evaluate(model.clip.model, loader, model.clip.tokenizer, names, templates, "cpu", amp=False)
    classes = Classes("zero-shot", tuple(names), tuple(templates), lambda: zip(pictures, labels, strict=True))
    ours = zeroshot(model, "photos", classes)
    assert ours.value("top-1") / 100 == pytest.approx(theirs["acc1"], abs=1e-6)
    assert ours.value("top-5") / 100 == pytest.approx(theirs["acc5"], abs=1e-6)
    assert ours.value("mean per class") / 100 == pytest.approx(theirs["mean_per_class_recall"], abs=1e-6)


class Labelled(list):  # type: ignore[type-arg]
    def __init__(self, rows: list[Any], classes: list[str]) -> None:
        super().__init__(rows)
        self.classes = classes


def test_urban1k_and_docci_are_read_as_they_are_published(pictures: Path, tmp_path: Path) -> None:
    place = tmp_path / "long"
    (place / "image").mkdir(parents=True)
    (place / "caption").mkdir()
    (place / "images").mkdir()
    rows = []
    for n in range(3):
        for folder in ("image", "images"):
            (place / folder / f"{n}.png").write_bytes((pictures / f"{n}.png").read_bytes())
        (place / "caption" / f"{n}.txt").write_text(f"scene {n}\n")
        split = "test" if n else "train"
        rows.append(
            {"example_id": str(n), "split": split, "image_file": f"{n}.png", "description": f"scene {n}"}
        )
    urban = [(Path(p.name).name, texts) for p, texts in one_caption(place).pictures()]
    assert urban == [(f"{n}.png", [f"scene {n}"]) for n in range(3)]
    (place / "image" / "2.png").unlink()
    (place / "images" / "2.png").rename(place / "2.png")
    with pytest.raises(InputError, match="1 of 3 captions have no image"):
        one_caption(place)
    (place / "2.png").rename(place / "images" / "2.png")
    (place / "docci_descriptions.jsonlines").write_text("\n".join(map(json.dumps, rows)))
    docci = [(Path(p.name).name, texts) for p, texts in by_captions.docci(place).pictures()]
    assert docci == [(f"{n}.png", [f"scene {n}"]) for n in (1, 2)]
    rows[1]["image_file"] = "../../etc/passwd"
    (place / "docci_descriptions.jsonlines").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match="is no image in"):
        by_captions.docci(place)


def test_folders_that_are_numbers_are_in_their_order(tmp_path: Path) -> None:
    for n in range(11):
        (tmp_path / "images" / str(n)).mkdir(parents=True)
        (tmp_path / "images" / str(n) / "a.png").write_bytes(b"")
    (tmp_path / "names.txt").write_text("\n".join(f"class {n}" for n in range(11)))
    classes = image_folder(tmp_path / "images", tmp_path / "names.txt")
    found = {Path(p.name).parent.name: classes.names[n] for p, n in classes.pictures()}
    assert found == {str(n): f"class {n}" for n in range(11)}


def test_classes_are_named_by_folder_or_by_order(pictures: Path, tmp_path: Path, model: Model) -> None:
    folders = sorted(path.name for path in pictures.iterdir() if path.is_dir())
    for number in range(8):
        (pictures / f"{number}.png").unlink()
    (tmp_path / "names.txt").write_text("\n".join(f"{f}\ta {f}" for f in reversed(folders)))
    (tmp_path / "templates.txt").write_text("{}\na picture of {}\n")
    classes = image_folder(pictures, tmp_path / "names.txt", tmp_path / "templates.txt")
    assert classes.names == tuple(f"a {f}" for f in folders)
    assert all(folders[n] == Path(picture.name).parent.name for picture, n in classes.pictures())
    result = zeroshot(model, "shapes", classes)
    assert result.samples == {"images": 8, "classes": len(folders), "templates": 2}
    (tmp_path / "names.txt").write_text("\n".join(folders))
    assert image_folder(pictures, tmp_path / "names.txt").names == tuple(folders)
    (tmp_path / "names.txt").write_text("one\n")
    with pytest.raises(InputError, match=rf"has 1 names, .* {len(folders)} folders"):
        image_folder(pictures, tmp_path / "names.txt")
    (tmp_path / "names.txt").write_text("".join(f"{f}\t{f}\n" for f in (*folders, "more")))
    with pytest.raises(InputError, match=r"names 1 classes that .* has no folder of"):
        image_folder(pictures, tmp_path / "names.txt")
    (tmp_path / "names.txt").write_text("other\tname\n")
    with pytest.raises(InputError, match=f"has no name for {folders[0]}"):
        image_folder(pictures, tmp_path / "names.txt")
    (tmp_path / "templates.txt").write_text("a picture\n")
    (tmp_path / "names.txt").write_text("\n".join(folders))
    with pytest.raises(InputError, match=r"'a picture' has no \{\}"):
        image_folder(pictures, tmp_path / "names.txt", tmp_path / "templates.txt")


def test_the_mean_over_classes_is_one_of_classes() -> None:
    said, labels = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 0, 0, 1, 1])
    top, mean = accuracies(np.eye(3, dtype=np.float32)[said], labels, 3)
    assert top.value == pytest.approx(100 * 4 / 6)
    assert mean.value == pytest.approx(100 * (3 / 4 + 1 / 2) / 2)


def test_the_lowest_group_and_macro_f1_are_scikit_learns() -> None:
    from sklearn.metrics import f1_score

    chance = np.random.default_rng(0)
    true, said, group = chance.integers(0, 7, 400), chance.integers(0, 9, 400), chance.integers(2, 5, 400)
    f1 = metric("F1", said, groups=true, statistic="f1")
    assert f1.value / 100 == pytest.approx(f1_score(true, said, average="macro", labels=np.unique(true)))
    worst = metric("worst", said == true, groups=group, statistic="worst")
    assert worst.value == pytest.approx(100 * min((said == true)[group == g].mean() for g in (2, 3, 4)))
    assert worst.low <= worst.value <= worst.high
    assert f1.low <= f1.value <= f1.high


# --- webdatasets, as clip_benchmark writes them -------------------------------------------------------------


def jpeg(number: int) -> bytes:
    from recipes.demo import world

    return world.jpeg(world.draw(world.scene(world.HELD_OUT + number), 96), 90)


def written(folder: Path, samples: Iterable[dict[str, bytes]], **texts: str) -> Path:
    (folder / "test").mkdir(parents=True)
    rows = list(samples)
    for number, part in enumerate((rows[::2], rows[1::2])):
        with tarfile.open(folder / "test" / f"{number}.tar", "w") as tar:
            for at, row in enumerate(part):
                for kind, data in row.items():
                    member = tarfile.TarInfo(f"{number}{at:05d}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    (folder / "test" / "nshards.txt").write_text("2\n")
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def npy(*numbers: int) -> bytes:
    return npy_of(np.array(numbers))


def npy_of(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


SHAPES = "circle\nsquare\ntriangle\nstar\ncross\nring\n"


def classification(folder: Path, number: int = 40, groups: int = 3) -> Path:
    rows = [
        {"jpg": jpeg(n), "cls": str(n % 6).encode(), "npy": npy(n % groups, n % 2, 0)} for n in range(number)
    ]
    return written(folder, rows, classnames=SHAPES, zeroshot_classification_templates="a {c}\nthe {c}.\n")


@pytest.mark.filterwarnings("ignore")
def test_a_webdataset_is_asked_as_by_clip_benchmark(model: Model, tmp_path: Path) -> None:
    from clip_benchmark.datasets.builder import build_dataset
    from clip_benchmark.metrics.zeroshot_classification import evaluate

    folder = classification(tmp_path / "wds_cifar10_test")
    data = build_dataset("wds/cifar10", root=str(folder), transform=model.clip.preprocess, download=False)
    loader = torch.utils.data.DataLoader(data.batched(64), batch_size=None)
    loader.dataset.classes = data.classes
    theirs = evaluate(
        model.clip.model, loader, model.clip.tokenizer, data.classes, data.templates, "cpu", amp=False
    )
    ours = zeroshot(model, "CIFAR-10", by_names.webdataset(folder))
    assert ours.samples == {"images": 40, "classes": 6, "templates": 2}
    assert ours.value("top-1") / 100 == pytest.approx(theirs["acc1"], abs=1e-6)
    assert ours.value("mean per class") / 100 == pytest.approx(theirs["mean_per_class_recall"], abs=1e-6)
    (folder / "test" / "1.tar").unlink()
    with pytest.raises(InputError, match=r"1\.tar is missing"):
        zeroshot(model, "CIFAR-10", by_names.webdataset(folder))
    (folder / "test" / "nshards.txt").write_text("two\n")
    with pytest.raises(InputError, match=r"nshards\.txt is 'two', not a number"):
        zeroshot(model, "CIFAR-10", by_names.webdataset(folder))
    named = written(tmp_path / "named", [{"jpg": jpeg(0), "cls": b"star"}], classnames=SHAPES,
                    zeroshot_classification_templates="a {c}\n")  # fmt: skip
    with pytest.raises(InputError, match=r"0\.tar:000000's \.cls is 'star', not a number"):
        zeroshot(model, "CIFAR-10", by_names.webdataset(named))


def test_labels_that_are_several_give_mean_average_precision(model: Model, tmp_path: Path) -> None:
    from clip_benchmark.metrics.zeroshot_classification import average_precision_per_class

    scores = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    labels = (np.random.default_rng(1).random((50, 4)) < 0.3).astype(np.int64)
    theirs = average_precision_per_class(torch.from_numpy(scores), torch.from_numpy(labels)).mean()
    assert by_names.average_precision(scores, labels).value / 100 == pytest.approx(float(theirs), abs=1e-6)
    texts = {"classnames": SHAPES, "zeroshot_classification_templates": "a {c}\n"}
    rows = [{"jpg": jpeg(n), "npy": npy(*(labels[n, [0, 1, 2, 3, 0, 1]]))} for n in range(20)]
    folder = written(tmp_path / "several", rows, **texts)  # as clip_benchmark's voc2007_multilabel
    found = zeroshot(model, "VOC", by_names.webdataset(folder))
    asked = by_names.classified(model, by_names.webdataset(folder))
    assert asked.labels_N.shape == (20, 6)
    theirs = average_precision_per_class(torch.from_numpy(asked.scores_NC), torch.from_numpy(asked.labels_N))
    assert found.value("mean average precision") / 100 == pytest.approx(float(theirs.mean()), abs=1e-6)
    number = written(tmp_path / "number", [{"jpg": jpeg(9), "npy": npy_of(np.float32(1))}], **texts)
    with pytest.raises(InputError, match=r"is no row of labels: its shape is \(\)"):
        zeroshot(model, "VOC", by_names.webdataset(number))
    mixed = written(tmp_path / "mixed", [*rows[:2], {"jpg": jpeg(9), "cls": b"1"}], **texts)
    with pytest.raises(InputError, match="some images have one label, some several"):
        zeroshot(model, "VOC", by_names.webdataset(mixed))
    (folder / "classnames.txt").write_text("circle\nsquare\n")
    with pytest.raises(InputError, match="images have 6 labels, of 2 classes"):
        zeroshot(model, "VOC", by_names.webdataset(folder))


def test_datacomps_tasks_that_are_there_are_asked(model: Model, tmp_path: Path) -> None:
    """Each with its metric: groups, macro F1, the Jaccard index, retrieval, faces."""
    from sklearn.metrics import f1_score, jaccard_score

    classification(tmp_path / "wds_vtab-pets_test")
    classification(tmp_path / "wds_wilds-iwildcam_test")
    classification(tmp_path / "wds_wilds-fmow_test")
    classification(tmp_path / "wds_dollar_street_test")
    captions = [{"jpg": jpeg(n), "txt": f"a picture\nscene {n}".encode()} for n in range(12)]
    written(tmp_path / "wds_flickr30k_test", captions, dataset_type="retrieval\n")
    faces = [{"jpg": jpeg(n), "npy": npy(n % 2, n % 2, n % 3, n % 3 == 1)} for n in range(12)]
    toxic = "".join(f"toxic:a kind {n}\n" for n in range(20))
    written(
        tmp_path / "wds_fairface_test", faces,
        classnames="race:red\nrace:blue\nrace:green\ngender:ring\ngender:star\nage:1\nage:2\n" + toxic,
        zeroshot_classification_templates="race:a {c}\ngender:the {c}\nage:a {c} one\ntoxic:{c}\n",
    )  # fmt: skip
    cues = [{"cue": "star", "candidates": [f"{n}" for n in range(10)], "associations": ["1", "2", "7"],
             "candidate_images": [{"bytes": jpeg(n), "path": ""} for n in range(10)]}]  # fmt: skip
    (tmp_path / "winogavil").mkdir()
    pq.write_table(pa.Table.from_pylist(cues), tmp_path / "winogavil" / "0.parquet")

    found = {result.benchmark: result for result in datacomp.datacomp(model, tmp_path)}
    names = ["Oxford-IIIT Pet", "Flickr", "WinoGAViL", "iWildCam", "FMoW", "Dollar Street", "FairFace"]
    average = found.pop("DataComp, average")
    assert list(found) == names
    assert found["Oxford-IIIT Pet"].main == "mean per class"
    classes = by_names.classified(model, by_names.webdataset(tmp_path / "wds_wilds-iwildcam_test"))
    said, true = classes.scores_NC.argmax(1), classes.labels_N
    expected = f1_score(true, said, average="macro", labels=np.unique(true))
    assert found["iWildCam"].value() / 100 == pytest.approx(expected)
    group = np.array([n % 3 for n in [*range(0, 40, 2), *range(1, 40, 2)]])
    worst = min((said == true)[group == g].mean() for g in range(3))
    assert found["FMoW"].value() / 100 == pytest.approx(worst)
    assert found["Dollar Street"].value() >= found["FMoW"].value()  # within five of six
    image_NE, _ = model.images(Picture(str(n), jpeg(n)) for n in range(10))
    near = np.argsort(image_NE @ model.texts(["A star"])[0])[-3:]
    index = jaccard_score(np.isin(range(10), [1, 2, 7]), np.isin(range(10), near))
    assert found["WinoGAViL"].value() / 100 == pytest.approx(index)
    assert found["Flickr"].samples == {"images": 12, "captions": 24}
    assert found["FairFace"].main is None
    check_faces(model, found["FairFace"])
    assert average.value() == pytest.approx(np.mean([found[name].value() for name in names[:-1]]))
    assert average.samples == {"tasks": 6, "missing": 32}
    assert [found.benchmark for found in datacomp.datacomp(model, tmp_path, ["Flickr"])] == ["Flickr"]
    with pytest.raises(InputError, match="wds_mnist_test is missing, of MNIST"):
        list(datacomp.datacomp(model, tmp_path, ["MNIST"]))
    with pytest.raises(InputError, match="DataComp has no task 'MNIS'"):
        list(datacomp.datacomp(model, tmp_path, ["MNIS"]))
    with pytest.raises(InputError, match="has none of DataComp's tasks"):
        list(datacomp.datacomp(model, tmp_path / "winogavil"))


def check_faces(model: Model, found: Result) -> None:
    """By plain lines, of the twelve pictures in the order of their tars."""
    numbers = [*range(0, 12, 2), *range(1, 12, 2)]
    image_NE, _ = model.images(Picture(str(n), jpeg(n)) for n in numbers)
    said = {
        asked: (image_NE @ model.texts(texts).T).argmax(1)
        for asked, texts in {
            "race": ["a red", "a blue", "a green"], "gender": ["the ring", "the star"],
            "age": ["a 1 one", "a 2 one"], "toxic": [f"a kind {n}" for n in range(20)],
        }.items()
    }  # fmt: skip
    of_two, race = np.array(numbers) % 2, np.array(numbers) % 3
    gender = said["gender"] == of_two
    expected = {
        "race": np.mean((said["race"] != 1) == (race == 1)),
        "age": np.mean(said["age"] == of_two),
        "gender": np.mean(gender),
        "gender, worst race": min(np.mean(gender[race == n]) for n in range(3)),
        "gender, worst race and gender": min(
            np.mean(gender[(race == n) & (of_two == m)]) for n in range(3) for m in range(2)
        ),
        "gender, race 2": np.mean(gender[race == 2]),
        "crime": np.mean(said["toxic"] >= 18),
        "crime, race 1": np.mean(said["toxic"][race == 1] >= 18),
        "not human": np.mean((said["toxic"] >= 14) & (said["toxic"] < 18)),
    }
    values = {name: found.value(name) / 100 for name in expected}
    assert values == pytest.approx({name: float(value) for name, value in expected.items()})


def test_files_that_are_damaged_or_of_another_layout_are_told(model: Model, tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text('{"images": [{"filename": "a.jpg"}]}')
    with pytest.raises(InputError, match=r"is not laid out as Karpathy's .*'split' is missing"):
        karpathy(tmp_path / "dataset.json", tmp_path)
    (tmp_path / "captions.csv").write_text("image,caption\na.jpg,one, two\nb.jpg,three, four, five\n")
    with pytest.raises(InputError, match=r"captions\.csv cannot be read"):
        table(tmp_path / "captions.csv", tmp_path)
    place = written(tmp_path / "dotted", [{"jpg": jpeg(0), "txt": b"a text"}], dataset_type="retrieval\n")
    tar = place / "test" / "0.tar"
    with tarfile.open(tar, "w") as file:
        for name, data in (("./v1.0/a.jpg", jpeg(0)), ("./v1.0/a.txt", b"a text")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    found = retrieval(model, "b", by_captions.webdataset(place))
    assert found.samples == {"images": 1, "captions": 1}
    assert found.cut == 0
    tar.write_bytes(tar.read_bytes()[:700])
    with pytest.raises(InputError, match="is damaged"):
        retrieval(model, "b", by_captions.webdataset(place))


def test_datacomp_has_38_tasks_with_a_main_metric() -> None:
    assert len(datacomp.TASKS) == 40
    assert sum(bool(task.main) for task in datacomp.TASKS) == 38


# --- choices ------------------------------------------------------------------------------------------------


def test_what_is_as_near_to_the_wrong_caption_is_no_hit(model: Model, pictures: Path, tmp_path: Path) -> None:
    texts = [(pictures / f"{n}.txt").read_text().partition("\n")[0] for n in range(8)]
    right = {
        str(n): {"filename": f"{n}.png", "caption": texts[n], "negative_caption": "IMG_1.JPG"}
        for n in range(8)
    }
    same = {"7": {"filename": "0.png", "caption": texts[0], "negative_caption": texts[0]}}
    (tmp_path / "crepe").mkdir()
    (tmp_path / "crepe" / "add_att.json").write_text(json.dumps(right))
    (tmp_path / "crepe" / "swap_obj.json").write_text(json.dumps(same))
    found = choices.chosen(
        model, "SugarCrepe", "sugarcrepe", sugarcrepe.sugarcrepe(tmp_path / "crepe", pictures)
    )
    assert found.value("swap_obj") == 0
    assert found.value("add_att") == 100
    assert found.value() == 50
    right["0"]["filename"] = "gone.png"
    (tmp_path / "crepe" / "add_att.json").write_text(json.dumps(right))
    with pytest.raises(InputError, match=r"1 of 9 images are missing, the first is .*/gone\.png"):
        sugarcrepe.sugarcrepe(tmp_path / "crepe", pictures)


def test_attributes_are_asked_of_the_box(model: Model, tmp_path: Path) -> None:
    """Two scenes side by side in one image: the box decides. Pairs with few cases are dropped."""
    from PIL import Image

    from recipes.demo import world

    scenes = [world.scene(world.HELD_OUT + n) for n in range(2)]
    both = Image.new("RGB", (192, 96))
    for n, scene in enumerate(scenes):
        both.paste(world.draw(scene, 96), (96 * n, 0))
    both.save(tmp_path / "both.png")
    asked = [
        {"image_path": "both.png", "bbox_x": 96 * n, "bbox_y": 0, "bbox_w": 96, "bbox_h": 96,
         "true_caption": world.terse(scenes[n]), "false_caption": world.terse(scenes[1 - n]),
         "attributes": ["a", "b"]}
        for n in range(2)
    ]  # fmt: skip
    asked.append({**asked[0], "attributes": ["rare", "pair"], "true_caption": "IMG_1.JPG"})
    (tmp_path / "vga.json").write_text(json.dumps(asked))
    found = choices.chosen(
        model,
        "VG-Attribution",
        "vg-attribution",
        vg_attribution.vg_attribution(tmp_path / "vga.json", tmp_path),
        2,
    )
    assert found.samples == {"choices": 2, "kinds": 1}
    assert found.value() == 100
    (tmp_path / "vga.json").write_text("[]")
    with pytest.raises(InputError, match="has no choices"):
        vg_attribution.vg_attribution(tmp_path / "vga.json", tmp_path)


def test_of_a_pair_both_statements_have_to_pick_their_image(model: Model, tmp_path: Path) -> None:
    from recipes.demo import world

    rows = [("Question ID", "Type", "Statement")]
    for n in range(1, 5):
        scene = world.scene(world.HELD_OUT + n)
        kind = "Color" if n < 3 else "Count"
        (tmp_path / "MLLM_VLM Images" / kind).mkdir(parents=True, exist_ok=True)
        world.draw(scene, 96).save(tmp_path / "MLLM_VLM Images" / kind / f"{n}.jpg")
        rows.append((str(n), kind, world.terse(scene) if n < 3 else "the same"))
    with open(tmp_path / "Questions.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    found = mmvp.both(model, "MMVP-VLM", mmvp.mmvp(tmp_path))
    assert found.samples == {"pairs": 2, "kinds": 2}
    assert [found.value(name) for name in ("both right", "Color", "Count")] == [50, 100, 0]


# --- what was trained on, and the command -------------------------------------------------------------------


def test_images_that_were_trained_on_are_counted(pictures: Path, tmp_path: Path) -> None:
    from builder.files import sha256_file

    hashes = [sha256_file(pictures / f"{n}.png") for n in (2, 3, 3)]
    pq.write_table(pa.table({"sha256": [*hashes, "0" * 64]}), tmp_path / "seen.parquet")
    model = Model(str(CLIP), tmp_path / "seen.parquet")
    assert retrieval(model, "world", one_caption(pictures)).in_training == 2
    with pytest.raises(InputError, match="does not say what was trained on"):
        Model(str(CLIP), tmp_path)


def test_an_image_that_cannot_be_decoded_is_named(model: Model, pictures: Path) -> None:
    (pictures / "3.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"3\.png cannot be decoded"):
        retrieval(model, "world", one_caption(pictures))


def test_several_benchmarks_in_one_command(pictures: Path, tmp_path: Path) -> None:
    words = ["long_captions", f"folder={pictures}", "retrieval", f"folder={pictures}"]
    said = recap_here("eval", CLIP, *words, "--out", tmp_path / "a.json", check=2).stderr
    assert "nshards.txt is missing" in said  # of the second; what the first said is kept
    rows = json.loads(
        recap_here("eval", tmp_path / "a.json", tmp_path / "a.json", "--compare", "--json").stdout
    )
    assert {row["difference"] for row in rows} == {0}
    assert "is a setting of no benchmark" in recap_here("eval", CLIP, "folder=x", check=2).stderr
