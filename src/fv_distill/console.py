"""What a person at a terminal sees."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

console = Console()

USER_ERRORS = (
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    ImportError,
)


@contextmanager
def exit_on_user_error(*, debug: bool) -> Iterator[None]:
    """Turn errors that a user can mend into one message and exit status 2; `debug` lets the traceback through."""
    try:
        yield
    except USER_ERRORS as error:
        if debug:
            raise
        print(f"error: {error}\n(--debug shows the traceback)", file=sys.stderr)
        raise SystemExit(2) from None
