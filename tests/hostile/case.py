"""What a case is, and the folder in which one is prepared."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from conftest import CAPTIONER, CLIP

Place = str | re.Pattern[str]
Json = Any
JPG = "http://a.example/1.jpg"
TABLE = {
    "uid": [f"{n:032x}" for n in (1, 2, 3)],
    "url": [f"http://a.example/{n}.jpg" for n in (1, 2, 3)],
    "text": ["a cat", "two dogs", "three birds"],
}


@dataclass(frozen=True)
class Outcome:
    """How a command ended. `code` is None where it hung and was killed."""

    code: int | None
    out: str
    err: str
    cpu_s: float


@dataclass(frozen=True)
class Case:
    """A mistake or a misfortune: how it comes about, and what a user is told of it.

    `prepare` makes it in an empty folder and returns the arguments of `recap`. `place` is what the message must name: the file, the setting,
    the line. With more than one `code`, each of them would do. `also` asserts what else matters; a few cases are also run as a `real` process.
    """

    name: str
    prepare: Callable[[Situation], Sequence[object]]
    place: Place | tuple[Place, ...] = ()
    code: int | tuple[int, ...] = 2
    env: Mapping[str, str] = field(default_factory=dict)
    stdin: bytes = b""
    also: Callable[[Situation, Outcome], None] | None = None
    after_progress: bool = False  # shards that are done may be told of first
    real: bool = False

    @property
    def places(self) -> tuple[Place, ...]:
        return self.place if isinstance(self.place, tuple) else (self.place,)

    @property
    def codes(self) -> tuple[int, ...]:
        return self.code if isinstance(self.code, tuple) else (self.code,)


@dataclass(frozen=True)
class Situation:
    """An empty folder, and copies of the finished run and of what it published."""

    here: Path
    finished: Path

    def file(self, name: str | os.PathLike[str], content: bytes | str | Json = b"") -> Path:
        """A file of bytes, of text or, of anything else, JSON. One that is there is replaced, not written to: it may be a link."""
        path = self.here / name
        if not isinstance(content, bytes | str):
            content = json.dumps(content)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def parquet(
        self, name: str = "t.parquet", columns: Mapping[str, Any] | pa.Table | None = None, **more: Any
    ) -> Path:
        """A small table with uid, url and text; `columns` instead of them, `more` besides or in their place."""
        path = self.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(
            columns
            if isinstance(columns, pa.Table)
            else pa.table({**(TABLE if columns is None else columns), **more}),
            path,
        )
        return path

    def run(self, name: str = "run") -> Path:
        """A finished run."""
        others = shutil.ignore_patterns(
            ".duckdb-*", ".lock"
        )  # of a test that looks at it just now, and one file for all copies
        return Path(shutil.copytree(self.finished, self.here / name, ignore=others, copy_function=os.link))

    def target(self, name: str = "published") -> Path:
        """A folder with the version 0.1.0."""
        return Path(
            shutil.copytree(published(self.finished), self.here / name, copy_function=os.link, symlinks=True)
        )

    def version(self) -> Path:
        return self.target() / "v0.1.0"

    def recipe(self, text: str, name: str = "mine.py") -> Path:
        return self.file(name, text)

    def captioner(self, **damage: bytes | str | Json | None) -> Path:
        return self._model(CAPTIONER, "captioner", damage)

    def clip(self, **damage: bytes | str | Json | None) -> Path:
        return self._model(CLIP, "clip", damage)

    def _model(self, original: Path, name: str, damage: Mapping[str, Any]) -> Path:
        """A copy of a model's folder with other contents of the files named `config__json`; without those for which None is given."""
        folder = Path(shutil.copytree(original, self.here / name, copy_function=os.link))
        for key, content in damage.items():
            file = folder / key.replace("__", ".")
            if content is None:
                file.unlink()
            else:
                self.file(file, content)
        return folder


def published(run: Path) -> Path:
    return run.with_name(f"{run.name}-published")


def line(number: int) -> re.Pattern[str]:
    return re.compile(rf"\bline:? {number}\b|:{number}\b", re.IGNORECASE)


def either(*texts: str) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)))


SOURCE_ONLY = """
from builder.core import Recipe
from builder.stages.source import Source


def rows(*, metadata: str) -> Recipe:
    return Recipe("rows", (Source(files=metadata, rows_per_shard=100),))
"""


def build_rows(s: Situation, metadata: object, *settings: object) -> list[object]:
    """Build the shards of a table and nothing else."""
    return [
        "build",
        f"{s.recipe(SOURCE_ONLY, 'only_rows.py')}:rows",
        f"metadata={metadata}",
        *settings,
        "--run",
        s.here / "run",
    ]


def plan_rows(s: Situation, metadata: object, *settings: object) -> list[object]:
    return [
        "plan",
        f"{s.recipe(SOURCE_ONLY, 'only_rows.py')}:rows",
        f"metadata={metadata}",
        *settings,
        "--run",
        s.here / "run",
    ]


def of_datacomp(
    command: str, s: Situation, *settings: object, captioner: object = CAPTIONER, clip: object = CLIP
) -> list[object]:
    """Plan or build the whole line over a small table."""
    models = [f"captioner={captioner}", f"clip={clip}"]
    return [
        command,
        "recap_datacomp_1b",
        f"metadata={s.parquet()}",
        *models,
        *settings,
        "--run",
        s.here / "run",
    ]


def named(kind: str, cases: Iterable[Case]) -> list[Case]:
    return [Case(**{**vars(case), "name": f"{kind}: {case.name}"}) for case in cases]
