"""From what a user typed to a recipe: a name, `my_file.py:function` or a recipe.json, and key=value pairs."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_type_hints

from builder.core import Recipe
from builder.errors import RecipeError, UserError, command
from builder.files import read_file
from builder.store import store_of
from builder.typed import from_json, parse

Kind = TypeVar("Kind")


def resolve(text: str, settings: Iterable[str] = ()) -> Recipe:
    """The recipe that `text` names.

    `settings` are parameters of its function, `rows=500`, or of a stage, `download.timeout_s=5`.

    Raises:
        RecipeError: an unknown name, parameter or setting, or a value of the wrong type.
    """
    pairs = pairs_of(settings)
    of_stages = {key: pairs.pop(key) for key in list(pairs) if "." in key}
    if text.endswith(".json"):
        if pairs:
            reason = f"a recipe.json has no parameter '{next(iter(pairs))}'"
            raise RecipeError(reason, "name the stage: download.timeout_s=5")
        recipe = Recipe.from_json(_read(text), text)
    else:
        recipe = _call(text, *_find(text, "recipes.datasets", Recipe, "recipe.json"), pairs, Recipe, "build")
    return _with_stage_settings(recipe, of_stages)


def resolve_training(what: str, text: str, settings: Iterable[str], kind: type[Kind]) -> Kind:
    """The training of a `what`, `clip`, that `text` names: a function of recipes/WHAT/trainings.py, or
    `my_file.py:function`, with these parameters; or a training.json, with its own settings changed. Raises
    as `resolve`.
    """
    pairs = pairs_of(settings)
    if text.endswith(".json"):
        training: Any = from_json(kind, read_file(Path(text)), what=text)
        hints = get_type_hints(kind)
        for key in (key for key in pairs if key not in hints):
            raise _unknown(f"training {text}", "setting", key, hints)
        given = {key: _value(hints[key], value, key) for key, value in pairs.items()}
        changed: Kind = replace(training, **given)
        return changed
    found = _find(text, f"recipes.{what}.trainings", kind, "training.json")
    return _call(text, *found, pairs, kind, f"train {what}")


def _read(text: str) -> bytes:
    """A recipe.json, of a run wherever it is.

    Raises:
        RecipeError: it is not there.
    """
    if "://" not in text:
        return read_file(Path(text))
    folder, _, name = text.rpartition("/")
    data = store_of(folder).read(name)
    if data is None:
        raise RecipeError(f"{text} is not there", "name a recipe.json that is: RUN/recipe.json")
    return data


def resolve_benchmark(text: str, settings: Iterable[str], kind: type[Kind]) -> Kind:
    """The benchmark that `text` names: a function of recipes/evaluate/benchmarks.py, or of a file of the
    user's. Raises as `resolve`.
    """
    found = _find(text, "recipes.evaluate.benchmarks", kind)
    return _call(text, *found, pairs_of(settings), kind, "eval MODEL")


def recipe_functions(module: ModuleType, kind: type) -> dict[str, Callable[..., Any]]:
    """Public functions of a module that return a recipe of this kind."""
    functions = inspect.getmembers(module, inspect.isfunction)
    return {
        n: f
        for n, f in functions
        if not n.startswith("_")
        and f.__module__ == module.__name__
        and get_type_hints(f).get("return") is kind
    }


def _find(text: str, ours: str, kind: type, file: str = "") -> tuple[str, Callable[..., Any]]:
    path, _, name = text.rpartition(":")
    with _telling_of_users_code(path):
        module = _load(Path(path)) if path else importlib.import_module(ours)
        functions = recipe_functions(module, kind)
    if name not in functions:
        where = f" in {path}" if path else ""
        raise RecipeError(
            f"there is no recipe '{name}'{where}",
            f"there are: {', '.join(functions)}; "
            f"or my_file.py:function (public, -> {kind.__name__})" + (f", or a {file}" if file else ""),
        )
    return name, functions[name]


def _load(path: Path) -> ModuleType:
    """Import a user's file under its own name, so that worker processes can import it too."""
    if not path.is_file():
        raise RecipeError(f"there is no file {path}", "name it as my_file.py:function")
    path = path.resolve()
    sys.path.insert(0, str(path.parent))
    module = importlib.import_module(path.stem)
    if Path(module.__file__ or "").resolve() != path:
        sys.path.remove(str(path.parent))
        reason = f"{path} has the name of a module that is loaded already"
        raise RecipeError(reason, "give the file another name")
    return module


@contextmanager
def _telling_of_users_code(path: str) -> Iterator[None]:
    """Where a user's own file goes wrong, in one line.

    Raises:
        RecipeError: with the file and the line.
    """
    try:
        yield
    except UserError as error:
        raise type(error)(
            f"{path}: {error.message}" if path and path not in error.message else error.message, error.hint
        ) from error
    except (Exception, SystemExit) as error:
        if not path:
            raise
        last = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename).name == Path(path).name
        ]
        line = error.lineno if isinstance(error, SyntaxError) else last[-1] if last else None
        raise RecipeError(
            f"{path}{f', line {line}' if line else ''}: {type(error).__name__}: {error}", "mend the file"
        ) from error


def pairs_of(settings: Iterable[str]) -> dict[str, str]:
    """`key=value` each.

    Raises:
        RecipeError: one is not, or a key is given twice.
    """
    pairs: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise RecipeError(f"'{setting}' is not key=value", "for example: rows_per_shard=1000")
        if key in pairs:
            raise RecipeError(
                f"'{key}' is given twice", f"leave one of them out: {key}={pairs[key]} or {key}={value}"
            )
        pairs[key] = value
    return pairs


def _call(
    text: str,
    name: str,
    function: Callable[..., Any],
    pairs: Mapping[str, str],
    kind: type[Kind],
    verb: str,
) -> Kind:
    parameters, hints = inspect.signature(function).parameters, get_type_hints(function)
    for key in pairs:
        if key not in parameters:
            raise _unknown(f"recipe {text}", "parameter", key, parameters)
    missing = [
        key
        for key, parameter in parameters.items()
        if parameter.default is parameter.empty and key not in pairs
    ]
    if missing:
        raise RecipeError(
            f"recipe {text} needs {', '.join(missing)}",
            f"{command('recap', *verb.split(), text)} " + " ".join(f"{key}=..." for key in missing),
        )
    with _telling_of_users_code(text.rpartition(":")[0]):
        recipe = function(**{key: _value(hints.get(key, str), value, key) for key, value in pairs.items()})
    if not isinstance(recipe, kind):
        article = "return Recipe(name, stages)" if kind is Recipe else f"return {kind.__name__}(...)"
        raise RecipeError(f"{text} returned {type(recipe).__name__}, not a {kind.__name__}", article)
    return recipe


def _with_stage_settings(recipe: Recipe, pairs: Mapping[str, str]) -> Recipe:
    """`download.timeout_s=5` names a stage; `caption.dtype=float32` all of that kind."""
    stages = {stage.name: stage for stage in recipe.stages}
    for key, value in pairs.items():
        name, _, setting = key.partition(".")
        of_kind = [other for other, stage in stages.items() if type(stage).__name__.lower() == name]
        chosen = [name] if name in stages else of_kind or [recipe.stage(name).name]
        for each in chosen:
            stage = stages[each]
            known = {field.name for field in fields(stage)} - {"name"}
            if setting not in known:
                raise _unknown(f"stage {name}", "setting", setting, known)
            hint = get_type_hints(type(stage))[setting]
            stages[each] = replace(stage, **{setting: _value(hint, value, key)})
    return replace(recipe, stages=tuple(stages.values()))


def _value(hint: Any, text: str, key: str) -> Any:
    """A command line's string as a value: tuples are separated by commas, `none` is None."""
    if is_dataclass(hint):
        raise RecipeError(
            f"{key} has parts and cannot be given as key=value",
            "write a recipe function: my_file.py:function",
        )
    if text.lower() == "none" and type(None) in getattr(hint, "__args__", ()):
        return None
    if getattr(hint, "__origin__", None) is tuple:
        return parse(hint, tuple(part for part in text.split(",") if part), what=key)
    return parse(hint, text, what=key)


def _unknown(owner: str, kind: str, key: str, known: Iterable[str]) -> RecipeError:
    known = list(known)
    close = difflib.get_close_matches(key, known, 1)
    return RecipeError(
        f"{owner} has no {kind} '{key}'",
        f"did you mean {close[0]}?" if close else f"there are: {', '.join(sorted(known))}",
    )
