"""How fast a run is: step time, samples and operations per second, utilisation, memory, time left."""

import json
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch

from fv_distill.hardware import peak_flops

from .base import Callback
from .call_meter import CallMeter
from .options import require_integer

if TYPE_CHECKING:
    from fv_distill.training.trainer import Trainer

THROUGHPUT_FILE = "throughput.jsonl"


@dataclass(frozen=True)
class _Step:
    """One step on this process: its time, and its operations without and with recomputation."""

    seconds: float
    needed: float
    performed: float


class ThroughputCallback(Callback):
    """Every `every_steps` steps, log the speed of the last `window` steps to the trackers and to `throughput.jsonl`.

    Times are no part of `metrics.jsonl`, whose lines follow from the config alone. A step's time goes from the end of
    the last step to its own: loading data, logging and saving are in it, validation isn't. The run's first step counts
    for nothing. Networks are counted by `CallMeter`; the loss, the optimizer and text encoders are not.

    Args:
        every_steps: how often.
        window: the number of last steps that the figures are over.
        peak_tflops: a device's peak in 1e12 dense FLOP/s; None looks known accelerators up (`fv_distill.hardware`).

    Raises:
        ValueError: for a number that isn't positive.
    """

    def __init__(self, every_steps: int = 10, window: int = 50, peak_tflops: float | None = None) -> None:
        self.every_steps = require_integer("callbacks.throughput.every_steps", every_steps, at_least=1)
        self.window = require_integer("callbacks.throughput.window", window, at_least=1)
        if peak_tflops is not None and not peak_tflops > 0:
            raise ValueError(f"callbacks.throughput.peak_tflops={peak_tflops!r} must be positive, or null")
        self._peak = None if peak_tflops is None else peak_tflops * 1e12
        self._steps: deque[_Step] = deque(maxlen=window)
        self._meters: list[CallMeter] = []
        self._mark: float | None = None
        self._paused_at = 0.0
        self._file: TextIO | None = None

    def on_train_start(self, trainer: "Trainer") -> None:
        """Count the calls of every network, of one that two roles share once."""
        networks = {id(model.transformer): model.transformer for model in trainer.models.values()}
        self._meters = [CallMeter(network) for network in networks.values()]
        if self._peak is None:
            self._peak = _known_peak(trainer)

    def on_validation_begin(self, trainer: "Trainer") -> None:
        """Stop the clock."""
        self._paused_at = time.perf_counter()
        for meter in self._meters:
            meter.enabled = False

    def on_validation_end(self, trainer: "Trainer") -> None:
        """Go on."""
        if self._mark is not None:
            self._mark += time.perf_counter() - self._paused_at
        for meter in self._meters:
            meter.enabled = True

    def on_training_step_end(self, trainer: "Trainer", metrics: Mapping[str, float]) -> None:
        """Take the time, and log when it is due."""
        now = time.perf_counter()
        if self._mark is not None:
            needed = sum(meter.needed for meter in self._meters)
            performed = sum(meter.performed for meter in self._meters)
            self._steps.append(_Step(now - self._mark, needed, performed))
        self._mark = now
        for meter in self._meters:
            meter.reset()
        is_due = trainer.step % self.every_steps == 0 or trainer.step == trainer.config.training.loop.max_train_steps
        if is_due and self._steps:
            self._log(trainer)

    def on_close(self, trainer: "Trainer") -> None:
        """Take the hooks off and close the file."""
        for meter in self._meters:
            meter.detach()
        if self._file is not None:
            self._file.close()

    def _log(self, trainer: "Trainer") -> None:
        accelerator = trainer.accelerator
        seconds = sum(step.seconds for step in self._steps)
        own = [
            sum(step.needed for step in self._steps),
            sum(step.performed for step in self._steps),
            peak_memory_bytes(accelerator.device),
        ]
        everyone = accelerator.gather(torch.tensor([own], device=accelerator.device, dtype=torch.float32))
        if not accelerator.is_main_process:
            return
        needed, performed = everyone[:, :2].mean(dim=0).tolist()
        mean = seconds / len(self._steps)
        values = {
            "step_seconds_median": statistics.median(step.seconds for step in self._steps),
            "step_seconds_mean": mean,
            "samples_per_second": trainer.plan.global_batch_size / mean,
            "tflops_per_device": performed / seconds / 1e12,
            "peak_memory_gb": everyone[:, 2].max().item() / 1e9,
            "eta_seconds": mean * (trainer.config.training.loop.max_train_steps - trainer.step),
        }
        if self._peak is not None:
            values |= {"mfu": needed / seconds / self._peak, "hfu": performed / seconds / self._peak}
        values = {f"throughput/{name}": value for name, value in values.items()}
        accelerator.log(values, step=trainer.step)
        if self._file is None:
            self._file = (Path(trainer.config.training.output_dir) / THROUGHPUT_FILE).open("a")
        self._file.write(json.dumps({"step": trainer.step, "time": time.time(), **values}) + "\n")
        self._file.flush()


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held: of the accelerator, or of the host where there is none."""
    if device.type != "cpu":
        return torch.get_device_module(device).max_memory_allocated(device)
    import resource

    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _known_peak(trainer: "Trainer") -> float | None:
    """The rated peak of this process's device in the type that the student computes in; None if it isn't known."""
    device = trainer.accelerator.device
    if device.type != "cuda":
        return None
    dtype = trainer.models["student"].dtype if "student" in trainer.models else torch.float32
    name = "bfloat16" if trainer.accelerator.mixed_precision == "bf16" else str(dtype)
    if name.endswith("float32") and torch.get_float32_matmul_precision() != "highest":
        name = "tfloat32"
    return peak_flops(torch.cuda.get_device_name(device), name)
