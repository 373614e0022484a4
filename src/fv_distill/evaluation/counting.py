"""What a network does while a clip is made: calls counted by hooks, the noise it starts from, time and memory."""

import hashlib
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class NetworkCalls:
    """Seen by the hooks of one run.

    Attributes:
        rows: of all inputs together; a network called with a clip and its unconditional twin counts two.
        started: when the first call began, `time.perf_counter`.
        noise: the rows of the first call's input, in the network's dtype.
    """

    rows: int = 0
    started: float | None = None
    noise: list[Tensor] = field(default_factory=list)


@contextmanager
def watch_calls(networks: Iterable[nn.Module], device: torch.device) -> Iterator[NetworkCalls]:
    """Count the calls of networks within the block."""
    seen = NetworkCalls()

    def before_call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # By name in diffusers' video transformers, by place in its UNets.
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if seen.started is None:
            # What the text encoder has queued is not the network's work.
            synchronize(device)
            seen.started = time.perf_counter()
            seen.noise = list(latents.detach().cpu())
        seen.rows += len(latents)

    handles = [network.register_forward_pre_hook(before_call, with_kwargs=True) for network in networks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def synchronize(device: torch.device) -> None:
    """Wait for an accelerator; a CPU is never behind."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def fingerprint(noise: Tensor) -> str:
    """A name for a tensor's values and shape."""
    values = noise.detach().cpu().contiguous()
    digest = hashlib.blake2b(values.reshape(-1).view(torch.uint8).numpy().tobytes(), digest_size=8)
    digest.update(str((tuple(values.shape), values.dtype)).encode())
    return digest.hexdigest()


class PeakMemory:
    """The peak from `reset` on: allocated on an accelerator; on a CPU, the process's resident memory (Linux)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._resets = True

    def reset(self) -> None:
        """Begin anew."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._device.type == "cpu" and _CLEAR.exists():
            try:
                # "5" resets VmHWM, see proc_pid_clear_refs(5).
                _CLEAR.write_text("5")
            except OSError:
                # Some containers forbid it, and the peak since the process began is another thing.
                self._resets = False

    def read(self) -> int | None:
        """Bytes; None where nothing measures it."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if self._device.type == "cpu" and _STATUS.exists() and self._resets:
            lines = _STATUS.read_text().splitlines()
            peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
            return peaks[0] if peaks else None
        return None
