"""From dotted paths in a config to objects."""

import difflib
import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from . import local_modules
from .schema import ConfigError

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def resolve_target(path: str) -> Any:
    """The object at a dotted path: a class, a function, or an attribute of a class.

    What is installed is looked at first, then the folder of the config that was loaded last; see `local_modules`. A
    module there that has the name of an installed one is not used, with a warning.

    Raises:
        ImportError: naming the part that doesn't exist, or that failed to import, and the nearest name.
    """
    parts = path.split(".")
    if len(parts) < 2 or not all(parts):
        raise ImportError(f"_target_ {path!r} is no dotted path such as package.module.Name")
    module, depth = _import_longest(path, parts)
    clash = local_modules.shadowed(parts[0])
    found: Any = module
    for position, name in enumerate(parts[depth:], start=depth):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            where = ".".join(parts[:position])
            nearest = difflib.get_close_matches(name, dir(found), n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            hint += f". {clash}and installed modules win: rename the file" if clash else ""
            raise ImportError(f"_target_ {path!r}: {where} has no {name!r}{hint}") from error
    if clash:
        warnings.warn(f"_target_ {path!r}: {clash}and installed modules win", stacklevel=2)
    return found


def instantiate(config: Mapping[str, Any], **extra: Any) -> Any:
    """Call the `_target_` of a config with its other keys and `extra`.

    Raises:
        ConfigError: if there is no target, or it does not take a key (those it takes are listed, the nearest first).
        ImportError: see `resolve_target`.
    """
    if not config.get("_target_"):
        raise ConfigError(f"there is no _target_ among the keys {', '.join(config) or '(none)'}")
    path = config["_target_"]
    target = resolve_target(path)
    kwargs = {key: value for key, value in config.items() if key != "_target_"} | extra
    _check_keywords(path, target, kwargs)
    return target(**kwargs)


def _import_longest(path: str, parts: list[str]) -> tuple[Any, int]:
    """The module of the longest importable prefix, and how many parts it has."""
    module, depth = None, 0
    if not _is_installed(parts[0]):
        local_modules.offer(parts[0])
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        try:
            module, depth = importlib.import_module(name), end
        except ModuleNotFoundError as error:
            # Missing itself, or importable but missing something that it imports?
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise ImportError(f"_target_ {path!r}: importing {name} failed: {error}") from error
            break
        except SyntaxError as error:
            raise ImportError(f"_target_ {path!r}: importing {name} failed: {error}") from error
    if module is None:
        raise ImportError(f"_target_ {path!r}: there is no package {parts[0]!r}: {local_modules.places(parts[0])}")
    return module, depth


def _is_installed(name: str) -> bool:
    # A module that was made by hand has no spec, for which `find_spec` raises.
    return name in sys.modules or importlib.util.find_spec(name) is not None


def accepted_parameters(target: Any) -> dict[str, inspect.Parameter] | None:
    """The keywords of a callable by name; None where it takes any.

    A class method's `**kwargs` are taken to go on to the same method of the base classes, and then to the constructor:
    of these count the parameters that have a default, as the method gives the others.
    """
    if not (inspect.ismethod(target) and isinstance(target.__self__, type)):
        plain = inspect.signature(target).parameters.values()
        return None if _takes_any(plain) else {p.name: p for p in plain if p.kind in _BY_NAME}
    found: dict[str, inspect.Parameter] = {}
    for name in (target.__name__, "__init__"):
        for kind in (kind for kind in target.__self__.__mro__ if name in vars(kind)):
            definition = vars(kind)[name]
            _, *parameters = inspect.signature(getattr(definition, "__func__", definition)).parameters.values()
            for parameter in parameters:
                is_given = name == "__init__" and parameter.default is parameter.empty
                if parameter.kind in _BY_NAME and not is_given:
                    found.setdefault(parameter.name, parameter)
            if not _takes_any(parameters):
                break
        if name != "__init__" and not _takes_any(parameters):
            break
    return found


def _takes_any(parameters: Iterable[inspect.Parameter]) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _check_keywords(path: str, target: Any, kwargs: Mapping[str, Any]) -> None:
    parameters = accepted_parameters(target)
    if parameters is None:
        return
    accepted = list(parameters)
    for key in kwargs:
        if key not in accepted:
            nearest = difflib.get_close_matches(key, accepted, n=len(accepted), cutoff=0.0)
            raise ConfigError(f"{path} takes no {key!r}; it takes {', '.join(nearest or accepted)}")
    missing = [name for name, p in parameters.items() if p.default is p.empty and name not in kwargs]
    if missing:
        raise ConfigError(f"{path} needs {', '.join(missing)}")
