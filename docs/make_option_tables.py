"""Write the option tables of the documentation from the typed fields, so that they can't go stale.

A page holds a table between two comments, `<!-- options: module.Class prefix -->` and `<!-- end of options -->`; what
is between them is replaced. The class is a pydantic model, or any other one whose constructor's parameters are the
options, with their meanings under `Args:` in its docstring. With `--check` nothing is written and the exit status tells
whether all is up to date.

    python docs/make_option_tables.py
"""

import argparse
import importlib
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

DOCS = Path(__file__).resolve().parent
MARKERS = re.compile(r"(<!-- options: (\S+)\.(\w+) (\S*) ?-->\n)(.*?)(<!-- end of options -->)", re.DOTALL)


def type_name(annotation: Any) -> str:
    """A type as a reader of YAML would call it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if argument is type(None) else type_name(argument) for argument in arguments)
    if origin in (list, tuple, Sequence):
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return f"mapping of {type_name(arguments[0])} to {type_name(arguments[1])}"
    return getattr(annotation, "__name__", str(annotation))


def default_of(field: FieldInfo) -> str:
    """The default as it would stand in YAML."""
    if field.is_required():
        return "required"
    value = field.default
    return "null" if value is None else f"`{json.dumps(value)}`"


def rows(kind: type[BaseModel], prefix: str) -> Iterator[str]:
    """A table row for each field, those of nested sections under their dotted keys."""
    for name, field in kind.model_fields.items():
        key, annotation = f"{prefix}{field.alias or name}", field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from rows(annotation, f"{key}.")
        else:
            meaning = (field.description or "").replace("|", r"\|")
            yield f"| `{key}` | {type_name(annotation)} | {default_of(field)} | {meaning} |"


def parameter_rows(kind: type, prefix: str) -> Iterator[str]:
    """A table row for each parameter of a constructor."""
    meanings = described_arguments(inspect.getdoc(kind) or "")
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            yield f"| `{prefix}*` | any | none | {meanings[name]} |"
            continue
        default = "required" if parameter.default is parameter.empty else f"`{json.dumps(parameter.default)}`"
        default = "null" if parameter.default is None else default
        yield f"| `{prefix}{name}` | {type_name(parameter.annotation)} | {default} | {meanings[name]} |"


def described_arguments(docstring: str) -> dict[str, str]:
    """The entries of a docstring's `Args:` section, each in one line."""
    section = re.search(r"^Args:\n((?: +.*\n?)+)", docstring, re.MULTILINE)
    entries = re.findall(r"^    (\w+): ((?:.*\n?)(?:^ {8}.*\n?)*)", section[1] if section else "", re.MULTILINE)
    # As a reader of YAML knows it, and as the typed fields' descriptions end.
    plain = ((name, re.sub(r"\bNone\b", "null", " ".join(text.split())).rstrip(".")) for name, text in entries)
    return {name: text.replace("|", r"\|") for name, text in plain}


def table(module: str, name: str, prefix: str) -> str:
    """The table of one model's fields."""
    kind = getattr(importlib.import_module(module), name)
    made = rows(kind, prefix) if issubclass(kind, BaseModel) else parameter_rows(kind, prefix)
    return "\n".join(["", "| key | type | default | meaning |", "|---|---|---|---|", *made, "", ""])


def updated(text: str) -> str:
    """A page with its tables made anew."""
    return MARKERS.sub(lambda match: f"{match[1]}{table(match[2], match[3], match[4])}{match[6]}", text)


def main() -> None:
    """Rewrite or check every page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    check = parser.parse_args().check
    stale = []
    for page in sorted(DOCS.glob("*.md")):
        before = page.read_text(encoding="utf-8")
        after = updated(before)
        if after != before:
            stale.append(page.name)
            if not check:
                page.write_text(after, encoding="utf-8")
    if stale:
        print(f"{'out of date' if check else 'written'}: {', '.join(stale)}")
    if check and stale:
        sys.exit("run python docs/make_option_tables.py")


if __name__ == "__main__":
    main()
