"""Ending a run on request: after SIGTERM or SIGINT the present step is finished, saved, and nothing is lost."""

import signal
import threading
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Remembers that one of the two signals came, while used as a context; a SIGINT after it acts as it always did.

    A SIGTERM may come twice and means the same: SLURM sends one to every process, and so does the launcher that gets
    one itself.

    Signals reach processes at different moments. `agreed` lets all of them stop after the same step, wherever one came.
    Python allows handlers in the main thread only; elsewhere the signals keep their usual effect.

    Args:
        accelerator: of the run.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._received = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def agreed(self) -> str | None:
        """The name of the signal that any process has received, or None; every process gets the same answer."""
        received = self._received
        if self._accelerator.num_processes > 1:
            everyones = self._accelerator.gather(torch.tensor([received], device=self._accelerator.device))
            received = int(everyones.max())
        return signal.Signals(received).name if received else None

    def _remember(self, number: int, _: FrameType | None) -> None:
        self._received = number
        if signal.SIGINT in self._previous:
            signal.signal(signal.SIGINT, self._previous.pop(signal.SIGINT))

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
