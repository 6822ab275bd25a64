"""What a training sees: every row with its image, every sample once an epoch, from any point on the same."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, a_version, output_of
from PIL import Image

from builder.errors import InputError
from builder.stages.imagetar import images
from recipes.data import Mix, Order, Pairs, Picture, batches
from recipes.images import images_of
from recipes.join import Joined, join, read

ROW = {
    "uid": "0" * 32,
    "caption": None,
    "org_caption": "alt",
    "re_caption": "One. Two? Three!",
    "short": "few",
}


# --- the join -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def joined(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Joined:
    return join(str(published_in(demo_run)), str(demo_run), tmp_path_factory.mktemp("joined"))


def published_in(demo_run: Path) -> Path:
    return demo_run.with_name("demo-published") / "latest"


def test_every_row_of_a_version_finds_its_image_in_the_run(joined: Joined, demo_run: Path) -> None:
    published = pq.read_table(next(published_in(demo_run).glob("data/train-*"))).to_pylist()
    assert joined.audit.found == joined.audit.rows == len(published) == sum(joined.rows)
    rows = [row for number in range(len(joined.rows)) for row in joined.shard(number).to_pylist()]
    captions = {row["uid"]: (row["sha256"], row["org_caption"], row["re_caption"]) for row in published}
    assert {row["uid"]: (row["sha256"], row["org_caption"], row["re_caption"]) for row in rows} == captions
    keys = {row["key"]: row["uid"] for row in pq.read_table(output_of(demo_run, "download")).to_pylist()}
    there = dict(images(output_of(demo_run, "download", ".tar")))
    of_first = {row["uid"]: row for row in joined.shard(0).to_pylist()}
    for key, image in there.items():
        if row := of_first.get(keys[key]):
            with open(row["file"], "rb") as file:
                file.seek(row["start"])
                assert file.read(row["bytes"]) == image


def test_a_join_is_made_once(joined: Joined, demo_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.join._join", None)
    assert join(str(published_in(demo_run)), str(demo_run), joined.folder) == joined


def picture(colour: int, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), (colour, 0, 0)).save(out, kind)
    return out.getvalue()


@pytest.fixture
def few(tmp_path: Path) -> tuple[Path, list[dict[str, str]]]:
    """A version of 6 rows, of which the last two are behind one image."""
    import hashlib

    rows = [
        {
            "uid": f"{n:032x}",
            "sha256": hashlib.sha256(picture(10 * min(n, 4))).hexdigest(),
            "org_caption": f"alt {n}",
            "re_caption": f"caption {n}",
        }
        for n in range(6)
    ]
    return of_rows(tmp_path / "version", rows), rows


def test_pictures_in_a_folder_are_known_by_what_they_hold(
    few: tuple[Path, list[dict[str, str]]], tmp_path: Path
) -> None:
    version, _ = few
    for n in (4, 0, 2, 9):
        (tmp_path / "photos" / "some").mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / "some" / f"{n} [x].jpg").write_bytes(picture(10 * n))
    with pytest.raises(
        InputError, match=r"4 of 6 rows found their image \(66.7 %\); 2 did not; 1 of 4 images"
    ):
        join(str(version), str(tmp_path / "photos"), tmp_path / "joined")
    found = join(str(version), str(tmp_path / "photos"), tmp_path / "joined", min_found=0.5)
    assert [row["re_caption"] for row in found.shard(0).to_pylist()] == [f"caption {n}" for n in (0, 2, 4, 5)]


@pytest.mark.parametrize("with_uid", [True, False])
def test_what_img2dataset_wrote_is_joined(
    few: tuple[Path, list[dict[str, str]]], tmp_path: Path, with_uid: bool
) -> None:
    version, rows = few
    (tmp_path / "images").mkdir()
    for shard in range(2):
        about = []
        with tarfile.open(tmp_path / "images" / f"{shard:05d}.tar", "w") as tar:
            for n in range(3 * shard, 3 * shard + 3):
                for kind, data in (("jpg", picture(10 * min(n, 4))), ("txt", b"alt")):
                    member = tarfile.TarInfo(f"{n:09d}.{kind}")
                    member.size, member.mtime = len(data), 1.5  # a pax header
                    tar.addfile(member, io.BytesIO(data))
                about.append(
                    {"key": f"{n:09d}", "sha256": rows[n]["sha256"]}
                    | ({"uid": rows[n]["uid"]} if with_uid else {})
                )
        pq.write_table(pa.Table.from_pylist(about), tmp_path / "images" / f"{shard:05d}.parquet")
    found = join(str(version), str(tmp_path / "images"), tmp_path / "joined")
    assert found.rows == (3, 3)
    assert [row["uid"] for n in range(2) for row in found.shard(n).to_pylist()] == [
        row["uid"] for row in rows
    ]
    for row in found.shard(1).to_pylist():
        with open(row["file"], "rb") as file:
            file.seek(row["start"])
            assert file.read(row["bytes"]) == picture(10 * min(int(row["uid"], 16), 4))


def test_what_img2dataset_wrote_as_parquet_is_joined(
    few: tuple[Path, list[dict[str, str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own writer: what could not be downloaded is a row without a picture."""
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")
    from img2dataset.writer import ParquetSampleWriter

    version, rows = few
    (tmp_path / "images").mkdir()
    schema = pa.schema([("key", pa.string()), ("sha256", pa.string()), ("uid", pa.string())])
    for shard in range(2):
        writer = ParquetSampleWriter(shard, str(tmp_path / "images"), False, 5, schema, "jpg")
        for n in range(3 * shard, 3 * shard + 3):
            about = {"sha256": rows[n]["sha256"], "uid": rows[n]["uid"]}
            writer.write(picture(10 * min(n, 4)), f"{n:09d}", None, about)
        writer.write(None, "9", None, {"sha256": None, "uid": "f" * 32})
        writer.close()
    found = join(str(version), str(tmp_path / "images"), tmp_path / "joined")
    assert found.rows == (3, 3)
    assert found.audit.images == 6
    for row in found.shard(1).to_pylist():
        with open(row["file"], "rb") as file:
            file.seek(row["start"])
            assert file.read(row["bytes"]) == picture(10 * min(int(row["uid"], 16), 4))
    assert join(str(version), str(tmp_path / "images"), tmp_path / "joined").rows == (3, 3)


def test_a_share_of_the_samples_has_no_text() -> None:
    mix = Mix(drop=0.1)
    texts = [mix.text(ROW | {"uid": f"{n:032x}"}, 0, 0) for n in range(4000)]
    assert 0.08 < texts.count("") / 4000 < 0.12
    assert set(texts) == {"", ROW["re_caption"]}
    with pytest.raises(InputError, match="drop=2 is no probability"):
        Mix(drop=2)


def test_the_square_in_the_middle_is_taken() -> None:
    image = Image.new("RGB", (60, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    pixels = Picture(10, centre=True).of(buffer.getvalue(), ())
    inside = pixels[:, 1:9]  # a filter looks over the edge
    assert inside.tolist() == [[[0, 0, 255]] * 8] * 10


def test_a_jpeg_is_read_as_small_as_its_crop_allows() -> None:
    """And shows the same: of a picture whose places differ, crop by crop; where it cannot, the same bits."""
    wave = np.sin(np.arange(361) / 30)
    image = Image.fromarray(
        (128 + 60 * wave[:241, None, None] + 60 * wave[None, :, None] * [1, -1, 0]).astype(np.uint8)
    )
    kinds = {}
    for kind in ("JPEG", "PNG"):
        buffer = io.BytesIO()
        image.save(buffer, kind)
        kinds[kind] = buffer.getvalue()
    for n in range(20):
        whole, small = (Picture(24, 0.4, draft=draft).of(kinds["JPEG"], (n,)) for draft in (False, True))
        assert 0 < np.abs(whole.astype(int) - small).max() <= 4
        other = Picture(24, 0.4).of(kinds["JPEG"], (n + 1,))
        assert np.abs(whole.astype(int) - other).max() > 4
    for kind, px in (("PNG", 24), ("JPEG", 200)):
        whole, small = (Picture(px, draft=draft).of(kinds[kind], ()) for draft in (False, True))
        assert (whole == small).all()
    for px, size in ((24, (46, 31)), (40, (91, 61)), (60, (91, 61)), (61, (181, 121)), (121, (361, 241))):
        opened = Image.open(io.BytesIO(kinds["JPEG"]))
        box = Picture(px, draft=True)._smaller(opened, (0, 0, 361, 241))
        assert opened.size == size
        assert box[2] == 361 / round(361 / size[0])


def test_a_subset_says_which_rows_and_with_which_caption(
    few: tuple[Path, list[dict[str, str]]], tmp_path: Path
) -> None:
    version, rows = few
    (tmp_path / "photos").mkdir()
    for n in range(5):
        (tmp_path / "photos" / f"{n}.jpg").write_bytes(picture(10 * n))
    uids = np.array([(int(r["uid"][:16], 16), int(r["uid"][16:], 16)) for r in rows[1:3]], np.dtype("u8,u8"))
    np.save(tmp_path / "subset.npy", uids)
    found = join(str(version), str(tmp_path / "photos"), tmp_path / "a", subset=tmp_path / "subset.npy")
    assert [row["re_caption"] for row in found.shard(0).to_pylist()] == ["caption 1", "caption 2"]
    wanted = [
        (rows[1]["uid"], "org_caption"),
        (rows[1]["uid"], "re_caption"),
        (rows[3]["uid"], "org_caption+re_caption"),
    ]
    pq.write_table(pa.table(list(zip(*wanted, strict=True)), ["uid", "caption"]), tmp_path / "subset.parquet")
    found = join(str(version), str(tmp_path / "photos"), tmp_path / "b", subset=tmp_path / "subset.parquet")
    texts = [Mix(p_original=0.5).text(row, 0, 0) for row in found.shard(0).to_pylist()]
    assert texts == ["alt 1", "caption 1", "alt 3, caption 3"]


@pytest.mark.parametrize("with_uid", [True, False])
def test_a_row_comes_once_however_often_it_is_named(
    few: tuple[Path, list[dict[str, str]]], tmp_path: Path, with_uid: bool
) -> None:
    """Its image in two tars, of which one may not know its uid, its uid twice in a subset; and uids that the
    version has not are told.
    """
    version, rows = few
    tars_of(tmp_path / "images", rows)
    tars_of(tmp_path / "images", rows, first=1, with_uid=with_uid)
    found = join(str(version), str(tmp_path / "images"), tmp_path / "joined")
    assert (found.audit.found, found.audit.rows, sum(found.rows), found.audit.images) == (6, 6, 6, 12)
    named = [(rows[n]["uid"], "re_caption") for n in (1, 1, 2)] + [("f" * 32, "re_caption")]
    subset = tmp_path / "subset.parquet"
    pq.write_table(pa.table(list(zip(*named, strict=True)), ["uid", "caption"]), subset)
    with pytest.raises(InputError, match=r"2 of 3 rows found .* 1 of them are not in the version"):
        join(str(version), str(tmp_path / "images"), tmp_path / "some", subset=subset)
    some = join(str(version), str(tmp_path / "images"), tmp_path / "some", subset=subset, min_found=0.5)
    assert [row["uid"] for row in some.shard(0).to_pylist()] == [rows[n]["uid"] for n in (1, 2)]


def tars_of(folder: Path, rows: list[dict[str, str]], first: int = 0, with_uid: bool = True) -> None:
    """As img2dataset writes them: a tar, and a table beside it."""
    folder.mkdir(exist_ok=True)
    about = []
    with tarfile.open(folder / f"{first:05d}.tar", "w") as tar:
        for n, row in enumerate(rows):
            data = picture(10 * min(int(row["uid"], 16), 4))
            member = tarfile.TarInfo(f"{n:09d}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            about.append(
                {"key": f"{n:09d}", "sha256": row["sha256"]} | ({"uid": row["uid"]} if with_uid else {})
            )
    pq.write_table(pa.Table.from_pylist(about), folder / f"{first:05d}.parquet")


def test_the_order_of_what_is_joined_is_part_of_what_it_is(
    few: tuple[Path, list[dict[str, str]]], tmp_path: Path
) -> None:
    version, rows = few
    tars_of(tmp_path / "a", rows)
    tars_of(tmp_path / "b", rows[::-1])
    ours, theirs = (join(str(version), str(tmp_path / n), tmp_path / f"{n}-joined") for n in ("a", "b"))
    differ = {name for name, value in ours.about().items() if theirs.about()[name] != value}
    assert differ == {"order"}


def test_a_join_that_is_refused_takes_no_others_place(
    few: tuple[Path, list[dict[str, str]]], tmp_path: Path
) -> None:
    version, rows = few
    tars_of(tmp_path / "a", rows)
    tars_of(tmp_path / "b", rows[:2])
    tars_of(tmp_path / "c", rows[::-1])

    def refuse(joined: Joined) -> None:
        raise InputError(f"other data: {joined.order}", "none")

    ours = join(str(version), str(tmp_path / "a"), tmp_path / "joined")
    with pytest.raises(InputError, match="2 of 6 rows found their image"):
        join(str(version), str(tmp_path / "b"), tmp_path / "joined")
    for name in ("a", "c"):  # by whoever trains
        with pytest.raises(InputError, match="other data"):
            join(str(version), str(tmp_path / name), tmp_path / "joined", accept=refuse)
    assert read(tmp_path / "joined") == ours
    assert len(ours.shard(0)) == 6
    assert [path.name for path in tmp_path.glob("joined*")] == ["joined"]


def test_a_row_without_any_text_teaches_nothing_and_is_counted(joined: Joined, tmp_path: Path) -> None:
    table = joined.shard(0)
    for name in ("org_caption", "re_caption"):
        texts = [None, " ", *table[name].to_pylist()[2:]]
        table = table.set_column(table.column_names.index(name), name, pa.array(texts, pa.string()))
    pq.write_table(table, tmp_path / "00000.parquet")
    less = Joined(tmp_path, joined.rows[:1], joined.captions, joined.audit, joined.of)
    seen = list(batches(a_dataset(less, 1), start=0, samples=joined.rows[0], workers=0))
    without = {batch.uids[0] for batch in seen if batch.textless}
    assert without == set(table["uid"].to_pylist()[:2])
    assert all(bool(batch.ok[0]) == (not batch.textless) for batch in seen)


def test_what_cannot_be_joined_is_told_in_one_line(
    few: tuple[Path, list[dict[str, str]]], tmp_path: Path
) -> None:
    version, _ = few
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match="has neither tars nor tables of pictures nor pictures"):
        list(images_of(str(tmp_path / "photos"), tmp_path))
    (tmp_path / "photos" / "a.jpg").write_bytes(picture(0))
    with pytest.raises(InputError, match=r"no captions 'no_such'\n.*re_caption, org_caption"):
        join(str(version), str(tmp_path / "photos"), tmp_path / "joined", captions=("no_such",))
    np.save(tmp_path / "none.npy", np.array([(7, 7)], np.dtype("u8,u8")))
    with pytest.raises(InputError, match=r"none.npy names no row of the version"):
        join(str(version), str(tmp_path / "photos"), tmp_path / "joined", subset=tmp_path / "none.npy")
    with pytest.raises(InputError, match=r"1 of 6 rows"):
        join(str(version), str(tmp_path / "photos"), tmp_path / "joined")


def test_a_column_that_is_drawn_from_has_a_text_somewhere(
    few: tuple[Path, list[dict[str, str]]], tmp_path: Path
) -> None:
    """White alone is none; one that is only taken where others have none may be empty, as is one of a subset
    that says what it wants.
    """
    _, rows = few
    tars_of(tmp_path / "images", rows)
    version = of_rows(tmp_path / "a", [row | {"re_caption": " \t\u3000"} for row in rows])
    where = str(version), str(tmp_path / "images"), tmp_path / "joined"
    with pytest.raises(InputError, match="the captions 're_caption' are empty in every row"):
        join(*where)
    with pytest.raises(InputError, match="'re_caption' are empty"):
        join(*where, filled=Mix(p_original=0.9).drawn_from())
    assert join(*where, filled=Mix(p_original=1).drawn_from()).audit.found == 6
    version = of_rows(tmp_path / "b", [row | {"org_caption": None} for row in rows])
    where = str(version), str(tmp_path / "images"), tmp_path / "joined"
    with pytest.raises(InputError, match="'org_caption' are empty"):
        join(*where, filled=Mix(p_original=0.1).drawn_from())
    with pytest.raises(InputError, match="'org_caption' are empty"):
        join(*where, filled=Mix(concat=True).drawn_from())
    found = join(*where, filled=Mix().drawn_from())
    assert [Mix().text(row, 0, 0) for row in found.shard(0).to_pylist()] == [f"caption {n}" for n in range(6)]
    subset = tmp_path / "subset.parquet"
    pq.write_table(pa.table([[rows[1]["uid"]], ["re_caption"]], ["uid", "caption"]), subset)
    assert join(*where, subset=subset, filled=Mix(p_original=1).drawn_from()).audit.found == 1
    version = of_rows(
        tmp_path / "c", [row | {"re_caption": None} if n else row for n, row in enumerate(rows)]
    )
    where = str(version), str(tmp_path / "images"), tmp_path / "joined"
    named = [(rows[0]["uid"], "re_caption"), (rows[1]["uid"], None)]  # and the second falls back
    pq.write_table(pa.table(list(zip(*named, strict=True)), ["uid", "caption"]), subset)
    assert join(*where, subset=subset, filled=Mix().drawn_from()).audit.found == 2


def of_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    count = len(rows)
    ledger = {"uid": [r["uid"] for r in rows], "url": ["http://h/"] * count, "status": ["ok"] * count}
    return a_version(folder, pa.Table.from_pylist(rows), pa.table(ledger | {"error": [""] * count}))


def test_a_row_that_found_its_image_has_no_other(
    few: tuple[Path, list[dict[str, str]]], tmp_path: Path
) -> None:
    """Whatever else is known by its uid."""
    version, rows = few
    tars_of(tmp_path / "images", rows)
    tars_of(tmp_path / "images", [row | {"sha256": f"{n:064x}"} for n, row in enumerate(rows)], first=1)
    assert join(str(version), str(tmp_path / "images"), tmp_path / "joined").audit.other_image == 0
    tars_of(tmp_path / "images", rows[:4])
    found = join(str(version), str(tmp_path / "images"), tmp_path / "joined", min_found=0.5)
    assert (found.audit.found, found.audit.other_image) == (4, 2)


# --- which text ---------------------------------------------------------------------------------------------


def test_shares_of_captions_are_those_that_were_asked_for() -> None:
    mix = Mix({"re_caption": 3.0, "short": 1.0}, p_original=0.2)
    found = Counter(mix.text(ROW | {"uid": f"{n:032x}"}, 7, 0) for n in range(20_000))
    shares = {text: number / 20_000 for text, number in found.items()}
    assert shares == pytest.approx({"alt": 0.2, "One. Two? Three!": 0.6, "few": 0.2}, abs=0.011)  # 4 sigma


def test_a_text_is_a_function_of_seed_epoch_and_uid() -> None:
    mix = Mix(p_original=0.5)
    first = [mix.text(ROW | {"uid": f"{n:032x}"}, 7, 3) for n in range(200)]
    code = (
        "from recipes.data import Mix; mix = Mix(p_original=0.5); "
        f"print([mix.text({ROW!r} | {{'uid': f'{{n:032x}}'}}, 7, 3) for n in range(200)])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr(first)
    assert first != [mix.text(ROW | {"uid": f"{n:032x}"}, 7, 4) for n in range(200)]
    assert first != [mix.text(ROW | {"uid": f"{n:032x}"}, 8, 3) for n in range(200)]


@pytest.mark.parametrize(
    ("mix", "row", "texts"),
    [
        (Mix(), {}, {"One. Two? Three!"}),
        (Mix(p_original=1.0), {}, {"alt"}),
        (Mix(concat=True), {}, {"alt, One. Two? Three!"}),
        (Mix(concat=True), {"org_caption": None}, {"One. Two? Three!"}),
        (Mix(one_sentence=True), {}, {"One.", "Two?", "Three!"}),
        (Mix(), {"re_caption": None}, {"alt"}),
        (Mix(), {"re_caption": "  "}, {"alt"}),
        (Mix(p_original=1.0), {"org_caption": ""}, {"One. Two? Three!"}),
        (Mix({"short": 1.0, "re_caption": 0.0}), {"short": None}, {"One. Two? Three!"}),
        (Mix(), {"re_caption": None, "org_caption": None}, {""}),
        (Mix(), {"caption": "org_caption"}, {"alt"}),
        (Mix(p_original=1.0), {"caption": "org_caption+re_caption"}, {"alt, One. Two? Three!"}),
    ],
)  # fmt: skip
def test_which_text(mix: Mix, row: dict[str, object], texts: set[str]) -> None:
    assert {mix.text(ROW | row, seed, 0) for seed in range(60)} == texts


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"p_original": 1.1}, "p_original=1.1 is no probability"),
        ({"p_original": float("nan")}, "is no probability"),
        ({"captions": {"re_caption": 0.0}}, "weights are re_caption=0"),
        ({"captions": {}}, "weights are none"),
        ({"captions": {"re_caption": -1.0}}, "weights are re_caption=-1"),
    ],
)
def test_a_mix_that_is_none_is_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Mix(**given)  # type: ignore[arg-type]


# --- in which order, and from where -------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [[5], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [0, 7, 0, 2]])
def test_every_sample_comes_once_an_epoch(rows: list[int]) -> None:
    order, total = Order(rows, seed=3, pool=3), sum(rows)
    every = {(shard, row) for shard, size in enumerate(rows) for row in range(size)}
    epochs = [[order.at(epoch * total + n) for n in range(total)] for epoch in range(3)]
    for number, epoch in enumerate(epochs):
        assert {first for first, _, _ in epoch} == {number}
        assert {(shard, row) for _, shard, row in epoch} == every
    if total > 10:
        assert epochs[0] != [(0, *rest) for _, *rest in epochs[1]]
        assert [order.at(n) for n in reversed(range(total))] == epochs[0][::-1]


def a_dataset(joined: Joined, batch: int, seed: int = 5) -> Pairs:
    return Pairs(joined, Mix(p_original=0.5), Picture(32, area=0.4), tokens, seed=seed, batch=batch)


def tokens(texts: list[str]) -> tuple[torch.Tensor, int]:
    return torch.tensor([[len(text), sum(map(ord, text))] for text in texts]), 0


def samples(found: Iterable[object]) -> list[tuple[str, str, str]]:
    return [
        (uid, batch.texts[n].numpy().tobytes().hex(), batch.images[n].numpy().tobytes().hex())  # type: ignore[attr-defined]
        for batch in found
        for n, uid in enumerate(batch.uids)  # type: ignore[attr-defined]
    ]


def test_the_samples_are_the_same_for_any_workers_ranks_batches_and_from_any_point(joined: Joined) -> None:
    """More than an epoch, so that a step lies in two."""
    total = 2 * (sum(joined.rows) // 48 + 1) * 24
    whole = samples(list(batches(a_dataset(joined, 24), start=0, samples=total, workers=0)))
    assert len(whole) == total
    for workers in (1, 2):
        assert samples(batches(a_dataset(joined, 12), start=0, samples=total, workers=workers)) == whole
    assert samples(list(batches(a_dataset(joined, 8), start=72, samples=total, workers=0))) == whole[72:]
    ranks = [
        list(batches(a_dataset(joined, 12), start=0, samples=total, workers=0, rank=rank, ranks=2))
        for rank in range(2)
    ]
    assert samples([batch for step in zip(*ranks, strict=True) for batch in step]) == whole
    uids = [uid for uid, _, _ in whole]
    assert len(set(uids[: sum(joined.rows)])) == sum(joined.rows)
    one = replace(joined, rows=joined.rows[:1])  # a shard, and more workers
    uids = [uid for uid, _, _ in samples(batches(a_dataset(one, 1), start=0, samples=one.rows[0], workers=3))]
    assert sorted(uids) == sorted(joined.shard(0)["uid"].to_pylist())


def test_an_image_that_cannot_be_decoded_is_told_and_moves_no_other(joined: Joined, tmp_path: Path) -> None:
    (tmp_path / "no.jpg").write_bytes(b"no picture at all")
    dataset = a_dataset(joined, 8)
    (fine,) = batches(dataset, start=0, samples=8, workers=0)
    _, shard, place = dataset.order.at(3)
    table = joined.shard(shard).to_pylist()
    table[place] |= {"file": str(tmp_path / "no.jpg"), "start": 0, "bytes": 17}
    for number in range(len(joined.rows)):
        changed = pa.Table.from_pylist(table) if number == shard else joined.shard(number)
        pq.write_table(changed, tmp_path / f"{number:05d}.parquet")
    moved = Joined(tmp_path, joined.rows, joined.captions, joined.audit, joined.of)
    (found,) = batches(a_dataset(moved, 8), start=0, samples=8, workers=0)
    assert found.ok.tolist() == [n != 3 for n in range(8)]
    assert found.uids == fine.uids
    assert not found.images[3].any()
    assert torch.equal(found.images[4:], fine.images[4:])


def test_a_file_of_images_that_is_gone_is_no_picture_that_cannot_be_decoded(
    joined: Joined, tmp_path: Path
) -> None:
    table = joined.shard(0)
    gone = pa.array([str(tmp_path / "gone.tar")] * len(table))
    pq.write_table(
        table.set_column(table.column_names.index("file"), "file", gone), tmp_path / "00000.parquet"
    )
    moved = Joined(tmp_path, joined.rows[:1], joined.captions, joined.audit, joined.of)
    with pytest.raises(InputError, match=r"gone\.tar is gone, which was joined"):
        list(batches(a_dataset(moved, 4), start=0, samples=4, workers=0))
