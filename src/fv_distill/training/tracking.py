"""What a run leaves to look at: tracker entries, `metrics.jsonl`, the resolved config and a progress bar."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fv_distill.config.load import dump_run_config
from fv_distill.config.schema import RunConfig
from fv_distill.console import console

from .durable_files import append_line, replace_durably, sync
from .sessions import write_session
from .sigma_losses import NUM_BINS, SIGMA_LOSSES_FILE, SigmaLossWindow
from .trackers import start_trackers

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "resolved_config.yaml"

# Seconds between lines when the output is a file and a bar can't redraw itself.
_LINE_INTERVAL = 10.0


class RunLog:
    """Logs on the main process; the others only keep the trackers' calls in step.

    Args:
        accelerator: its trackers are used.
        config: the run's config, written to the output directory and to the trackers.
    """

    def __init__(self, accelerator: Accelerator, config: RunConfig) -> None:
        self.accelerator = accelerator
        self.config = config
        self.options = config.training.tracker
        self.directory = Path(config.training.output_dir)
        self.sigma_losses = SigmaLossWindow(self.options.sigma_losses_every_steps)
        self._progress: Progress | None = None
        self._bad_rows = 0
        self._last_line = 0.0
        self._step = 0

    def start(self, step: int, max_steps: int) -> None:
        """Open trackers and the progress bar; metrics beyond the resumed step are dropped."""
        if self.accelerator.is_main_process:
            self.directory.mkdir(parents=True, exist_ok=True)
            replace_durably(self.directory / CONFIG_FILE, dump_run_config(self.config))
            _keep_until(self.directory / METRICS_FILE, step)
            _keep_until(self.directory / SIGMA_LOSSES_FILE, step)
        write_session(self.accelerator, self.directory, step=step)
        start_trackers(self.accelerator, self.config, step=step)
        if self.accelerator.is_main_process and sys.stdout.isatty():
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[losses]}"),
                console=console,
            )
            self._progress.start()
            self._progress.add_task("training", total=max_steps, completed=step, losses="")
        self._max_steps, self._start_step, self._start_time = max_steps, step, time.monotonic()
        self._step = step

    def step(self, step: int, metrics: Mapping[str, float], *, num_bad_rows: int) -> None:
        """Log a finished step."""
        self._step = step
        self._bad_rows += num_bad_rows
        window = self.sigma_losses.close_if_due(step)
        if num_bad_rows:
            self.warn(f"step {step}: {num_bad_rows} bad rows were replaced ({self._bad_rows} so far on this process)")
        if not self.accelerator.is_main_process:
            return
        values = {**metrics, **({"data/bad_rows": self._bad_rows} if self._bad_rows else {})}
        append_line(self.directory / METRICS_FILE, {"step": step, **values})
        if window is not None:
            append_line(self.directory / SIGMA_LOSSES_FILE, window)
            self.accelerator.log(_scalars(window), step=step)
        if step % self.options.log_every_steps == 0:
            self.accelerator.log(values, step=step)
        self._show(step, metrics)

    def sync(self) -> None:
        """Put the metrics so far on the disk for good."""
        for name in (METRICS_FILE, SIGMA_LOSSES_FILE):
            if (path := self.directory / name).is_file():
                sync(path)

    def warn(self, message: str) -> None:
        """Print a warning on the main process."""
        if self.accelerator.is_main_process:
            console.print(f"[yellow]warning:[/yellow] {message}")

    def finish(self) -> None:
        """Close the progress bar and write the window that is open; `accelerator.end_training` closes the trackers."""
        window = self.sigma_losses.line(self._step)
        if self.accelerator.is_main_process and window is not None:
            append_line(self.directory / SIGMA_LOSSES_FILE, {**window, "partial": True})
        if self._progress is not None:
            self._progress.stop()

    def _show(self, step: int, metrics: Mapping[str, float]) -> None:
        losses = "  ".join(f"{name}={value:.4g}" for name, value in metrics.items() if name.startswith("loss/"))
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step, losses=losses)
            return
        now = time.monotonic()
        if now - self._last_line >= _LINE_INTERVAL or step == self._max_steps:
            self._last_line = now
            per_step = (now - self._start_time) / max(1, step - self._start_step)
            eta = per_step * (self._max_steps - step)
            console.print(f"step {step}/{self._max_steps}  {losses}  {per_step:.2f} s/step  eta {eta:.0f} s")


def _keep_until(path: Path, step: int) -> None:
    """Drop lines of later steps and open windows, which a resumed run writes again, and half lines, of a kill."""
    if path.is_file():
        # A crash of the machine can leave bytes that are no text.
        lines = path.read_text(errors="replace").splitlines(keepends=True)
        replace_durably(path, "".join(line for line in lines if _is_kept(line, step)))


def _is_kept(line: str, step: int) -> bool:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        # A power failure can leave anything; what it hit is lost either way.
        return False
    return line.endswith("\n") and entry["step"] <= step and not entry.get("partial", False)


def _scalars(window: Mapping[str, Any]) -> dict[str, float]:
    """A window as trackers take it, `loss_by_sigma/critic/0.3` for [0.3, 0.4)."""
    return {
        f"loss_by_sigma/{name}/{index / NUM_BINS:.1f}": loss
        for name, bins in window.items()
        if name != "step"
        for index, loss in enumerate(bins["loss"])
        if loss is not None
    }
