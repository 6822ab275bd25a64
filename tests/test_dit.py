"""Recap-DiT: the model is the paper's, a step and a sampler are those of plain lines, nothing is drawn twice
alike by chance.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CLIP, ROOT, recap_here, recap_if_full
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file, save_file
from test_data import published_in
from torch.distributions import Normal, kl_divergence
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from builder.errors import InputError
from recipes.data import Batch, Mix, Picture
from recipes.demo import demo, reader, world
from recipes.dit import model as dit
from recipes.dit import trainings
from recipes.dit.model import DiT, Net, Words
from recipes.dit.objective import Objective
from recipes.dit.plan import forward_flops, picture_flops, plan
from recipes.dit.sample import Drawer, How, sample, seeds_of
from recipes.dit.train import Step, Training, noise_of, train
from recipes.evaluate.drawings import Artist, load
from recipes.evaluate.world_drawings import prompts, read_back
from recipes.join import join
from recipes.muon import Muon, orthogonal
from recipes.training import ALONE

TINY = Net(
    size="P", patch=4, px=16, channels=3, sigma=False, context=32, text_width=64, text_layers=1,
    vocabulary=1024,
)  # fmt: skip
FLOW = Objective(kind="flow", predict="clean", learned_sigma=False)
WORDS = CLIP / dit.TOKENIZER
SHIPPED = CLIP.with_name("dit")


def a_training(demo_run: Path, **changed: object) -> Training:
    training = Training(
        name="tiny", version=str(published_in(demo_run)), images=str(demo_run), tokenizer=str(CLIP), net=TINY,
        objective=FLOW, samples=96, batch=16, lr=1e-3, mix=Mix(drop=0.1), precision="fp32", save_every=2,
        workers=1,
    )  # fmt: skip
    return replace(training, **changed)  # type: ignore[arg-type]


def losses(out: Path) -> dict[int, float]:
    lines = (json.loads(line) for line in (out / "log.jsonl").read_text().splitlines())
    return {line["sample"]: line["loss"] for line in lines}


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.training.REPORT_S", 0.0)


# --- the model ----------------------------------------------------------------------------------------------

# The paper's, in millions, and what facebookresearch/DiT says of XL: with 1,001 classes, and places, which
# are not trained.
PUBLISHED = {"S": 33, "B": 130, "L": 458, "XL": 675}
XL = 675_129_632


@pytest.mark.parametrize("size", PUBLISHED)
def test_it_is_the_published_model_and_what_reads_the_text(size: dit.Size) -> None:
    with torch.device("meta"):
        model = DiT(Net(size=size, patch=2))
    blocks, width, _ = dit.SIZES[size]
    reads = blocks * 4 * (width**2 + width) + 768 * width + width
    classes, fixed = 1001 * width, 16**2 * width
    ours = sum(parameter.numel() for parameter in model.parameters())
    without = ours - reads + classes + fixed
    assert without // 10**6 == PUBLISHED[size] or round(without / 10**6) == PUBLISHED[size]
    if size == "XL":
        assert without == XL


@pytest.mark.parametrize(("size", "gflops"), [("S", 6.06), ("B", 23.01), ("L", 80.71), ("XL", 118.64)])
def test_its_operations_are_the_published_ones_and_those_that_torch_counts(
    size: dit.Size, gflops: float
) -> None:
    """The paper's Gflops are multiplications alone, of a model that reads no text."""
    assert picture_flops(Net(size=size, patch=2)) / 2e9 == pytest.approx(gflops, rel=1e-3)
    net = Net(size="P", px=32, channels=3, context=48, text_width=64, text_layers=2, vocabulary=100)
    model = DiT(net)
    tokens, mask = torch.ones(2, 48).long(), torch.ones(2, 48).bool()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(2, 3, 32, 32), torch.ones(2), tokens, mask).sum().backward()
    assert counter.get_total_flops() / 2 == pytest.approx(3 * forward_flops(net), rel=0.03)


def test_a_plan_of_the_papers_training() -> None:
    training = trainings.recap_dit(version="v", images="i")
    told = plan(training, tflops=1000, utilisation=0.5)
    by_hand = 3 * 2 * 5.56e9 * 1.33e9  # DiT-B/4's 5.56, and what reads the text
    assert by_hand < told.flops < 1.5 * by_hand
    assert told.lines[0].steps == 650_000
    said = recap_here("plan", "dit:recap_dit", "version=v", "images=i", "size=L", "patch=2").stdout
    assert "650,000 steps" in said


def test_at_first_nothing_comes_out_and_a_block_changes_nothing() -> None:
    torch.manual_seed(0)
    model = DiT(TINY)
    tokens, mask = Words(WORDS, 32)(["a red star", ""])[0]
    noisy, time = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 700.0])
    assert (model(noisy, time, tokens, mask.bool()) == 0).all()
    x, text = torch.randn(2, 16, 128), torch.randn(2, 32, 128)
    for block in model.blocks:
        assert torch.equal(block(x, torch.randn(2, 128), text, mask.bool()), x)


def test_patches_come_back_where_they_were() -> None:
    model = DiT(TINY)
    picture = torch.randn(2, 3, 16, 16)
    patches = picture.unfold(2, 4, 4).unfold(3, 4, 4)  # (B, C, H, W, p, q)
    flat = patches.permute(0, 2, 3, 4, 5, 1).reshape(2, 16, 48)
    assert torch.equal(model._unpatched(flat), picture)


def test_what_is_behind_a_text_is_not_read() -> None:
    torch.manual_seed(0)
    model = DiT(TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tokens, mask = Words(WORDS, 32)(["a red star"])[0]
    noisy, time = torch.randn(1, 3, 16, 16), torch.tensor([300.0])
    out = model(noisy, time, tokens, mask.bool())
    other = torch.where(mask.bool(), tokens, 7)
    torch.testing.assert_close(model(noisy, time, other, mask.bool()), out)
    tokens[0, 2] = 9
    assert not torch.allclose(model(noisy, time, tokens, mask.bool()), out)


# --- what a step minimises ----------------------------------------------------------------------------------


def test_the_schedule_is_the_papers() -> None:
    betas = np.linspace(1e-4, 0.02, 1000)
    kept = np.cumprod(1 - betas)
    clean, noise = torch.ones(3, 3, 2, 2), torch.full((3, 3, 2, 2), 0.5)
    time = torch.tensor([0, 499, 999])
    found = Objective().noisy(clean, noise, time)
    for place, t in enumerate(time.tolist()):
        wanted = math.sqrt(kept[t]) + 0.5 * math.sqrt(1 - kept[t])
        assert found[place].flatten().tolist() == pytest.approx([wanted] * 12, rel=1e-5)
    even = Objective().times(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
    assert (even.min(), even.max()) == (0, 999)
    assert torch.histc(even.float(), 10).std() / 10_000 < 0.02


@pytest.mark.parametrize("predict", ["noise", "velocity", "clean"])
def test_at_first_the_loss_is_the_variance_of_what_is_predicted(predict: str) -> None:
    """Of nothing coming out; of noise that is 1."""
    clean, (noise, _) = torch.zeros(4, 3, 16, 16), noise_of(0, 0, torch.Size((4, 3, 16, 16)))
    clean += 0.5 * (predict == "clean")
    time = torch.tensor([1, 300, 600, 999])
    one = Objective(predict=predict, learned_sigma=False)  # type: ignore[arg-type]
    noisy = one.noisy(clean, noise, time)
    loss = one.loss(torch.zeros_like(clean), clean, noise, noisy, time)
    kept = torch.tensor(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))[time]
    share = {"noise": torch.ones(4), "velocity": kept.float(), "clean": torch.ones(4)}[predict]
    of = clean if predict == "clean" else noise
    torch.testing.assert_close(loss, of.square().flatten(1).mean(1) * share, rtol=1e-4, atol=1e-6)
    assert float(loss[0] / share[0]) == pytest.approx(0.25 if predict == "clean" else 1, abs=0.15)
    if predict == "noise":  # and so of a training's first step
        step = Step(one, DiT(TINY), precision="fp32", seed=0, ranks=ALONE)
        texts = Words(WORDS, 32)(["a"] * 4)[0]
        told = step(Batch(["u"] * 4, torch.zeros(4, 3, 16, 16).byte(), texts, torch.ones(4).bool(), 0), 0)
        assert told == pytest.approx(float(noise.square().mean()), rel=1e-6)


@pytest.mark.parametrize("predict", ["noise", "velocity", "clean"])
def test_weights_by_signal_to_noise_are_those_of_its_authors(predict: str) -> None:
    """min(snr, 5) of the clean picture, whatever is predicted (arXiv 2303.09556)."""
    clean, noise, time = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4), torch.tensor([5, 300, 900])
    one = Objective(predict=predict, learned_sigma=False, min_snr=5.0)  # type: ignore[arg-type]
    a = torch.tensor(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), dtype=torch.float32)[time].view(
        3, 1, 1, 1
    )
    noisy = one.noisy(clean, noise, time)
    guess = clean + 0.1 * torch.randn_like(clean)
    out = {
        "clean": guess, "noise": (noisy - a.sqrt() * guess) / (1 - a).sqrt(),
        "velocity": (a.sqrt() * noisy - guess) / (1 - a).sqrt(),
    }[predict]  # fmt: skip
    snr = (a / (1 - a)).flatten()
    wanted = snr.clamp(max=5) * (guess - clean).square().flatten(1).mean(1)
    torch.testing.assert_close(one.loss(out, clean, noise, noisy, time), wanted, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("predict", ["noise", "velocity", "clean"])
def test_what_is_right_has_no_loss_in_a_flow(predict: str) -> None:
    clean, noise = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 3, 8, 8)
    time = torch.tensor([0.5, 300.0, 600.0, 999.0])
    flow = Objective(kind="flow", predict=predict, learned_sigma=False)  # type: ignore[arg-type]
    noisy = flow.noisy(clean, noise, time)
    right = {"noise": noise, "velocity": noise - clean, "clean": clean}[predict]
    assert flow.loss(right, clean, noise, noisy, time).max() < 1e-8
    assert flow.loss(right + 0.1, clean, noise, noisy, time).min() > 1e-3
    same = flow.velocity(right, noisy, time)[1:3]
    torch.testing.assert_close(same, (noise - clean)[1:3], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("predict", ["noise", "velocity", "clean"])
def test_what_learns_the_variance_is_the_divergence_in_bits(predict: str) -> None:
    """By torch's own normal distributions."""
    torch.manual_seed(1)
    clean, noise, time = torch.rand(3, 2, 4, 4) * 2 - 1, torch.randn(3, 2, 4, 4), torch.tensor([1, 400, 999])
    one = Objective(predict=predict)  # type: ignore[arg-type]
    noisy = one.noisy(clean, noise, time)
    mean, sigma = torch.randn(2, 3, 2, 4, 4) * 0.3
    kept = torch.tensor(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    for place, t in enumerate(time.tolist()):
        a, before = kept[t], kept[t - 1]
        beta = 1 - a / before
        low = beta * (1 - before) / (1 - a)
        x, out = noisy[place].double(), mean[place].double()
        guess = {
            "noise": (x - (1 - a).sqrt() * out) / a.sqrt(), "clean": out,
            "velocity": a.sqrt() * x - (1 - a).sqrt() * out,
        }[predict]  # fmt: skip
        means = [
            before.sqrt() * beta / (1 - a) * of + (1 - beta).sqrt() * (1 - before) / (1 - a) * x
            for of in (clean[place].double(), guess)
        ]
        share = (sigma[place].double() + 1) / 2
        log_variance = share * beta.log() + (1 - share) * low.log()
        apart = kl_divergence(Normal(means[0], low.sqrt()), Normal(means[1], (log_variance / 2).exp()))
        found = one.bound(mean, sigma, clean, noisy, time)[place]
        assert float(found) == pytest.approx(float(apart.mean()) / math.log(2), rel=2e-3)


def test_at_the_cleanest_time_the_variance_costs_what_the_picture_costs() -> None:
    """In 256 values from -1 to 1, by torch's own normal distribution, which DiT's is near."""
    torch.manual_seed(1)
    clean = torch.randint(0, 256, (1, 2, 4, 4)) / 127.5 - 1
    clean[0, 0, 0, :2] = torch.tensor([-1.0, 1.0])  # what is beyond counts to these
    time, mean, sigma = torch.tensor([0]), clean + torch.randn(1, 2, 4, 4) * 0.01, torch.randn(1, 2, 4, 4)
    one = Objective(predict="clean")
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = (1 - betas).cumprod(0)
    share, low = (sigma.double() + 1) / 2, betas[1] * (1 - kept[0]) / (1 - kept[1])
    of = Normal(mean.double(), (share * betas[0].log() + (1 - share) * low.log()).div(2).exp())
    above = torch.where(clean == 1, 1, of.cdf(clean.double() + 1 / 255))
    below = torch.where(clean == -1, 0, of.cdf(clean.double() - 1 / 255))
    wanted = -(above - below).log().mean() / math.log(2)
    found = one.bound(mean, sigma, clean, one.noisy(clean, torch.randn_like(clean), time), time)
    assert float(found) == pytest.approx(float(wanted), rel=0.01)


def test_a_flows_times_are_shifted_in_training_and_in_sampling(models: dict[str, Path]) -> None:
    """To a s / (1 + (a - 1) s) of what they were."""
    even, shifted = replace(FLOW), replace(FLOW, shift=6.0)
    s = even.times(torch.linspace(-3, 3, 50)) / 1000
    torch.testing.assert_close(shifted.times(torch.linspace(-3, 3, 50)) / 1000, 6 * s / (1 + 5 * s))
    drawer = Drawer(models["flow"])
    drawer.objective = shifted
    for sampler, begin in (("euler", 1.0), ("dpm", 1 - 1e-3)):
        how = drawer.usual(sampler=sampler, steps=250, guidance=1.0, batch=1)
        times = np.array(drawer._times(drawer._scheduler(how))) / 1000
        even_times = np.linspace(begin, 0, 250, endpoint=False)
        assert times == pytest.approx(6 * even_times / (1 + 5 * even_times), abs=2e-3)
        drawer.draw(["a red star"], [0], how)
    with pytest.raises(InputError, match="shift=inf"):
        replace(FLOW, shift=math.inf)


def test_a_sample_without_a_picture_moves_nothing() -> None:
    torch.manual_seed(0)
    model = DiT(TINY)
    images, ok = (
        torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8),
        torch.tensor([True, True, True, False]),
    )
    texts = Words(WORDS, 32)(["a", "b", "c", "d"])[0]
    step = Step(FLOW, model, precision="fp32", seed=0, ranks=ALONE)
    told = step(Batch(["u"] * 4, images, texts, ok, 0), 0)
    three = step(Batch(["u"] * 3, images[:3], texts[:, :3], ok[:3], 0), 0)
    assert three == pytest.approx(told, rel=1e-6)


# --- a training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_training_that_stopped_goes_on_to_the_same_bits(
    demo_run: Path, tmp_path: Path, every_step: None, optimizer: str
) -> None:
    training = a_training(demo_run, optimizer=optimizer)
    there = train(training, tmp_path / "whole", say=lambda _: None)
    train(training, tmp_path / "cut", say=lambda _: None)
    shutil.rmtree(tmp_path / "cut" / "step-000000000096")
    again = train(training, tmp_path / "cut", say=lambda _: None)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for name in (dit.WEIGHTS, "training.tensors"):
        assert (again / name).read_bytes() == (there / name).read_bytes()
    with pytest.raises(InputError, match="another training: lr was"):
        train(replace(training, lr=1.0), tmp_path / "cut")
    told = tmp_path / "cut" / "training.json"
    before = {name: value for name, value in json.loads(told.read_text()).items() if name != "features"}
    del before["objective"]["shift"]
    told.write_text(json.dumps(before))  # of before there were those settings
    assert train(training, tmp_path / "cut", say=lambda _: None) == again


def test_a_training_in_bf16_is_near_one_in_fp32(demo_run: Path, tmp_path: Path, every_step: None) -> None:
    training = a_training(demo_run, samples=64, objective=replace(FLOW, predict="velocity"))
    for precision in ("fp32", "bf16"):
        one = replace(training, precision=precision)  # type: ignore[arg-type]
        train(one, tmp_path / precision, say=lambda _: None)
    ours, theirs = losses(tmp_path / "bf16"), losses(tmp_path / "fp32")
    assert ours == pytest.approx(theirs, rel=0.02)
    assert ours != theirs


@pytest.mark.slow
def test_a_compiled_training_is_that_of_the_plain_model(
    demo_run: Path, tmp_path: Path, every_step: None
) -> None:
    training = a_training(demo_run, samples=64)
    for compiled in (False, True):
        train(replace(training, compile=compiled), tmp_path / str(compiled), say=lambda _: None)
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-4)


def test_muon_is_torchs_and_adamw_beside_it() -> None:
    """Torch's computes in bfloat16, so that a step of it is right to some percent."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((32, 96), (96, 32), (40,))]
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    adamw = {"betas": (0.9, 0.999), "eps": 1e-8}
    both = [[torch.nn.Parameter(one.clone()) for one in start] for _ in range(2)]
    ours = Muon(both[0][:2], both[0][2:], **settings, **adamw)  # type: ignore[arg-type]
    theirs = [
        torch.optim.Muon(both[1][:2], **settings, adjust_lr_fn="match_rms_adamw"),  # type: ignore[arg-type]
        torch.optim.AdamW(both[1][2:], **settings, **adamw),  # type: ignore[arg-type]
    ]
    for _ in range(5):
        for a, b in zip(*both, strict=True):
            a.grad, b.grad = (gradient := torch.randn(a.shape)), gradient.clone()
        for one in (ours, *theirs):
            one.step()
    for a, b, before in zip(*both, start, strict=True):
        apart, moved = (a - b).detach(), (b - before).detach()
        assert float(apart.norm() / moved.norm()) < 0.03
    assert torch.equal(both[0][2], both[1][2])
    values = torch.linalg.svdvals(orthogonal(torch.randn(64, 200)))
    assert 0.6 < float(values.min()) < float(values.max()) < 1.3


def test_the_average_is_the_closed_form_of_the_weights(
    demo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.training.KEPT", 100)
    training = a_training(demo_run, save_every=1, ema=0.3)
    train(training, tmp_path / "out", say=lambda _: None)
    folders = sorted((tmp_path / "out").glob("step-*"))
    name = "blocks.0.mlp.0.weight"
    weights = [load_file(folder / "training.tensors")[f"weights:{name}"] for folder in folders]
    wanted = weights[0]  # at the first step the decay is 0
    for step, weight in enumerate(weights[1:], 2):
        decay = min(0.3, step / (9 + step))
        wanted = decay * wanted + (1 - decay) * weight
    torch.testing.assert_close(load_file(folders[-1] / dit.WEIGHTS)[name], wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_have_ones_losses(
    demo_run: Path, tmp_path: Path, every_step: None, sharded: bool
) -> None:
    training = a_training(demo_run, workers=0, sharded=sharded)
    (tmp_path / "run.py").write_text(
        "import sys, pathlib\n"
        "sys.path.insert(0, 'tests')\n"
        "import recipes.training\n"
        "recipes.training.REPORT_S = 0.0\n"
        "from test_dit import a_training, train\n"
        f"training = a_training(pathlib.Path({str(demo_run)!r}), workers=0, sharded={sharded})\n"
        f"train(training, pathlib.Path({str(tmp_path / 'two')!r}), say=lambda _: None)\n"
    )
    command = [
        "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2", "--master-addr=127.0.0.1",
        "--master-port=29588", str(tmp_path / "run.py"),
    ]  # fmt: skip
    train(training, tmp_path / "one", say=lambda _: None)
    ours = losses(tmp_path / "one")
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert losses(tmp_path / "two") == pytest.approx(ours, rel=1e-5)
        shutil.rmtree(tmp_path / "two" / "step-000000000096")


@pytest.mark.slow
def test_sixteen_pictures_are_drawn_again_from_their_captions(demo_run: Path, tmp_path: Path) -> None:
    """What it has seen often enough it knows by heart."""
    version = published_in(demo_run)
    there = (
        join(str(version), str(demo_run), tmp_path / "all", min_found=0.9).shard(0).slice(0, 16).to_pylist()
    )
    subset = pa.table({"uid": [row["uid"] for row in there], "caption": ["re_caption"] * 16})
    pq.write_table(subset, tmp_path / "subset.parquet")
    training = a_training(
        demo_run, subset=str(tmp_path / "subset.parquet"), samples=16 * 500, lr=1e-3, cosine=True, warmup=800,
        mix=Mix(), ema=0.99, net=replace(TINY, context=80), workers=0, save_every=10**6,
        objective=replace(FLOW, floor=0.3),
    )  # fmt: skip
    model = train(training, tmp_path / "out", say=lambda _: None)
    drawer = Drawer(model)
    texts = [row["re_caption"] for row in there]
    drawn = drawer.draw(texts, seeds_of(texts, 0), How(sampler="euler", steps=30, guidance=1.0, batch=16))
    seen = Picture(16, centre=True)
    real = []
    for row in there:
        with open(row["file"], "rb") as file:
            file.seek(row["start"])
            real.append(seen.of(file.read(row["bytes"]), ()).astype(float))
    apart = np.array([[np.abs(np.asarray(a, float) - b).mean() for b in real] for a in drawn])
    assert (apart.argmin(1) == np.arange(16)).all()
    assert np.median(apart.diagonal()) < 12  # of 255; to another's it is some 40


# --- drawing ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of random weights."""
    found = {}
    for kind, objective in {
        "flow": FLOW, "diffusion": Objective(), "clean": Objective(predict="clean"),
    }.items():  # fmt: skip
        torch.manual_seed(0)
        net = replace(TINY, sigma=objective.learned_sigma)
        model = DiT(net)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        found[kind] = tmp_path_factory.mktemp(kind)
        dit.describe(net, asdict(objective), WORDS, found[kind])
        save_file(model.state_dict(), found[kind] / dit.WEIGHTS)
    return found


@pytest.mark.parametrize(
    ("kind", "sampler"),
    [
        ("flow", "euler"),
        ("flow", "dpm"),
        ("diffusion", "ddpm"),
        ("diffusion", "dpm"),
        ("clean", "ddpm"),
        ("clean", "dpm"),
    ],
)
def test_any_part_of_the_pictures_comes_out_bit_for_bit(
    models: dict[str, Path], tmp_path: Path, kind: str, sampler: str
) -> None:
    texts = ["a red star", "a blue ring", "a red star", "", "two green squares"]
    for folder in ("all", "part"):
        sample(models[kind], texts, tmp_path / folder, sampler=sampler, steps=4, batch=4, say=lambda _: None)
        if folder == "part":
            continue
        shutil.copytree(tmp_path / "all", tmp_path / "part")
        for n in (1, 4):
            (tmp_path / "part" / f"{n:06d}.png").unlink()
    found = [(tmp_path / "part" / f"{n:06d}.png").read_bytes() for n in range(5)]
    assert found == [(tmp_path / "all" / f"{n:06d}.png").read_bytes() for n in range(5)]
    assert found[0] != found[2]  # the same text again is another picture


def test_processes_draw_each_its_share(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, how = ["a", "b", "c", "d", "e"], {"steps": 2, "batch": 2, "say": lambda _: None}
    sample(models["flow"], texts, tmp_path / "alone", **how)  # type: ignore[arg-type]
    monkeypatch.setenv("WORLD_SIZE", "2")
    names = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        sample(models["flow"], texts, tmp_path / "two", **how)  # type: ignore[arg-type]
        names.append(sorted(path.name for path in (tmp_path / "two").glob("*.png")))
    assert [len(found) for found in names] == [2, 5]
    for name in names[1]:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    words = ["sample", models["flow"], "a", "--out", tmp_path / "two", "--grid"]
    assert "without torchrun" in recap_here(*words, check=2).stderr
    with pytest.raises(InputError, match="several processes evaluate"):
        Artist(str(models["flow"])).drawn(["a"], tmp_path / "three")
    (tmp_path / "busy").mkdir()
    with ThreadPoolExecutor(1) as pool:
        with FileLock(tmp_path / "busy" / ".lock"):  # another one settles
            waits = pool.submit(sample, models["flow"], texts, tmp_path / "busy", **how)  # type: ignore[arg-type]
            with pytest.raises(TimeoutError):
                waits.result(2)
            assert not (tmp_path / "busy" / "sample.json").exists()
        waits.result()
    monkeypatch.delenv("WORLD_SIZE")
    sample(models["flow"], texts, tmp_path / "rank", **how)  # type: ignore[arg-type]
    assert len(list((tmp_path / "rank").glob("*.png"))) == 5


def test_a_step_of_the_sampler_is_that_of_plain_lines(models: dict[str, Path]) -> None:
    """The second of four, with the learned variance; the first of DPM-Solver++'s; and of a flow."""
    drawer = Drawer(models["diffusion"])
    scheduler = drawer._scheduler(How(steps=4))
    assert scheduler.timesteps.tolist() == [999, 666, 333, 0]
    assert drawer._scheduler(How(steps=501)).timesteps[0] == 999
    kept = torch.tensor(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), dtype=torch.float64)
    x, out = torch.randn(1, 3, 4, 4), torch.randn(1, 6, 4, 4) * 0.5
    seeded = torch.Generator().manual_seed(5)
    found = scheduler.step(out, scheduler.timesteps[1], x, generator=[seeded]).prev_sample
    noise = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    a, before = kept[666], kept[333]
    beta = 1 - a / before
    guess = (x - (1 - a).sqrt() * out[:, :3]) / a.sqrt()
    mean = before.sqrt() * beta / (1 - a) * guess + (1 - beta).sqrt() * (1 - before) / (1 - a) * x
    share = (out[:, 3:] + 1) / 2
    low = beta * (1 - before) / (1 - a)
    wanted = mean + (0.5 * (share * beta.log() + (1 - share) * low.log())).exp() * noise
    torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-4)
    scheduler = drawer._scheduler(How(sampler="dpm", steps=4))
    found = scheduler.step(out[:, :3], scheduler.timesteps[0], x).prev_sample
    a, after = kept[scheduler.timesteps[0]], kept[scheduler.timesteps[1]]
    guess = (x - (1 - a).sqrt() * out[:, :3]) / a.sqrt()
    smaller = (a / (1 - a) * (1 - after) / after).sqrt()  # exp(-h), h of the half logarithms of their snr
    wanted = ((1 - after) / (1 - a)).sqrt() * x - after.sqrt() * (smaller - 1) * guess
    torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-4)
    flow = Drawer(models["flow"])
    scheduler = flow._scheduler(How(sampler="euler", steps=4))
    assert flow._times(scheduler) == [1000, 750, 500, 250]
    velocity = torch.randn(1, 3, 4, 4)
    found = scheduler.step(velocity, scheduler.timesteps[0], x).prev_sample
    torch.testing.assert_close(found, x - velocity / 4)


@pytest.mark.parametrize("kind", ["flow", "diffusion"])
def test_guidance_of_one_is_the_text_alone(models: dict[str, Path], kind: str) -> None:
    drawer = Drawer(models[kind])
    x = torch.randn(2, 3, 16, 16)
    text, mask = drawer.features(["a red star", "a blue ring", "", ""])
    outs = [drawer._out(x, 400.0, text, mask, How(guidance=g, batch=2)) for g in (1.0, 1.0 + 1e-7, 0.0, 3.0)]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-5)
    learned = slice(0, 3)  # of what is guided
    told = outs[2][:, learned] + 3 * (outs[0] - outs[2])[:, learned]
    torch.testing.assert_close(outs[3][:, learned], told, rtol=1e-3, atol=1e-4)
    if kind == "diffusion":
        assert torch.equal(outs[3][:, 3:], outs[2][:, 3:])  # the variance is the text's


def test_guidance_acts_on_all_channels_or_on_the_first_three(tmp_path: Path) -> None:
    """Of four, and their variances."""
    torch.manual_seed(0)
    net, model = replace(TINY, channels=4, sigma=True), tmp_path / "model"
    net_of_4 = DiT(net)
    for parameter in net_of_4.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    dit.describe(net, asdict(Objective()), WORDS, model)
    save_file(net_of_4.state_dict(), model / dit.WEIGHTS)
    drawer, x = Drawer(model), torch.randn(1, 4, 16, 16)
    text, mask = drawer.features(["a red star", ""])
    without, plain, every, three = (
        drawer._out(x, 400.0, text, mask, How(guidance=g, guided=guided, batch=1))  # type: ignore[arg-type]
        for g, guided in ((0.0, "all"), (1.0, "all"), (3.0, "all"), (3.0, "three"))
    )
    told = without[:, :4] + 3 * (plain[:, :4] - without[:, :4])
    torch.testing.assert_close(every, torch.cat([told, plain[:, 4:]], 1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(three, torch.cat([told[:, :3], plain[:, 3:]], 1), rtol=1e-3, atol=1e-4)


def test_what_cannot_be_drawn_is_told_in_one_line(models: dict[str, Path], tmp_path: Path) -> None:
    model = models["flow"]
    with pytest.raises(InputError, match="more than the model's 32 tokens"):
        sample(model, ["red " * 60], tmp_path / "a")
    with pytest.raises(InputError, match=r"sampler=ddpm is not for a flow\n.*euler, dpm"):
        sample(model, ["red"], tmp_path / "a", sampler="ddpm")
    with pytest.raises(InputError, match="guidance=-1 is below 0"):
        sample(model, ["red"], tmp_path / "a", guidance=-1.0)
    for given, said in (
        ({"guidance": float("inf")}, "guidance=inf is below 0, or no number"),
        ({"guidance": 1e38}, "what .* draws is no number"),
    ):
        with pytest.raises(InputError, match=said):
            sample(model, ["red"], tmp_path / "none", **given)  # type: ignore[arg-type]
    for given, said in (
        ({"steps": 1}, "ddpm in one step takes noise"),
        ({"sampler": "dpm", "steps": 1000}, "no 1000 different times"),
    ):
        with pytest.raises(InputError, match=said):
            sample(models["diffusion"], ["red"], tmp_path / "none", **given)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="text_layers and vocabulary 0 or more"):
        replace(TINY, text_layers=-1)
    with pytest.raises(InputError, match="there are no texts"):
        sample(model, [], tmp_path / "a")
    with pytest.raises(InputError, match="holds no DiT"):
        sample(CLIP, ["red"], tmp_path / "a")
    assert sample(model, ["red"], tmp_path / "a", steps=2, say=lambda _: None).batch == 4
    assert sample(model, ["red", *"blue"], tmp_path / "a", steps=2, say=lambda _: None).batch == 4
    assert sample(model, [*"blue"] * 2, tmp_path / "b", steps=2, say=lambda _: None).batch == 32
    shutil.rmtree(tmp_path / "a")
    sample(model, ["red", "blue"], tmp_path / "a", steps=2, batch=2, say=lambda _: None)
    with pytest.raises(InputError, match="pictures of other texts"):
        sample(model, ["green"], tmp_path / "a", steps=2, batch=2)
    with pytest.raises(InputError, match="steps was 2, is 3"):
        sample(model, ["red", "blue"], tmp_path / "a", steps=3, batch=2)
    with pytest.raises(InputError, match="no whole number of patches"):
        Net(px=30)
    with pytest.raises(InputError, match="has 1,024 tokens, the model's vocabulary 10"):
        dit.tokenizer(str(CLIP), 10)
    with pytest.raises(InputError, match="neither learned_sigma nor min_snr"):
        Objective(kind="flow")


def test_seeds_are_the_texts_own() -> None:
    assert seeds_of(["a", "b", "a"], 0)[:2] == seeds_of(["a", "b"], 0)
    assert len(set(seeds_of(["a", "a", "b"], 0) + seeds_of(["a", "a", "b"], 1))) == 6


@pytest.mark.full
def test_the_commands(demo_run: Path, tmp_path: Path) -> None:
    version = published_in(demo_run)
    settings = [f"version={version}", f"images={demo_run}", "samples=64", "batch=32", "px=16", "workers=0"]
    done = recap_if_full("train", "dit", "demo", *settings, "--out", tmp_path / "out", "--json")
    model = json.loads(done.stdout)["model"]
    (tmp_path / "more.txt").write_text("a blue ring\n\na green cross\n")
    words = [
        "--captions",
        tmp_path / "more.txt",
        "--out",
        tmp_path / "drawn",
        "--steps",
        "2",
        "--grid",
        "--json",
    ]
    again = [tmp_path / "out" / "training.json", "samples=32", "--out", tmp_path / "less", "--json"]
    less = json.loads(recap_here("train", "dit", *again).stdout)["model"]
    assert less.endswith("step-000000000032")
    assert (
        "has no setting 'sample'"
        in recap_here("train", "dit", again[0], "sample=3", "--out", tmp_path / "x", check=2).stderr
    )
    told = json.loads(recap_if_full("sample", model, "a red star", *words).stdout)
    assert (told["pictures"], told["sampler"], told["guidance"]) == (3, "euler", 2)
    with Image.open(tmp_path / "drawn" / "grid.png") as sheet:
        assert sheet.size == (3 * 65 - 1, 64)
    assert (
        "is not for a flow"
        in recap_here("sample", model, "x", "--out", tmp_path / "b", "--sampler", "ddpm", check=2).stderr
    )


# --- who reads the pictures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("px", [32, pytest.param(64, marks=pytest.mark.slow)])
def test_the_reader_is_right_on_real_scenes(px: int) -> None:
    """Colour, shape and place, as the demo's web has pictures: at least 98 %, and nothing else."""
    right = there = wrong = 0
    for n in range(60 if px == 32 else 100):
        scene = world.scene(world.HELD_OUT * 5 + n)
        image = Image.open(io.BytesIO(world.jpeg(world.draw(scene, 128), 90)))
        found = {
            (one.place, one.name) for one in reader.read(image.resize((px, px), Image.Resampling.BILINEAR))
        }
        wanted = {(thing.place, thing.name) for thing in scene.things}
        right, there, wrong = right + len(found & wanted), there + len(wanted), wrong + len(found - wanted)
    assert right >= 0.98 * there
    assert wrong <= 0.01 * there


# --- the demo's model ---------------------------------------------------------------------------------------


def test_what_is_shipped_draws_what_is_asked_for_at_the_end_of_the_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Few scenes; recipes/demo/weights/README.md has what it draws of many."""
    demo._draw(tmp_path / "demo")
    (settings,) = tmp_path.glob("demo-drawn/*/sample.json")
    drawings = load(settings.parent)
    scenes, texts = prompts(len(drawings.prompts), "described")
    assert list(drawings.prompts) == texts
    with Image.open(tmp_path / "demo-drawn" / "grid.png") as grid:
        assert grid.size == (6 * 129 - 1, 4 * 129 - 1)
    found = read_back("few", drawings, scenes, "described")
    assert f"pairs {found.value('pairs'):.0f} %" in capsys.readouterr().out
    assert found.value("colours") > 85
    assert found.value("pairs") > 85
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 15e6
