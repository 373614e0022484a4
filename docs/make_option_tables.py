"""Write the option tables of the documentation from the typed fields, so that they can't go stale.

A page holds a table between two comments, `<!-- options: module.Class prefix -->` and `<!-- end of options -->`; what
is between them is replaced. With `--check` nothing is written and the exit status tells whether all is up to date.

    python docs/make_option_tables.py
"""

import argparse
import importlib
import json
import re
import sys
import types
import typing
from collections.abc import Iterator
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
    if origin in (list, tuple):
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


def table(module: str, name: str, prefix: str) -> str:
    """The table of one model's fields."""
    kind = getattr(importlib.import_module(module), name)
    return "\n".join(["", "| key | type | default | meaning |", "|---|---|---|---|", *rows(kind, prefix), "", ""])


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
