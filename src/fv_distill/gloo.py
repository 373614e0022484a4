"""Processes that talked through gloo end well."""

import atexit
import time

import torch.distributed as dist

_SECONDS = 0.25


def await_gloo_at_exit() -> None:
    """Let gloo's threads finish before the interpreter ends; called where a process has joined its groups.

    A gloo thread drops a collective's tensors a moment after the collective has returned, and needs Python's lock for
    it. Asking for the lock of an interpreter that is being finalized aborts the process, whose work is done and saved:
    "terminate called without an active exception", status -6 (https://github.com/pytorch/pytorch/issues/190489).
    Leaving the groups doesn't end these threads, as others hold references to them.
    """
    if dist.is_initialized():
        atexit.unregister(_wait)
        atexit.register(_wait)


def _wait() -> None:
    time.sleep(_SECONDS)
