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

from .durable_files import replace_durably, sync

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
        self._progress: Progress | None = None
        self._bad_rows = 0
        self._last_line = 0.0

    def start(self, step: int, max_steps: int) -> None:
        """Open trackers and the progress bar; metrics beyond the resumed step are dropped."""
        if self.accelerator.is_main_process:
            self.directory.mkdir(parents=True, exist_ok=True)
            replace_durably(self.directory / CONFIG_FILE, dump_run_config(self.config))
            _keep_until(self.directory / METRICS_FILE, step)
        if self.options.trackers:
            flat = _flatten(self.config.model_dump(mode="json", by_alias=True)) | {"yaml": self.config.source_text}
            init_kwargs = {"wandb": {"name": self.options.run_name}} if self.options.run_name else {}
            self.accelerator.init_trackers(self.options.project_name, config=flat, init_kwargs=init_kwargs)
            self._attach_yaml()
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

    def step(self, step: int, metrics: Mapping[str, float], *, num_bad_rows: int) -> None:
        """Log a finished step."""
        self._bad_rows += num_bad_rows
        if num_bad_rows:
            self.warn(f"step {step}: {num_bad_rows} bad rows were replaced ({self._bad_rows} so far on this process)")
        if not self.accelerator.is_main_process:
            return
        values = {**metrics, **({"data/bad_rows": self._bad_rows} if self._bad_rows else {})}
        # One write without a buffer: a kill leaves a line whole or, at worst, the last one cut off, never two mixed.
        with (self.directory / METRICS_FILE).open("ab", buffering=0) as file:
            file.write((json.dumps({"step": step, **values}) + "\n").encode())
        if step % self.options.log_every_steps == 0:
            self.accelerator.log(values, step=step)
        self._show(step, metrics)

    def sync(self) -> None:
        """Put the metrics so far on the disk for good."""
        if (path := self.directory / METRICS_FILE).is_file():
            sync(path)

    def warn(self, message: str) -> None:
        """Print a warning on the main process."""
        if self.accelerator.is_main_process:
            console.print(f"[yellow]warning:[/yellow] {message}")

    def finish(self) -> None:
        """Close the progress bar; `accelerator.end_training` closes the trackers."""
        if self._progress is not None:
            self._progress.stop()

    def _attach_yaml(self) -> None:
        """Put the YAML as it was written beside the flat values that trackers take."""
        for tracker in self.accelerator.trackers:
            if self.accelerator.is_main_process and tracker.name == "tensorboard":
                tracker.writer.add_text(
                    "config", f"```yaml\n{self.config.source_text or dump_run_config(self.config)}```"
                )

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
    """Drop the lines of later steps, which a resumed run will write again, and what a kill has left of a line."""
    if path.is_file():
        # A crash of the machine can leave bytes that are no text.
        lines = path.read_text(errors="replace").splitlines(keepends=True)
        replace_durably(path, "".join(line for line in lines if _is_whole(line) and json.loads(line)["step"] <= step))


def _is_whole(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return line.endswith("\n")


def _flatten(value: Any, prefix: str = "") -> dict[str, str | int | float | bool]:
    """Dotted keys with scalar values: trackers take neither nested nor list values."""
    if isinstance(value, dict):
        items = [_flatten(inner, f"{prefix}.{key}" if prefix else str(key)) for key, inner in value.items()]
        return {key: inner for item in items for key, inner in item.items()}
    return {prefix: value if isinstance(value, str | int | float | bool) else json.dumps(value)}
