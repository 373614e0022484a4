"""What a training run tells about itself in the card of its export: settings, loss curves, validation clips."""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .loss_chart import draw_losses
from .student_info import public_name

ASSETS = "assets"
# What `fv-distill evaluate` and the demo leave behind, the better one first.
EVALUATION_FILES = ("evaluation.json", "results.json")
RECORD_FILES = (ASSETS, *EVALUATION_FILES)
LOSS_CHART = "losses.png"
_CONTACT_SHEET = "contact_sheet_*.png"
_CLIP_SUFFIXES = (".mp4", ".gif")
_MAX_CLIPS = 4


def training_record(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that a reader of its card may want to know, as JSON values.

    Paths are cut down to their last part: a card is public, and where somebody's data lies is nobody's business.

    Args:
        metadata: a checkpoint's.
    """
    config = metadata["config"]
    training, loop = config["training"], config["training"]["loop"]
    optimizer = training["optimizer"]
    data = training["data"]["data_path"]
    return {
        "data": [public_name(path) for path in ([data] if isinstance(data, str) else data)],
        "steps": metadata["step"],
        "updates": dict(metadata["updates"]),
        "global_batch_size": metadata["global_batch_size"],
        "gradient_accumulation_steps": loop["gradient_accumulation_steps"],
        "processes": metadata["world_size"],
        "optimizer": optimizer["_target_"].rpartition(".")[2],
        "learning_rate": optimizer["learning_rate"],
        "seed": training["seed"],
        "method_options": {
            key: _without_folders(value) for key, value in config["method"].items() if key != "_target_"
        },
    }


def _without_folders(value: Any) -> Any:
    return Path(value).name if isinstance(value, str) and ("/" in value or "\\" in value) else value


@dataclass(frozen=True)
class RunFiles:
    """Where a run wrote.

    Attributes:
        directory: the run's own, with `metrics.jsonl`.
        validation: with a folder of clips for each validation.
    """

    directory: Path
    validation: Path


def find_run(checkpoint: Path, config: Mapping[str, Any]) -> RunFiles | None:
    """The run that wrote a checkpoint, where it still lies; None for a checkpoint that was taken elsewhere.

    Args:
        checkpoint: `<run>/checkpoints/step-00000100`.
        config: the run's, from the checkpoint.
    """
    directory = checkpoint.resolve().parent.parent
    if not (directory / "metrics.jsonl").is_file():
        return None
    return run_files(directory, config)


def run_files(directory: Path, config: Mapping[str, Any]) -> RunFiles:
    """Where the run of a config wrote, given its directory."""
    validation = config["callbacks"].get("validation", {}).get("output_dir")
    return RunFiles(directory, Path(validation) if validation else directory / "validation")


def copy_run_assets(run: RunFiles, output_dir: Path, *, step: int) -> None:
    """Put a chart of the losses and the last validation's clips up to `step` into `<output_dir>/assets`.

    Args:
        run: where the run wrote.
        output_dir: the export's.
        step: of the exported checkpoint; the run may have gone on.
    """
    assets = output_dir / ASSETS
    losses = read_losses(run.directory / "metrics.jsonl", last_step=step)
    if losses:
        assets.mkdir(exist_ok=True)
        draw_losses(losses).save(assets / LOSS_CHART)
    folder = _last_validation(run.validation, step)
    if folder is not None:
        clips = sorted(path for path in folder.iterdir() if path.suffix in _CLIP_SUFFIXES)
        for path in [*sorted(folder.glob(_CONTACT_SHEET)), *clips[:_MAX_CLIPS]]:
            assets.mkdir(exist_ok=True)
            shutil.copyfile(path, assets / path.name)


def read_losses(path: Path, *, last_step: int) -> dict[str, list[tuple[int, float]]]:
    """`(step, value)` pairs of each finite `loss/<role>` in a `metrics.jsonl`, by role."""
    losses: dict[str, list[tuple[int, float]]] = {}
    # A run that is going on is in the middle of its last line now and then.
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    for line in (json.loads(text) for text in lines if text.endswith("\n")):
        for name, value in line.items():
            if name.startswith("loss/") and name.count("/") == 1 and line["step"] <= last_step and math.isfinite(value):
                losses.setdefault(name.removeprefix("loss/"), []).append((line["step"], value))
    return losses


def _last_validation(folder: Path, step: int) -> Path | None:
    found = sorted(path for path in folder.glob("step-*") if path.is_dir() and path.name[len("step-") :].isdigit())
    found = [path for path in found if int(path.name.removeprefix("step-")) <= step]
    return found[-1] if found else None
