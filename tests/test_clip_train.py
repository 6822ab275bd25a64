"""Recap-CLIP's training: its loss and gradients are those of plain lines, and a kill changes no bit of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import CLIP, ROOT
from test_data import published_in

from builder.errors import InputError
from recipes.clip import model as clip
from recipes.clip.model import Towers
from recipes.clip.train import Phase, Training, contrastive, gradients, train
from recipes.data import Mix

TINY = Towers(vision="T", text="T", patch=8, context=48, tokenizer=str(CLIP))


def a_training(demo_run: Path, **changed: object) -> Training:
    """Six steps over more than an epoch's third, in two phases."""
    phases = (
        Phase(px=16, samples=128, warmup=32, batch=32, lr=1e-4),
        Phase(px=32, samples=64, warmup=0, batch=32, lr=1e-5),
    )
    training = Training(
        name="tiny", version=str(published_in(demo_run)), images=str(demo_run), towers=TINY, phases=phases,
        mix=Mix(p_original=0.5), precision="fp32", save_every=1, workers=1,
    )  # fmt: skip
    return replace(training, **changed)  # type: ignore[arg-type]


def losses(out: Path) -> dict[int, float]:
    lines = (json.loads(line) for line in (out / "log.jsonl").read_text().splitlines())
    found = [(line["sample"], line["loss"]) for line in lines]
    assert len(dict(found)) == len(found)  # a step is told once, though it was done twice
    return dict(found)


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.clip.train.REPORT_S", 0.0)


def unit(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, 16, generator=generator), dim=1)


def test_the_loss_is_open_clips() -> None:
    image, text, scale = unit(20, 0), unit(20, 1), torch.tensor(14.3)
    ours = contrastive(image, text, scale, torch.ones(20, dtype=torch.bool))
    torch.testing.assert_close(ours, open_clip.ClipLoss()(image, text, scale))


def test_a_sample_without_a_picture_is_nobodys() -> None:
    image, text, scale = unit(20, 0), unit(20, 1), torch.tensor(14.3)
    ok = torch.ones(20, dtype=torch.bool)
    ok[[3, 19]] = False
    torch.testing.assert_close(
        contrastive(image, text, scale, ok), open_clip.ClipLoss()(image[ok], text[ok], scale)
    )
    assert contrastive(image, text, scale, torch.zeros(20, dtype=torch.bool)) == 0


@pytest.mark.parametrize("size", [4, 5])
def test_parts_of_a_step_have_the_gradient_of_the_whole(size: int) -> None:
    torch.manual_seed(0)
    model = clip.make(TINY.config(32))
    images, texts = torch.randn(12, 3, 32, 32), torch.randint(0, 900, (12, 48))
    ok = torch.ones(12, dtype=torch.bool)
    ok[7] = False
    found = []
    for parts in (12, size):
        model.zero_grad()
        loss = gradients(model, images, texts, ok, parts, "fp32", "cpu")
        found.append(
            (loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        )
    (loss, whole), (by_parts, theirs) = found
    assert by_parts == pytest.approx(loss, rel=1e-6)
    assert whole.keys() == theirs.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-5, atol=1e-6)


def test_a_part_sees_the_patches_that_it_saw_before() -> None:
    """Half of them, drawn anew for each part, and the same in both passes."""
    torch.manual_seed(0)
    model = clip.make(replace(TINY, keep=0.5).config(32)).train()
    seen: list[torch.Tensor] = []
    model.visual.patch_dropout.register_forward_hook(lambda _, __, out: seen.append(out.detach().clone()))
    gradients(
        model,
        torch.randn(8, 3, 32, 32),
        torch.randint(0, 900, (8, 48)),
        torch.ones(8).bool(),
        4,
        "fp32",
        "cpu",
    )
    first, second, first_again, second_again = seen
    assert torch.equal(first, first_again)
    assert torch.equal(second, second_again)
    assert first.shape[1] == 1 + 16 // 2


def test_a_training_that_was_killed_goes_on_to_the_same_bits(
    demo_run: Path, tmp_path: Path, every_step: None
) -> None:
    """kill -9, the same again, and the log and the weights are those of one that was
    not killed.
    """
    whole = train(a_training(demo_run), tmp_path / "whole", say=lambda _: None)
    code = (
        "import recipes.clip.train as t; from recipes.clip.train import *; from recipes.clip.model import *; "
        "from pathlib import Path; t.REPORT_S = 0.0; "
        f"t.train({a_training(demo_run)!r}, Path({str(tmp_path / 'killed')!r}))"
    )
    for steps in (2, 5) if os.environ.get("RECAP_FULL") else (3,):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 120
        while len(losses(tmp_path / "killed") if (tmp_path / "killed/log.jsonl").exists() else {}) < steps:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    there = train(a_training(demo_run), tmp_path / "killed", say=lambda _: None)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert (there / clip.WEIGHTS).read_bytes() == (whole / clip.WEIGHTS).read_bytes()
    assert len(losses(tmp_path / "whole")) == 6


@pytest.mark.skipif(not os.environ.get("RECAP_FULL"), reason="a minute; make test-slow runs it")
def test_two_processes_have_the_losses_of_one(demo_run: Path, tmp_path: Path, every_step: None) -> None:
    code = (
        "import recipes.clip.train as t; from recipes.clip.train import *; from recipes.clip.model import *; "
        "from pathlib import Path; t.REPORT_S = 0.0; "
        f"t.train({a_training(demo_run, workers=0)!r}, Path({str(tmp_path / 'two')!r}))"
    )
    (tmp_path / "run.py").write_text(f"if __name__ == '__main__':\n    {code}\n")
    command = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-addr=127.0.0.1",
        "--master-port=29587",
    ]
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path / "run.py")], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    train(a_training(demo_run, micro=8, workers=0), tmp_path / "one", say=lambda _: None)
    ours, theirs = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert theirs == pytest.approx(ours, rel=1e-5)


def test_a_checkpoint_is_a_model_of_open_clip(demo_run: Path, tmp_path: Path) -> None:
    there = train(a_training(demo_run), tmp_path / "out", say=lambda _: None)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{there}")
    tokens = open_clip.get_tokenizer(f"local-dir:{there}")(["a red star"])
    assert tokens.shape == (1, 48)
    assert preprocess.transforms[0].size in (32, (32, 32))
    with torch.no_grad():
        image, text, _ = model.eval()(torch.zeros(1, 3, 32, 32), tokens)
    assert image.shape == text.shape == (1, 128)


def test_another_training_is_not_mixed_with_it(demo_run: Path, tmp_path: Path) -> None:
    train(a_training(demo_run), tmp_path / "out", say=lambda _: None)
    with pytest.raises(InputError, match="holds another training: seed was 0"):
        train(a_training(demo_run, seed=1), tmp_path / "out")
    larger = a_training(demo_run, towers=replace(TINY, text="S"))
    (tmp_path / "out" / "training.json").unlink()
    longer = replace(larger, phases=(replace(larger.phases[0], samples=1280), *larger.phases[1:]))
    with pytest.raises(InputError, match="holds a model of another shape"):
        train(longer, tmp_path / "out", say=lambda _: None)


def test_a_loss_that_is_no_number_stops_and_names_the_step(
    demo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.clip.train.gradients", lambda *_: float("nan"))
    with pytest.raises(InputError, match=r"the loss is nan at sample 0, uids [0-9a-f]{32} to [0-9a-f]{32}\n"):
        train(a_training(demo_run), tmp_path / "out", say=lambda _: None)


@pytest.mark.parametrize(("step", "rate"), [(0, 0.25), (3, 1.0), (4, 1.0), (8, 0.5), (12, 0.0)])
def test_the_rate_rises_and_falls(step: int, rate: float) -> None:
    phase = Phase(px=16, samples=12 * 512, warmup=4 * 512, batch=512, lr=1e-6)
    assert phase.rate(step) == pytest.approx(rate * 2e-6)


@pytest.mark.parametrize(
    ("vision", "text", "millions"),
    [("S", "S", 58), ("B", "B", 140), ("L", "L", 415)],
)
def test_towers_have_the_papers_sizes(
    vision: clip.Size, text: clip.Size, millions: int, tmp_path: Path
) -> None:
    """By plain arithmetic: blocks of 12 width^2, and what is around them."""
    towers = Towers(vision=vision, text=text, tokenizer=str(CLIP))
    with torch.device("meta"):
        config = towers.config(224)["model_cfg"]
        config["text_cfg"]["vocab_size"] = 32000
        config["text_cfg"].pop("hf_tokenizer_name")
        config["text_cfg"].pop("tokenizer_kwargs")
        model = open_clip.model.CLIP(**config)
    layers, width, _ = clip.VISION[vision]
    text_layers, text_width, _ = clip.TEXT[text]
    plain = 12 * (layers * width**2 + text_layers * text_width**2)
    plain += 3 * 16**2 * width + 32000 * text_width + clip.EMBED[vision] * (width + text_width)
    plain += 197 * width + 128 * text_width
    number = sum(parameter.numel() for parameter in model.parameters())
    assert number == pytest.approx(plain, rel=0.01)
    assert number / 1e6 == pytest.approx(millions, rel=0.05)
