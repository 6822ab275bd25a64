"""Versions as tags of a data set repository on the Hub.

A version is uploaded to a pull request, held against its manifest there, merged, so that `main` moves once,
and tagged. Nothing is remembered on this machine: what is left to do follows from what the Hub holds, so the
same command again, after whatever crash, finishes the job in the same pull request or says that it is done.

    tag there, same manifest          done
    pull request merged, no tag       verify, tag
    pull request open                 send what is missing, verify, merge, verify, tag
    nothing                           open a pull request
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, TypeVar

import httpx2
from fsspec import AbstractFileSystem
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    DiscussionWithDetails,
    HfApi,
    HfFileSystem,
    get_token,
    hf_hub_url,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import get_session, hf_raise_for_status, parse_ratelimit_headers

from builder.errors import DamagedError, InputError, VersionError
from builder.versions.version import MANIFEST, OURS, VERSION, Published, Staged, by_number, next_version

T = TypeVar("T")
FILES_PER_COMMIT = 100  # what the Hub recommends
# Calls in five minutes (the Hub's page on rate limits, 2026).
PLANS = {"free": 1000, "PRO": 2500, "Team": 3000, "Enterprise": 6000}
COMMITS_PER_HOUR = 128
MAX_FILES, MAX_ENTRIES_PER_FOLDER = 100_000, 10_000
ATTEMPTS = 6
log = logging.getLogger(__name__)


class Hub:
    """`hf://datasets/user/name`, or `hf://user/name` of a model. `wait_s` is the first wait of a retry where
    the server names none; what begins with one of `ours` is the version's or not there.
    """

    def __init__(
        self, repo: str, *, wait_s: float = 1.0, kind: Literal["dataset", "model"] = "dataset",
        ours: tuple[str, ...] = OURS,
    ) -> None:  # fmt: skip
        self.folder = "datasets/" if kind == "dataset" else ""  # of addresses
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo, re.ASCII):
            reason = f"hf://{self.folder}{repo} is no repository"
            raise InputError(reason, f"it has a user and a name: hf://{self.folder}user/name")
        self.repo, self.wait_s, self.kind, self.ours = repo, wait_s, kind, ours
        self.api = HfApi()  # endpoint and token from the client's own places
        self.here: dict[str, Any] = {"repo_id": repo, "repo_type": kind}

    # --- what is there --------------------------------------------------------------------------------------

    def versions(self) -> list[str]:
        try:
            refs = self._call(lambda: self.api.list_repo_refs(**self.here))
        except RepositoryNotFoundError:  # or a private one, and no token for it
            return []
        except HfHubHTTPError as error:
            raise _refused(error, self.repo) from error
        found = (tag.name[1:] for tag in refs.tags if tag.name.startswith("v"))
        return sorted((version for version in found if VERSION.fullmatch(version)), key=by_number)

    def files(self, version: str) -> tuple[AbstractFileSystem, str]:
        fs = HfFileSystem(endpoint=self.api.endpoint, skip_instance_cache=True)
        return fs, f"{self.folder}{self.repo}@v{version}"

    def how_to_delete(self, version: str) -> str:
        return (
            f"hf repos tag delete {self.repo} v{version} --repo-type {self.kind}  "
            "# then squash main's history and delete its files under Settings, List LFS files: "
            f"{self.api.endpoint}/{self.folder}{self.repo}/settings"
        )

    # --- publishing -----------------------------------------------------------------------------------------

    def publish(self, staged: Staged, *, dry_run: bool = False, rebase: bool = False) -> Published:
        """Raises:
        VersionError: the version exists with other bytes, main was moved by somebody else, or the Hub
            stores other bytes.
        InputError: no token, or no right to write.
        """
        if not get_token():
            raise InputError("there is no token for the Hub", "log in: hf auth login")
        rows, place = staged.rows, f"hf://{self.folder}{self.repo}@{staged.tag}"
        _within_limits(list(staged.files))
        try:
            if staged.version in (there := self.versions()) and (tagged := self._tag(staged.tag)):
                self._same(staged, tagged)
                return Published(place, rows, False, tagged)
            if dry_run:
                return Published(place, rows, False, plan=self._plan(staged))
            staged.check_beside(there)
            self._call(lambda: self.api.create_repo(**self.here, exist_ok=True))
            pull = self._pull_request(staged, rebase)
            # What comes to main from here on is found before it is merged.
            staged.check_beside([version for version in self.versions() if version != staged.version])
            if pull.status != "merged":
                self._send(staged, pull)
                self._verify(staged, f"refs/pr/{pull.num}")
                pull = self._merge(staged, pull)
            assert pull.merge_commit_oid is not None
            where = "main was moved by somebody else at the same moment; the version has no tag"
            self._verify(staged, pull.merge_commit_oid, where=where)
            self._create_tag(staged, pull.merge_commit_oid)
            return Published(place, rows, True, pull.merge_commit_oid)
        except HfHubHTTPError as error:
            raise _refused(error, self.repo) from error

    def _plan(self, staged: Staged) -> dict[str, Any]:
        """Files, bytes, commits and calls that publishing takes, and the minutes by the Hub's limits."""
        held = self._tree("main") if self._call(lambda: self.api.repo_exists(**self.here)) else {}
        operations = list(self._operations(staged, held, "main"))
        added = [op.path_in_repo for op in operations if isinstance(op, CommitOperationAdd)]
        promised = staged.promised()
        send = {name: promised[name][1] for name in added}
        commits = -(-len(operations) // FILES_PER_COMMIT)
        # Preupload, commit, tree; upload and its check; trees.
        calls = 20 + 3 * commits + 2 * len(send) + 3 * (len(staged.files) // 1000 + 1)
        least = commits / COMMITS_PER_HOUR * 60 if commits > COMMITS_PER_HOUR else 0
        by_calls = {plan: calls / limit * 5 if calls > limit else 0 for plan, limit in PLANS.items()}
        minutes = {plan: round(max(least, by_limit), 1) for plan, by_limit in by_calls.items()}
        return {
            "files": len(send), "bytes": sum(send.values()),
            "files_there": len(promised) - len(send), "commits": commits, "calls": calls,
            "minutes_by_plan": minutes,
        }  # fmt: skip

    def _tag(self, tag: str) -> str | None:
        refs = self._call(lambda: self.api.list_repo_refs(**self.here))
        return next((ref.target_commit for ref in refs.tags if ref.name == tag), None)

    def _same(self, staged: Staged, commit: str) -> None:
        if self._read(MANIFEST, commit) != (staged.folder / MANIFEST).read_bytes():
            reason = f"{self.repo} has a {staged.tag} with other bytes; a version never changes"
            raise VersionError(reason, f"publish under a new one: --version {next_version(self.versions())}")

    def _pull_request(self, staged: Staged, rebase: bool) -> DiscussionWithDetails:
        """The pull request of this version with these bytes, opened if there is none.

        Of two for one version the older one stands, so that of two publishers at once one goes on and the
        other says so.
        """
        sha256, _ = staged.promised()[MANIFEST]
        of_version = f"{staged.manifest['name']} {staged.tag} ("
        title = f"{of_version}{sha256[:16]})"

        def find() -> DiscussionWithDetails | None:
            pulls = list(self.api.get_repo_discussions(**self.here, discussion_type="pull_request"))
            first = min(
                (pull for pull in pulls if pull.title.startswith(of_version) and pull.status != "closed"),
                key=lambda p: p.num,
                default=None,
            )
            if first and first.title != title:
                there = first.status == "merged"
                where = "there" if there else "on its way"
                close = f"hf discussions close {self.repo} {first.num} --type {self.kind}"
                raise VersionError(
                    f"{staged.tag} of {self.repo} with other bytes is {where}: pull request {first.num}",
                    "choose another version" if there else f"wait for it, or give it up: {close}",
                )
            return self.api.get_discussion_details(**self.here, discussion_num=first.num) if first else None

        pull = self._call(find)
        if pull and rebase and pull.status != "merged" and self._base(pull, title) != self._head():
            stale, change = pull.num, self.api.change_discussion_status
            self._call(lambda: change(**self.here, discussion_num=stale, new_status="closed"))
            pull = None
        if pull is None:
            description = (
                "Uploaded by recapkit, which verifies it and merges it. "
                "To give it up, close this pull request."
            )
            self._call(
                lambda: self.api.create_pull_request(**self.here, title=title, description=description),
                done=find,
            )
            pull = self._call(find)
        assert pull is not None
        return pull

    def _send(self, staged: Staged, pull: DiscussionWithDetails) -> None:
        """Commit to the pull request what it lacks, until it lacks nothing.

        Content that the repository holds is not sent again.
        """
        revision = f"refs/pr/{pull.num}"

        def missing() -> list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete]:
            return list(self._operations(staged, self._tree(revision), revision))

        times: Counter[str] = Counter()
        while operations := self._call(missing):
            batch = operations[:FILES_PER_COMMIT]
            times.update(operation.path_in_repo for operation in batch)
            if max(times.values()) > 2:
                return  # what is stored is not what was sent: verification will say so
            message = f"{pull.title}: {len(batch)} files"
            # After a failure that may hide a success it looks again, so nothing is committed twice.
            commit = partial(self.api.create_commit, **self.here, commit_message=message, revision=revision)
            self._call(partial(commit, operations=batch), done=partial(_none_of, batch, missing))

    def _operations(self, staged: Staged, held: dict[str, RepoFile], revision: str) -> Iterator[Any]:
        at = {_content(file): (name, revision) for name, file in held.items() if file.lfs}
        promised = staged.promised()
        # A version made from an older one takes over what main may have lost.
        for tag in (f"v{version}" for version in reversed(self.versions())):
            if all(content in at or (staged.folder / name).exists() for name, content in promised.items()):
                break
            at = {_content(file): (name, tag) for name, file in self._tree(tag).items() if file.lfs} | at
        for name, content in promised.items():
            if name in held and _matches(held[name], content, staged):
                continue
            if content in at:
                source, of = at[content]
                yield CommitOperationCopy(src_path_in_repo=source, path_in_repo=name, src_revision=of)
            else:
                yield CommitOperationAdd(path_in_repo=name, path_or_fileobj=staged.folder / name)
        gone = (name for name in held if name.startswith(self.ours) and name not in promised)
        yield from (CommitOperationDelete(path_in_repo=name) for name in gone)

    def _verify(self, staged: Staged, revision: str, *, where: str = "main is untouched") -> None:
        """Hold size and sha256 of every file at a revision against the manifest.

        Files outside LFS are read for it; they are few and small.
        """
        held = self._tree(revision)
        for name, (sha256, size) in staged.promised().items():
            file = held.get(name)
            if file is not None and not file.lfs:
                stored = self._read(name, revision)
                found = (hashlib.sha256(stored).hexdigest(), len(stored))
            else:
                found = _content(file) if file else ("", -1)
            if found != (sha256, size):
                got = f"{found[1]} bytes and sha256 {found[0][:16]}..."
                what = "is missing" if found[1] < 0 else f"has {got}, not {size} and {sha256[:16]}..."
                hint = "type the same command again: it sends the file once more"
                raise DamagedError(f"{self.repo} at {revision}: {name} {what}; {where}", hint)
        for name in held:
            if name.startswith(self.ours) and name not in staged.files:
                reason = f"{self.repo} at {revision}: {name} is not in the manifest; {where}"
                raise VersionError(reason, "type the same command again")

    def _merge(self, staged: Staged, pull: DiscussionWithDetails) -> DiscussionWithDetails:
        head, base = self._head(), self._base(pull, pull.title)
        if head != base:
            raise VersionError(
                f"main of {self.repo} was moved by somebody else: "
                f"it is at {head[:8]}, the upload stands on {base[:8]}",
                f"look at {self.api.endpoint}/{self.folder}{self.repo}/commits/main, "
                "then type the same command with --rebase to publish on top of it",
            )

        def merged() -> DiscussionWithDetails | None:
            now = self.api.get_discussion_details(**self.here, discussion_num=pull.num)
            return now if now.status == "merged" else None

        if pull.status == "draft":
            change = self.api.change_discussion_status
            self._call(lambda: change(**self.here, discussion_num=pull.num, new_status="open"), done=merged)
        try:
            self._call(lambda: self.api.merge_pull_request(**self.here, discussion_num=pull.num), done=merged)
        except HfHubHTTPError as error:
            if error.response.status_code not in (400, 409) or self._call(lambda: merged() or False):
                raise
            moved = f"main of {self.repo} was moved by somebody else while this was uploaded"
            hint = "type the same command with --rebase to publish on top of it"
            raise VersionError(f"{moved}: {error.server_message}", hint) from error
        found = self._call(merged)
        if found is None:
            reason = f"pull request {pull.num} of {self.repo} is not merged though the Hub said so"
            raise VersionError(reason, "type the same command again")
        return found

    def _create_tag(self, staged: Staged, commit: str) -> None:
        about = {"tag": staged.tag, "revision": commit, "tag_message": staged.manifest["name"]}
        try:
            self._call(lambda: self.api.create_tag(**self.here, **about), done=lambda: self._tag(staged.tag))
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
        tagged = self._tag(staged.tag)
        if tagged != commit:
            there = f"{self.repo} has a {staged.tag} at {tagged}, not at {commit}"
            raise VersionError(f"{there}: somebody else published it", "choose another version")

    # --- calls ----------------------------------------------------------------------------------------------

    def _head(self) -> str:
        refs = self._call(lambda: self.api.list_repo_refs(**self.here))
        return next(ref.target_commit for ref in refs.branches if ref.name == "main")

    def _base(self, pull: DiscussionWithDetails, title: str) -> str:
        """The commit of main that a pull request stands on: the newest that is not its own."""
        commits = self._call(lambda: self.api.list_repo_commits(**self.here, revision=f"refs/pr/{pull.num}"))
        return next(commit.commit_id for commit in commits if not commit.title.startswith(title))

    def _tree(self, revision: str) -> dict[str, RepoFile]:
        tree = partial(self.api.list_repo_tree, **self.here, revision=revision, recursive=True)
        items = self._call(lambda: list(tree()))
        return {item.path: item for item in items if isinstance(item, RepoFile)}

    def _read(self, name: str, revision: str) -> bytes:
        url = hf_hub_url(**self.here, filename=name, revision=revision, endpoint=self.api.endpoint)

        def read() -> bytes:
            response = get_session().get(url, headers=build_hf_headers(), follow_redirects=True)
            hf_raise_for_status(response)
            content: bytes = response.content
            return content

        return self._call(read)

    def _call(self, call: Callable[[], T], *, done: Callable[[], object] | None = None) -> T:
        """`call()`, again after what may pass, as long as the server asks to wait or twice as long each time.

        `done` is asked before the call is repeated: a 504 or a broken connection may hide that it was
        applied. What `done` returns, if anything, is returned then.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return call()
            except (HfHubHTTPError, httpx2.HTTPError, OSError, RuntimeError) as error:
                if attempt == ATTEMPTS or not _may_pass(error):
                    raise
                wait_s = _asked_to_wait_s(error)
                if wait_s is None:
                    wait_s = self.wait_s * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
                reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
                log.info("the Hub: %s; again in %.1f s", reason, wait_s)
                time.sleep(wait_s)
            if done is not None and (found := self._call(done)) is not None:
                return found  # type: ignore[return-value]
        raise AssertionError("unreachable")


def _none_of(batch: list[Any], missing: Callable[[], list[Any]]) -> bool | None:
    """True when nothing of a batch is missing any more."""
    left = {operation.path_in_repo for operation in missing()}
    return left.isdisjoint(operation.path_in_repo for operation in batch) or None


def _within_limits(names: list[str]) -> None:
    """Raises:
    VersionError: more files, in all or in one folder, than the Hub takes.
    """
    hint = "make larger files: select.shards_per_file=..."
    if len(names) > MAX_FILES:
        raise VersionError(f"{len(names):,} files; a repository of the Hub takes {MAX_FILES:,}", hint)
    for folder, number in Counter(name.rpartition("/")[0] for name in names).items():
        if number > MAX_ENTRIES_PER_FOLDER:
            reason = f"{number:,} files in {folder}/; a folder of the Hub takes {MAX_ENTRIES_PER_FOLDER:,}"
            raise VersionError(reason, hint)


def _content(file: RepoFile) -> tuple[str, int]:
    return (file.lfs.sha256, file.lfs.size) if file.lfs else (f"blob:{file.blob_id}", file.size)


def _matches(file: RepoFile, content: tuple[str, int], staged: Staged) -> bool:
    if file.lfs:
        return _content(file) == content
    data = (staged.folder / file.path).read_bytes()
    return file.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _may_pass(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 412, 425, 429) or error.response.status_code >= 500
    cause = error.__cause__
    if isinstance(error, RuntimeError) and isinstance(cause, HfHubHTTPError):
        return _may_pass(cause)
    disk_is_full = getattr(error, "errno", None) == 28
    return not isinstance(error, FileNotFoundError | PermissionError) and not disk_is_full


def _asked_to_wait_s(error: Exception) -> float | None:
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if response is None or response.status_code < 400:
        return None
    limit = parse_ratelimit_headers(response.headers)
    if limit is not None and response.status_code == 429:
        return float(limit.reset_in_seconds) + 1
    after = response.headers.get("retry-after", "")
    return float(after) if after.isdecimal() else None


def _refused(error: HfHubHTTPError, repo: str) -> Exception:
    status = error.response.status_code
    if status in (401, 403):
        hint = "log in with one that may write: hf auth login; then the same command"
        return InputError(f"the Hub refuses the token for {repo}: HTTP {status}", hint)
    hint = "type the same command again; it goes on where this one stopped"
    return VersionError(f"the Hub, for {repo}: {str(error).splitlines()[0]}", hint)
