"""What can go wrong, as types.

RecapError
├── OutdatedError     outputs that have to be made again before a task can be done: they are, in the next pass
├── ShardError        one shard cannot be done, nor if tried again: recorded, named, the others go on (exit 1)
└── UserError         the user must change something: one line, and the next command to type (exit 2)
    ├── RecipeError   an unknown recipe, parameter or setting, or a value of the wrong type
    ├── InputError    metadata, a model folder or a run directory that cannot be used as it is
    └── VersionError  a version that exists with other bytes, or a run that is not ready to be published
        ├── DamagedError  a file that no longer has the bytes that it was made with
        └── MovedError    a version came to the target while another one was put together for it

A failed row is none of these: it is a `Status` in the data. Whatever else a shard raises is tried again, then
recorded.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


class RecapError(Exception):
    """Base of everything that recapkit raises on purpose."""


class ShardError(RecapError):
    """What is wrong with one shard's input, with the file's and the column's name."""


class OutdatedError(RecapError):
    """`names` are objects that were made from what is no longer so."""

    def __init__(self, message: str, names: Sequence[str]) -> None:
        super().__init__(message)
        self.names = tuple(names)


class UserError(RecapError):
    """The user must change something. `hint` is what to type next."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class RecipeError(UserError): ...


class InputError(UserError): ...


class VersionError(UserError): ...


class DamagedError(VersionError): ...


class MovedError(VersionError): ...


@contextmanager
def telling_of_a_full_disk(*places: object) -> Iterator[None]:
    """Whatever a library makes of it, a full disk is the user's to free.

    Raises:
        InputError: the disk of one of `places` is full.
    """
    try:
        yield
    except Exception as error:
        if any(words in str(error) for words in ("No space left on device", "Disk quota exceeded")):
            told = error.filename if isinstance(error, OSError) else None
            where = told or next((place for place in places if _is_full(place)), places[0])
            hint = "free some space, then type the same command again"
            raise InputError(f"the disk of {where} is full", hint) from error
        raise


def _is_full(place: object) -> bool:
    with suppress(OSError):
        return shutil.disk_usage(str(place)).free < 1 << 20
    return False


def named(place: object) -> object:
    """A path or a URL for `command`."""
    return str(place) if "://" in str(place) else Path(str(place))


def command(*words: object) -> str:
    """A command to type, quoted for a shell; a path that begins with a dash is no option."""
    texts = (
        f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word) for word in words
    )
    return shlex.join(texts)
