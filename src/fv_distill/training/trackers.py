"""Accelerate's trackers: checked before anything is loaded, given the config, and continued by a resumed run."""

import json
import uuid
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from fv_distill.config.load import dump_run_config
from fv_distill.config.schema import ConfigError, RunConfig

LOG_FOLDER = "logs"
# Beside what the trackers write themselves, so that --overwrite starts new runs in them.
RUN_IDS_FILE = "tracker_runs.json"
YAML_FILE = "run_config.yaml"

# What has to be installed where the package isn't called like the tracker.
_INSTALL = {"wandb": "'fv_distill[wandb]'", "trackio": "'fv_distill[trackio]'"}


def check_trackers(names: list[str]) -> None:
    """Find out at the start what accelerate would find out late, or only write into a debug log.

    Raises:
        ConfigError: for a name that accelerate doesn't have.
        ImportError: for a tracker whose package isn't installed.
    """
    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"training.tracker.trackers: there is no tracker {name!r}; accelerate has {', '.join(known)}, and [] "
                "writes metrics.jsonl only"
            )
        # A class that the user's own code registered is there, however it is called.
        is_built_in = LOGGER_TYPE_TO_CLASS[name].__module__ == GeneralTracker.__module__
        if is_built_in and name not in available:
            raise ImportError(
                f"training.tracker.trackers: {name} is not installed; pip install {_INSTALL.get(name, name)}, or take "
                f"{name} out of the list"
            )


def start_trackers(accelerator: Accelerator, config: RunConfig, *, step: int) -> None:
    """Open the trackers of the config and put the config into them, flat and as the YAML that was written.

    Args:
        accelerator: opens them, on the main process.
        config: of the run.
        step: the step that is resumed from, 0 at the start. Later entries of tensorboard are hidden.

    Raises:
        ConfigError: if a tracker doesn't start, with its own reason.
    """
    options, directory = config.training.tracker, Path(config.training.output_dir)
    if not options.trackers:
        return
    init_kwargs: dict[str, dict[str, Any]] = {}
    if accelerator.is_main_process:
        init_kwargs = _init_kwargs(directory, options.trackers, options.run_name, step=step)
    try:
        accelerator.init_trackers(options.project_name, init_kwargs=init_kwargs)
    except Exception as error:
        # Each has errors of its own, for a missing login or an unreachable server.
        hint = "; wandb needs `wandb login`, or WANDB_MODE=offline" if "wandb" in options.trackers else ""
        raise ConfigError(f"training.tracker.trackers={options.trackers}: {error}{hint}") from error
    if accelerator.is_main_process:
        for tracker in accelerator.trackers:
            _store_config(tracker, config, directory / LOG_FOLDER, step=step)


def log_text(tracker: GeneralTracker, name: str, text: str, *, step: int) -> None:
    """Log Markdown where the tracker shows it."""
    if tracker.name == "tensorboard":
        tracker.tracker.add_text(name, text, step)
    elif tracker.name == "trackio":
        import trackio

        tracker.log({name: trackio.Markdown(text)}, step=step)


def _init_kwargs(directory: Path, names: list[str], run_name: str | None, *, step: int) -> dict[str, dict[str, Any]]:
    """Arguments by tracker, so that a resumed run goes on in the entry that it began."""
    folder = directory / LOG_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    ids = _run_ids(folder / RUN_IDS_FILE, names, run_name or directory.name)
    kwargs: dict[str, dict[str, Any]] = {}
    if "tensorboard" in names and step:
        kwargs["tensorboard"] = {"purge_step": step + 1}
    if "wandb" in names:
        # Without an existing `dir` wandb would write to the working directory or to a temporary one.
        kwargs["wandb"] = {"id": ids["wandb"], "resume": "allow", "dir": str(folder), "name": run_name}
    if "trackio" in names:
        # The directory is trackio's own (TRACKIO_DIR): its dashboard compares all runs of a project.
        kwargs["trackio"] = {"name": ids["trackio"], "resume": "allow", "embed": False}
    return kwargs


def _run_ids(path: Path, names: list[str], run_name: str) -> dict[str, str]:
    """The names under which trackers know this run, made on first use and kept."""
    ids = json.loads(path.read_text()) if path.is_file() else {}
    unique = uuid.uuid4().hex[:8]
    fresh = {"wandb": unique, "trackio": f"{run_name}-{unique}"}
    added = {name: value for name, value in fresh.items() if name in names and name not in ids}
    if added:
        ids |= added
        path.write_text(json.dumps(ids) + "\n")
    return ids


def _store_config(tracker: GeneralTracker, config: RunConfig, folder: Path, *, step: int) -> None:
    """The resolved values, and the YAML to the letter."""
    flat = flatten(config.model_dump(mode="json", by_alias=True))
    yaml_text = config.source_text or dump_run_config(config)
    if tracker.name == "tensorboard":
        # Accelerate's own way makes a new folder, and a new row of the dashboard, each time that a run is resumed.
        tracker.tracker.add_hparams(flat, {}, run_name="config")
        log_text(tracker, "config", f"```yaml\n{yaml_text}```", step=step)
        return
    tracker.store_init_configuration(flat | {"yaml": yaml_text})
    if tracker.name == "wandb":
        (folder / YAML_FILE).write_text(yaml_text)
        tracker.tracker.save(str(folder / YAML_FILE), base_path=str(folder), policy="now")
    elif tracker.name == "trackio":
        log_text(tracker, "config", f"```yaml\n{yaml_text}```", step=step)


def flatten(value: Any, prefix: str = "") -> dict[str, str | int | float | bool]:
    """Dotted keys with scalar values: trackers take neither nested nor list values."""
    if isinstance(value, dict):
        items = [flatten(inner, f"{prefix}.{key}" if prefix else str(key)) for key, inner in value.items()]
        return {key: inner for item in items for key, inner in item.items()}
    return {prefix: value if isinstance(value, str | int | float | bool) else json.dumps(value)}
