"""What a model said, kept by what made it say it."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from builder.core import Task


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
    model: str, prompt: Sequence[int], sampling: Mapping[str, Any], image: bytes, attempt: int = 0
) -> str:
    """128 bits of what made a reply: model, prompt as tokens, sampling with its seed, the image that the
    model saw, attempt.
    """
    made = hashlib.sha256(json.dumps([model, sampling, attempt], sort_keys=True).encode())
    made.update(struct.pack(f"<{len(prompt)}I", *prompt))
    made.update(hashlib.sha256(image).digest())
    return made.hexdigest()[:32]


class Replies:
    """The replies that a shard has, by key: of outputs under earlier keys, and its journal, which goes on."""

    def __init__(self, task: Task, column: str) -> None:
        assert task.store is not None  # a worker's task has one
        self.known: dict[str, Reply] = {}
        for name in task.earlier:
            self.known |= _of_output(task, name, column)
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

    def close(self) -> None:
        self._journal.close()


def _of_output(task: Task, name: str, column: str) -> dict[str, Reply]:
    """Replies that an earlier output holds; none where it was made by other code, or is damaged."""
    columns = [column, f"{column}_finish_reason", f"{column}_num_tokens", "reply", "reply_key"]
    try:
        rows = pq.read_table(task.files[name], columns=columns).to_pylist()
    except (pa.ArrowException, OSError, KeyError):
        return {}
    found = {}
    for row in (row for row in rows if row.get("reply_key")):
        text = row["reply"] if row["reply"] is not None else row[column]
        found[row["reply_key"]] = Reply(text or "", row[columns[1]], row[columns[2]], key=row["reply_key"])
    return found
