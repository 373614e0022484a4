"""What a run has left in its directory, read without assuming that it is finished or whole."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

CONFIG_FILE = "resolved_config.yaml"
METRICS_FILE = "metrics.jsonl"
SIGMA_LOSSES_FILE = "sigma_losses.jsonl"
THROUGHPUT_FILE = "throughput.jsonl"
SESSIONS_FILE = "sessions.jsonl"

Series = dict[str, list[tuple[int, float]]]
"""Name -> (step, value), in the order of the steps."""


@dataclass(frozen=True)
class Checkpoint:
    """One folder of `checkpoints/`."""

    name: str
    complete: bool
    num_bytes: int
    written: datetime
    metadata: dict[str, Any]


@dataclass
class RunDirectory:
    """A run as it lies on the disk; what isn't there is empty.

    Args:
        path: its directory.
        config: the resolved config, as plain values.
        config_text: the same as YAML.
        metrics: from `metrics.jsonl`.
        throughput: from `throughput.jsonl`.
        sigma_losses: the windows of `sigma_losses.jsonl`.
        sessions: the lines of `sessions.jsonl`, one for each start.
        checkpoints: oldest first.
        last_written: when the last step was logged.
        notes: what could not be read.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    metrics: Series = field(default_factory=dict)
    throughput: Series = field(default_factory=dict)
    sigma_losses: list[dict[str, Any]] = field(default_factory=list)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    last_written: datetime | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The last step that was logged, 0 before the first."""
        return max((points[-1][0] for points in self.metrics.values()), default=0)

    def setting(self, *keys: str) -> Any:
        """A value of the config by its keys, or None where the config lacks it."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def read_run_directory(path: Path) -> RunDirectory:
    """Read a run's directory; damaged lines and files become notes.

    Raises:
        FileNotFoundError: if there is no such directory.
        ValueError: if it is no run's.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no directory; give the training.output_dir of a run")
    if not any((path / name).is_file() for name in (CONFIG_FILE, METRICS_FILE)):
        raise ValueError(
            f"{path} is no run: it has neither {CONFIG_FILE} nor {METRICS_FILE}; give the training.output_dir of a run"
        )
    run = RunDirectory(path)
    run.config, run.config_text = _read_config(path / CONFIG_FILE, run.notes)
    run.metrics = _series(_read_lines(path / METRICS_FILE, run.notes))
    run.throughput = _series(_read_lines(path / THROUGHPUT_FILE, run.notes))
    run.sigma_losses = sorted(_read_lines(path / SIGMA_LOSSES_FILE, run.notes), key=lambda line: line["step"])
    run.sessions = _read_lines(path / SESSIONS_FILE, run.notes)
    run.checkpoints = _checkpoints(path / "checkpoints")
    if (path / METRICS_FILE).is_file():
        run.last_written = _modified(path / METRICS_FILE)
    return run


def _read_config(path: Path, notes: list[str]) -> tuple[dict[str, Any], str]:
    if not path.is_file():
        notes.append(f"There is no {path.name}, so what was trained is not known.")
        return {}, ""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        config = None
    if not isinstance(config, dict):
        notes.append(f"{path.name} is damaged and shown as it is.")
        return {}, text
    return config, text


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The JSON objects of a file that have a step; the others are counted in a note."""
    if not path.is_file():
        return []
    good, num_bad = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            good.append(entry)
        else:
            num_bad += 1
    if num_bad:
        notes.append(f"{num_bad} damaged line{'s' if num_bad > 1 else ''} of {path.name} left out.")
    return good


def _series(lines: list[dict[str, Any]]) -> Series:
    """By name; where a step occurs twice, its last line counts."""
    by_step = {line["step"]: line for line in lines}
    series: Series = {}
    for step in sorted(by_step):
        for name, value in by_step[step].items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                series.setdefault(name, []).append((step, float(value)))
    return series


def num_not_finite(series: Series) -> int:
    """In how many steps some value was NaN or infinite."""
    return len({step for points in series.values() for step, value in points if not math.isfinite(value)})


def _checkpoints(folder: Path) -> list[Checkpoint]:
    return [_checkpoint(path) for path in sorted(folder.glob("step-*")) if path.is_dir()]


def _checkpoint(path: Path) -> Checkpoint:
    metadata_path = path / "metadata.json"
    metadata = {}
    if metadata_path.is_file():
        try:
            metadata = json.loads(metadata_path.read_text(encoding="utf-8"))
        except ValueError:
            metadata = {}
    return Checkpoint(
        name=path.name,
        complete=path.suffix == "" and bool(metadata),
        num_bytes=sum(_sizes(path)),
        written=_modified(metadata_path if metadata else path),
        metadata=metadata,
    )


def _sizes(folder: Path) -> Iterator[int]:
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                yield path.stat().st_size
        except FileNotFoundError:
            # The run goes on while it is looked at, and has removed an old checkpoint.
            continue


def _modified(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)
