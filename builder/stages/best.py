"""best: of several captions of a row the one that is nearest to the image (arXiv 2307.10350, section 3).

Reads   the captions, and a score stage that has their cosines.
Writes  `<shard>.parquet`: uid, status, error, the caption with its columns, its cosine, whether the model's
        context cut it, and which one it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from builder.core import Identifier, Stage, Status, Task, Work
from builder.errors import RecipeError
from builder.files import read_rows, write_parquet

_ENDS = (
    ("finish_reason", pa.string()),
    ("num_tokens", pa.int32()),
    ("defects", pa.string()),
    ("rejected", pa.string()),
    ("blind", pa.bool_()),
)


@dataclass(frozen=True, kw_only=True)
class Best(Stage):
    """`of` are captions before it, `by` the score stage that decides; of equal ones the first is taken."""

    name: Identifier = "re_caption"
    of: tuple[Identifier, ...]
    by: str = "score"

    def after(self, earlier: tuple[Stage, ...]) -> Stage:
        """Raises:
        RecipeError: there is no such score stage, or it does not score them all.
        """
        made = {name for stage in earlier for name in stage.makes_captions()}
        by = (name for stage in earlier if stage.name == self.by for name in stage.makes_scores())
        scored = [name for name in by if name in made]
        for missing in (name for name in self.of if name not in scored):
            reason = f"stage {self.name} takes the best of '{missing}' and others by '{self.by}'"
            raise RecipeError(f"{reason}, which does not score it", "put a score stage that does before it")
        if len(self.of) < 2:
            raise RecipeError(f"stage {self.name} takes the best of {len(self.of)}", "name two captions")
        return self

    def reads(self) -> tuple[str, ...]:
        return (*self.of, self.by)

    def names_captions(self) -> tuple[str, ...]:
        return self.of

    def makes_captions(self) -> tuple[str, ...]:
        return (self.name,)

    def makes_scores(self) -> tuple[str, ...]:
        return (self.name,)

    @contextmanager
    def open(self) -> Iterator[Work]:
        yield self.choose

    def choose(self, task: Task) -> Mapping[str, int]:
        name = self.name
        fields = [(column, pa.string()) for column in ("uid", "status", "error", name)]
        fields += [(f"{name}_{end}", kind) for end, kind in _ENDS]
        fields += [
            (f"{name}_cosine", pa.float64()),
            (f"{name}_cut", pa.bool_()),
            (f"{name}_from", pa.string()),
        ]
        schema = pa.schema(fields)
        given = [read_rows(task.input(one), self._columns(one)) for one in self.of]
        scores = [f"{one}_{column}" for one in self.of for column in ("cosine", "cut")]
        table = []
        scored = read_rows(task.input(self.by), ["uid", "status", "error", *scores])
        for score, *captions in zip(scored, *given, strict=True):
            row = {column: score[column] for column in ("uid", "status", "error")}
            if row["status"] == Status.OK:
                row |= self._best(score, captions)
            table.append({field: row.get(field) for field in schema.names})
        write_parquet(pa.Table.from_pylist(table, schema), task.output())
        return Counter(str(row["status"]) for row in table)

    def _columns(self, caption: str) -> list[str]:
        return ["uid", caption, *(f"{caption}_{end}" for end, _ in _ENDS)]

    def _best(self, score: Mapping[str, Any], captions: list[Mapping[str, Any]]) -> dict[str, Any]:
        if any(caption["uid"] != score["uid"] for caption in captions):
            raise ValueError("the captions and their scores do not hold the same rows")
        scored = [n for n, one in enumerate(self.of) if score[f"{one}_cosine"] is not None]
        if not scored:
            return {"status": str(Status.CAPTION_FAILED), "error": "none of its captions has a cosine"}
        best = max(scored, key=lambda n: (score[f"{self.of[n]}_cosine"], -n))
        of, name, row = self.of[best], self.name, captions[best]
        found = {f"{name}_{end}": row[f"{of}_{end}"] for end, _ in _ENDS}
        found |= {f"{name}_{column}": score[f"{of}_{column}"] for column in ("cosine", "cut")}
        return found | {name: row[of], f"{name}_from": of}
