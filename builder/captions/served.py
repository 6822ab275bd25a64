"""A model behind an endpoint that speaks OpenAI's chat completions, for every column that it makes.

The server tokenizes: text of the row goes to it with special tokens broken up, and cut by characters.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from builder.captions.asking import BROKEN_UP, TOKENS, Asking, Job, Ready, Request
from builder.captions.endpoint import Ask, Endpoint
from builder.captions.kinds import PLACEHOLDER, Kind
from builder.captions.replies import Reply, reply_key
from builder.captions.special_tokens import joined, specials_of

if TYPE_CHECKING:
    from builder.stages.caption import Caption

MAX_QUOTED_CHARACTERS = 2_000  # of each text of the row: some 500 tokens of English


class Served(Asking):
    """One model at one endpoint, and the columns that it makes; the first says where it is."""

    def __init__(self, *columns: Caption) -> None:
        """Raises:
        InputError: it cannot be reached, has not the model, or does not take a column's request.
        """
        settings = columns[0]
        super().__init__(settings.in_flight, len(columns))
        folder = Path(settings.model)  # a server that was given a folder calls its model so
        self.specials = specials_of(folder if folder.is_dir() else None)
        self.made_by = settings.made_by()
        self.endpoint = Endpoint(
            settings.endpoint,
            settings.model,
            concurrency=settings.in_flight,
            max_total_tokens=settings.max_total_tokens,
        )
        try:
            self.endpoint.check()
            blank = io.BytesIO()
            Image.new("RGB", (64, 64)).save(blank, "JPEG")
            for column in columns:
                text, *_ = self.text(column, dict.fromkeys(column.quotes(), ""))
                picture = blank.getvalue() if column.image else None
                short = column.sampling("") | {"max_tokens": 1, "min_tokens": 0}
                self.endpoint.try_out(Ask(0, text, picture, short))
        except BaseException:
            self.endpoint.close()
            raise

    def text(self, kind: Kind, row: Mapping[str, object]) -> tuple[str, bool, int]:
        """The message for a row, whether text of the row was cut, and how many special tokens were in it."""
        parts, cut = [], False
        for number, part in enumerate(PLACEHOLDER.split(kind.prompt)):
            text = str(row[part]) if number % 2 else part
            cut = cut or (number % 2 == 1 and len(text) > MAX_QUOTED_CHARACTERS)
            parts.append((text[:MAX_QUOTED_CHARACTERS] if number % 2 else text, number % 2 == 0))
        message, broken = joined(parts, self.specials)
        return message, cut, broken

    def prepare(self, job: Job, requests: Sequence[Request]) -> None:
        for request in requests:
            if job.kind.image and request.image is None:
                job.came(request, Reply(error="its image is not in the tar"))
                continue
            text, cut, broken = self.text(job.kind, request.row)
            job.counts[BROKEN_UP] += broken
            sampling = job.kind.sampling(request.uid, request.attempt)
            sha256 = bytes.fromhex(request.sha256)
            key = reply_key(self.made_by, text.encode("utf-8", "replace"), sampling, sha256, request.attempt)
            if known := job.known.get(key):
                job.came(request, known)
            else:
                job.ready.append(Ready(request, key, cut, sampling, text))

    def put(self, name: str, ready: Ready) -> Reply | None:
        self.endpoint.add(Ask(int(name), ready.prompt, ready.request.image, ready.sampling))
        return None

    def step(self) -> Iterator[tuple[str, Reply]]:
        for answer in self.endpoint.step():
            job, ready = self.asked[str(answer.id)]
            job.counts[TOKENS] += (answer.prompt_tokens or 0) + (answer.num_tokens or 0)
            if answer.error:
                yield str(answer.id), Reply(error=answer.error)
            else:
                said = answer.text, answer.finish_reason, answer.num_tokens
                yield str(answer.id), Reply(*said, ready.prompt_cut, ready.key)

    def abort(self, names: Sequence[str]) -> None:
        everything = len(names) == len(self.asked)
        self.endpoint.abort(None if everything else {int(name) for name in names})

    def close(self) -> None:
        self.endpoint.close()
