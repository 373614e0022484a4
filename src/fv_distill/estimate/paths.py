"""What the teacher's sampling paths take that knowledge distillation learns from."""

import math
from dataclasses import dataclass

from fv_distill.methods.calls import NetworkCall
from fv_distill.methods.options import TrajectoryOptions
from fv_distill.models.base import ModelBase

from .flops import CallCosts, ClipShape
from .layout import Layout

_FP32 = 4


@dataclass(frozen=True)
class TeacherPaths:
    """Paths made before training; all zero where none are.

    Attributes:
        per_row: paths from each row of the data.
        path_bytes: of one on disk.
        path_flops: of making one.
        calls_per_path: of the teacher.
    """

    per_row: int
    path_bytes: int
    path_flops: float
    calls_per_path: int


NO_PATHS = TeacherPaths(0, 0, 0.0, 0)


def measure_paths(options: TrajectoryOptions, teacher: ModelBase, shape: ClipShape, layout: Layout) -> TeacherPaths:
    """The paths that a method's options describe."""
    kept = options.teacher_inference_steps + 1 if options.store_all_states else len(options.sigmas)
    calls = options.teacher_inference_steps * (1 if options.teacher_guidance_scale == 1 else 2)
    one = ClipShape(1, shape.latents, shape.text)
    cost = CallCosts({"teacher": teacher}, one, layout)(NetworkCall("teacher"))
    return TeacherPaths(
        per_row=options.trajectories_per_row,
        path_bytes=(kept * math.prod(shape.latents) + math.prod(shape.text)) * _FP32,
        path_flops=float(calls * cost.flops),
        calls_per_path=calls,
    )
