"""A small web of the procedural world, with DataComp-shaped metadata and the faults of the real one.

    python -m recipes.demo.web runs/demo-web --rows 2000  # writes missing metadata, serves until Ctrl-C

Every picture is drawn when it is asked for. `truth.json` says for each uid which fault was planted.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from builder.errors import InputError
from recipes.demo import world

PX = 256
HOST, PORT = "127.0.0.1", 8642
FAULTS = {  # share of rows -> what the server does
    "ok": 0.77,
    "gone": 0.08,  # 404
    "placeholder": 0.05,  # one "image not available" picture for many URLs
    "changed": 0.03,  # another picture than the one that was hashed
    "html": 0.015,  # 200 text/html under a .jpg name
    "truncated": 0.01,  # bytes cut off
    "empty": 0.005,  # zero bytes
    "slow": 0.005,  # headers, then nothing
    "flaky": 0.02,  # 503 on the first request, right on the second
    "redirect": 0.01,  # 302 to the picture
    "private": 0.005,  # 302 to a private host: never to be connected to
    "noai": 0.01,  # X-Robots-Tag: noai
    "bomb": 0.001,  # 400 million pixels in 50 kB
}


def make(folder: Path, *, rows: int = 2000, seed: int = 0, port: int = PORT, num_files: int = 2) -> None:
    """Write `metadata/<32 hex>.parquet` with DataComp's columns, and `truth.json`.

    The same arguments write the same bytes.
    """
    rng = random.Random(seed)
    table, truth = [], {}
    for n in range(rows):
        uid = hashlib.md5(f"{seed}/{n}".encode()).hexdigest()
        scene = world.scene(world.HELD_OUT + seed * 10_000_000 + n)
        fault = rng.choices(list(FAULTS), list(FAULTS.values()))[0]
        table.append(
            {
                "uid": uid,
                "url": f"http://{HOST}:{port}/{fault}/{uid}.jpg",
                "text": world.alt_text(scene, rng),
                "original_width": PX,
                "original_height": PX,
                "clip_b32_similarity_score": 0.15 + 0.2 * rng.random(),
                "clip_l14_similarity_score": 0.12 + 0.2 * rng.random(),
                "face_bboxes": [],
                "sha256": hashlib.sha256(world.jpeg(world.draw(scene, PX))).hexdigest(),
            }
        )
        truth[uid] = {"fault": fault, "scene": scene.seed}
    (folder / "metadata").mkdir(parents=True, exist_ok=True)
    kinds = {
        "original_width": pa.int64(),
        "original_height": pa.int64(),
        "face_bboxes": pa.list_(pa.list_(pa.float64())),
    }
    schema = pa.schema(
        (name, kinds.get(name, pa.float32() if "score" in name else pa.string())) for name in table[0]
    )
    step = -(-rows // num_files)
    for k in range(0, rows, step):
        name = hashlib.md5(f"{seed}/file{k}".encode()).hexdigest()
        pq.write_table(
            pa.Table.from_pylist(table[k : k + step], schema=schema), folder / "metadata" / f"{name}.parquet"
        )
    (folder / "truth.json").write_text(json.dumps(truth))


@contextmanager
def serve(folder: Path, port: int = PORT, gone: Collection[str] = ()) -> Iterator[Counter[str]]:
    """Answer the URLs of `make` until the block ends, but for the uids in `gone`; gives the requests by path.

    Raises:
        InputError: the port is taken.
    """
    truth = json.loads((folder / "truth.json").read_text())
    uids, seen = list(truth), Counter[str]()
    stop = threading.Event()

    class Handler(_Handler):
        def do_GET(self) -> None:
            seen[self.path] += 1
            match = re.fullmatch(r"/(\w+)/([0-9a-f]{32})\.jpg", self.path)
            if not match or match[2] not in truth or match[2] in gone:
                return self.answer(404)
            fault, uid = match[1], match[2]
            if fault == "changed":
                uid = uids[(uids.index(uid) + 1) % len(uids)]
            self.answer_with(
                fault, world.jpeg(world.draw(world.scene(truth[uid]["scene"]), PX)), seen[self.path], stop
            )

    try:
        server = _Server((HOST, port), Handler)
    except OSError as error:
        raise InputError(
            f"port {port} is taken ({error.strerror})", f"see by what: ss -ltnp 'sport = :{port}'"
        ) from error
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no error of ours; a web server that prints it would hide what is."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def answer(
        self,
        code: int,
        body: bytes = b"",
        kind: str = "image/jpeg",
        length: int | None = None,
        **headers: str,
    ) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def answer_with(self, fault: str, picture: bytes, times: int, stop: threading.Event) -> None:
        if fault == "gone":
            self.answer(404, b"not found", "text/plain")
        elif fault == "placeholder":
            self.answer(200, placeholder(), "image/png")
        elif fault == "html":
            self.answer(200, b"<!doctype html><title>Sorry</title>", "text/html")
        elif fault == "truncated":
            self.answer(200, picture[: len(picture) // 3], length=len(picture))
            self.close_connection = True
        elif fault == "empty":
            self.answer(200)
        elif fault == "slow":
            self.answer(200, length=len(picture))
            stop.wait(30)
            self.close_connection = True
        elif fault == "flaky" and times == 1:
            self.answer(503, b"busy", "text/plain", Retry_After="0")
        elif fault == "redirect":
            self.answer(302, Location=self.path.replace("/redirect/", "/ok/"))
        elif fault == "private":
            self.answer(302, Location="http://127.0.0.2:9/secret")
        elif fault == "bomb":
            self.answer(200, bomb(), "image/png")
        else:
            headers = {"X_Robots_Tag": "noai"} if fault == "noai" else {}
            self.answer(200, picture, "image/jpeg", None, **headers)


@cache
def placeholder() -> bytes:
    image = Image.new("RGB", (320, 240), (230, 230, 230))
    ImageDraw.Draw(image).text((80, 110), "IMAGE NOT AVAILABLE", fill=(120, 120, 120))
    return _png(image)


@cache
def bomb() -> bytes:
    return _png(Image.new("1", (20_000, 20_000)))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--rows", default=2000, show_default=True)
@click.option("--port", default=PORT, show_default=True)
def main(folder: Path, rows: int, port: int) -> None:
    if not (folder / "truth.json").exists():
        make(folder, rows=rows, port=port)
    with serve(folder, port):
        click.echo(f"serving {folder} on http://{HOST}:{port}", err=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            click.echo("stopped", err=True)


if __name__ == "__main__":
    main()
