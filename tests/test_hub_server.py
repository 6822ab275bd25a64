"""The stand-in for the Hub, asked by the real clients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from hub.server import Fault, Hub
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    constants,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import close_session, parse_ratelimit_headers

DEMO: dict[str, Any] = {"repo_id": "me/demo", "repo_type": "dataset"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with Hub(tmp_path / "hub") as hub:
        HfApi(hub.url, hub.token).create_repo(**DEMO)
        yield hub
        close_session()


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi(hub.url, hub.token)


def add(api: HfApi, files: dict[str, bytes], **more: Any) -> str:
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit(
        **DEMO, operations=operations, **{"commit_message": f"add {', '.join(files)}"} | more
    ).oid


def client(hub: Hub, code: str, **environment: str) -> Any:
    """What a client process prints, as JSON."""
    env = os.environ | hub.env() | environment
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_uploads_come_in_one_request_or_in_parts(hub: Hub, api: HfApi) -> None:
    hub.part_size = 4096
    small, large = os.urandom(4096), os.urandom(10_000)
    head = add(api, {"README.md": b"hello", "data/small.parquet": small, "data/large.parquet": large})
    repo = hub.repo("me/demo")
    assert [call.route for call in hub.calls].count("lfs_put") == 1
    assert [call.route for call in hub.calls].count("lfs_part") == 3
    assert repo.refs == {"refs/heads/main": head}
    assert [
        repo.read(path, "main") for path in ("README.md", "data/small.parquet", "data/large.parquet")
    ] == [b"hello", small, large]
    assert repo.commits[head].files["README.md"].sha256 is None
    assert hub.bytes_in == 5 + 4096 + 10_000
    assert api.repo_info(**DEMO).sha == head
    before = len(hub.calls)
    add(api, {"README.md": b"hello", "data/large.parquet": large})  # nothing new: the client makes no commit
    assert [call.route for call in hub.calls[before:]] == ["validate_yaml", "preupload", "lfs_batch", "info"]
    Path(api.hf_hub_download(**DEMO, filename="data/large.parquet")).read_bytes()
    assert hub.bytes_out == 10_000


def test_contents_go_through_xet(hub: Hub) -> None:
    found = client(hub, f"""
import json, os
from huggingface_hub import CommitOperationAdd, HfApi, HfFileSystem
api, demo, data = HfApi(), {DEMO}, [os.urandom(200_000), os.urandom(70_000)]
for n in (0, 1):
    api.create_commit(
        **demo, operations=[CommitOperationAdd(f"data/{{n}}.parquet", data[n])], commit_message="m"
    )
paths = [api.hf_hub_download(**demo, filename=f"data/{{n}}.parquet") for n in (0, 1)]
# Plain HTTP, while this process has the store open.
with HfFileSystem().open("datasets/me/demo/data/1.parquet") as file:
    file.seek(1000)
    part = file.read(50)
whole = [open(path, "rb").read() == content for path, content in zip(paths, data)]
print(json.dumps([whole, part == data[1][1000:1050]]))
""")  # fmt: skip
    assert found == [[True, True], True]
    assert [call.route for call in hub.calls].count("lfs_put") == 0
    assert [call.method for call in hub.calls if call.route == "resolve"] == ["HEAD", "HEAD", "GET"]
    assert hub.repo("me/demo").at("main").files["data/0.parquet"].xet


def test_a_pull_request_becomes_one_commit_on_main(hub: Hub, api: HfApi) -> None:
    base = add(api, {"a.txt": b"a", "b.txt": b"b"})
    pull = api.create_pull_request(**DEMO, title="version 1")
    assert (pull.status, pull.git_reference, pull.target_branch, pull.conflicting_files) == (
        "draft",
        "refs/pr/1",
        "refs/heads/main",
        [],
    )
    add(api, {"c.txt": b"c"}, revision="refs/pr/1")
    api.create_commit(
        **DEMO, operations=[CommitOperationDelete("b.txt")], commit_message="less", revision="refs/pr/1"
    )
    add(api, {"a.txt": b"from main"})
    with pytest.raises(BadRequestError, match="#1 is draft"):
        api.merge_pull_request(**DEMO, discussion_num=1)
    api.change_discussion_status(**DEMO, discussion_num=1, new_status="open")
    api.comment_discussion(**DEMO, discussion_num=1, comment="looks good")
    api.merge_pull_request(**DEMO, discussion_num=1)
    merged = api.get_discussion_details(**DEMO, discussion_num=1)
    repo = hub.repo("me/demo")
    assert (merged.status, merged.merge_commit_oid) == ("merged", repo.refs["refs/heads/main"])
    assert [event.type for event in merged.events] == [
        "comment",
        "commit",
        "commit",
        "status-change",
        "comment",
        "status-change",
    ]
    assert [commit.title for commit in repo.log("main")] == [
        "version 1 (#1)",
        "add a.txt",
        "add a.txt, b.txt",
        "initial commit",
    ]
    assert set(repo.at("main").files) == {".gitattributes", "a.txt", "c.txt"}
    assert repo.read("a.txt", "main") == b"from main"
    assert repo.discussions[1].base == base
    with pytest.raises(BadRequestError, match="#1 is merged"):
        api.merge_pull_request(**DEMO, discussion_num=1)


def test_a_pull_request_that_conflicts_is_refused(hub: Hub, api: HfApi) -> None:
    info = api.create_commit(
        **DEMO, operations=[CommitOperationAdd("a.txt", b"mine")], commit_message="mine", create_pr=True
    )
    assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
    head = add(api, {"a.txt": b"theirs"})
    api.change_discussion_status(**DEMO, discussion_num=1, new_status="open")
    assert api.get_discussion_details(**DEMO, discussion_num=1).conflicting_files == ["a.txt"]
    with pytest.raises(HfHubHTTPError, match=r"conflicts with main in: a.txt") as refused:
        api.merge_pull_request(**DEMO, discussion_num=1)
    assert refused.value.response.status_code == 409
    assert hub.repo("me/demo").refs["refs/heads/main"] == head


def test_discussions_are_listed_by_pages_and_filters(hub: Hub, api: HfApi) -> None:
    hub.discussions_page = 2
    for n in range(5):
        api.create_discussion(**DEMO, title=f"number {n}", pull_request=n % 2 == 0)
    api.change_discussion_status(**DEMO, discussion_num=1, new_status="closed")
    assert [d.num for d in api.get_repo_discussions(**DEMO)] == [5, 4, 3, 2, 1]
    assert [
        d.num
        for d in api.get_repo_discussions(**DEMO, discussion_type="pull_request", discussion_status="open")
    ] == [5, 3]
    assert [d.num for d in api.get_repo_discussions(**DEMO, discussion_status="closed", author="me")] == [1]


def test_refs_are_made_once_and_deleted(hub: Hub, api: HfApi) -> None:
    head = add(api, {"a.txt": b"a"})
    api.create_tag(**DEMO, tag="v0.1.0", tag_message="first", revision=head)
    api.create_branch(**DEMO, branch="side", revision="v0.1.0")
    add(api, {"b.txt": b"b"}, revision="side")
    for make in (
        lambda: api.create_tag(**DEMO, tag="v0.1.0"),
        lambda: api.create_branch(**DEMO, branch="side"),
    ):
        with pytest.raises(HfHubHTTPError, match="already exists") as refused:
            make()
        assert refused.value.response.status_code == 409
    refs = api.list_repo_refs(**DEMO, include_pull_requests=True)
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v0.1.0", head)]
    assert [ref.name for ref in refs.branches] == ["main", "side"]
    api.super_squash_history(**DEMO, branch="side")
    assert len(api.list_repo_commits(**DEMO, revision="side")) == 1
    api.delete_tag(**DEMO, tag="v0.1.0")
    api.delete_branch(**DEMO, branch="side")
    assert set(hub.repo("me/demo").refs) == {"refs/heads/main"}
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag(**DEMO, tag="v0.1.0")


def test_trees_and_histories_come_in_pages(hub: Hub, api: HfApi) -> None:
    hub.tree_page, hub.commits_page = 3, 2
    head = add(api, {f"data/{n}.txt": b"%d" % n for n in range(7)})
    add(api, {"data/3.txt": b"new", "data/x.parquet": b"x"})
    paths = [".gitattributes", "data", *(f"data/{n}.txt" for n in range(7)), "data/x.parquet"]
    assert [item.path for item in api.list_repo_tree(**DEMO, recursive=True)] == paths
    assert [call.route for call in hub.calls].count("tree") == 4
    assert [item.path for item in api.list_repo_tree(**DEMO)] == [".gitattributes", "data"]
    assert [commit.title for commit in api.list_repo_commits(**DEMO)][-1] == "initial commit"
    changed, kept, folder = api.get_paths_info(
        **DEMO, paths=["data/3.txt", "data/2.txt", "data", "no"], expand=True
    )
    assert (changed.last_commit.title, kept.last_commit.oid, folder.path) == (
        "add data/3.txt, data/x.parquet",
        head,
        "data",
    )
    assert [item.path for item in api.list_repo_tree(**DEMO, path_in_repo="data", revision=head)] == paths[
        2:9
    ]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(**DEMO, path_in_repo="nothing"))
    fs = HfFileSystem(endpoint=hub.url, token=hub.token, skip_instance_cache=True)
    assert [path.partition("demo/")[2] for path in fs.find("datasets/me/demo")] == [
        path for path in paths if path != "data"
    ]


def test_parts_of_files_are_served(hub: Hub, api: HfApi) -> None:
    content = os.urandom(50_000)
    add(api, {"a.parquet": content, "b.txt": b"text"})
    fs = HfFileSystem(endpoint=hub.url, token=hub.token, skip_instance_cache=True)
    assert fs.cat_file("datasets/me/demo@main/a.parquet", 100, 200) == content[100:200]
    assert fs.cat_file("datasets/me/demo/b.txt") == b"text"
    url = f"{hub.url}/datasets/me/demo/resolve/main/a.parquet"
    for wanted, part in (
        ("bytes=-10", content[-10:]),
        ("bytes=49990-", content[-10:]),
        ("bytes=0-99999", content),
    ):
        answer = httpx2.get(url, headers={"range": wanted})
        assert (answer.status_code, answer.content) == (206, part)
    assert httpx2.get(url, headers={"range": "bytes=50000-"}).status_code == 416
    whole = httpx2.head(url)
    file = hub.repo("me/demo").at("main").files["a.parquet"]
    assert (whole.headers["etag"], whole.headers["x-linked-size"]) == (f'"{file.sha256}"', "50000")
    assert api.get_paths_info(**DEMO, paths="a.parquet")[0].blob_id == file.oid


def test_what_is_not_there_is_said_the_hubs_way(hub: Hub, api: HfApi) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api.dataset_info("me/nothing")
    with pytest.raises(RevisionNotFoundError):
        api.dataset_info("me/demo", revision="v9")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(**DEMO, filename="nothing.txt")
    with pytest.raises(HfHubHTTPError, match="not in this stand-in") as refused:
        api.list_liked_repos("me")
    assert refused.value.response.status_code == 501
    with pytest.raises(ValueError, match="Invalid metadata"):
        add(api, {"README.md": b"---\na: [\n---\n"})
    for token in ("hf_wrong", False):
        with pytest.raises(HfHubHTTPError, match="401"):
            HfApi(hub.url, token).create_tag(**DEMO, tag="v1")
    assert HfApi(hub.url, hub.user("alice")).whoami()["name"] == "alice"


def test_a_commit_is_applied_whole_or_not_at_all(hub: Hub, api: HfApi) -> None:
    head = add(api, {"a.parquet": b"content"})
    lines = [
        {"key": "header", "value": {"summary": "s"}},
        {"key": "file", "value": {"path": "b.txt", "content": "YQ==", "encoding": "base64"}},
    ]
    lines.append(
        {"key": "lfsFile", "value": {"path": "c.parquet", "algo": "sha256", "oid": "0" * 64, "size": 7}}
    )
    url, headers = f"{hub.url}/api/datasets/me/demo/commit/main", {"authorization": f"Bearer {hub.token}"}
    assert httpx2.post(url, headers=headers, content="\n".join(map(json.dumps, lines))).status_code == 400
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as refused:
        add(api, {"b.txt": b"b"}, parent_commit="1" * 40)
    assert refused.value.response.status_code == 412
    assert hub.repo("me/demo").refs["refs/heads/main"] == head
    copy = CommitOperationCopy(src_path_in_repo="a.parquet", path_in_repo="copy.parquet")
    api.create_commit(**DEMO, operations=[copy, CommitOperationDelete("a.parquet")], commit_message="move")
    assert hub.repo("me/demo").read("copy.parquet", "main") == b"content"
    with pytest.raises(EntryNotFoundError):
        api.create_commit(**DEMO, operations=[CommitOperationDelete("a.parquet")], commit_message="again")


def test_datasets_loads_configs_at_a_tag_and_at_main(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1, 2, 3]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"y": ["b"]}), tmp_path / "b.parquet")
    configs = (
        "configs:\n- config_name: default\n  data_files:\n  - {split: train, path: 'data/train-*'}\n"
        "- config_name: ledger\n  data_files: 'b/*'\n"
    )
    files = {
        "README.md": f"---\n{configs}---\n".encode(),
        "data/train-0.parquet": (tmp_path / "a.parquet").read_bytes(),
    }
    add(api, files | {"b/b.parquet": (tmp_path / "b.parquet").read_bytes()})
    api.create_tag(**DEMO, tag="v0.1.0")
    add(api, {"data/train-0.parquet": b"broken"})
    add(api, {"data/train-0.parquet": files["data/train-0.parquet"]})
    found = client(hub, """
import json
from datasets import load_dataset
print(json.dumps([
    load_dataset("me/demo", split="train", revision="v0.1.0")["x"][:],
    [row["x"] for row in load_dataset("me/demo", split="train", streaming=True, revision="v0.1.0")],
    load_dataset("me/demo", "ledger", split="train")["y"][:],
]))""", USE_TORCH="0")  # fmt: skip
    assert found == [[1, 2, 3], [1, 2, 3], ["b"]]
    assert "unknown" not in {call.route for call in hub.calls}
    assert {call.status for call in hub.calls if call.route == "dataset_viewer"} == {404}


def refused(call: Callable[[], object]) -> int:
    with pytest.raises(HfHubHTTPError) as error:
        call()
    return error.value.response.status_code


def test_each_fault_does_what_it_says(hub: Hub, api: HfApi) -> None:
    def tag(name: str) -> Callable[[], None]:
        return lambda: api.create_tag(**DEMO, tag=name)

    def tags() -> set[str]:
        return {
            ref.removeprefix("refs/tags/") for ref in hub.repo("me/demo").refs if ref.startswith("refs/tags/")
        }

    hub.faults += [
        Fault("tag", 2, "status", 503, {"retry-after": "1"}, "not now"),
        Fault("tag", 3, "applied_then_status"),
    ]
    tag("a")()
    assert (refused(tag("b")), refused(tag("c")), tags()) == (503, 504, {"a", "c"})
    tag("b")()
    hub.faults[:] = [Fault("tag", 1, "drop"), Fault("tag", 2, "drop_after")]
    for name in ("d", "e"):
        with pytest.raises(httpx2.HTTPError):
            tag(name)()
    assert tags() == {"a", "b", "c", "e"}
    hub.faults[:] = [Fault("tag", 1, "expired"), Fault("*", 2, "rate_limit", wait_s=3)]
    assert refused(tag("f")) == 401
    with pytest.raises(HfHubHTTPError, match="Retry after 3 seconds") as error:
        api.list_repo_refs(**DEMO)
    limits = parse_ratelimit_headers(error.value.response.headers)
    assert limits is not None
    assert (limits.remaining, limits.reset_in_seconds) == (0, 3)
    seen: list[str] = []
    hub.faults[:] = [Fault("tag", 1, "call", function=lambda: seen.append(f"before: {'g' in tags()}"))]
    hub.faults += [
        Fault("tag", 1, "call_after", function=lambda: seen.append(f"after: {'g' in tags()}")),
        Fault("tag", 1, "slow", wait_s=0.3),
    ]
    start = time.monotonic()
    tag("g")()
    assert time.monotonic() - start > 0.3
    assert seen == ["before: False", "after: True"]
    assert [call.status for call in hub.calls if call.route == "tag"] == [200, 503, 504, 200, 0, 0, 401, 200]


def test_an_answer_may_be_cut_and_another_writer_may_come_first(hub: Hub, api: HfApi) -> None:
    head = add(api, {"a.parquet": os.urandom(100_000)})
    hub.faults.append(Fault("resolve", 2, "truncate"))
    httpx2.get(f"{hub.url}/datasets/me/demo/resolve/main/a.parquet")
    with pytest.raises(httpx2.RemoteProtocolError):
        httpx2.get(f"{hub.url}/datasets/me/demo/resolve/main/a.parquet")
    assert hub.bytes_out == 150_000
    hub.faults[:] = [Fault("commit", 1, "second_writer", path="other.txt")]
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        add(api, {"b.txt": b"b"}, parent_commit=head)
    assert set(hub.repo("me/demo").at("main").files) == {".gitattributes", "a.parquet", "other.txt"}


def test_wrong_bytes_are_stored_and_told(hub: Hub, api: HfApi) -> None:
    hub.part_size = 1000
    hub.faults += [
        Fault("lfs_put", 1, "wrong_bytes"),
        Fault("lfs_part", 1, "wrong_bytes"),
        Fault("commit", 1, "wrong_bytes", path="a.txt"),
    ]
    files = {"a.txt": b"some text", "a.parquet": os.urandom(1000), "b.parquet": os.urandom(2500)}
    add(api, files)
    for path, content in files.items():
        stored = hub.repo("me/demo").read(path, "main")
        assert sum(a != b for a, b in zip(stored, content, strict=True)) == 1
        assert (
            HfFileSystem(endpoint=hub.url, token=hub.token, skip_instance_cache=True).cat_file(
                f"datasets/me/demo/{path}"
            )
            == stored
        )
    add(api, files)  # nothing of it is there yet, so the client sends it all once more
    assert [hub.repo("me/demo").read(path, "main") for path in files] == list(files.values())


def test_a_server_goes_on_where_another_stopped(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    add(api, {"a.parquet": b"content"})
    api.create_pull_request(**DEMO, title="a pull request")
    command = [sys.executable, "tests/hub/server.py", str(tmp_path / "hub")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url, exports = server.stdout.readline().strip(), server.stdout.readline()
        assert f"HF_ENDPOINT={url} HF_TOKEN={hub.token}" in exports
        again = HfApi(url, hub.token)
        assert [d.title for d in again.get_repo_discussions(**DEMO)] == ["a pull request"]
        assert Path(again.hf_hub_download(**DEMO, filename="a.parquet")).read_bytes() == b"content"
        server.terminate()


def test_calls_at_once_are_all_applied(hub: Hub, api: HfApi) -> None:
    threads = [threading.Thread(target=add, args=(api, {f"{n}.parquet": b"%d" % n})) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(hub.repo("me/demo").log("main")) == 9
    assert len(hub.repo("me/demo").at("main").files) == 9
