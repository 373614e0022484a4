"""Early checks of the keys that go to classes: a typo stops a run before any model is loaded."""

import inspect
import warnings
from collections.abc import Iterator, Mapping

from pydantic import BaseModel

from .instantiate import accepted_parameters, resolve_target
from .schema import ConfigError, OpenSection, RunConfig
from .validation import unknown_key

# Parameters that the library sets itself, and the key that each follows from.
_MODEL_RESERVED = {"text_length": "training.data.text_length"}
_OPTIMIZER_RESERVED = {"params": "models.<name>.trainable", "lr": "learning_rate"}


def check_targets(config: RunConfig) -> None:
    """Compare the free keys of models, optimizer and callbacks with the signatures of their targets.

    Raises:
        ConfigError: naming the dotted key and the nearest known one; with `allow_unknown_keys` a warning, and
            the key is dropped.
        ImportError: naming the section whose `_target_` can't be imported.
    """
    problems = []
    for where, target, section, reserved in _open_sections(config):
        unknown = _unknown_keys(where, target, section, reserved)
        problems += [message for _, message in unknown]
        if config.allow_unknown_keys:
            for key, message in unknown:
                warnings.warn(f"{message}; the key is ignored", stacklevel=3)
                assert section.model_extra is not None
                del section.model_extra[key]
    if problems and not config.allow_unknown_keys:
        raise ConfigError("\n".join(problems))


def options_class_of(target: str, *, where: str) -> type[BaseModel]:
    """The options class of a method.

    Raises:
        ConfigError: if the target is no method.
    """
    kind = _resolve(where, target)
    if not hasattr(kind, "options_class"):
        raise ConfigError(f"{where}={target!r} is no training method; see fv_distill.methods")
    return kind.options_class


def describe_callbacks(config: RunConfig) -> str:
    """The options of a config's callbacks with type and default, from the signatures of their classes.

    Raises:
        ConfigError: for a callback that is neither built in nor has a target.
        ImportError: for a target that doesn't exist.
    """
    lines = []
    for name in config.callbacks:
        target = _callback_target(config, name)
        kind = _resolve(f"callbacks.{name}", target)
        summary = (inspect.getdoc(kind) or "").split("\n", 1)[0]
        lines += ["", f"options of callbacks.{name} ({target}): {summary}", ""]
        for parameter in inspect.signature(kind).parameters.values():
            if parameter.name != "training_config":
                lines.append(f"  callbacks.{name}.{_describe_parameter(parameter)}")
    return "\n".join(lines)


def _describe_parameter(parameter: inspect.Parameter) -> str:
    if parameter.kind is parameter.VAR_KEYWORD:
        return "*  (any, optional)"
    default = "required" if parameter.default is parameter.empty else f"default {parameter.default!r}"
    kind = "" if parameter.annotation is parameter.empty else f"{inspect.formatannotation(parameter.annotation)}, "
    return f"{parameter.name}  ({kind}{default})"


def _callback_target(config: RunConfig, name: str) -> str:
    from fv_distill.callbacks.base import BUILT_IN

    target = config.callbacks[name].target or BUILT_IN.get(name)
    if target is None:
        raise ConfigError(
            f"callbacks.{name} has no _target_ and is not built in; built-in names: {', '.join(BUILT_IN)}"
        )
    return target


def _open_sections(config: RunConfig) -> Iterator[tuple[str, str, OpenSection, Mapping[str, str]]]:
    for role, model in config.models.items():
        yield f"models.{role}", f"{model.target}.from_pretrained", model, _MODEL_RESERVED
    optimizer = config.training.optimizer
    yield "training.optimizer", optimizer.target, optimizer, _OPTIMIZER_RESERVED
    for name, callback in config.callbacks.items():
        yield f"callbacks.{name}", _callback_target(config, name), callback, {}


def _unknown_keys(where: str, target: str, section: OpenSection, reserved: Mapping[str, str]) -> list[tuple[str, str]]:
    extras = section.model_extra or {}
    if not extras:
        return []
    parameters = accepted_parameters(_resolve(where, target))
    if parameters is None:
        return []
    accepted = set(parameters) - set(reserved)
    fields = [field.alias or name for name, field in type(section).model_fields.items()]
    known = [*fields, *sorted(accepted - set(fields))]
    return [
        (key, f"unknown key {where}.{key}; it follows from {reserved[key]}")
        if key in reserved
        else (key, unknown_key(f"{where}.{key}", known))
        for key in extras
        if key not in accepted
    ]


def _resolve(where: str, target: str) -> type:
    try:
        return resolve_target(target)
    except ImportError as error:
        raise ImportError(f"{where}: {error}") from error
