"""Which route a request means, the request as handlers read it, and what they answer."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hub.store import Refused

_REPO = r"/api/(?P<kind>datasets|models)/(?P<repo>[^/]+/[^/]+)"
_GIT = r"/(?:(?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+)"
_PULL = _REPO + r"/discussions/(?P<num>\d+)"
ROUTES = [(name, method, re.compile(pattern)) for name, method, pattern in (
    ("whoami", "GET", "/api/whoami-v2"), ("validate_yaml", "POST", "/api/validate-yaml"),
    ("create_repo", "POST", "/api/repos/create"), ("delete_repo", "DELETE", "/api/repos/delete"),
    ("info", "GET", _REPO + "(?:/revision/(?P<rev>[^/]+))?"),
    ("preupload", "POST", _REPO + "/preupload/(?P<rev>[^/]+)"),
    ("lfs_batch", "POST", _GIT + r"\.git/info/lfs/objects/batch"),
    ("lfs_put", "PUT", r"/lfs/(?P<sha>\w{64})/(?P<size>\d+)"),
    ("lfs_part", "PUT", r"/lfs/(?P<sha>\w{64})/(?P<size>\d+)/(?P<id>\w+)/(?P<part>\d+)"),
    ("lfs_complete", "POST", r"/lfs/(?P<sha>\w{64})/(?P<size>\d+)/(?P<id>\w+)"),
    ("lfs_verify", "POST", "/lfs/verify"), ("lfs_duplicate", "POST", _REPO + "/lfs-files/duplicate"),
    ("xet_token", "GET", _REPO + "/xet-(?P<what>read|write)-token/(?P<rev>[^/]+)"),
    ("commit", "POST", _REPO + "/commit/(?P<rev>[^/]+)"),
    ("super_squash", "POST", _REPO + "/super-squash/(?P<rev>[^/]+)"),
    ("branch", "POST", _REPO + "/branch/(?P<rev>[^/]+)"),
    ("delete_branch", "DELETE", _REPO + "/branch/(?P<rev>[^/]+)"),
    ("tag", "POST", _REPO + "/tag/(?P<rev>[^/]+)"), ("delete_tag", "DELETE", _REPO + "/tag/(?P<rev>[^/]+)"),
    ("refs", "GET", _REPO + "/refs"), ("commits", "GET", _REPO + "/commits/(?P<rev>[^/]+)"),
    ("tree", "GET", _REPO + "/tree/(?P<rev>[^/]+)(?:/(?P<path>.*))?"),
    ("paths_info", "POST", _REPO + "/paths-info/(?P<rev>[^/]+)"),
    ("discussions", "GET", _REPO + "/discussions"), ("create_discussion", "POST", _REPO + "/discussions"),
    ("discussion", "GET", _PULL), ("comment", "POST", _PULL + "/comment"),
    ("status_change", "POST", _PULL + "/status"), ("title_change", "POST", _PULL + "/title"),
    ("merge", "POST", _PULL + "/merge"), ("resolve", "GET", _GIT + "/resolve/(?P<rev>[^/]+)/(?P<path>.+)"),
    ("dataset_viewer", "GET", "/(?:info|parquet)"),
)]  # fmt: skip
NO_TOKEN = {
    "lfs_put",
    "lfs_part",
    "lfs_complete",
    "paths_info",
}  # signed addresses, and a POST that only reads


@dataclass
class Ask:
    """A request, read."""

    method: str
    raw_path: str
    fields: dict[str, str]
    query: dict[str, str]
    headers: Any
    port: int  # of the client
    user: str = ""
    body: bytes = b""
    upload: Path | None = None  # the body of a PUT
    sha256: str = ""  # of the upload
    regular_bytes: int = 0  # contents that came in a commit
    wrong: str | None = None  # store a flipped byte; in a commit in this path, or "" in the first file

    def json(self) -> Any:
        return json.loads(self.body or b"null") or {}

    def flag(self, name: str) -> bool:
        return self.query.get(name, "").lower() in ("1", "true")


@dataclass
class Answer:
    body: bytes | Path
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200
    start: int = 0  # of a file: the part to send
    stop: int = 0


def answer(data: object, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    return Answer(json.dumps(data).encode(), {"content-type": "application/json"} | (headers or {}), status)


def refusal(refused: Refused) -> Answer:
    headers = {
        "x-error-message": refused.message.replace("\n", " ").encode("ascii", "replace").decode(),
        **refused.headers,
    }
    return answer(
        {"error": refused.message},
        refused.status,
        headers | ({"x-error-code": refused.code} if refused.code else {}),
    )
