"""The keys of a config as text, for `--help`, and as names, for suggestions."""

import json
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fv_distill.methods.options import OPTIONS_BY_TARGET

from .schema import RunConfig

_WIDTH = 118


def describe_keys(method_targets: Sequence[str] = ()) -> str:
    """Every key with type, default and meaning; the options of the given methods, or of all."""
    lines = ["config keys, each of which can be overridden as --dotted.key VALUE:", ""]
    lines += _describe_model(RunConfig, "")
    known = [target for target in method_targets if target in OPTIONS_BY_TARGET]
    for target in known or OPTIONS_BY_TARGET:
        lines += ["", f"options of {target}:", ""]
        lines += _describe_model(OPTIONS_BY_TARGET[target], "method.")
    return "\n".join(lines)


def all_keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """The dotted keys of a model and of those inside it; `<name>` stands for the keys of a mapping."""
    keys = []
    for name, field in kind.model_fields.items():
        key = f"{prefix}.{field.alias or name}" if prefix else field.alias or name
        nested = _nested_model(field.annotation)
        keys += [key] if nested is None else all_keys(nested, f"{key}.<name>" if _is_mapping(field) else key)
    return keys


def fields_at(kind: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """The keys that are known at a dotted place below a model."""
    inner: Any = kind
    for part in location:
        nested = _nested_model(inner)
        if nested is None:
            continue
        field = nested.model_fields.get(part)
        inner = field.annotation if field is not None else inner
    nested = _nested_model(inner)
    return [] if nested is None else [field.alias or name for name, field in nested.model_fields.items()]


def _describe_model(kind: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        nested = _nested_model(field.annotation)
        if nested is None:
            yield from _describe_field(key, field)
        else:
            yield from _describe_model(nested, f"{key}.<name>." if _is_mapping(field) else f"{key}.")
    if kind.model_config.get("extra") == "allow":
        yield f"  {prefix}*  (any, optional)"
        yield "      handed to the class that _target_ names, and checked against its signature"


def _describe_field(key: str, field: FieldInfo) -> Iterator[str]:
    default = "required" if field.is_required() else f"default {_show(field.default)}"
    yield f"  {key}  ({_type_name(field.annotation)}, {default})"
    yield from textwrap.wrap(field.description or "", _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _is_mapping(field: FieldInfo) -> bool:
    return typing.get_origin(field.annotation) is dict


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    """The model inside an annotation: itself, or the value type of a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) is dict:
        return _nested_model(typing.get_args(annotation)[1])
    return None


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "|".join(str(argument) for argument in arguments)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if argument is type(None) else _type_name(argument) for argument in arguments)
    if origin in (list, tuple):
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"mapping of {_type_name(arguments[0])} to {_type_name(arguments[1])}"
    return getattr(annotation, "__name__", str(annotation))


def _show(value: Any) -> str:
    if value is None:
        return "null"
    return json.dumps(value) if isinstance(value, bool | str | list | tuple) else repr(value)
