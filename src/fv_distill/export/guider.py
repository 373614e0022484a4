"""Guidance that is a component of a pipeline, its guider, and not an argument of its call."""

import json
from pathlib import Path
from typing import Any

_CONFIG = Path("guider") / "guider_config.json"


def switch_guider_off(directory: Path) -> None:
    """Let a saved pipeline's guider make no unconditional pass; nothing to do for pipelines without one."""
    path = directory / _CONFIG
    if path.is_file():
        path.write_text(json.dumps({**json.loads(path.read_text()), "guidance_scale": 1.0}, indent=2) + "\n")


def set_guider(pipeline: Any, scale: float) -> None:
    """Give a loaded pipeline's guider another scale; nothing to do for pipelines without one."""
    if "guider" in pipeline.components:
        pipeline.guider = pipeline.guider.new(guidance_scale=scale)
