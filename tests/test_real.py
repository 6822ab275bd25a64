"""Real photos, real alt text and the faults of the real web, from the metadata to a published version."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import httpx2
import psutil
import pyarrow.parquet as pq
import pytest
from conftest import CAPTIONER, CLIP, ROOT, recap, survived

from builder.captions.checks import Defect
from builder.run import Run

ROWS, PORT = 200, 8657


@pytest.fixture(scope="module")
def site(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder, tool, data = tmp_path_factory.mktemp("real"), shared / "tools" / "realweb.py", shared / "data"
    make = [
        sys.executable,
        tool,
        "make",
        data / "flickr8k/images",
        folder,
        "--rows",
        ROWS,
        "--bomb",
        0.01,
        "--port",
        PORT,
    ]
    make += [
        "--captions",
        data / "flickr8k/captions.json",
        "--alt-text",
        data / "alt-text/web_alt_text_10000.parquet",
    ]
    subprocess.run([str(x) for x in make], check=True, capture_output=True)
    server = subprocess.Popen(
        [sys.executable, str(tool), "serve", str(folder), "--port", str(PORT)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", PORT)) == 0:
                    break
            time.sleep(0.05)
        else:
            raise RuntimeError(f"the web of real photos does not answer on port {PORT}")
        if bomb := next(
            (
                uid
                for uid, row in json.loads((folder / "truth.json").read_text()).items()
                if row["fault"] == "bomb"
            ),
            None,
        ):
            httpx2.get(
                f"http://127.0.0.1:{PORT}/bomb/{bomb}.jpg", timeout=60
            )  # it is made on the first request, in longer than a download waits
        yield folder
    finally:
        server.kill()
        server.wait()


def command(site: Path, run: Path, verify: bool) -> list[str]:
    return [
        "build", "recap_datacomp_1b", f"metadata={site}/metadata", f"captioner={CAPTIONER}", f"clip={CLIP}",
        f"verify_sha256={verify}", "rows_per_shard=100", "allow_private=127.0.0.1/32", "download.timeout_s=8",
        # The demo's captioner knows no photos: what it writes of them is full of loops.
        "caption.max_model_len=512", f"caption.tolerated={','.join(Defect)}", "--run", str(run),
    ]  # fmt: skip


def check(shared: Path, site: Path, result: str, *options: str) -> None:
    done = subprocess.run(
        [
            sys.executable,
            str(shared / "tools" / "realweb.py"),
            "check",
            str(site),
            result,
            "--strict",
            *options,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_every_row_agrees_and_memory_stays_low(shared: Path, site: Path, tmp_path: Path) -> None:
    """With verification; the whole line, with bombs of 400 million pixels in it, under 4 GB."""
    build = subprocess.Popen(
        [sys.executable, "-m", "builder.cli", *command(site, tmp_path / "run", True)],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    tree, peak = psutil.Process(build.pid), 0
    while build.poll() is None:
        total = 0
        for process in [tree, *tree.children(recursive=True)]:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        peak = max(peak, total)
        time.sleep(0.1)
    assert build.returncode == 0
    survived(f"{ROWS} real rows: at most {peak / 2**30:.2f} GiB resident in all processes together")
    assert peak < 4 * 2**30
    recap("publish", tmp_path / "run", tmp_path / "out", "--version", "0.1.0")
    check(shared, site, f"{tmp_path}/out/v0.1.0/ledger/*.parquet")
    train = datasets.load_dataset(
        str(tmp_path / "out" / "v0.1.0"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert all(caption for caption in train["re_caption"])
    assert sum("loop" in (defects or "") for defects in train["re_defects"]) > 0.5 * len(train)
    assert len(train) > 0.7 * ROWS


@pytest.mark.slow
def test_every_row_agrees_without_verification(shared: Path, site: Path, tmp_path: Path) -> None:
    """Up to the ledger: which images are placeholders is known when all are there, and said at the end."""
    recap(*command(site, tmp_path / "run", False))
    run = Run.open(tmp_path / "run")
    ledgers = run.files("select", ".ledger.parquet")
    assert sum(pq.read_metadata(run.local(name)).num_rows for name in ledgers) == ROWS
    check(shared, site, f"{tmp_path}/run/select/*/*.ledger.parquet", "--no-verify")
