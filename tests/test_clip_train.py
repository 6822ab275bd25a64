"""Recap-CLIP's training: its loss and gradients are those of plain lines, and a kill changes no bit of it."""

from __future__ import annotations

import json
import multiprocessing.forkserver
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CLIP, FULL, ROOT, fill, mounted, recap_here
from hub.server import Hub as Server
from huggingface_hub import snapshot_download
from test_data import published_in
from test_hub import server  # noqa: F401
from torch.nn.attention import SDPBackend, sdpa_kernel

import recipes.training
from builder.errors import InputError, RecipeError, VersionError
from recipes.clip import model as clip
from recipes.clip import trainings
from recipes.clip.losses import Step, sigmoid, softmax
from recipes.clip.model import Decoder, Towers, Trained
from recipes.clip.plan import forward_flops, parameters, plan
from recipes.clip.train import MOMENTS, Phase, Training, train
from recipes.data import Mix, Order
from recipes.evaluate import results
from recipes.evaluate.model import Model
from recipes.join import read
from recipes.push import push_model
from recipes.training import ALONE, alone_in, checkpoint

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
    monkeypatch.setattr("recipes.training.REPORT_S", 0.0)


def unit(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, 16, generator=generator), dim=1)


HEADS = torch.tensor([14.3, -9.0])


def test_the_loss_is_open_clips() -> None:
    image, text, ok = unit(20, 0), unit(20, 1), torch.ones(20, dtype=torch.bool)
    torch.testing.assert_close(softmax(image, text, HEADS, ok), open_clip.ClipLoss()(image, text, HEADS[0]))
    theirs = open_clip.loss.SigLipLoss()(image, text, HEADS[0], HEADS[1])
    torch.testing.assert_close(sigmoid(image, text, HEADS, ok), theirs)


def test_a_sample_without_a_picture_is_nobodys() -> None:
    image, text = unit(20, 0), unit(20, 1)
    ok = torch.ones(20, dtype=torch.bool)
    ok[[3, 19]] = False
    torch.testing.assert_close(
        softmax(image, text, HEADS, ok), open_clip.ClipLoss()(image[ok], text[ok], HEADS[0])
    )
    theirs = open_clip.loss.SigLipLoss()(image[ok], text[ok], HEADS[0], HEADS[1])
    torch.testing.assert_close(sigmoid(image, text, HEADS, ok), theirs)
    image.requires_grad_()
    none = softmax(image, text, HEADS, torch.zeros(20, dtype=torch.bool))
    none.backward()
    assert none == 0
    assert image.grad is not None
    assert (image.grad == 0).all()


def a_model(towers: Towers, px: int = 32) -> Trained:
    torch.manual_seed(0)
    decoder = Decoder(towers, 1024) if towers.decoder_layers else None
    return Trained(clip.make(towers.config(px)), decoder).train()


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("loss", ["clip", "siglip", "captions"])
def test_parts_of_a_step_have_the_gradient_of_the_whole(size: int, loss: str) -> None:
    towers = replace(
        TINY, sigmoid=loss == "siglip", decoder_layers=2 * (loss == "captions"), decoder_context=20
    )
    model = a_model(towers)
    images, texts = torch.randn(12, 3, 32, 32), torch.randint(0, 900, (12, 48))
    captions = torch.randint(1, 900, (12, 20)).tril(14) if loss == "captions" else None
    ok = torch.ones(12, dtype=torch.bool)
    ok[7] = False
    found = []
    for parts in (12, size):
        model.zero_grad()
        of = "siglip" if loss == "siglip" else "clip"
        told = Step(model, model, loss=of, captioning=2.0, size=parts)(images, texts, ok, captions)  # type: ignore[arg-type]
        named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((told, named))
    (told, whole), (by_parts, theirs) = found
    assert by_parts == pytest.approx(told, rel=1e-6)
    assert whole.keys() == theirs.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-5, atol=1e-6)


def test_the_loss_of_captions_is_of_the_tokens_that_are_there() -> None:
    """The mean over them, of pictures that are ok, as by a few plain lines."""
    towers = replace(TINY, decoder_layers=2, decoder_context=20)
    model = a_model(towers)
    images, texts = torch.randn(4, 3, 32, 32), torch.randint(0, 900, (4, 48))
    captions = torch.zeros(4, 20, dtype=torch.long)
    captions[:, :9] = torch.randint(1, 900, (4, 9))
    captions[2, 5:] = 0
    ok = torch.tensor([True, True, True, False])
    without = Step(model, model)(images, texts, ok)
    told = Step(model, model, captioning=2.0)(images, texts, ok, captions)
    model.clip.visual.output_tokens = True
    assert model.decoder is not None
    with torch.no_grad():
        _, patches = model.clip.visual(images[:3])
        losses = [model.decoder(patches[n : n + 1], captions[n : n + 1])[0, : (8, 8, 4)[n]] for n in range(3)]
    assert told - without == pytest.approx(2 * float(torch.cat(losses).mean()), rel=1e-5)


def test_a_part_sees_the_patches_that_it_saw_before() -> None:
    """Half of them, drawn anew for each part, and the same in both passes."""
    model = a_model(replace(TINY, keep=0.5))
    seen: list[torch.Tensor] = []
    dropout = model.clip.visual.patch_dropout
    dropout.register_forward_hook(lambda _, __, out: seen.append(out.detach().clone()))
    step = Step(model, model, size=4)
    step(torch.randn(8, 3, 32, 32), torch.randint(0, 900, (8, 48)), torch.ones(8).bool())
    first, second, first_again, second_again = seen
    assert torch.equal(first, first_again)
    assert torch.equal(second, second_again)
    assert first.shape[1] == 1 + 16 // 2


@pytest.fixture(scope="module")
def forkserver() -> Iterator[Any]:
    """Its processes have imported already what a training needs. It goes with these tests, for there is one
    at a time, and another's processes would be as large.
    """
    context = multiprocessing.get_context("forkserver")
    multiprocessing.forkserver._forkserver._stop()
    context.set_forkserver_preload(["recipes.clip.train", "test_clip_train"])
    yield context
    multiprocessing.forkserver._forkserver._stop()


def _train(training: Training, place: Path, **environment: str) -> None:
    os.environ |= environment
    recipes.training.REPORT_S = 0.0
    train(training, place, say=lambda _: None)


@pytest.mark.full
def test_a_training_that_was_killed_goes_on_to_the_same_bits(
    demo_run: Path, tmp_path: Path, every_step: None, forkserver: Any
) -> None:
    """kill -9, the same again, and the log and the weights are those of one that was
    not killed.
    """
    whole = train(a_training(demo_run), tmp_path / "whole", say=lambda _: None)
    for steps in (2, 5) if FULL else (3,):
        process = forkserver.Process(target=_train, args=(a_training(demo_run), tmp_path / "killed"))
        process.start()
        end = time.monotonic() + 120
        while len(losses(tmp_path / "killed") if (tmp_path / "killed/log.jsonl").exists() else {}) < steps:
            assert process.is_alive()
            assert time.monotonic() < end
            time.sleep(0.002)
        process.kill()
        process.join()
    there = train(a_training(demo_run), tmp_path / "killed", say=lambda _: None)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert (there / clip.WEIGHTS).read_bytes() == (whole / clip.WEIGHTS).read_bytes()
    assert len(losses(tmp_path / "whole")) == 6


WAYS = {
    "ddp": {},
    "fsdp": {"sharded": True},
    "siglip": {"loss": "siglip", "towers": replace(TINY, sigmoid=True)},
    "captions": {"captioning": 2.0, "towers": replace(TINY, decoder_layers=2, decoder_context=40)},
}


def in_two(forkserver: Any, training: Training, out: Path) -> None:
    """By two processes; by torchrun, which imports all anew, where there is time."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29587", "GLOO_SOCKET_IFNAME": "lo"}
    if not FULL:
        both = [
            forkserver.Process(
                target=_train,
                args=(training, out),
                kwargs=place | {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank},
                daemon=True,  # one alone would wait for the other
            )
            for rank in "01"
        ]
        for process in both:
            process.start()
        for process in both:
            process.join(200)
        assert [process.exitcode for process in both] == [0, 0]
        return
    code = (
        "import recipes.training as t; from recipes.clip.train import *; from recipes.clip.model import *; "
        f"from pathlib import Path; t.REPORT_S = 0.0; train({training!r}, Path({str(out)!r}))"
    )
    script = out.with_suffix(".py")
    script.write_text(f"if __name__ == '__main__':\n    {code}\n")
    options = ["--nproc-per-node=2", f"--master-addr={place['MASTER_ADDR']}"]
    options += [f"--master-port={place['MASTER_PORT']}", str(script)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | place | {"OMP_NUM_THREADS": "1"}, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.full
@pytest.mark.parametrize("way", WAYS if FULL else ["ddp"])
def test_two_processes_have_the_losses_of_one(
    demo_run: Path, tmp_path: Path, every_step: None, forkserver: Any, way: str
) -> None:
    """In parts, too; and one goes on where two were."""
    training = a_training(demo_run, workers=0, **WAYS[way])
    in_two(forkserver, replace(training, micro=8), tmp_path / "two")
    train(training, tmp_path / "one", say=lambda _: None)
    ours, theirs = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert theirs == pytest.approx(ours, rel=1e-5)
    if not FULL:
        return  # another minute
    shutil.rmtree(tmp_path / "two" / "step-000000000192")
    in_two(forkserver, replace(training, micro=8), tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(ours, rel=1e-5)
    shutil.rmtree(tmp_path / "two" / "step-000000000192")
    train(training, tmp_path / "two", say=lambda _: None)
    assert losses(tmp_path / "two") == pytest.approx(ours, rel=1e-5)


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
    both = a_training(demo_run, mix=Mix({"re_caption": 1.0, "org_caption": 1.0}))
    told = tmp_path / "order" / "training.json"
    told.parent.mkdir()
    told.write_text(json.dumps(asdict(both)))
    with pytest.raises(InputError, match="holds another training: mix was"):  # the order decides the draw
        train(replace(both, mix=Mix({"org_caption": 1.0, "re_caption": 1.0})), told.parent)
    with (
        alone_in(tmp_path / "order", ALONE),
        pytest.raises(InputError, match="another process trains in"),
        alone_in(tmp_path / "order", ALONE),
    ):
        pass
    with pytest.raises(InputError, match="holds another training: seed was 0"):
        train(a_training(demo_run, seed=1), tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "step-000000000192")
    (last,) = (tmp_path / "out").glob("step-*")
    whole = (last / "training.tensors").read_bytes()
    (last / "training.tensors").write_bytes(whole[:1000])
    with pytest.raises(InputError, match=r"training\.tensors is damaged.*\n.*rm -r"):
        train(a_training(demo_run), tmp_path / "out", say=lambda _: None)
    (last / "training.tensors").write_bytes(whole)
    larger = a_training(demo_run, towers=replace(TINY, text="S"))
    (tmp_path / "out" / "training.json").unlink()
    longer = replace(larger, phases=(replace(larger.phases[0], samples=1280), *larger.phases[1:]))
    with pytest.raises(InputError, match="holds a model of another shape"):
        train(longer, tmp_path / "out", say=lambda _: None)


def test_a_loss_that_is_no_number_stops_and_names_the_step(
    demo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.clip.losses.Step.__call__", lambda *_: float("nan"))
    with pytest.raises(
        InputError,
        match=r"the loss or its gradient is nan in the step of sample 0: 32 uids, in .*unhealthy-0\.json",
    ):
        train(a_training(demo_run), tmp_path / "out", say=lambda _: None)
    uids = json.loads((tmp_path / "out" / "unhealthy-0.json").read_text())["uids"]
    assert len(set(uids)) == 32


@pytest.mark.parametrize(("step", "rate"), [(0, 0.25), (3, 1.0), (4, 1.0), (8, 0.5), (12, 0.0)])
def test_the_rate_rises_and_falls(step: int, rate: float) -> None:
    phase = Phase(px=16, samples=12 * 512, warmup=4 * 512, batch=512, lr=1e-6)
    assert phase.rate(step) == pytest.approx(rate * 2e-6)


@pytest.mark.parametrize(
    ("size", "image", "text", "embed"),
    [
        ("S", (12, 384, 6, 16), (12, 384, 6), 384),
        ("B", (12, 768, 12, 16), (12, 512, 8), 512),
        ("L", (24, 1024, 16, 16), (12, 768, 12), 768),
        ("H", (32, 1280, 16, 14), (24, 1024, 16), 1024),
    ],
)
def test_towers_have_the_papers_sizes(
    size: clip.Size, image: tuple[int, ...], text: tuple[int, ...], embed: int
) -> None:
    """Layers, width, heads and patch, of the modules as they are made."""
    training = trainings.recap_clip(version="v", images="i", tokenizer=str(CLIP), vision=size, text=size)
    with torch.device("meta"):
        made: Any = clip.make(training.towers.config(224))
    blocks = made.visual.transformer.resblocks
    patch = made.visual.conv1
    assert (len(blocks), patch.out_channels, blocks[0].attn.num_heads, patch.kernel_size[0]) == image
    assert blocks[0].mlp.c_fc.out_features == 4 * image[1]
    assert made.visual.positional_embedding.shape == ((224 // image[3]) ** 2 + 1, image[1])
    blocks = made.transformer.resblocks
    assert (len(blocks), made.token_embedding.embedding_dim, blocks[0].attn.num_heads) == text
    assert made.positional_embedding.shape == (128, text[1])
    assert made.visual.proj.shape == (image[1], embed)
    assert made.text_projection.shape == (text[1], embed)


@pytest.mark.parametrize(
    ("scale", "samples", "batch", "patch"),
    [("small", 12_800_000, 4096, 32), ("medium", 128_000_000, 4096, 32), ("large", 1_280_000_000, 8192, 16)],
)
def test_datacomps_compute_is_its_own(scale: Any, samples: int, batch: int, patch: int) -> None:
    training = trainings.datacomp(version="v", images="i", tokenizer=str(CLIP), scale=scale)
    (phase,) = training.phases
    assert (phase.px, phase.samples, phase.batch, phase.warmup) == (224, samples, batch, 500 * batch)
    assert phase.rate(499) == pytest.approx(5e-4)
    assert (training.towers.patch, training.betas, training.weight_decay) == (patch, (0.9, 0.98), 0.2)


def test_clips_has_a_sentence_and_a_decoder_of_the_whole() -> None:
    training = trainings.clips(version="v", images="i", tokenizer=str(CLIP), p_original=0.5)
    assert training.mix == Mix(p_original=0.5, one_sentence=True)
    assert (training.captioning, training.towers.context, training.towers.decoder_context) == (2.0, 80, 128)
    with pytest.raises(RecipeError, match="scale=huge"):
        trainings.datacomp(version="v", images="i", tokenizer=str(CLIP), scale="huge")  # type: ignore[arg-type]


# --- what a checkpoint is, and where it goes ----------------------------------------------------------------


@pytest.mark.slow
def test_a_training_of_every_option_goes_on(demo_run: Path, tmp_path: Path, every_step: None) -> None:
    """SigLIP's loss, a decoder, patches dropped, steps in parts, TensorBoard; from another's weights."""
    towers = replace(TINY, sigmoid=True, decoder_layers=1, decoder_context=40, keep=0.5)
    training = a_training(
        demo_run, towers=towers, loss="siglip", captioning=2.0, micro=16, tensorboard=True, precision="bf16",
        mix=Mix(p_original=0.5, one_sentence=True),
    )  # fmt: skip
    whole = train(training, tmp_path / "whole", say=lambda _: None)
    train(replace(training, phases=training.phases[:1]), tmp_path / "part", say=lambda _: None)
    for path in ("training.json",):
        shutil.copyfile(tmp_path / "whole" / path, tmp_path / "part" / path)
    there = train(training, tmp_path / "part", say=lambda _: None)
    assert (there / clip.WEIGHTS).read_bytes() == (whole / clip.WEIGHTS).read_bytes()
    assert (there / MOMENTS).read_bytes() == (whole / MOMENTS).read_bytes()
    assert list((tmp_path / "whole" / "tensorboard").iterdir())
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{there}")
    assert float(model.logit_bias.detach()) == pytest.approx(-10, abs=0.5)
    started = replace(training, start=str(whole), phases=training.phases[1:])
    train(started, tmp_path / "started", say=lambda _: None)
    assert losses(tmp_path / "started")[32] < losses(tmp_path / "whole")[32]


def test_a_full_disk_leaves_the_checkpoint_of_before(demo_run: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", mib=60) as disk:
        out = disk / "out"
        training = a_training(demo_run)
        train(replace(training, phases=training.phases[:1]), out, say=lambda _: None)
        before = (out / "latest").resolve()
        kept = {path.name: path.read_bytes() for path in before.iterdir()}
        (out / "training.json").unlink()
        fill(disk, 12_000)
        with pytest.raises(InputError, match=r"the disk of .* is full"):
            train(training, out, say=lambda _: None)
        assert (out / "latest").resolve() == before
        assert {path.name: path.read_bytes() for path in before.iterdir()} == kept
        assert not (out / ".step").exists()


def test_the_last_two_checkpoints_stay(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "file").write_text("whole")

    for sample in (10, 20, 30):
        there = checkpoint(tmp_path, sample, write)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000000000020", "step-000000000030"]
    assert (tmp_path / "latest").resolve() == there

    def fails(folder: Path) -> None:
        write(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="is full"):
        checkpoint(tmp_path, 40, fails)
    assert (tmp_path / "latest").resolve() == there


def test_a_model_is_pushed_as_a_version(
    demo_run: Path,
    tmp_path: Path,
    server: Server,  # noqa: F811
) -> None:
    """Whole, tagged, never changed; and what is loaded from there is the model."""
    there = train(a_training(demo_run), tmp_path / "out", say=lambda _: None)
    words = "demo", f"folder={tmp_path}/worlds", "scenes=20", "--out"
    recap_here("eval", there, *words, tmp_path / "ours.json")
    recap_here("eval", CLIP, *words, tmp_path / "theirs.json")
    ours = results.read(tmp_path / "ours.json")
    for target in (str(tmp_path / "models"), "hf://me/a-clip"):
        assert push_model(there, target, "1.0.0", results=ours, dry_run=True).plan["files"] > 3
        assert push_model(there, target, "1.0.0", results=ours).new
        assert not push_model(there, target, "1.0.0", results=ours).new
    with pytest.raises(InputError, match=r"was asked of .*, not of the weights in"):
        push_model(there, "hf://me/other", "1.0.0", results=results.read(tmp_path / "theirs.json"))
    folder = tmp_path / "models" / "v1.0.0"
    assert "| world, by descriptions | " in (folder / "README.md").read_text()
    open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert "sample 192" not in (folder / "README.md").read_text()
    assert not (folder / MOMENTS).exists()
    for file in ("README.md", clip.CONFIG):  # it is read elsewhere
        assert str(tmp_path) not in (folder / file).read_text()
        assert str(ROOT) not in (folder / file).read_text()
    pulled = Path(snapshot_download("me/a-clip", revision="v1.0.0", cache_dir=tmp_path / "cache"))
    assert (pulled / clip.WEIGHTS).read_bytes() == (there / clip.WEIGHTS).read_bytes()
    (there / "README.md").write_text("another card")
    with pytest.raises(VersionError, match="with other bytes"):
        push_model(there, "hf://me/a-clip", "1.0.0")
    with pytest.raises(InputError, match="is no version"):
        push_model(there, str(tmp_path / "models"), "one")
    with pytest.raises(InputError, match=r"is no target"):
        push_model(there, "s3://bucket", "1.0.0")


# --- what it would take -------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", [0, 2])
def test_operations_are_those_that_torch_counts(decoder: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    towers = replace(TINY, decoder_layers=decoder, decoder_context=40)
    model = a_model(towers, 64)
    captions = torch.randint(1, 900, (2, 40)) if decoder else None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        sum(
            part.sum() for part in model(torch.randn(2, 3, 64, 64), torch.ones(2, 48).long(), captions)
        ).backward()
    assert counter.get_total_flops() / 2 == pytest.approx(3 * forward_flops(towers, 64), rel=0.05)
    assert parameters(towers, 64) == sum(p.numel() for p in model.parameters())


def test_a_plan_of_the_papers_training() -> None:
    """ViT-L/16: by hand, 12 width^2 a token and block, twice, three times for both ways."""
    training = trainings.recap_clip(version="v", images="i", tokenizer=str(CLIP), vision="L", text="L")
    told = plan(training, tflops=1000, utilisation=0.5, price=2.0)
    image, text = 24 * 24 * 1024**2, 12 * 24 * 768**2
    by_hand = 3 * 2.56e9 * ((49 + 1) * image + 128 * text)
    assert told.lines[0].flops == pytest.approx(by_hand, rel=0.1)
    assert told.lines[0].steps == 78_125
    assert told.gpu_hours == pytest.approx(sum(line.flops for line in told.lines) / 0.5e15 / 3600)
    assert told.cost == pytest.approx(2 * told.gpu_hours)
    said = recap_here(
        "plan", "clip:recap_clip", "version=v", "images=i", f"tokenizer={CLIP}", "vision=L"
    ).stdout
    assert "78,125 steps" in said
    with pytest.raises(InputError, match="is no share"):
        plan(training, tflops=1000, utilisation=2)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"phases": (Phase(px=16, samples=64, warmup=0, batch=31, lr=1e-4),), "captioning": 2.0},
            "go together",
        ),
        ({"min_found": 2.0}, "has not the images"),
        ({"version": "/nowhere"}, "has no version"),
        ({"images": "/nowhere"}, "is no folder"),
        ({"start": str(CLIP)}, "of another shape"),
        ({"start": "/nowhere"}, "is missing"),
    ],
)
def test_what_cannot_be_is_told(demo_run: Path, tmp_path: Path, wrong: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        train(a_training(demo_run, **wrong), tmp_path / "out", say=lambda _: None)


def test_a_gradient_that_is_no_number_is_seen(
    demo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is one, and the weights would be none."""
    monkeypatch.setattr("recipes.training.norm_of_gradient", lambda _: float("inf"))
    with pytest.raises(InputError, match="the loss or its gradient is inf"):
        train(a_training(demo_run), tmp_path / "out", say=lambda _: None)
    assert not list((tmp_path / "out").glob("step-*"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": -1}, {"save_every": 0}, {"workers": -1}, {"micro": 0}, {"area": 0.0}, {"phases": ()},
        {"min_found": float("nan")}, {"min_found": -0.1},
    ],
)  # fmt: skip
def test_settings_that_cannot_be(demo_run: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        a_training(demo_run, **wrong)


def test_other_data_is_not_trained_on(demo_run: Path, tmp_path: Path) -> None:
    """`latest` is another version now: the training that went on would be of neither."""
    copied = shutil.copytree(demo_run.with_name("demo-published"), tmp_path / "target", symlinks=True)
    training = a_training(demo_run, version=str(copied / "latest"))
    train(replace(training, phases=training.phases[:1]), tmp_path / "out", say=lambda _: None)
    before = Model(str(tmp_path / "out" / "latest")).trained_on
    out, told = tmp_path / "out", json.loads((tmp_path / "out" / "training.json").read_text())
    told["phases"] = asdict(training)["phases"]
    (out / "training.json").write_text(json.dumps(told))
    shutil.copytree(copied / "v0.1.0", copied / "v0.2.0")
    manifest = copied / "v0.2.0" / "manifest.json"
    about = json.loads(manifest.read_text())
    manifest.chmod(0o644)
    manifest.write_text(json.dumps(about | {"version": "0.2.0"}))
    (copied / "latest").unlink()
    (copied / "latest").symlink_to("v0.2.0")
    join, data = (out / "joined" / "join.json").read_bytes(), (out / "data.json").read_bytes()
    with pytest.raises(
        InputError, match=r"was trained on other data: version was demo 0\.1\.0, and is demo 0\.2\.0"
    ):
        train(training, out, say=lambda _: None)
    assert (out / "joined" / "join.json").read_bytes() == join
    assert (out / "data.json").read_bytes() == data
    assert Model(str(out / "latest")).trained_on == before
    numbered = replace(training, version=str(copied / "v0.1.0"))  # what the hint says
    assert train(numbered, out, say=lambda _: None).name == "step-000000000192"
    assert json.loads((out / "training.json").read_text())["version"] == numbered.version


def test_what_is_cut_or_no_picture_is_told(demo_run: Path, tmp_path: Path, every_step: None) -> None:
    """In the log, of what was seen since a phase began or went on."""
    short = a_training(demo_run, towers=replace(TINY, context=8), mix=Mix(), workers=0)
    train(replace(short, phases=short.phases[:1]), tmp_path / "out", say=lambda _: None)
    told = json.loads((tmp_path / "out" / "training.json").read_text())
    (tmp_path / "out" / "training.json").write_text(
        json.dumps(told | {"phases": asdict(short)["phases"]}, indent=2)
    )
    path = tmp_path / "out" / "joined" / "00000.parquet"
    table = pq.read_table(path)
    nothing = pa.array([0] * len(table), pa.int64())
    pq.write_table(table.set_column(table.column_names.index("bytes"), "bytes", nothing), path)
    train(short, tmp_path / "out", say=lambda _: None)
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    joined = read(tmp_path / "out" / "joined")
    assert joined
    shards = [Order(joined.rows, 0).at(n)[1] for n in range(128, 192)]
    assert [line["undecodable"] for line in lines] == [0, 0, 0, 0, shards[:32].count(0), shards.count(0)]
    assert {line["cut_percent"] for line in lines} == {100.0}


def test_the_command_line_trains(demo_run: Path, tmp_path: Path) -> None:
    """By a training's name, and by the settings that lie in its folder."""
    out = tmp_path / "out"
    settings = [f"version={published_in(demo_run)}", f"images={demo_run}", "samples=64", "batch=32"]
    said = recap_here("train", "clip", "demo", *settings, "vision=P", "text=P", "--out", out).stdout
    assert f"{out}/step-000000000064" in said
    told = recap_here("train", "clip", out / "training.json", "--out", tmp_path / "again", "--json").stdout
    assert json.loads(told)["model"].endswith("step-000000000064")
    assert "has no parameter 'sample'" in recap_here("train", "clip", "demo", "sample=3", check=2).stderr


def test_a_version_on_the_hub_is_trained_on(
    demo_run: Path,
    tmp_path: Path,
    server: Server,  # noqa: F811
) -> None:
    """At its version; what was published in a folder is the same data, and it goes on there."""
    run = shutil.copytree(demo_run, tmp_path / "run")
    recap_here("publish", run, "hf://datasets/me/demo", "--version", "0.1.0")
    training = a_training(demo_run, version="hf://datasets/me/demo@v0.1.0")
    assert train(training, tmp_path / "out", say=lambda _: None).name == "step-000000000192"
    of_hub, of_folder = read(tmp_path / "out" / "joined"), tmp_path / "folder"
    train(a_training(demo_run), of_folder, say=lambda _: None)
    theirs = read(of_folder / "joined")
    assert of_hub
    assert theirs
    assert (of_hub.order, of_hub.rows, of_hub.audit) == (theirs.order, theirs.rows, theirs.audit)
    ours = (tmp_path / "out" / "latest" / clip.WEIGHTS).read_bytes()
    assert ours == (of_folder / "latest" / clip.WEIGHTS).read_bytes()


@pytest.mark.slow
def test_a_compiled_training_is_that_of_the_plain_model(
    demo_run: Path, tmp_path: Path, every_step: None
) -> None:
    training = a_training(demo_run)
    for compiled in (False, True):
        train(replace(training, compile=compiled), tmp_path / str(compiled), say=lambda _: None)
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-4)


@pytest.mark.slow
def test_the_benchmark_measures_something() -> None:
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import common, json; "
        "common.keep = lambda name, found: print(json.dumps(found)); import clip_train; "
        "sys.argv = ['clip_train', '--turns', '1', '--steps', '8', '--batch', '8']; clip_train.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert '"ratio' in done.stdout


def test_what_a_worker_refuses_is_told_as_it_is(demo_run: Path, tmp_path: Path) -> None:
    """Of a loader's process, too: what is wrong, and the hint."""
    training = a_training(demo_run, workers=1)
    train(replace(training, phases=training.phases[:1]), tmp_path / "out", say=lambda _: None)
    (tmp_path / "out" / "training.json").unlink()
    for path in (tmp_path / "out" / "joined").glob("[0-9]*.parquet"):
        table = pq.read_table(path)
        places = pa.array(["/nowhere.tar"] * len(table))
        pq.write_table(table.set_column(table.column_names.index("file"), "file", places), path)
    with pytest.raises(InputError) as told:
        train(training, tmp_path / "out", say=lambda _: None)
    assert told.value.message == "/nowhere.tar is gone, which was joined"
    assert "put it back" in told.value.hint


def test_a_phase_has_a_step() -> None:
    for wrong in ({"lr": -1.0}, {"lr": float("nan")}, {"lr": float("inf")}, {"px": 0}, {"warmup": -1}):
        with pytest.raises(InputError, match="is no number of"):
            Phase(**({"px": 16, "samples": 64, "warmup": 0, "batch": 32, "lr": 1e-4} | wrong))  # type: ignore[arg-type]
    for context in (0, -5):
        with pytest.raises(InputError, match="is no number of 1 or more"):
            Towers(tokenizer=str(CLIP), context=context)
    with pytest.raises(InputError, match="a phase of 10 samples has no step of 32"):
        Phase(px=16, samples=10, warmup=0, batch=32, lr=1e-4)
