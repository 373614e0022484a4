"""Checks of callbacks' options, in messages that name the key."""

from typing import Any


def require_integer(key: str, value: Any, *, at_least: int) -> int:
    """The value, if it is an integer that is large enough.

    Raises:
        ValueError: naming key, value and the smallest one that is allowed.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{key}={value!r} must be an integer of at least {at_least}")
    return value


def require_boolean(key: str, value: Any) -> bool:
    """The value, if it is true or false; a word such as "no" would otherwise count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{key}={value!r} must be true or false")
    return value
