"""Work that only the main process does and that takes long, without the others waiting in one collective call."""

import concurrent.futures
import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

Result = TypeVar("Result")

# Seconds between two signs of life. NCCL ends a process that waits ten minutes for another by default.
_INTERVAL = 1.0


def start_in_background(work: Callable[[], Result], *, name: str) -> "concurrent.futures.Future[Result]":
    """Run `work` in a thread that doesn't keep the process alive.

    The threads of an executor, such as `HfApi.run_as_future` has, are waited for at the interpreter's end: after a
    Ctrl-C the run would seem to hang until gigabytes are uploaded. What a cut leaves behind is safe, see `export.hub`.
    """
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def on_main_process(accelerator: Accelerator, work: Callable[[], object], *, name: str) -> None:
    """Do `work` on the main process while the others wait, however long it takes; every process has to call this.

    Raises:
        Exception: what `work` raised, on the main process only; the others go on.
    """
    future = start_in_background(work, name=name) if accelerator.is_main_process else None
    while True:
        if future is not None:
            concurrent.futures.wait([future], timeout=_INTERVAL)
        is_done = future is not None and future.done()
        if accelerator.num_processes > 1:
            is_done = bool(accelerator.gather(torch.tensor([int(is_done)], device=accelerator.device)).max())
        if is_done:
            break
    if future is not None:
        future.result()


def raise_everywhere(accelerator: Accelerator, check: Callable[[], None]) -> None:
    """Make a short check on the main process, and stop all processes if it fails; every process has to call this.

    Raises:
        ValueError: on every process, with the message of the one that `check` raised.
    """
    message: str | None = None
    if accelerator.is_main_process:
        try:
            check()
        except ValueError as error:
            message = str(error)
    [message] = broadcast_object_list([message])
    if message is not None:
        raise ValueError(message)
