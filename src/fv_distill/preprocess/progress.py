"""How far the work is: a bar with the time left at a terminal, a line now and then in a log."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fv_distill.console import console

_LINE_SECONDS = 30.0
Report = Callable[[int, int], None]
"""Called with the number of things done so far and of those skipped."""

Value = TypeVar("Value")


@contextmanager
def progress(name: str, total: int, *, num_ranks: int, enabled: bool) -> Iterator[Report]:
    """Report on `total` things that `num_ranks` processes share evenly, from the share of this one.

    Args:
        name: of the work.
        total: over all processes.
        num_ranks: processes.
        enabled: whether this process reports.
    """
    if not enabled or not total:
        yield lambda done, skipped: None
    elif console.is_terminal:
        skipped_column = TextColumn("{task.fields[skipped]}")
        columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), skipped_column)
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(name, total=total, skipped="")
            yield lambda done, skipped: bar.update(
                task,
                completed=min(total, done * num_ranks),
                skipped=f"{skipped * num_ranks} skipped" if skipped else "",
            )
    else:
        yield _lines(name, total, num_ranks)


def _lines(name: str, total: int, num_ranks: int) -> Report:
    start = last = time.monotonic()

    def report(done: int, skipped: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _LINE_SECONDS:
            return
        last = now
        known = min(total, done * num_ranks)
        rate = known / (now - start)
        left = f", {timedelta(seconds=round((total - known) / rate))} left" if rate else ""
        also = f", {skipped * num_ranks} skipped" if skipped else ""
        console.print(f"{name}: {known} of {total}{also}, {rate:.2f}/s{left}", highlight=False, markup=False)

    return report


def counted(values: Iterable[Value], report: Report) -> Iterator[Value]:
    """The values, each reported on once it has been worked on."""
    for done, value in enumerate(values, start=1):
        yield value
        report(done, 0)
