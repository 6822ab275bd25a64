"""Latents are made once by a stage, joined in place of images, trained on, decoded by their own VAE."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CLIP, recap_here, with_stage
from PIL import Image
from safetensors.numpy import load_file
from test_data import published_in
from test_dit import TINY, a_training

from builder.errors import InputError
from builder.run import Run
from builder.stages.imagetar import images
from builder.stages.latents import TENSOR, Latents, Vae, centre
from builder.stages.tensors import Shard, read_header
from recipes.data import Latent
from recipes.dit.sample import Drawer, sample
from recipes.dit.train import train
from recipes.join import join

PX = 32


def a_vae(folder: Path, seed: int = 0) -> Path:
    """Of random weights, which makes a picture of 4 channels, half as large."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**kinds, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4)
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers", reason="the extra recapkit[train] is not installed")
    return a_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def run(demo_run: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's, with one stage more."""
    encoded = Latents(model=str(vae), px=PX, batch=16)
    return with_stage(demo_run, tmp_path_factory.mktemp("encoded") / "run", encoded)


def test_a_latent_is_what_the_vae_says_of_its_image(run: Path, vae: Path) -> None:
    opened, model = Run.open(run), Vae(str(vae))
    for download, encoded in zip(opened.done("download"), opened.done("latents"), strict=True):
        table = pq.read_table(opened.local(encoded.output(".parquet"))).to_pylist()
        ok = [row for row in table if row["status"] == "ok"]
        assert len(ok) > 20
        path = opened.local(encoded.output(".safetensors"))
        header, latents = read_header(path, TENSOR), load_file(path)["latents"]
        assert (header.number, header.shape) == (len(ok), (4, PX // 2, PX // 2))
        assert (header.about["px"], header.about["factor"]) == (str(PX), "0.18215")
        about = pq.read_table(opened.local(download.output(".parquet"))).to_pylist()
        known = {row["key"]: row for row in about}
        jpgs = {known[key]["uid"]: jpg for key, jpg in images(opened.local(download.output(".tar")))}
        for place in (0, len(ok) // 2, len(ok) - 1):
            picture = centre(Image.open(io.BytesIO(jpgs[ok[place]["uid"]])).convert("RGB"), PX)
            wanted = model.encode(np.array(picture)[None])[0]
            np.testing.assert_allclose(latents[place], wanted, atol=2e-3)
            data = path.read_bytes()[header.start + place * header.bytes :][: header.bytes]
            assert np.array_equal(Latent(4, PX // 2).of(data, ()), latents[place])


def test_a_training_on_latents_draws_with_their_vae_and_no_other(
    run: Path, vae: Path, demo_run: Path, tmp_path: Path
) -> None:
    net = replace(TINY, channels=4, px=PX // 2)
    training = a_training(demo_run, images=str(run), latents="latents", net=net, samples=32, min_found=0.9)
    there = train(training, tmp_path / "out", say=lambda _: None)
    about = json.loads((there / "config.json").read_text())["latents"]
    assert about["shape"] == [4, 16, 16]
    sample(there, ["a red star"], tmp_path / "drawn", vae=str(vae), steps=2, say=lambda _: None)
    with Image.open(tmp_path / "drawn" / "000000.png") as picture:
        assert picture.size == (PX, PX)
    with pytest.raises(InputError, match="draws latents\n"):
        Drawer(there)
    other = a_vae(tmp_path / "other", seed=1)
    said = recap_here("sample", there, "x", "--vae", other, "--out", tmp_path / "b", check=2).stderr
    assert "latents of another model" in said
    with pytest.raises(InputError, match="the latents are 4 channels of 16 a side"):
        train(replace(training, net=replace(net, px=32)), tmp_path / "b", say=lambda _: None)
    pictures = replace(training, latents="", net=TINY, images=str(demo_run))
    with pytest.raises(InputError, match="needs no vae"):
        Drawer(train(pictures, tmp_path / "c", say=lambda _: None), vae=str(vae))


def test_latents_join_by_uid_and_sha256(run: Path, demo_run: Path, tmp_path: Path) -> None:
    version = str(published_in(demo_run))
    ours = join(version, str(run), tmp_path / "a", min_found=0.9, latents="latents")
    pictures = join(version, str(run), tmp_path / "b", min_found=0.9)
    assert ours.audit.found == pictures.audit.found
    uids = [
        sorted(uid for number in range(len(one.rows)) for uid in one.shard(number)["uid"].to_pylist())
        for one in (ours, pictures)
    ]
    assert uids[0] == uids[1]
    with pytest.raises(InputError, match="has no stage x"):
        join(version, str(run), tmp_path / "c", latents="x")
    with pytest.raises(InputError, match="is no run on this machine"):
        join(version, str(tmp_path), tmp_path / "c", latents="latents")


def test_latents_are_read_where_their_vae_is_not_and_those_of_two_are_not_mixed(
    run: Path, vae: Path, demo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = str(published_in(demo_run))
    with pytest.raises(InputError, match=r"rows found their image .*\n.*build latents to the end"):
        join(version, str(run), tmp_path / "a", min_found=1.1, latents="latents")
    vae.rename(tmp_path / "elsewhere")
    try:
        here = join(version, str(run), tmp_path / "a", min_found=0.9, latents="latents")
        assert here.latents is not None
        assert here.latents["precision"] == "fp32"
    finally:
        (tmp_path / "elsewhere").rename(vae)
    numbers = count()

    def by_others(path: Path, tensor: str) -> Shard:
        shard = read_header(path, tensor)
        return replace(shard, about={**shard.about, "vae": str(next(numbers))})

    monkeypatch.setattr("recipes.images.read_header", by_others)
    with pytest.raises(
        InputError, match=r"has other latents than the shards before: vae is 1, was 0\n.*one VAE"
    ):
        join(version, str(run), tmp_path / "b", min_found=0.9, latents="latents")


def test_what_is_no_vae_and_no_file_of_latents_is_told(vae: Path, tmp_path: Path) -> None:
    for name, text, said in (
        ("none", None, "has no config.json"), ("other", '{"_class_name": "UNet"}', "is of UNet"),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / "config.json").write_text(text)
        with pytest.raises(InputError, match=said):
            Latents(model=str(tmp_path / name)).check()
    with pytest.raises(InputError, match="no config"):
        Latents(model=str(CLIP)).check()
    with pytest.raises(InputError, match="px=33 is no multiple of 2"):
        Vae(str(vae)).shape(33)
    shutil.copyfile(vae / "diffusion_pytorch_model.safetensors", tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="holds no latents"):
        read_header(tmp_path / "a.safetensors", TENSOR)
