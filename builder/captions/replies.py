"""What a model said, kept by what made it say it."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from builder.core import Task

# Replies of a row besides the one that it kept.
OTHERS = pa.list_(
    pa.struct(
        [
            ("key", pa.string()),
            ("text", pa.string()),
            ("finish_reason", pa.string()),
            ("tokens", pa.int32()),
            ("prompt_cut", pa.bool_()),
            ("blank", pa.bool_()),
        ]
    )
)


@dataclass(frozen=True)
class Reply:
    """One reply of a model, as it came. `error` is why there is none; such a one is not kept."""

    text: str = ""
    finish_reason: str | None = None
    num_tokens: int | None = None
    prompt_cut: bool = False  # text of the row did not fit into the prompt
    key: str = ""
    error: str = ""


def reply_key(
    model: str, prompt: Sequence[int], sampling: Mapping[str, Any], image_sha256: bytes, attempt: int = 0
) -> str:
    """128 bits of what made a reply: model, prompt as tokens, sampling with its seed, the image that the
    model saw (of nothing: none), attempt.
    """
    made = hashlib.sha256(json.dumps([model, sampling, attempt], sort_keys=True).encode())
    made.update(struct.pack(f"<{len(prompt)}I", *prompt))
    made.update(image_sha256)
    return made.hexdigest()[:32]


class Replies:
    """The replies that a shard has, by key: of outputs under earlier keys, and its journal, which goes on.

    Those of outputs are known by their rows and what they were made of too: no engine is needed for that.
    """

    def __init__(self, task: Task, column: str) -> None:
        assert task.store is not None  # a worker's task has one
        self.known: dict[str, Reply] = {}
        self._of_rows: dict[tuple[str, str, int, bool], str] = {}
        for name in task.earlier:
            for of_row, reply in _of_output(task, name, column):
                self.known[reply.key] = reply
                self._of_rows[of_row] = reply.key
        for line in task.store.journaled(task.journal):
            try:
                reply = Reply(**json.loads(line))
            except (ValueError, TypeError):
                continue  # the machine itself went down
            self.known[reply.key] = reply
        self._journal = task.store.journal(task.journal)

    def add(self, reply: Reply) -> None:
        """Keep a reply, if it is one and a new one."""
        if not reply.error and reply.key not in self.known:
            self.known[reply.key] = reply
            self._journal.add(json.dumps(vars(reply)))

    def of_row(self, made_of: str, uid: str, attempt: int, blank: bool) -> Reply | None:
        key = self._of_rows.get((made_of, uid, attempt, blank))
        return self.known[key] if key else None

    def close(self) -> None:
        self._journal.close()


def _of_output(task: Task, name: str, column: str) -> Iterator[tuple[tuple[str, str, int, bool], Reply]]:
    """((made of, uid, attempt, blank), reply) of what an earlier output holds; nothing where it was made by
    other code, or is damaged.
    """
    columns = ["uid", column, f"{column}_finish_reason", f"{column}_num_tokens", "reply", "reply_key"]
    more = ("other_replies", "made_of", f"{column}_prompt_cut")
    try:
        file = pq.ParquetFile(task.files[name])
        names = file.schema_arrow.names
        if not set(columns) <= set(names):
            return
        rows = file.read(columns=columns + [one for one in more if one in names]).to_pylist()
    except (pa.ArrowException, OSError, KeyError):
        return
    for row in rows:
        of_row = row.get("made_of") or "", row["uid"]
        others = [other for other in row.get("other_replies") or () if not other["blank"]]
        for attempt, other in enumerate(others):
            yield (*of_row, attempt, False), _other(other)
        for other in (other for other in row.get("other_replies") or () if other["blank"]):
            yield (*of_row, 0, True), _other(other)
        if key := row["reply_key"]:
            text = row["reply"] if row["reply"] is not None else row[column]
            cut = bool(row.get(f"{column}_prompt_cut"))
            reply = Reply(text or "", row[columns[2]], row[columns[3]], cut, key)
            yield (*of_row, len(others), False), reply


def _other(row: Mapping[str, Any]) -> Reply:
    return Reply(row["text"], row["finish_reason"], row["tokens"], row["prompt_cut"], row["key"])
