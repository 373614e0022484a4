"""Pydantic's findings in our words: the dotted key, the value, what is allowed, the nearest known key."""

import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from .describe import all_keys, fields_at
from .schema import ConfigError

Validated = TypeVar("Validated", bound=BaseModel)


@dataclass(frozen=True)
class _Problem:
    """One finding of pydantic; `keys` is its location without the names of union members."""

    kind: str
    message: str
    given: Any
    location: tuple[Any, ...]
    keys: tuple[str, ...]

    @property
    def within_union(self) -> bool:
        return len(self.keys) < len(self.location)


def validate(kind: type[Validated], data: Mapping[str, Any], *, prefix: str = "", lenient: bool = False) -> Validated:
    """`kind.model_validate` with errors in our words.

    Args:
        kind: the pydantic model.
        data: plain values.
        prefix: dotted key of `data` in the config.
        lenient: warn of unknown keys and drop them.

    Raises:
        ConfigError: one line per problem.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        problems = [_problem(item, data) for item in error.errors()]
        unknown = [problem for problem in problems if problem.kind == "extra_forbidden"]
        if lenient and unknown:
            for problem in unknown:
                warnings.warn(f"{_describe([problem], kind, prefix)}; the key is ignored", stacklevel=2)
            pruned = _without(data, [problem.location for problem in unknown])
            return validate(kind, pruned, prefix=prefix, lenient=lenient)
        lines = [_describe(group, kind, prefix) for group in _grouped(problems)]
        raise ConfigError("\n".join(lines)) from error


def unknown_key(path: str, siblings: Sequence[str], elsewhere: Sequence[str] = ()) -> str:
    """What to say of an unknown key.

    Args:
        path: its dotted path.
        siblings: the keys that are known beside it, one of which is suggested if it is near.
        elsewhere: dotted paths, one of which is suggested if it ends in nearly the same name.
    """
    name = path.rsplit(".", 1)[-1]
    nearest = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if nearest:
        return f"unknown key {path}; did you mean {nearest[0]}?"
    by_name = {other.rsplit(".", 1)[-1]: other for other in elsewhere}
    nearest = difflib.get_close_matches(name, by_name, n=1, cutoff=0.8)
    if nearest:
        return f"unknown key {path}; did you mean {by_name[nearest[0]]}?"
    ordered = sorted(siblings, key=lambda other: -difflib.SequenceMatcher(None, name, other).ratio())
    return f"unknown key {path}; known keys here, the nearest first: {', '.join(ordered)}"


def _problem(item: Any, data: Any) -> _Problem:
    keys, inner = [], data
    for position, part in enumerate(item["loc"]):
        is_key = isinstance(inner, Mapping) and part in inner
        is_index = isinstance(inner, list | tuple) and isinstance(part, int) and part < len(inner)
        if is_key or is_index:
            keys.append(str(part))
            inner = inner[part]
        elif item["type"] == "missing" and position == len(item["loc"]) - 1:
            keys.append(str(part))
    return _Problem(item["type"], item["msg"], item["input"], tuple(item["loc"]), tuple(keys))


def _grouped(problems: Sequence[_Problem]) -> list[list[_Problem]]:
    """Problems by key; of a union's members only those that came furthest."""
    groups: dict[tuple[str, ...], list[_Problem]] = {}
    for problem in problems:
        deeper = any(other.keys[: len(problem.keys)] == problem.keys != other.keys for other in problems)
        if not (problem.within_union and deeper):
            groups.setdefault(problem.keys, []).append(problem)
    return list(groups.values())


def _describe(group: Sequence[_Problem], kind: type[BaseModel], prefix: str) -> str:
    problem = group[0]
    path = ".".join([prefix, *problem.keys] if prefix else problem.keys)
    if problem.kind == "extra_forbidden":
        return unknown_key(path, fields_at(kind, problem.location[:-1]), all_keys(kind, prefix))
    if problem.kind == "missing":
        return f"{path} is missing; the config has to set it"
    messages = [_in_our_words(other.message.removeprefix("Value error, ")) for other in group]
    shown = f"{path}={problem.given!r}" if _is_short(problem.given) else path
    return f"{shown or 'the config'}: {', or '.join(dict.fromkeys(messages))}"


def _is_short(value: Any) -> bool:
    return isinstance(value, str | int | float | list | tuple | type(None)) and len(repr(value)) < 200


def _in_our_words(message: str) -> str:
    return message[:1].lower() + message[1:].replace("valid dictionary", "mapping")


def _without(data: Mapping[str, Any], locations: Sequence[Sequence[Any]]) -> dict[str, Any]:
    first = {location[0] for location in locations if len(location) == 1}
    deeper = {key: [location[1:] for location in locations if location[0] == key and len(location) > 1] for key in data}
    return {
        key: _without(value, deeper[key]) if deeper[key] else value for key, value in data.items() if key not in first
    }
