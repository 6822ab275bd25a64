"""Publishing to the Hub: once, whole, whatever happens. The server is `tests/hub`, the client is real."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import output_of, recap, record_of, survived
from hub.server import Fault
from hub.server import Hub as Server

from builder import tombstones
from builder.errors import InputError, UserError, VersionError
from builder.run import Run
from builder.versions.folder import Folder
from builder.versions.hub import Hub
from builder.versions.publish import stage
from builder.versions.remove import remove
from builder.versions.verify import verify
from builder.versions.version import MANIFEST, Staged


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A Hub of our own, and this process its client, without Xet: every byte goes through the server."""
    with Server(tmp_path / "hub") as hub:
        for name, value in hub.env().items():
            monkeypatch.setenv(name, value)
        for name, constant in constants_of(hub.url, xet=False).items():
            monkeypatch.setattr(huggingface_hub.constants, name, constant)
        yield hub


def constants_of(url: str, *, xet: bool) -> dict[str, Any]:
    """What `huggingface_hub` makes of HF_ENDPOINT and HF_HUB_DISABLE_XET when it is imported."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    return {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_DISABLE_XET": not xet}


@pytest.fixture(scope="session")
def staged(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Staged:
    run = Path(shutil.copytree(demo_run, tmp_path_factory.mktemp("staged") / "run"))
    return stage(Run.open(run), "0.1.0", tombstones.table({}))


def other(staged: Staged, folder: Path, version: str | None = None, **files: bytes) -> Staged:
    """The same version, or another, with other bytes in some files."""
    shutil.copytree(staged.folder, folder, copy_function=os.link)
    manifest = json.loads((folder / MANIFEST).read_text())
    for name, data in files.items():
        path = folder / name
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    manifest["version"] = version or staged.version
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return Staged(folder, manifest["version"], manifest)


def hub(repo: str = "me/demo") -> Hub:
    return Hub(repo, wait_s=0.01)


def assert_published_once(server: Server, staged: Staged, repo: str = "me/demo") -> None:
    """One commit on main beyond the initial one, one tag on it, every byte right."""
    there = server.repo(repo)
    main = there.log("main")
    assert len(main) == 2, [commit.title for commit in main]
    assert [name for name in there.refs if name.startswith("refs/tags/")] == [f"refs/tags/{staged.tag}"]
    assert there.refs[f"refs/tags/{staged.tag}"] == main[0].oid
    assert {
        name: hashlib.sha256(there.read(name, staged.tag)).hexdigest()
        for name in main[0].files
        if name != ".gitattributes"
    } == {name: sha256 for name, (sha256, _) in staged.promised().items()}
    assert [discussion.status for discussion in there.discussions.values()] == ["merged"]


# --- what a user gets ---------------------------------------------------------------------------------------


def test_a_version_is_published_once(server: Server, staged: Staged) -> None:
    first = hub().publish(staged)
    assert_published_once(server, staged)
    assert first.new
    assert first.commit == server.repo("me/demo").refs["refs/tags/v0.1.0"]
    calls, sent = len(server.calls), server.bytes_in
    again = hub().publish(staged)
    assert (again.new, again.commit) == (False, first.commit)
    assert server.bytes_in == sent
    assert {call.method for call in server.calls[calls:] if call.route != "create_repo"} == {"GET"}
    assert_published_once(server, staged)


def test_other_bytes_under_a_version_are_refused(server: Server, staged: Staged, tmp_path: Path) -> None:
    hub().publish(staged)
    with pytest.raises(VersionError, match=r"other bytes; a version never changes\n.*--version 0\.1\.1"):
        hub().publish(other(staged, tmp_path / "other", **{"README.md": b"changed"}))
    assert_published_once(server, staged)


def test_what_did_not_change_is_not_sent_again(server: Server, staged: Staged, tmp_path: Path) -> None:
    """A second version with a new card and another shard: old ones are taken over under their new names."""
    hub().publish(staged)
    sent = server.bytes_in
    data = (staged.folder / "data/train-00000-of-00001.parquet").read_bytes()
    pq.write_table(
        pq.read_table(staged.folder / "data/train-00000-of-00001.parquet").slice(0, 20),
        tmp_path / "more.parquet",
    )
    more = (tmp_path / "more.parquet").read_bytes()
    second = other(
        staged, tmp_path / "second", "0.2.0",
        **{"README.md": b"another card", "data/train-00000-of-00002.parquet": data,
           "data/train-00001-of-00002.parquet": more},
    )  # fmt: skip
    del second.manifest["files"]["data/train-00000-of-00001.parquet"]
    (second.folder / MANIFEST).write_text(json.dumps(second.manifest))
    plan = hub().publish(second, dry_run=True).plan
    assert (plan["files"], plan["commits"]) == (3, 1)
    assert server.bytes_in == sent
    hub().publish(second)
    assert server.bytes_in - sent < len(more) + 3 * (staged.folder / MANIFEST).stat().st_size
    there = server.repo("me/demo")
    assert {name for name in there.at("v0.2.0").files if name.startswith("data/")} == {
        name for name in second.files if name.startswith("data/")
    }
    assert there.read("data/train-00000-of-00002.parquet", "v0.2.0") == data
    assert there.read("data/train-00000-of-00001.parquet", "v0.1.0") == data
    assert len(there.log("main")) == 3


def test_more_files_than_the_hub_takes_are_refused(server: Server, staged: Staged) -> None:
    many = Staged(
        staged.folder, "0.1.0", staged.manifest | {"files": {f"data/{k}.parquet": {} for k in range(10_001)}}
    )
    with pytest.raises(
        VersionError, match=r"10,001 files in data/; a folder of the Hub takes 10,000\n.*shards_per_file"
    ):
        hub().publish(many)
    assert server.calls == []


def test_a_dry_run_sends_nothing(server: Server, staged: Staged) -> None:
    plan = hub().publish(staged, dry_run=True).plan
    assert plan["bytes"] == sum(size for _, size in staged.promised().values())
    assert plan["files"] == len(staged.promised())
    assert plan["minutes_by_plan"]["free"] == 0
    assert {call.method for call in server.calls} == {"GET"}


@pytest.mark.slow
def test_the_command_line_publishes_verifies_and_says_how_to_load(
    server: Server, demo_run: Path, staged: Staged, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(demo_run, tmp_path / "run"))
    place = "hf://datasets/me/demo"
    done = recap("publish", run, place, "--version", "0.1.0")
    assert 'datasets.load_dataset("me/demo", revision="v0.1.0")' in done.stdout
    recorded = json.loads((run / "versions" / "v0.1.0.published.json").read_text())
    assert (recorded["place"], recorded["commit"]) == (
        f"{place}@v0.1.0",
        server.repo("me/demo").refs["refs/tags/v0.1.0"],
    )
    assert_published_once(server, staged)
    assert " 0 problems" in recap("verify", f"{place}@v0.1.0").stdout
    assert server.token not in done.stdout + done.stderr
    assert not any(server.token.encode() in path.read_bytes() for path in run.rglob("*") if path.is_file())
    loads = (
        "rows = datasets.load_dataset('me/demo', revision='v0.1.0', split='train'); "
        "print(len(rows), rows[0]['re_caption'])"
    )
    streams = (
        "print(sum(1 for _ in datasets.load_dataset("
        "'me/demo', 'ledger', revision='v0.1.0', split='train', streaming=True)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", f"import datasets; {loads}; {streams}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    assert int(out[0].split()[0]) == staged.manifest["rows"]["train"]
    assert out[1] == "240"


def test_rows_are_removed_and_stay_removed(server: Server, staged: Staged) -> None:
    hub().publish(staged)
    rows = pq.read_table(staged.folder / "data/train-00000-of-00001.parquet").to_pylist()
    named = {"uid": [rows[0]["uid"]], "sha256": [rows[5]["sha256"]], "url": [rows[9]["url"]]}
    removal = remove("hf://datasets/me/demo", "0.1.1", named)
    published, number = removal.published, removal.rows
    assert (published.new, number) == (True, 3)
    there = server.repo("me/demo")
    kept = pq.read_table(
        pa.BufferReader(there.read("data/train-00000-of-00001.parquet", "v0.1.1"))
    ).to_pylist()
    assert kept == [row for index, row in enumerate(rows) if index not in (0, 5, 9)]
    assert verify("hf://datasets/me/demo@v0.1.1")["problems"] == []
    tombs = there.read(tombstones.FILE, "v0.1.1")
    assert rows[0]["uid"].encode() not in tombs
    ledger = pq.read_table(
        pa.BufferReader(there.read("ledger/train-00000-of-00001.parquet", "v0.1.1"))
    ).to_pylist()
    assert len(ledger) == 240
    assert [row["uid"] for row in ledger if row["status"] == "removed"] == [None] * 3
    assert not remove("hf://datasets/me/demo", "0.1.1", named).published.new


def test_a_domain_goes_with_its_subdomains(staged: Staged, tmp_path: Path) -> None:
    Folder(tmp_path / "out").publish(staged)
    nothing = remove(str(tmp_path / "out"), "0.1.1", {"domain": ["example.org", "7.0.0.1"]})
    assert (nothing.rows, nothing.ledger_rows, nothing.matched_nothing) == (
        0,
        0,
        {"domain": ["example.org", "7.0.0.1"]},
    )
    with pytest.raises(VersionError, match=r"no row of .* would be left"):
        remove(str(tmp_path / "out"), "0.1.2", {"domain": ["0.0.1"]})


# --- what can go wrong --------------------------------------------------------------------------------------


def test_main_that_was_moved_is_not_overwritten(server: Server, staged: Staged) -> None:
    server.faults.append(Fault("commit", 1, "second_writer"))
    with pytest.raises(VersionError, match=r"moved by somebody else(.|\n)*--rebase"):
        hub().publish(staged)
    there = server.repo("me/demo")
    assert there.log("main")[0].title == "Upload other.txt"
    assert not [name for name in there.refs if name.startswith("refs/tags/")]
    with pytest.raises(VersionError, match=r"moved by somebody else: it is at .*\n.*--rebase"):
        hub().publish(staged)
    hub().publish(staged, rebase=True)
    assert [discussion.status for discussion in there.discussions.values()] == ["closed", "merged"]
    assert "other.txt" in there.at("v0.1.0").files
    assert len(there.log("main")) == 3


def test_wrong_bytes_at_the_hub_never_reach_main(server: Server, staged: Staged) -> None:
    server.faults.append(Fault("lfs_put", 0, "wrong_bytes"))
    with pytest.raises(VersionError, match=r"at refs/pr/1: \S+ has .*; main is untouched"):
        hub().publish(staged)
    there = server.repo("me/demo")
    assert len(there.log("main")) == 1
    assert not [name for name in there.refs if name.startswith("refs/tags/")]


def test_bytes_that_went_wrong_once_are_sent_again(server: Server, staged: Staged) -> None:
    server.faults.append(Fault("lfs_put", 2, "wrong_bytes"))
    hub().publish(staged)
    assert_published_once(server, staged)


def test_a_regular_file_with_wrong_bytes_is_found_too(server: Server, staged: Staged) -> None:
    server.faults.append(Fault("commit", 0, "wrong_bytes", path="stats.json"))
    with pytest.raises(VersionError, match=r"stats\.json has .*; main is untouched"):
        hub().publish(staged)
    server.faults.clear()
    hub().publish(staged)  # it is sent again
    assert_published_once(server, staged)


def test_a_refused_token_is_one_line(server: Server, staged: Staged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "0" * 34)
    with pytest.raises(
        InputError, match=r"refuses the token for me/demo: HTTP 401\n.*hf auth login"
    ) as refused:
        hub().publish(staged)
    assert "hf_0" not in str(refused.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="there is no token"):
        hub().publish(staged)


def test_a_rate_limit_is_waited_for_as_long_as_it_says(
    server: Server, staged: Staged, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("builder.versions.hub.time.sleep", waits.append)
    server.faults.append(Fault("tag", 1, "rate_limit", wait_s=17))
    hub().publish(staged)
    assert waits == [18]
    assert_published_once(server, staged)


def test_verify_names_what_differs(server: Server, staged: Staged) -> None:
    hub().publish(staged)
    there = server.repo("me/demo")
    files = dict(there.at("v0.1.0").files)
    files["README.md"] = server.store.add_regular(b"---\n---\nchanged")
    files["plots/more.txt"] = files.pop("stats.json")
    there.refs["refs/tags/v0.1.0"] = there.commit("refs/heads/main", files, "vandalism", "", "me").oid
    problems = verify("hf://datasets/me/demo@v0.1.0")["problems"]
    assert [problem.split(" ")[0] for problem in problems] == ["stats.json", "README.md", "plots/more.txt"]


def test_verification_reads_each_byte_once(server: Server, staged: Staged) -> None:
    hub().publish(staged)
    before = server.bytes_out
    assert verify("hf://datasets/me/demo@v0.1.0")["problems"] == []
    total = sum(size for _, size in staged.promised().values())
    again = sum(
        (staged.folder / name).stat().st_size for name in (MANIFEST, "recipe.json", "README.md")
    )  # read for what they say
    assert total <= server.bytes_out - before <= total + again


# --- killed at every call -----------------------------------------------------------------------------------


def _publish(url: str, environment: dict[str, str], staged: Staged, repo: str, xet: bool) -> None:
    """What a killed process was doing: publishing, with everything imported before."""
    os.environ.update(environment)
    for name, constant in constants_of(url, xet=xet).items():
        setattr(huggingface_hub.constants, name, constant)
    try:
        hub(repo).publish(staged)
    except UserError as error:
        print(error)
        os._exit(2)
    os._exit(0)


@pytest.fixture(scope="session")
def forkserver() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["builder.versions.publish", "builder.versions.hub", "test_hub"])
    return context


def run_until(
    forkserver: Any,
    server: Server,
    staged: Staged,
    repo: str,
    kill: tuple[int, str] | None,
    *,
    xet: bool = False,
) -> int:
    """Publish in a process of its own; kill it at (k-th call, "call" before or "call_after" handling it)."""
    process = forkserver.Process(target=_publish, args=(server.url, server.env(), staged, repo, xet))
    process.start()
    if kill:
        server.faults.append(
            Fault("*", kill[0], kill[1], function=lambda: os.kill(process.pid, signal.SIGKILL))
        )
    process.join()
    server.faults.clear()
    code: int = process.exitcode
    process.close()
    return code


@pytest.mark.slow
@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_killed_at_every_call_and_again_it_is_published_once(
    server: Server, staged: Staged, forkserver: Any, xet: bool
) -> None:
    """kill -9 before and after the server handles each call of a publish, and again on the rerun."""
    assert run_until(forkserver, server, staged, "me/whole", None, xet=xet) == 0
    number = len(server.calls)
    assert_published_once(server, staged, "me/whole")
    moments = [(k, when) for k in range(1, number + 1) for when in ("call", "call_after")]
    again = random.Random(1)
    killed = 0
    for index, moment in enumerate(moments):
        repo = f"me/killed-{index}"
        for kill in (moment, (again.randrange(1, number // 2), again.choice(("call", "call_after")))):
            killed += run_until(forkserver, server, staged, repo, kill, xet=xet) == -signal.SIGKILL
        assert run_until(forkserver, server, staged, repo, None, xet=xet) == 0
        assert_published_once(server, staged, repo)
    survived(
        f"publishing survived {killed} kills at {len(moments)} moments "
        f"of {number} calls ({'Xet' if xet else 'LFS'})"
    )
    assert killed >= len(moments)


FAULTS = [
    Fault("*", 0, "status", status=500), Fault("*", 0, "status", status=503, headers={"Retry-After": "0"}),
    Fault("*", 0, "drop"), Fault("*", 0, "applied_then_status", status=504), Fault("*", 0, "drop_after"),
    Fault("*", 0, "truncate"), Fault("*", 0, "slow", wait_s=0.2), Fault("*", 0, "rate_limit", wait_s=0),
    Fault("*", 0, "expired"),
]  # fmt: skip


@pytest.mark.slow
def test_every_fault_on_every_route_is_survived(
    server: Server, staged: Staged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either this publish gets through, or it says what is wrong and the next does; never twice or partly."""
    import huggingface_hub.utils._http as http

    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)  # the client's own waits
    hub("me/whole").publish(staged)
    routes = sorted({call.route for call in server.calls})
    matrix = [(route, fault) for route in routes for fault in FAULTS]
    refused = 0
    for index, (route, fault) in enumerate(matrix):
        repo = f"me/fault-{index}"
        server.faults.append(replace(fault, route=route, call=1))
        try:
            hub(repo).publish(staged)
        except UserError:
            refused += 1
            server.faults.clear()
            hub(repo).publish(staged)
        server.faults.clear()
        assert_published_once(server, staged, repo)
    survived(
        f"publishing survived {len(matrix)} faults: {len(FAULTS)} kinds on {len(routes)} routes; "
        f"{refused} by a second publish"
    )
    assert refused < len(routes)  # none but the expired token stops a publish


# --- two at a time, and large ones --------------------------------------------------------------------------


def together(forkserver: Any, server: Server, *jobs: Staged) -> list[int]:
    processes = [
        forkserver.Process(target=_publish, args=(server.url, server.env(), staged, "me/demo", False))
        for staged in jobs
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def test_of_two_publishers_one_wins_and_the_other_says_so(
    server: Server, staged: Staged, forkserver: Any, tmp_path: Path
) -> None:
    second = other(
        staged,
        tmp_path / "other",
        **{"README.md": (staged.folder / "README.md").read_bytes() + b"\nchanged\n"},
    )
    codes = together(forkserver, server, staged, second)
    assert sorted(codes) in ([0, 2], [2, 2])
    there = server.repo("me/demo")
    assert len([name for name in there.refs if name.startswith("refs/tags/")]) == codes.count(0)
    assert len(there.log("main")) == 2
    if 0 in codes:
        winner = (staged, second)[codes.index(0)]
        assert there.read("README.md", "v0.1.0") == (winner.folder / "README.md").read_bytes()


def test_two_publishers_of_the_same_bytes_publish_it_once(
    server: Server, staged: Staged, forkserver: Any
) -> None:
    codes = together(forkserver, server, staged, staged)
    hub().publish(staged)
    there = server.repo("me/demo")
    assert codes.count(0) >= 1
    assert len(there.log("main")) == 2
    assert there.refs["refs/tags/v0.1.0"] == there.log("main")[0].oid


def test_many_files_take_many_commits_and_main_moves_once(
    server: Server, staged: Staged, tmp_path: Path
) -> None:
    many = {f"ledger/part-{k:05d}.parquet": b"PAR1%d" % k for k in range(350)}
    version = other(staged, tmp_path / "many", **many)
    server.tree_page = 100
    server.faults.append(Fault("commit", 2, "applied_then_status", status=504))
    hub().publish(version)
    assert_published_once(server, version)
    assert sum(call.route == "commit" for call in server.calls) == -(-len(version.promised()) // 100)


@pytest.mark.slow
def test_a_shard_of_two_gigabytes_takes_no_memory(
    server: Server, staged: Staged, forkserver: Any, tmp_path: Path
) -> None:
    version = other(staged, tmp_path / "large", **{"data/train-00001-of-00002.parquet": b""})
    path, digest = version.folder / "data/train-00001-of-00002.parquet", hashlib.sha256()
    with open(path, "wb") as file:
        for _ in range(2048):
            block = os.urandom(1 << 20)
            digest.update(block)
            file.write(block)
    version.manifest["files"]["data/train-00001-of-00002.parquet"] = {
        "sha256": digest.hexdigest(),
        "bytes": 2 << 30,
    }
    (version.folder / MANIFEST).write_text(json.dumps(version.manifest))
    import psutil

    peaks: list[int] = []
    process = forkserver.Process(target=_publish, args=(server.url, server.env(), version, "me/large", False))
    process.start()
    while process.is_alive():
        peaks.append(psutil.Process(process.pid).memory_info().rss)
        process.join(0.2)
    assert process.exitcode == 0
    assert max(peaks) < 1 << 30


# --- before anything is sent --------------------------------------------------------------------------------


def spoil(run: Path, change: Callable[[pa.Table], pa.Table], suffix: str = ".parquet") -> None:
    """Change a shard, and its record with it, as a bug of ours would."""
    path = output_of(run, "select", suffix)
    table = change(pq.read_table(path))
    path.unlink()
    pq.write_table(table, path)
    name, recorded = str(path.relative_to(run)), record_of(run, "select")
    record = json.loads(recorded.read_text())
    record["bytes"][name] = path.stat().st_size
    record["outputs"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
    recorded.write_text(json.dumps(record))


def with_text(text: str) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(
        3, "org_caption", pa.array([text, *table["org_caption"].to_pylist()[1:]])
    )


@pytest.mark.parametrize(
    ("change", "suffix", "says"),
    [
        (with_text("my key is hf_" + "a" * 34), ".parquet", "looks like a secret"),
        (lambda table: table.drop_columns(["re_num_tokens"]), ".parquet", "another schema"),
        (lambda table: table.slice(1), ".parquet", "rows, its record says"),
        (
            lambda table: pa.concat_tables([table.slice(1), table.slice(5, 1)]),
            ".ledger.parquet",
            "occurs 2 times",
        ),
    ],
    ids=["secret", "schema", "rows", "uid twice"],
)
def test_what_must_not_be_published_is_not(
    server: Server,
    demo_run: Path,
    tmp_path: Path,
    change: Callable[[pa.Table], pa.Table],
    suffix: str,
    says: str,
) -> None:
    run = Path(shutil.copytree(demo_run, tmp_path / "run"))
    spoil(run, change, suffix)
    with pytest.raises(VersionError, match=says):
        stage(Run.open(run), "0.1.0", tombstones.table({}))
    assert server.calls == []


def test_rows_that_were_removed_do_not_come_back(demo_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(demo_run, tmp_path / "run"))
    uid = pq.read_table(output_of(run, "select"))["uid"][3].as_py()
    with pytest.raises(VersionError, match=r"1 rows are named by tombstones(.|\n)*dedup\.tombstones"):
        stage(Run.open(run), "0.1.0", tombstones.table({"uid": [uid]}))
    ledger = pq.read_table(output_of(run, "select", ".ledger.parquet")).to_pylist()
    dead = next(row["url"] for row in ledger if row["status"] == "dead_link")
    with pytest.raises(VersionError, match=r"1 rows are named by tombstones"):
        stage(Run.open(run), "0.1.0", tombstones.table({"url": [dead]}))
