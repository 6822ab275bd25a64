"""What the stand-in for the Hub answers, by route; a handler applies its call wholly or raises Refused."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

import yaml
from hub.store import Commit, Discussion, File, Refused, Repo, Store, flip, lfs_file, now, pointer, sha256_of
from hub.wire import Answer, Ask, answer

LFS = re.compile(
    r".*\.(7z|aac|arrow|avi|bin|bmp|bz2|ckpt|duckdb|flac|ftz|gif|gz|h5|joblib|jpeg|jpg|lz4|mds|mlmodel|model|mp3|mp4|msgpack|npy|npz|ogg|onnx|ot"
    r"|parquet|pb|pcm|pickle|pkl|png|pt|pth|rar|raw|safetensors|sam|tar|tflite|tgz|tiff|wasm|wav|webm|webp|xz|zip|zst)"
)
LFS_BYTES = 10_000_000  # any larger file is one


class Api:
    """The handlers. Page sizes and `part_size`, from which LFS uploads come in parts, may be set any time."""

    url: str

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, Store(folder)
        self.bytes_in = self.bytes_out = 0
        self.part_size, self.tree_page, self.commits_page, self.discussions_page = 5 * 2**20, 1000, 50, 10

    def repo(self, id: str, kind: str = "datasets") -> Repo:
        """A repository as it is.

        Raises:
            Refused: it is not there.
        """
        if (kind, id) not in self.store.repos:
            raise Refused(404, "Repository not found", "RepoNotFound")
        return self.store.repos[kind, id]

    def _repo(self, ask: Ask) -> Repo:
        return self.repo(ask.fields["repo"], ask.fields.get("kind", "models"))

    def _web(self, repo: Repo) -> str:
        return f"{self.url}/{'' if repo.kind == 'models' else f'{repo.kind}/'}{repo.id}"

    # --- repositories ---------------------------------------------------------------------------------------

    def _whoami(self, ask: Ask) -> Answer:
        token = {
            "type": "access_token",
            "accessToken": {"displayName": "test", "role": "write", "createdAt": now()},
        }
        return answer(
            {
                "type": "user",
                "id": ask.user,
                "name": ask.user,
                "fullname": ask.user,
                "isPro": False,
                "orgs": [],
                "auth": token,
            }
        )

    def _validate_yaml(self, ask: Ask) -> Answer:
        front = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", ask.json()["content"], re.DOTALL)
        try:
            yaml.safe_load(front[1] if front else "")
        except yaml.YAMLError as error:
            return answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return answer({"errors": [], "warnings": []})

    def _create_repo(self, ask: Ask) -> Answer:
        wanted = ask.json()
        kind, id = (
            f"{wanted.get('type') or 'model'}s",
            f"{wanted.get('organization') or ask.user}/{wanted['name']}",
        )
        url = f"{self.url}/{'' if kind == 'models' else f'{kind}/'}{id}"
        if (kind, id) in self.store.repos:
            return answer({"error": f"You already created this {kind[:-1]} repo: {id}", "url": url}, 409)
        repo = self.store.repos[kind, id] = Repo(self.store, kind, id)
        attributes = self.store.add_regular(b"*.parquet filter=lfs diff=lfs merge=lfs -text\n")
        repo.commit("refs/heads/main", {".gitattributes": attributes}, "initial commit", "", ask.user)
        repo.save()
        return answer({"url": url, "name": id, "id": _id(id)})

    def _delete_repo(self, ask: Ask) -> Answer:
        wanted = ask.json()
        repo = self.repo(
            f"{wanted.get('organization') or ask.user}/{wanted['name']}", f"{wanted.get('type') or 'model'}s"
        )
        del self.store.repos[repo.kind, repo.id]
        shutil.rmtree(repo.folder)
        return answer({})

    def _info(self, ask: Ask) -> Answer:
        repo = self._repo(ask)
        head = repo.at(ask.fields.get("rev", "main"))
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(head.files)]
        for sibling in siblings if ask.flag("blobs") else []:
            file = head.files[sibling["rfilename"]]
            lfs = (
                {
                    "lfs": {
                        "size": file.size,
                        "sha256": file.sha256,
                        "pointerSize": len(pointer(file.sha256, file.size)),
                    }
                }
                if file.sha256
                else {}
            )
            sibling |= {"size": file.size, "blobId": file.oid, **lfs}
        first = repo.log(head.oid)[-1]
        about = {
            "_id": _id(repo.id),
            "id": repo.id,
            "author": repo.id.split("/")[0],
            "sha": head.oid,
            "lastModified": head.date,
        }
        state = {
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "createdAt": first.date,
        }
        return answer(
            about
            | state
            | {"siblings": siblings, "usedStorage": sum(file.size for file in head.files.values())}
        )

    # --- contents -------------------------------------------------------------------------------------------

    def _preupload(self, ask: Ask) -> Answer:
        files = self._repo(ask).at(ask.fields["rev"]).files
        answers = []
        for file in ask.json()["files"]:
            lfs = (
                LFS.fullmatch(file["path"])
                or file["size"] > LFS_BYTES
                or b"\0" in base64.b64decode(file.get("sample", ""))
            )
            held = {"oid": files[file["path"]].key} if file["path"] in files else {}
            answers.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": False,
                    **held,
                }
            )
        return answer({"files": answers})

    def _lfs_batch(self, ask: Ask) -> Answer:
        self._repo(ask)
        batch, objects = ask.json(), []
        multipart = "multipart" in batch["transfers"]
        for wanted in batch["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            url, upload = f"{self.url}/lfs/{oid}/{size}", {}
            if multipart and size > self.part_size:
                url += f"/{time.time_ns()}"
                parts = {str(n + 1): f"{url}/{n + 1}" for n in range(-(-size // self.part_size))}
                upload = {"header": {"chunk_size": str(self.part_size), **parts}}
            actions = {"upload": {"href": url, **upload}, "verify": {"href": f"{self.url}/lfs/verify"}}
            objects.append(
                {
                    "oid": oid,
                    "size": size,
                    "authenticated": True,
                    **({} if self.store.has(oid) else {"actions": actions}),
                }
            )
        chosen = (
            "multipart"
            if any("header" in o.get("actions", {}).get("upload", {}) for o in objects)
            else "basic"
        )
        return answer({"transfer": chosen, "objects": objects})

    def _lfs_put(self, ask: Ask) -> Answer:
        assert ask.upload is not None
        if (ask.sha256, ask.upload.stat().st_size) != (ask.fields["sha"], int(ask.fields["size"])):
            raise Refused(400, f"the bytes that came have sha256 {ask.sha256}, not {ask.fields['sha']}")
        if ask.wrong is not None:
            flip(ask.upload)
        self.store.add_lfs(
            ask.upload, ask.sha256, sha256_of(ask.upload) if ask.wrong is not None else ask.sha256
        )
        return Answer(b"", {"etag": f'"{ask.sha256}"'})

    def _lfs_part(self, ask: Ask) -> Answer:
        assert ask.upload is not None
        folder = self.folder / "incoming" / f"{ask.fields['sha']}-{ask.fields['id']}"
        folder.mkdir(exist_ok=True)
        if ask.wrong is not None:
            flip(ask.upload)
            (folder / "wrong").touch()
        ask.upload.replace(folder / ask.fields["part"])
        (folder / f"{ask.fields['part']}.etag").write_text(ask.sha256)
        return Answer(b"", {"etag": f'"{ask.sha256}"'})

    def _lfs_complete(self, ask: Ask) -> Answer:
        sha, size = ask.fields["sha"], int(ask.fields["size"])
        folder, whole = self.folder / "incoming" / f"{sha}-{ask.fields['id']}", self.store.incoming()
        if not folder.exists() and self.store.has(sha):  # completed before, by a call whose answer was lost
            return answer({})
        parts = sorted(ask.json()["parts"], key=lambda part: part["partNumber"])
        for part in parts:
            etag = folder / f"{part['partNumber']}.etag"
            if not etag.exists() or etag.read_text() != part["etag"].strip('"'):
                raise Refused(400, f"part {part['partNumber']} did not come, or is another one")
        with whole.open("wb") as file:
            for part in parts:
                with (folder / str(part["partNumber"])).open("rb") as piece:
                    shutil.copyfileobj(piece, file)
        if ask.wrong is not None:
            flip(whole)
        found, lie = sha256_of(whole), ask.wrong is not None or (folder / "wrong").exists()
        if (found != sha and not lie) or whole.stat().st_size != size:
            whole.unlink()
            raise Refused(400, f"the parts together have sha256 {found}, not {sha}")
        shutil.rmtree(folder)
        self.store.add_lfs(whole, sha, found)
        return answer({})

    def _lfs_verify(self, ask: Ask) -> Answer:
        wanted = ask.json()
        file = self.store.find(wanted["oid"])
        if file is None or file.size != wanted["size"]:
            raise Refused(404, f"no such object: {wanted['oid']}")
        return answer({})

    def _lfs_duplicate(self, ask: Ask) -> Answer:
        failed = [
            {"sha256": f["sha256"], "error": "not found"}
            for f in ask.json()["files"]
            if self.store.find(f["sha256"]) is None
        ]
        return answer({"failed": failed})

    def _xet_token(self, ask: Ask) -> Answer:
        self._repo(ask)
        cas = (
            self.store.writable(ask.port)
            if ask.fields["what"] == "write"
            else self.store.view(self.folder / "cas")
        )
        token = {"casUrl": f"local://{cas}", "exp": int(time.time()) + 3600, "accessToken": "xet-token"}
        names = {
            "x-xet-cas-url": "casUrl",
            "x-xet-token-expiration": "exp",
            "x-xet-access-token": "accessToken",
        }
        return answer(token, headers={name: str(token[key]) for name, key in names.items()})

    def _commit(self, ask: Ask) -> Answer:
        repo, operations = self._repo(ask), [json.loads(line) for line in ask.body.splitlines() if line]
        header = next(o["value"] for o in operations if o["key"] == "header")
        head, ref = repo.at(ask.fields["rev"]), repo.ref(ask.fields["rev"])
        if not ref.startswith(("refs/heads/", "refs/pr/")) or ref not in repo.refs:
            raise Refused(400, f"{ask.fields['rev']} is no branch")
        if header.get("parentCommit") not in (None, head.oid):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files, wrong = dict(head.files), ask.wrong
        for operation in operations:
            key, value = operation["key"], operation["value"]
            path = value.get("path", "")
            lie = wrong is not None and key in ("file", "lfsFile") and wrong in (path, "")
            wrong = None if lie else wrong
            if key == "file":
                files[path] = self._regular(ask, base64.b64decode(value["content"]), lie=lie)
            elif key == "lfsFile":
                files[path] = self._lfs(value, lie=lie)
            elif key == "deletedFile" and path not in files:
                raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            elif key in ("deletedFile", "deletedFolder"):
                gone = {
                    name
                    for name in files
                    if name == path or (key == "deletedFolder" and name.startswith(f"{path.rstrip('/')}/"))
                }
                files = {name: file for name, file in files.items() if name not in gone}
            elif key != "header":
                raise Refused(400, f"not in this stand-in for the Hub: {key} in a commit")
        url, pull = self._web(repo), None
        if ask.flag("create_pr"):
            pull = self._open(
                repo, ask.user, header["summary"], header.get("description", ""), pull=True, base=head.oid
            )
            ref = f"refs/pr/{pull.num}"
        commit = repo.commit(ref, files, header["summary"], header.get("description", ""), ask.user)
        repo.save()
        pull_url = f"{url}/discussions/{pull.num}" if pull else None
        return answer(
            {
                "success": True,
                "commitOid": commit.oid,
                "commitUrl": f"{url}/commit/{commit.oid}",
                "pullRequestUrl": pull_url,
            }
        )

    def _regular(self, ask: Ask, data: bytes, *, lie: bool) -> File:
        ask.regular_bytes += len(data)
        if lie and data:
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        return self.store.add_regular(data)

    def _lfs(self, value: dict[str, Any], *, lie: bool) -> File:
        file = self.store.find(value["oid"])
        if file is None or value.get("size", file.size) != file.size:
            raise Refused(
                400,
                f"no such object was uploaded: {value['path']} "
                f"with sha256 {value['oid']} and {value.get('size')} bytes",
            )
        if lie:
            copy = self.store.incoming()
            shutil.copyfile(self.store.path(file), copy)
            flip(copy)
            file = lfs_file(sha256_of(copy), file.size)
            self.store.add(copy, file.key)
        return file

    def _tree(self, ask: Ask) -> Answer:
        repo, folder = self._repo(ask), ask.fields.get("path", "")
        commit, prefix = repo.at(ask.fields["rev"]), f"{folder}/" if folder else ""
        below = [path for path in commit.files if path.startswith(prefix)]
        if folder and not below:
            raise Refused(404, f"{folder} does not exist on {ask.fields['rev']}", "EntryNotFound")
        parents = {parent for path in below for parent in _parents(path) if parent.startswith(prefix)}
        paths = sorted(
            path
            for path in {*below, *parents}
            if ask.flag("recursive") or "/" not in path.removeprefix(prefix)
        )
        start, size = (
            int(ask.query.get("cursor", 0)),
            min(self.tree_page, int(ask.query.get("limit", self.tree_page))),
        )
        items = [
            self._entry(repo, commit, path, expand=ask.flag("expand")) for path in paths[start : start + size]
        ]
        return answer(
            items, headers=self._next(ask, "cursor", start + size) if start + size < len(paths) else {}
        )

    def _paths_info(self, ask: Ask) -> Answer:
        repo, form = self._repo(ask), parse_qs(ask.body.decode())
        commit = repo.at(ask.fields["rev"])
        there = {*commit.files, *(parent for path in commit.files for parent in _parents(path))}
        expand = form.get("expand", ["false"])[0].lower() == "true"
        return answer(
            [
                self._entry(repo, commit, path, expand=expand)
                for path in form.get("paths", [])
                if path in there
            ]
        )

    def _entry(self, repo: Repo, commit: Commit, path: str, *, expand: bool) -> dict[str, Any]:
        file = commit.files.get(path)
        entry: dict[str, Any]
        if file is None:
            entry = {
                "type": "directory",
                "oid": hashlib.sha1(path.encode()).hexdigest(),
                "size": 0,
                "path": path,
            }
        else:
            entry = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
        if file and file.sha256:
            entry["lfs"] = {
                "oid": file.sha256,
                "size": file.size,
                "pointerSize": len(pointer(file.sha256, file.size)),
            }
        if file and file.xet:
            entry["xetHash"] = file.xet
        if expand:
            last = repo.last_change(path, commit.oid)
            entry["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
        return entry

    def _next(self, ask: Ask, name: str, value: int) -> dict[str, str]:
        return {"link": f'<{self.url}{ask.raw_path}?{urlencode(ask.query | {name: str(value)})}>; rel="next"'}

    def _resolve(self, ask: Ask) -> Answer:
        repo, path = self._repo(ask), ask.fields["path"]
        commit = repo.at(ask.fields["rev"])
        headers = {
            "x-repo-commit": commit.oid,
            "accept-ranges": "bytes",
            "content-disposition": f"inline; filename*=UTF-8''{quote(path)}",
        }
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound", headers)
        file = commit.files[path]
        headers["etag"] = f'"{file.key}"'
        if file.sha256:
            headers |= {"x-linked-size": str(file.size), "x-linked-etag": f'"{file.sha256}"'}
        if file.xet:
            token = f"{self.url}/api/{repo.kind}/{repo.id}/xet-read-token/{commit.oid}"
            headers |= {"x-xet-hash": file.xet, "link": f'<{token}>; rel="xet-auth"'}
        whole = Answer(self.store.path(file) if ask.method == "GET" else Path(), headers, 200, 0, file.size)
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", ask.headers.get("range", ""))
        if not span or not any(span.groups()):
            return whole
        start, stop = (
            (int(span[1]), int(span[2] or file.size) + 1)
            if span[1]
            else (max(file.size - int(span[2]), 0), file.size)
        )
        if start >= file.size or stop <= start:
            raise Refused(
                416, "Requested Range Not Satisfiable", headers={"content-range": f"bytes */{file.size}"}
            )
        whole.status, whole.start, whole.stop = 206, start, min(stop, file.size)
        headers["content-range"] = f"bytes {start}-{whole.stop - 1}/{file.size}"
        return whole

    # --- refs -----------------------------------------------------------------------------------------------

    def _refs(self, ask: Ask) -> Answer:
        refs = self._repo(ask).refs

        def named(start: str, keep: str) -> list[dict[str, str]]:
            return [
                {"name": ref.removeprefix(keep), "ref": ref, "targetCommit": oid}
                for ref, oid in sorted(refs.items())
                if ref.startswith(start)
            ]

        found: dict[str, Any] = {
            "branches": named("refs/heads/", "refs/heads/"),
            "converts": [],
            "tags": named("refs/tags/", "refs/tags/"),
        }
        return answer(found | ({"pullRequests": named("refs/pr/", "")} if ask.flag("include_prs") else {}))

    def _branch(self, ask: Ask) -> Answer:
        return self._new_ref(
            ask, f"refs/heads/{ask.fields['rev']}", ask.json().get("startingPoint") or "main"
        )

    def _tag(self, ask: Ask) -> Answer:
        return self._new_ref(ask, f"refs/tags/{ask.json()['tag']}", ask.fields["rev"])

    def _new_ref(self, ask: Ask, ref: str, revision: str) -> Answer:
        repo = self._repo(ask)
        if ref in repo.refs:
            raise Refused(409, f"Reference already exists: {ref}")
        repo.refs[ref] = repo.at(revision).oid
        repo.save()
        return answer({})

    def _delete_branch(self, ask: Ask) -> Answer:
        if ask.fields["rev"] == "main":
            raise Refused(403, "main cannot be deleted")
        return self._delete_ref(ask, f"refs/heads/{ask.fields['rev']}")

    def _delete_tag(self, ask: Ask) -> Answer:
        return self._delete_ref(ask, f"refs/tags/{ask.fields['rev']}")

    def _delete_ref(self, ask: Ask, ref: str) -> Answer:
        repo = self._repo(ask)
        if ref not in repo.refs:
            raise Refused(404, f"Invalid rev id: {ref}", "RevisionNotFound")
        del repo.refs[ref]
        repo.save()
        return answer({})

    def _super_squash(self, ask: Ask) -> Answer:
        repo, ref = self._repo(ask), f"refs/heads/{ask.fields['rev']}"
        repo.commit(
            ref, repo.at(ref).files, ask.json().get("message", "Super-squash"), "", ask.user, parents=()
        )
        repo.save()
        return answer({})

    def _commits(self, ask: Ask) -> Answer:
        log, page = self._repo(ask).log(ask.fields["rev"]), int(ask.query.get("p", 0))
        size = min(self.commits_page, int(ask.query.get("limit", self.commits_page)))
        shown = log[page * size : (page + 1) * size]
        items = [
            {
                "id": c.oid,
                "title": c.title,
                "message": c.message,
                "authors": [{"user": c.author}],
                "date": c.date,
            }
            for c in shown
        ]
        return answer(items, headers=self._next(ask, "p", page + 1) if (page + 1) * size < len(log) else {})

    # --- discussions ----------------------------------------------------------------------------------------

    def _open(self, repo: Repo, author: str, title: str, text: str, *, pull: bool, base: str) -> Discussion:
        num = max(repo.discussions, default=0) + 1
        discussion = Discussion(num, title, author, "draft" if pull else "open", pull, now(), base)
        repo.discussions[num] = discussion
        repo.event(discussion, "comment", author, _comment(text))
        if pull:
            repo.refs[f"refs/pr/{num}"] = base
        return discussion

    def _create_discussion(self, ask: Ask) -> Answer:
        repo, wanted = self._repo(ask), ask.json()
        pull = bool(wanted.get("pullRequest"))
        discussion = self._open(
            repo, ask.user, wanted["title"], wanted["description"], pull=pull, base=repo.at("main").oid
        )
        repo.save()
        return answer(
            {
                "num": discussion.num,
                "url": f"{self._web(repo)}/discussions/{discussion.num}",
                "pullRequest": pull,
            }
        )

    def _discussions(self, ask: Ask) -> Answer:
        repo, kind, status = self._repo(ask), ask.query.get("type", "all"), ask.query.get("status", "all")
        found = [
            d for d in sorted(repo.discussions.values(), key=lambda d: -d.num)
            if kind in ("all", "pull_request" if d.is_pull_request else "discussion")
            and status in ("all", "open" if d.status in ("open", "draft") else "closed")
            and ask.query.get("author", d.author) == d.author
        ]  # fmt: skip
        start = int(ask.query.get("p", 0)) * self.discussions_page
        shown = [self._summary(repo, d) for d in found[start : start + self.discussions_page]]
        return answer({"discussions": shown, "count": len(found), "start": start})

    def _summary(self, repo: Repo, d: Discussion) -> dict[str, Any]:
        about = {
            "num": d.num,
            "title": d.title,
            "author": {"name": d.author},
            "status": d.status,
            "isPullRequest": d.is_pull_request,
        }
        return about | {
            "createdAt": d.date,
            "repo": {"name": repo.id, "type": repo.kind[:-1]},
            "pinned": False,
            "numComments": len(d.events),
        }

    def _discussion(self, ask: Ask) -> Answer:
        repo, discussion = self._numbered(ask)
        details = self._summary(repo, discussion) | {"events": discussion.events, "diff": ""}
        if discussion.is_pull_request:
            changes = {"base": "refs/heads/main"} | (
                {"mergeCommitId": discussion.merge_commit} if discussion.merge_commit else {}
            )
            conflicts = [] if discussion.merge_commit else repo.three_way(discussion)[1]
            details |= {"changes": changes, "filesWithConflicts": conflicts}
        return answer(details)

    def _numbered(self, ask: Ask) -> tuple[Repo, Discussion]:
        repo, num = self._repo(ask), int(ask.fields["num"])
        if num not in repo.discussions:
            raise Refused(404, f"Discussion {num} not found")
        return repo, repo.discussions[num]

    def _comment(self, ask: Ask) -> Answer:
        repo, discussion = self._numbered(ask)
        event = repo.event(discussion, "comment", ask.user, _comment(ask.json()["comment"]))
        repo.save()
        return answer({"newMessage": event})

    def _status_change(self, ask: Ask) -> Answer:
        (repo, discussion), wanted = self._numbered(ask), ask.json()
        if discussion.status == "merged" or wanted["status"] not in ("open", "closed"):
            raise Refused(
                400, f"#{discussion.num} is {discussion.status}; it cannot become {wanted['status']}"
            )
        discussion.status = wanted["status"]
        event = repo.event(discussion, "status-change", ask.user, {"status": wanted["status"]})
        if wanted.get("comment"):
            repo.event(discussion, "comment", ask.user, _comment(wanted["comment"]))
        repo.save()
        return answer({"newStatus": event})

    def _title_change(self, ask: Ask) -> Answer:
        repo, discussion = self._numbered(ask)
        event = repo.event(
            discussion, "title-change", ask.user, {"from": discussion.title, "to": ask.json()["title"]}
        )
        discussion.title = ask.json()["title"]
        repo.save()
        return answer({"newTitle": event})

    def _merge(self, ask: Ask) -> Answer:
        repo, discussion = self._numbered(ask)
        if not discussion.is_pull_request or discussion.status != "open":
            raise Refused(
                400, f"#{discussion.num} is {discussion.status}; only an open pull request can be merged"
            )
        files, conflicts = repo.three_way(discussion)
        if conflicts:
            raise Refused(409, f"This pull request has conflicts with main in: {', '.join(conflicts)}")
        commit = repo.commit(
            "refs/heads/main",
            files,
            f"{discussion.title} (#{discussion.num})",
            ask.json().get("comment", ""),
            ask.user,
        )
        discussion.status, discussion.merge_commit = "merged", commit.oid
        repo.event(discussion, "status-change", ask.user, {"status": "merged"})
        repo.save()
        return answer({"mergeCommitId": commit.oid})

    def _dataset_viewer(self, ask: Ask) -> Answer:
        raise Refused(404, "no data set viewer here")


def _comment(text: str) -> dict[str, Any]:
    latest = {"raw": text, "html": text, "updatedAt": now(), "author": {}}
    return {"edited": False, "hidden": False, "latest": latest, "history": []}


def _parents(path: str) -> list[str]:
    return [path[: match.start()] for match in re.finditer("/", path)]


def _id(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()[:24]
