"""What is measured of drawn pictures, against plain lines; prompts in the layouts that there are."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CLIP, recap_here, recap_if_full
from PIL import Image
from safetensors.torch import save_file
from test_dit import FLOW, TINY, WORDS

from builder.captions import kinds
from builder.captions.replies import Reply
from builder.errors import InputError
from builder.stages.caption import Caption
from recipes.demo import world
from recipes.dit import model as dit
from recipes.dit import prompts
from recipes.dit.model import DiT
from recipes.dit.sample import PROMPTS, SETTINGS, How, png
from recipes.evaluate import asked, benchmarks
from recipes.evaluate import frechet as distances
from recipes.evaluate.clip_score import clip_score
from recipes.evaluate.drawings import Artist, load
from recipes.evaluate.model import Model, Picture
from recipes.evaluate.results import Result, compare
from recipes.evaluate.world_drawings import prompts as of_scenes
from recipes.evaluate.world_drawings import read_back


def a_folder(place: Path, images: Sequence[Image.Image], texts: Sequence[str]) -> Path:
    """As `recap sample` leaves it."""
    place.mkdir(parents=True)
    for number, image in enumerate(images):
        (place / f"{number:06d}.png").write_bytes(png(image))
    (place / PROMPTS).write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    (place / SETTINGS).write_text(json.dumps({"model": "0" * 64, **asdict(How())}))
    return place


def scene_at(scene: world.Scene, px: int) -> Image.Image:
    image = Image.open(io.BytesIO(world.jpeg(world.draw(scene, 128), 90)))
    return image.resize((px, px), Image.Resampling.BILINEAR)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(str(CLIP))


def test_scenes_are_what_was_asked_for_and_other_scenes_are_not(tmp_path: Path) -> None:
    scenes, texts = of_scenes(24, "described")
    images = [scene_at(scene, 32) for scene in scenes]
    right = read_back("b", load(a_folder(tmp_path / "a", images, texts)), scenes, "described")
    for name in ("pairs", "at their place", "colours"):
        assert right.value(name) >= 97
    assert right.value("unasked") <= 1
    others = load(a_folder(tmp_path / "b", images[1:] + images[:1], texts))
    wrong = read_back("b", others, scenes, "described")
    assert wrong.value("at their place") < 10
    assert wrong.value("unasked") > 10
    blank = load(a_folder(tmp_path / "c", [Image.new("RGB", (32, 32), world.TONES["white"])] * 24, texts))
    nothing = read_back("b", blank, scenes, "described")
    assert [metric.value for metric in nothing.metrics] == [0, 0, 0, 0]
    scenes, texts = of_scenes(12, "alt")
    named = load(a_folder(tmp_path / "d", [scene_at(scene, 32) for scene in scenes], texts))
    found = read_back("b", named, scenes, "alt")
    assert [metric.name for metric in found.metrics] == ["pairs"]
    assert found.value() > 50  # a part of the alt text is about another picture


def test_distances_are_those_of_plain_lines(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    ours, theirs = chance.normal(size=(300, 8)).astype("f4"), chance.normal(0.3, 1.5, (400, 8)).astype("f4")
    found = distances._frechet("d", ours, theirs)
    a, b = np.cov(ours.astype("f8").T), np.cov(theirs.astype("f8").T)
    values, vectors = np.linalg.eigh(a)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b @ root)).sum()
    apart = np.square(ours.mean(0, dtype="f8") - theirs.mean(0, dtype="f8")).sum()
    assert found.value == pytest.approx(apart + np.trace(a) + np.trace(b) - 2 * cross, abs=1e-6)
    assert found.low < found.value < found.high
    assert distances._frechet("d", ours, ours).value == pytest.approx(0, abs=1e-6)
    kid = distances._kernel("KID", ours[:50], theirs[:50])
    x, y = ours[:50].astype("f8"), theirs[:50].astype("f8")
    k_xx, k_yy, k_xy = ((p @ q.T / 8 + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    off = 1 - np.eye(50)
    plain = (k_xx * off).sum() / 2450 + (k_yy * off).sum() / 2450 - 2 * k_xy.mean()
    assert kid.value == pytest.approx(1000 * plain, rel=1e-9)

    def apart_by(seed: int) -> distances.Metric:
        chance = np.random.default_rng(seed)
        x, y = chance.normal(size=(2, 100, 8)).astype("f4")
        return distances._kernel("KID", x, y + 1)

    found_100 = [apart_by(seed) for seed in range(100)]
    middle = np.mean([one.value for one in found_100])
    holds = sum(one.low < middle < one.high for one in found_100)
    assert 88 <= holds <= 100  # 95 are promised
    halves = [one.high - one.value for one in found_100]
    assert 0.8 < np.mean(halves) / (1.96 * np.std([one.value for one in found_100])) < 1.5


def test_inceptions_weights_are_the_users_and_nothing_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With random weights in the authors' layout: what the net says of the pixels, and nothing else."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    torch.manual_seed(0)
    with monkeypatch.context() as patched:
        patched.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
        patched.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        net = theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    path = tmp_path / "inception.pth"
    torch.save(net.state_dict(), path)
    images = [scene_at(scene, 32) for scene in of_scenes(3, "described")[0]]
    found = distances.inception(path)
    assert (found.distance, found.kernel) == ("FID", "KID x 1000")
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    np.testing.assert_array_equal(found.of(images), net(pixels)[0].numpy())
    for bad, said in ((tmp_path / "gone.pth", "nothing is downloaded"), (Path(__file__), "no weights of")):
        with pytest.raises(InputError, match=said):
            distances.inception(bad)
    torch.save({"a": Path()}, path)  # a pickle that would have to be run
    with pytest.raises(InputError, match="no weights of"):
        distances.inception(path)


def test_the_clip_score_is_that_of_plain_lines(tmp_path: Path, model: Model) -> None:
    scenes, texts = of_scenes(5, "described")
    images = [scene_at(scene, 64) for scene in scenes]
    drawings = load(a_folder(tmp_path / "a", images, texts))
    found = clip_score(model, "b", drawings)
    net, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{CLIP}")
    tokens = open_clip.get_tokenizer(f"local-dir:{CLIP}")(texts)
    with torch.inference_mode():
        seen = net.eval().encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)
        cosines = (seen * net.encode_text(tokens, normalize=True)).sum(1)
    assert found.value("CLIP score") == pytest.approx(100 * cosines.clamp(min=0).mean().item(), abs=1e-4)
    assert (found.samples, found.cut) == ({"pictures": 5}, 0)
    assert re.match(r"CLIP score by clip [0-9a-f]{8}; ddpm", found.protocol)  # wherever that lies
    long = load(a_folder(tmp_path / "b", images, ["a red star " * 100, *texts[1:]]))
    assert clip_score(model, "b", long).cut == 1


@pytest.mark.full
def test_a_folder_of_pictures_is_evaluated_by_one_command(tmp_path: Path) -> None:
    scenes, texts = of_scenes(8, "described")
    folder = a_folder(tmp_path / "drawn", [scene_at(scene, 32) for scene in scenes], texts)
    (tmp_path / "real").mkdir()
    for number, scene in enumerate(scenes):
        (tmp_path / "real" / f"{number}.jpg").write_bytes(world.jpeg(world.draw(scene, 128), 90))
    words = ["fid", f"reference={tmp_path}/real", f"features={CLIP}", "clip_score", f"model={CLIP}"]
    recap_if_full("eval", folder, *words, "--out", tmp_path / "a.json")
    found = {row["benchmark"]: row for row in json.loads((tmp_path / "a.json").read_text())}
    distance = found["fid"]["metrics"][0]
    assert distance["name"] == "Fréchet distance"  # not FID: those are no features of Inception
    for number, scene in enumerate(scenes):  # others, of which each is of one colour
        other = Image.new("RGB", (128, 128), world.COLOURS[scene.things[0].colour])
        (tmp_path / "real" / f"{number}.jpg").write_bytes(world.jpeg(other, 90))
    further = json.loads(recap_here("eval", folder, *words, "--json").stdout)[0]
    assert further["metrics"][0]["value"] > 1.5 * distance["value"]
    assert further["protocol"] != found["fid"]["protocol"]  # of other pictures: not to be compared
    assert 0 < found["clip score"]["metrics"][0]["value"] < 100
    said = recap_here("eval", folder, "fid", f"reference={tmp_path}/real", check=2).stderr
    assert "by which features" in said


def test_what_cannot_be_measured_is_told_in_one_line(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "a", [Image.new("RGB", (8, 8))] * 2, ["a", "b"])
    assert Artist(str(folder)).drawn(["a", "b"], tmp_path).prompts == ("a", "b")
    with pytest.raises(InputError, match="pictures of other prompts"):
        Artist(str(folder)).drawn(["a", "c"], tmp_path)
    with pytest.raises(InputError, match="no pictures of recap sample and no model"):
        Artist(str(tmp_path)).drawn(["a"], tmp_path)
    (folder / "000001.png").unlink()
    with pytest.raises(InputError, match="1 of 2 pictures are missing"):
        load(folder)
    (folder / SETTINGS).write_text("{")
    with pytest.raises(InputError, match=SETTINGS):
        load(folder)
    (tmp_path / "config.json").write_text("{}")  # as any model of the Hub has it
    with pytest.raises(InputError, match="no pictures of recap sample and no model"):
        Artist(str(tmp_path)).drawn(["a"], tmp_path)
    one = load(a_folder(tmp_path / "b", [Image.new("RGB", (8, 8))], ["a"]))
    features = distances.Features("x", lambda _: np.zeros((1, 2), "f4"), "d", "k")
    with pytest.raises(InputError, match="three pictures or more"):
        distances.frechet("b", one, [Picture("x")], features)
    odd = load(a_folder(tmp_path / "c", [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 9))], ["a", "b"]))
    with pytest.raises(InputError, match="9 x 9 pixels, not 8 x 8"):
        list(odd.images())


@pytest.mark.slow
def test_a_model_draws_what_it_is_asked_for(tmp_path: Path) -> None:
    """Fewer scenes, more, and other prompts have each their own pictures."""
    torch.manual_seed(0)
    model = tmp_path / "model"
    net = replace(TINY, context=80)
    dit.describe(net, asdict(FLOW), WORDS, model)
    save_file(DiT(net).state_dict(), model / dit.WEIGHTS)
    settings = [f"folder={tmp_path}/drawn", "name=few"]
    told = recap_here("eval", model, "world_drawings", "scenes=4", *settings, "--json")
    assert [row["model"] for row in json.loads(told.stdout)] == [str(model)] * 3
    few = recap_here("eval", model, "world_drawings", "scenes=4", *settings, "--steps", "3", "--json").stdout
    assert "3 steps" in json.loads(few)[0]["protocol"]
    said = recap_here("eval", CLIP, "demo", "--guidance", "2", check=2).stderr
    assert "is of nothing that draws" in said
    drawer = Artist(str(model))
    for texts in (["a red star"], ["a red star", "a ring"], ["a ring"]):
        assert drawer.drawn(texts, tmp_path / "drawn").prompts == tuple(texts)
    with pytest.raises(InputError, match="not told what to draw"):
        drawer.drawn(None, tmp_path)


@pytest.mark.slow
def test_the_demos_captioner_reads_pictures_and_judges_them(tmp_path: Path) -> None:
    """Of scenes that are what was asked for, and of others."""
    weights = "recipes/demo/weights/captioner"
    settings = {"model": weights, "dtype": "float32", "max_model_len": 768, "kv_cache_gib": 1}
    scenes, texts = of_scenes(40, "described")
    images = [scene_at(scene, 64) for scene in scenes]
    right = load(a_folder(tmp_path / "a", images, texts))
    wrong = load(a_folder(tmp_path / "b", images[1:] + images[:1], texts))
    by = Caption(**settings)
    assert asked.read_back("b", right, scenes, by).value() > 85
    assert asked.read_back("b", wrong, scenes, by).value() < 20
    judge = benchmarks.judge(model=weights, dtype="float32", max_model_len=768)
    (ours,), (theirs,) = (judge.run(judge.subject(str(tmp_path / name))) for name in ("a", "b"))
    assert 1 <= theirs.value() < ours.value() - 1 <= 4
    assert (ours.samples, ours.cut, ours.value("without a rating")) == ({"pictures": 40}, 0, 0)


def test_what_a_judge_does_not_rate_is_left_out_and_two_are_compared_by_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawings = load(a_folder(tmp_path / "a", [Image.new("RGB", (8, 8))] * 6, list("abcdef")))
    judge = kinds.judge("re_caption", "judge")
    by = Caption.of(judge, model="recipes/demo/weights/captioner")

    def rated(*said: str) -> Result:
        monkeypatch.setattr(asked, "said", lambda *_: [Reply(text) for text in said])
        return asked.rated("b", drawings, by)

    ours = rated("5", "4", "what?", "3", "2", "1")
    assert (ours.value(), ours.value("without a rating")) == (3, pytest.approx(100 / 6))
    theirs = rated("4", "3", "", "2", "1", "no")
    row = {row["metric"]: row for row in compare(ours, theirs)}["rating"]
    assert row["difference"] == 0.5
    same = compare(ours, rated("5", "4", "", "3", "2", "1"))[0]
    assert (same["low"], same["high"]) == (0, 0)
    with pytest.raises(InputError, match="rated none of 6 pictures"):
        rated(*["no"] * 6)


def test_two_distances_are_compared_without_an_interval() -> None:
    one, two = (distances.Metric("FID", value, value - 1, value + 1, [], []) for value in (30.0, 25.0))
    ours, theirs = (Result("b", "p", "m", {"pictures": 5}, (metric,)) for metric in (one, two))
    (row,) = compare(ours, theirs)
    assert (row["difference"], row["low"], row["high"]) == (5, None, None)
    assert str(distances.Metric("d", 0.01234, 0.01, 0.02, [], [])) == "d 0.0123 [0.01, 0.02]"


def test_prompts_of_every_layout(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a red star\n\n  a ring \n")
    assert prompts.read(tmp_path / "a.txt") == ["a red star", "a ring"]
    rows = [(2, 5, "second of 2"), (1, 9, "of 1"), (2, 3, "first of 2")]
    about = [{"image_id": image, "id": n, "caption": text} for image, n, text in rows]
    (tmp_path / "captions_val2014.json").write_text(json.dumps({"annotations": about}))
    assert prompts.read(tmp_path / "captions_val2014.json") == ["of 1", "first of 2"]
    table = pa.table({"caption": ["a", "b", None], "recaption": ["long a", "long b", "long c"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert prompts.read(tmp_path / "a.parquet") == ["a", "b"]
    some = prompts.read(tmp_path / "a.parquet", column="recaption", number=2)
    short = prompts.read(tmp_path / "a.parquet", number=2)
    assert len(some) == 2
    assert short == [text[-1] for text in some if text != "long c"]  # of the same rows
    (tmp_path / "b.json").write_text("{}")
    for name, given, said in (
        ("a.parquet", {"column": "x"}, "has no column x"), ("b.json", {}, "has not COCO's captions"),
        ("a.csv", {}, "is no file of prompts alone"),
        ("a.txt", {"number": 3}, "has 2 prompts, 3 are wanted"), ("a.txt", {"number": -1}, "ask for 1 to 2"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            prompts.read(tmp_path / name, **given)  # type: ignore[arg-type]
