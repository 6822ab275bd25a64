"""Data that may come from anybody, as types."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from builder.errors import InputError, RecipeError

T = TypeVar("T")


def parse(kind: type[T], value: Any, *, what: str) -> T:
    """`value`, from JSON or from a command line's string, as a `kind`.

    Raises:
        RecipeError: with the field and what was expected there.
    """
    try:
        checked: T = _adapter(kind).validate_python(value)
        return checked
    except ValidationError as error:
        raise RecipeError(f"{what}: {first_error(error)}") from error


def from_json(kind: type[T], text: str | bytes, *, what: str) -> T:
    """JSON that may come from anybody, as a `kind`.

    Raises:
        InputError: with what was expected, and where.
    """
    try:
        checked: T = _adapter(kind).validate_json(text)
        return checked
    except ValidationError as error:
        reason = f"{what} cannot be used: {first_error(error)}"
        raise InputError(reason, "get it again from where it was published") from error


_adapters: dict[Any, TypeAdapter[Any]] = {}


def _adapter(kind: Any) -> TypeAdapter[Any]:
    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind]


def first_error(error: ValidationError) -> str:
    """The first thing that is wrong, in one line."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part)[:80] for part in first["loc"][:5])
    if first["type"] == "json_invalid":  # of a file that is no JSON nothing is told: it may be any file
        return str(first["msg"])[:200]
    got = repr(first["input"])
    got = got if len(got) <= 80 else f"{got[:77]}..."
    return f"{place + ': ' if place else ''}{first['msg'][:200]} (got {got})"
