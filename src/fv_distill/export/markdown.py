"""Values from users as Markdown: whatever they hold, they stay one piece of text in their place."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

# What may start emphasis, links, code, HTML, headings, table cells or a nested list.
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!$])")


def text(value: str) -> str:
    """Plain text on one line."""
    return _SPECIAL.sub(r"\\\1", _one_line(value))


def code(value: str) -> str:
    """Code on one line, also inside a table."""
    value = _one_line(value)
    # A fence longer than any run of backticks inside; a space where one stands at an end.
    fence = "`" * (max((len(run) for run in re.findall(r"`+", value)), default=0) + 1)
    space = " " if value.startswith("`") or value.endswith("`") else ""
    return f"{fence}{space}{value}{space}{fence}".replace("|", "\\|")


def image(caption: str, path: str) -> str:
    """A picture beside the card."""
    return f"![{text(caption)}]({quote(path)})"


def video(path: str) -> str:
    """A film beside the card."""
    return f'<video controls loop muted src="{html.escape(quote(path))}"></video>'


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of named scalars; a column for each name that has a value anywhere, in the order in which they appear."""
    names = dict.fromkeys(key for row in rows for key, value in row.items() if _is_scalar(value))
    lines = [_line([text(name.replace("_", " ")) for name in names]), "|---" * len(names) + "|"]
    lines += [_line([_cell(row.get(name)) for name in names]) for row in rows]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _cell(value: Any) -> str:
    if not _is_scalar(value):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else text(str(value))


def _one_line(value: str) -> str:
    return " ".join(value.split())
