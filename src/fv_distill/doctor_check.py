"""One finding of the doctor."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Check:
    """What was looked at, how it is, and for what isn't well what to do."""

    name: str
    status: Literal["ok", "warning", "error"]
    detail: str
    fix: str = ""
