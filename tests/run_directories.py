"""A run's directory made by hand, with everything in it that a report shows, and with what a user can do to it."""

import json
import math
from pathlib import Path

import numpy as np

from fv_distill.callbacks.video_files import contact_sheet, write_video

EVIL = "<script>window.attacked = true</script>\"'><img src=x onerror='window.attacked = true'>"
NUM_STEPS = 120


def make_run_directory(path: Path, *, num_steps: int = NUM_STEPS) -> Path:
    """A DMD2-like run that was resumed once and is not finished."""
    path.mkdir(parents=True)
    (path / "resolved_config.yaml").write_text(json.dumps(_config()))
    lines = [json.dumps(_metrics(step)) for step in range(1, num_steps + 1)]
    lines.insert(7, '{"step": 8, "loss/cri')
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    windows = [_window(step) for step in range(20, num_steps + 1, 20)]
    (path / "sigma_losses.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in windows))
    sessions = [_session(0), _session(60)]
    (path / "sessions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in sessions))
    for step in (60, 120):
        _validation(path / "validation" / f"step-{step:08d}", seed=step)
    (path / "validation/prompts.json").write_text(json.dumps(["a digit", EVIL]))
    _checkpoint(path / "checkpoints/step-00000060", metadata={"step": 60, "global_batch_size": 8, "world_size": 2})
    _checkpoint(path / "checkpoints/step-00000120.incomplete")
    return path


def _config() -> dict:
    return {
        "models": {
            "student": {"_target_": "fv_distill.models.WanModel", "init_from": f"a/{EVIL}", "trainable": True},
            "teacher": {"_target_": "fv_distill.models.WanModel", "init_from": "a/b", "trainable": False},
        },
        "method": {"_target_": "fv_distill.methods.DMD2Method"},
        "training": {"seed": 3, "loop": {"max_train_steps": 200}, "tracker": {"run_name": EVIL}},
        "callbacks": {"ema": {"decay": 0.9}},
    }


def _metrics(step: int) -> dict:
    values = {"step": step, "loss/critic": math.nan if step == 30 else 1 / step, "lr/critic": 1e-4 * step}
    if step % 2 == 0:
        values |= {"loss/student": 2 + math.sin(step), "grad_norm/student": 1e-3 * 1.1**step}
    return values


def _window(step: int) -> dict:
    losses = [None, *(math.exp(-step / 100) * (1 + index) for index in range(9))]
    return {"step": step, "critic": {"loss": losses, "count": [0, *range(1, 10)]}}


def _session(step: int) -> dict:
    return {
        "started": "2026-05-01T10:00:00+00:00",
        "step": step,
        "world_size": 2,
        "sharded": True,
        "devices": {EVIL: 2},
        "python": "3.11.7",
        "versions": {"torch": "2.13.0"},
    }


def _validation(folder: Path, *, seed: int) -> None:
    folder.mkdir(parents=True)
    clips = np.random.default_rng(seed).integers(0, 255, (2, 5, 64, 64, 3), dtype=np.uint8)
    write_video(folder / "000_4-steps.mp4", clips[0], fps=8)
    write_video(folder / "001_4-steps.gif", clips[1], fps=8)
    contact_sheet(list(clips), ["a digit", EVIL]).save(folder / "contact_sheet_4-steps.png")


def _checkpoint(folder: Path, *, metadata: dict | None = None) -> None:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(1500))
    if metadata is not None:
        (folder / "metadata.json").write_text(json.dumps(metadata))
