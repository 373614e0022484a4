"""The report as one HTML file: everything it needs is in it, and a policy in it forbids all requests."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import fv_distill

from .charts import LineChart, line_chart
from .media import Gallery, read_galleries
from .run_directory import RunDirectory, Series, num_not_finite, read_run_directory
from .sigma_chart import sigma_charts

# Sections by the first word of a metric's name, and whether its values are noisy.
_SECTIONS = {
    "loss": ("Losses", True),
    "grad_norm": ("Gradient norms", True),
    "lr": ("Learning rates", False),
}
_OTHER = "Other metrics"


@dataclass(frozen=True)
class ChartSection:
    """Charts under one heading."""

    title: str
    charts: list[LineChart]


def write_report(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Write the page and return its path.

    Args:
        run_dir: the output directory of a run, finished or not.
        output: the file; None is `report.html` in the run's directory.

    Raises:
        FileNotFoundError: if there is no such directory.
        ValueError: if it is no run's.
    """
    run = read_run_directory(Path(run_dir))
    path = run.path / "report.html" if output is None else Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(render_report(run), encoding="utf-8")
    os.replace(partial, path)
    return path


def render_report(run: RunDirectory) -> str:
    """The page of a run."""
    environment = Environment(
        loader=PackageLoader("fv_distill.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["bytes"] = _bytes
    environment.filters["time"] = _time
    loader = environment.loader
    assert loader is not None
    return environment.get_template("report.html").render(
        run=run,
        name=run.path.resolve().name,
        facts=_facts(run),
        sections=_sections(run),
        sigmas=sigma_charts(run.sigma_losses),
        galleries=_galleries(run),
        models=_models(run),
        sessions=session_rows(run.sessions),
        environment_rows=_environment(run),
        resumed=_resumed_places(run),
        # Our own files, not user input.
        style=Markup(loader.get_source(environment, "report.css")[0]),
        script=Markup(loader.get_source(environment, "report.js")[0]),
        generated=datetime.now(UTC),
        version=fv_distill.__version__,
    )


def _facts(run: RunDirectory) -> list[tuple[str, str]]:
    """What is said at the top."""
    method = run.setting("method", "_target_")
    max_steps = run.setting("training", "loop", "max_train_steps")
    session = run.sessions[-1] if run.sessions else {}
    checkpoint = _newest_metadata(run)
    facts = [("method", str(method).rpartition(".")[2] if method else "unknown")]
    facts.append(("step", f"{run.step} of {max_steps}" if max_steps else str(run.step)))
    world_size = session.get("world_size", checkpoint.get("world_size"))
    if world_size is not None:
        facts.append(("processes", f"{world_size}, sharded" if session.get("sharded") else str(world_size)))
    if "global_batch_size" in checkpoint:
        facts.append(("global batch", str(checkpoint["global_batch_size"])))
    if run.setting("training", "seed") is not None:
        facts.append(("seed", str(run.setting("training", "seed"))))
    if session:
        facts.append(("first start", _time_text(run.sessions[0].get("started", ""))))
    if run.last_written is not None:
        facts.append(("last step logged", _time(run.last_written)))
    if skipped := num_not_finite(run.metrics):
        facts.append(("steps with values that are not finite", str(skipped)))
    return facts


def _newest_metadata(run: RunDirectory) -> dict[str, Any]:
    complete = [checkpoint for checkpoint in run.checkpoints if checkpoint.complete]
    return complete[-1].metadata if complete else {}


def _step_range(series: Series) -> tuple[int, int]:
    first = min((points[0][0] for points in series.values()), default=0)
    return first, max((points[-1][0] for points in series.values()), default=first)


def _sections(run: RunDirectory) -> list[ChartSection]:
    by_section: dict[str, list[LineChart]] = {
        title: [] for title in (*(title for title, _ in _SECTIONS.values()), _OTHER)
    }
    steps = _step_range(run.metrics)
    for name in sorted(run.metrics, key=_order):
        title, is_noisy = _SECTIONS.get(name.split("/")[0], (_OTHER, True))
        by_section[title].append(line_chart(name, run.metrics[name], steps=steps, is_noisy=is_noisy))
    sections = [ChartSection(title, charts) for title, charts in by_section.items() if charts]
    if run.throughput:
        steps = _step_range(run.throughput)
        charts = [line_chart(name, points, steps=steps) for name, points in run.throughput.items()]
        sections.append(ChartSection("Throughput", charts))
    return sections


def _order(name: str) -> tuple[bool, str]:
    """The student's curves first, which is what is trained for."""
    return (not name.endswith("/student"), name)


def _resumed_places(run: RunDirectory) -> list[float]:
    """Where a run was resumed, in percent of the charts' steps."""
    first, last = _step_range(run.metrics)
    steps = [session["step"] for session in run.sessions if first <= session["step"] <= last]
    return [100 * (step - first) / max(1, last - first) for step in steps]


def _galleries(run: RunDirectory) -> list[Gallery]:
    callbacks = run.setting("callbacks")
    own = [_validation_folder(callback) for callback in (callbacks.values() if isinstance(callbacks, dict) else ())]
    folders = dict.fromkeys([run.path / "validation", *(folder for folder in own if folder is not None)])
    return [gallery for folder in folders for gallery in read_galleries(folder)]


def _validation_folder(callback: Any) -> Path | None:
    """Where a callback was told to put videos, if it is one that makes them."""
    folder = callback.get("output_dir") if isinstance(callback, dict) and "dataset_file" in callback else None
    return Path(folder) if isinstance(folder, str) else None


def _models(run: RunDirectory) -> list[dict[str, str]]:
    models = run.setting("models")
    return [
        {
            "role": str(role),
            "from": str(model.get("weights") or model.get("init_from", "")),
            "adapter": str(model.get("_target_", "")).rpartition(".")[2],
            "state": "trained" if model.get("trainable") else "frozen",
        }
        for role, model in (models.items() if isinstance(models, dict) else ())
        if isinstance(model, dict)
    ]


def _environment(run: RunDirectory) -> list[tuple[str, str]]:
    session = run.sessions[-1] if run.sessions else {}
    versions = session.get("versions") or _newest_metadata(run).get("versions") or {}
    rows = [(name, str(session[name])) for name in ("python", "platform", "mixed_precision") if name in session]
    return [*rows, *((str(name), str(value)) for name, value in versions.items())]


def devices_text(devices: Any) -> str:
    """`{"NVIDIA H100": 8}` as `8 x NVIDIA H100`."""
    if not isinstance(devices, dict):
        return ""
    return ", ".join(f"{count} x {name}" for name, count in devices.items())


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _time_text(text: str) -> str:
    """An ISO time as the page writes times; anything else as it is."""
    try:
        return _time(datetime.fromisoformat(text))
    except ValueError:
        return text


def session_rows(sessions: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The starts of a run as the page's table."""
    return [
        {
            "started": _time_text(str(session.get("started", ""))),
            "step": str(session["step"]),
            "processes": str(session.get("world_size", "")),
            "devices": devices_text(session.get("devices")),
        }
        for session in sessions
    ]
