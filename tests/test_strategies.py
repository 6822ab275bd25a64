"""Selection strategies: what they select follows from the papers' definitions, computed in plain Python."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import recap_here, recap_if_full

from analysis.select import Given, names, select, selecting, uids_near_targets, write
from analysis.views import Parts
from builder.errors import InputError
from builder.places import parts

N = 1000
RNG = random.Random(7)
RAW, NEW = ([k / N for k in RNG.sample(range(N), N)] for _ in range(2))
UIDS = [f"{RNG.getrandbits(128):032x}" for _ in range(N)]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 rows whose cosines are 0, 0.001, ... 0.999 in two orders."""
    path = tmp_path_factory.mktemp("pool") / "rows.parquet"
    texts = [("a dog on the grass" if k % 2 else "ein Hund auf der grünen Wiese") for k in range(N)]
    table = {
        "uid": UIDS, "org_caption": texts, "re_caption": ["a picture of a dog"] * N, "org_clip_score": RAW,
        "re_clip_score": NEW, "clip_b32_similarity_score": pa.array(RAW, pa.float32()),
        "original_width": [300] * N,
        "original_height": [100 if k < 10 else 1000 if k < 20 else 400 for k in range(N)],
    }  # fmt: skip
    pq.write_table(pa.table(table), path)
    return path


def selected(pool: Path | Parts, strategy: str, **given: Any) -> set[tuple[str, str]]:
    found = pool if isinstance(pool, Parts) else parts(pool)
    rows = select(found, strategy.split("+"), Given(**given)).to_pylist()
    assert len(rows) == len({(row["uid"], row["caption"]) for row in rows})
    return {(row["uid"], row["caption"]) for row in rows}


def threshold(values: list[float], fraction: float) -> float:
    """As DataComp computes it: the value at int(n * fraction) in descending order."""
    return sorted(values, reverse=True)[int(len(values) * fraction)]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A word list, and embeddings of four images; the first and third are nearest to a target's centroid."""
    at = tmp_path_factory.mktemp("given")
    (at / "words.txt").write_text("cat\nDog\n")
    embeddings = np.array([[1, 0.1, 0, 0], [0, 1, 0.2, 0], [0, 0, 1, 0], [0.9, 0, 0, 0.8]], np.float16)
    np.savez(at / "e.npz", uid=np.array(UIDS[1:8:2]), embedding=embeddings)
    np.save(at / "c.npy", np.eye(4, dtype=np.float32))
    np.save(at / "t.npy", np.array([[0.9, 0.2, 0, 0], [0, 0, 0.7, 0.1]], np.float32))
    return {
        "words": at / "words.txt",
        "embeddings": at / "e.npz",
        "centroids": at / "c.npy",
        "targets": at / "t.npy",
    }


NEAR = {UIDS[1], UIDS[5], UIDS[7]}


def expected(strategy: str, fraction: float) -> set[tuple[str, str]]:
    """What each strategy selects, in plain Python.

    Nguyen et al., section 4, in words: top x by a caption's own cosine; the rest; the rest that reaches the
        same threshold.
    DataComp, appendix: English captions of enough words on images that are large enough, of one of the words,
        near a target.
    """
    raw, new = threshold(RAW, fraction), threshold(NEW, fraction)
    kept: set[tuple[str, str]] = set()
    for k, (uid, r, s) in enumerate(zip(UIDS, RAW, NEW, strict=True)):
        top_raw, top_new, english, original = r >= raw, s >= new, k % 2 == 1, ["org_caption"]
        chosen = {
            "no_filter": original,
            "basic": original * (english and k >= 20),  # the first ten are too small, the next ten too long
            "laion2b": original * bool(english and np.float32(r) >= np.float32(0.28)),
            "text_based": original * english,
            "image_based": original * (english and uid in NEAR),
            "clip_score": original * top_raw,
            "raw_top": original * top_raw,
            "synthetic_top": ["re_caption"] * top_new,
            "synthetic_on_raw_top": ["re_caption"] * top_raw,
            "synthetic_top_clusters": ["re_caption"] * (top_new and uid in NEAR),
            "raw_top_synthetic_rest": ["org_caption" if top_raw else "re_caption"],
            "raw_top_synthetic_rest_filtered": original if top_raw else ["re_caption"] * (s >= raw),
            "synthetic_top_raw_rest_filtered": ["re_caption"] if top_new else original * (r >= new),
            "concat_top_synthetic_rest": ["org_caption+re_caption"]
            if top_raw
            else ["re_caption"] * (s >= raw),
            "union_top": original * top_raw + ["re_caption"] * top_new,
        }[strategy]
        kept |= {(uid, caption) for caption in chosen}
    return kept


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("strategy", names())
def test_a_strategy_selects_what_the_papers_say(
    pool: Path, given: dict[str, Any], strategy: str, fraction: float
) -> None:
    assert selected(pool, strategy, fraction=fraction, **given) == expected(strategy, fraction)


def test_sizes_follow_from_the_definitions(pool: Path) -> None:
    """Scores are all different, so that the top 30 % of 1,000 are the 301 from the value at index 300 up."""
    assert len(selected(pool, "raw_top", fraction=0.3)) == 301
    assert len(selected(pool, "raw_top_synthetic_rest", fraction=0.3)) == N
    assert len(selected(pool, "union_top", fraction=0.3)) == 602
    assert len(selected(pool, "clip_score", threshold=0.28)) == 720
    assert len(selected(pool, "no_filter")) == N


def test_several_strategies_select_what_all_of_them_do(pool: Path) -> None:
    assert selected(pool, "basic+clip_score", fraction=0.3) == expected("basic", 0.3) & expected(
        "clip_score", 0.3
    )


def test_images_near_a_target_by_their_centroids(given: dict[str, Any]) -> None:
    assert (
        set(uids_near_targets(given["embeddings"], given["centroids"], given["targets"])["uid"].to_pylist())
        == NEAR
    )


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    """The sizes of a version are those of its stored images.

    A filter of the images' own sizes does not take them for those.
    """
    rows = {"uid": UIDS[:1], "org_caption": ["a dog on the grass"], "width": [512], "height": [400]}
    data, ledger = tmp_path / "train.parquet", tmp_path / "ledger.parquet"
    pq.write_table(pa.table(rows), data)
    pq.write_table(pa.table({"uid": UIDS[:1], "url": ["u"], "status": ["ok"], "error": ["-"]}), ledger)
    version = Parts([str(data)], [str(ledger)])
    assert len(selected(data, "basic")) == 1
    with pytest.raises(InputError, match=r"needs a column original_.*a version knows"):
        selected(version, "basic")
    with pytest.raises(InputError, match="raw_top: it needs cosines"):
        selected(version, "raw_top", fraction=0.3)


def test_a_subset_is_datacomps(pool: Path, tmp_path: Path) -> None:
    with selecting(parts(pool), ["union_top"], Given(fraction=0.3)) as con:
        subset, table = write(con, tmp_path)
    uids = np.load(subset)
    assert uids.dtype == np.dtype("u8,u8")
    assert (np.sort(uids) == uids).all()
    assert {f"{high:016x}{low:016x}" for high, low in uids.tolist()} == {
        uid for uid, _ in expected("union_top", 0.3)
    }
    assert pq.read_table(table).num_rows == 602


@pytest.mark.full
def test_the_command_writes_a_subset_that_a_build_takes(pool: Path, tmp_path: Path) -> None:
    done = recap_if_full("select", pool, "raw_top", "fraction=0.3", "--out", tmp_path / "s", "--json")
    assert json.loads(done.stdout)["rows"] == {"org_caption": 301}
    for asked, said in (
        (("raw_top",), "needs a fraction"),
        (("raw_top", "fracton=0.3"), "Unexpected keyword"),
        (("raw_top", "fraction=30"), "no share of the pool"),
        (("text_based", "words=none.txt"), "cannot be read"),
        (("best",), "there is no strategy 'best'"),
    ):
        assert said in recap_here("select", pool, *asked, "--out", tmp_path / "s", check=2).stderr


def test_a_build_takes_only_the_rows_of_a_subset(tmp_path: Path) -> None:
    from builder.core import Recipe
    from builder.run import Run, build
    from builder.stages.source import Source

    rows = [{"uid": uid, "url": f"http://127.0.0.1/{k}", "text": "x"} for k, uid in enumerate(UIDS)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    with duckdb.connect() as con:
        con.register(
            "selected", pa.table({"uid": UIDS[5:300:3], "caption": ["org_caption"] * len(UIDS[5:300:3])})
        )
        write(con, tmp_path)
    recipe = Recipe(
        "subset",
        (
            Source(
                files=str(tmp_path / "metadata.parquet"),
                rows_per_shard=250,
                subset=str(tmp_path / "subset.npy"),
            ),
        ),
    )
    assert build(recipe, tmp_path / "run").failed == {}
    run = Run.open(tmp_path / "run")
    files = [run.local(name) for name in run.files("source")]
    assert len(files) == 4  # shards of the metadata, two of them without a row
    assert [sum(record.rows.values()) for _, record in run.shards("source")] == [82, 17, 0, 0]
    assert [uid for file in files for uid in pq.read_table(file)["uid"].to_pylist()] == UIDS[5:300:3]


def test_a_pool_without_uids_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match="no column uid"):
        select(parts(tmp_path / "t.parquet"), ["no_filter"])
