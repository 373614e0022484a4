"""`make_estimate`: everything about one run's cost, from a method over networks on the meta device."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer

from fv_distill.methods.base import TrainingMethod
from fv_distill.methods.options import TrajectoryOptions
from fv_distill.models.base import ModelBase

from .batch import make_meta_batch
from .flops import CallCosts, ClipShape, CountedCall, average_calls
from .layout import Layout, Placement
from .memory import OptimizerSize, Phase, measure_optimizer, memory_phases
from .parameters import RoleSize, measure_role, trained_parameters
from .paths import NO_PATHS, TeacherPaths, measure_paths
from .simulation import UpdatePeak, simulate_updates


@dataclass(frozen=True)
class Clip:
    """What a run trains on.

    Attributes:
        batch_size: clips per process and micro-batch.
        accumulation_steps: micro-batches per step.
        latents: `[C, T, H, W]`.
        text: `[L, D]`.
        trajectories: of the paths that are trained on instead of clips.
        conditions: shapes of the data columns beside text.
    """

    batch_size: int
    accumulation_steps: int
    latents: tuple[int, int, int, int]
    text: tuple[int, int]
    trajectories: TrajectoryOptions | None = None
    conditions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Device:
    """The accelerator of each process.

    Attributes:
        name: for people.
        peak_flops: per second, dense, in the type that the run computes in; None if it is not known.
        memory_bytes: in all; None if it is not known.
        mfu: the share of the peak that the run's arithmetic, without recomputation, is taken to reach.
    """

    name: str
    peak_flops: float | None
    memory_bytes: int | None
    mfu: float


@dataclass(frozen=True)
class Estimate:
    """What a run takes; memory and arithmetic are those of one process unless they say otherwise.

    Attributes:
        phases: the memory of each part of the run.
        activations: peak by the updated role, "without" and "with" gradient checkpointing.
        checkpointing: of each updated role, whether it is on.
        calls: of the average step, on one micro-batch.
        flops_per_step: of the average step, without recomputation.
        executed_flops_per_step: with it.
        checkpoint_bytes: of one checkpoint on disk.
        paths: what making the teacher's paths takes.
        host_bytes: of the networks in host memory while they are loaded.
    """

    layout: Layout
    clip: Clip
    device: Device
    roles: tuple[RoleSize, ...]
    phases: tuple[Phase, ...]
    activations: Mapping[str, Mapping[str, int]]
    checkpointing: Mapping[str, bool]
    calls: tuple[CountedCall, ...]
    flops_per_step: float
    executed_flops_per_step: float
    num_steps: int
    checkpoint_bytes: int
    num_checkpoints: int
    paths: TeacherPaths
    host_bytes: int

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def global_batch_size(self) -> int:
        """Clips per step, of all processes."""
        return self.clip.batch_size * self.clip.accumulation_steps * self.layout.num_processes

    @property
    def seconds_per_step(self) -> float | None:
        """Of the average step, at the device's MFU."""
        if self.device.peak_flops is None:
            return None
        return self.flops_per_step / (self.device.peak_flops * self.device.mfu)


def make_estimate(
    method: TrainingMethod,
    optimizers: Mapping[str, Optimizer],
    *,
    layout: Layout,
    clip: Clip,
    device: Device,
    has_average: bool,
    text_encoder_bytes: int,
    num_steps: int,
    keep_last: int,
    teacher: ModelBase | None = None,
    placements: Mapping[str, Placement] | None = None,
) -> Estimate:
    """Estimate a run.

    Args:
        method: over networks on the meta device.
        optimizers: of its trainable roles.
        layout: where the networks are.
        clip: what is trained on.
        device: what each process runs on.
        has_average: whether there is an EMA of the student.
        text_encoder_bytes: of the encoder of negative and empty prompts; 0 if nothing is encoded.
        num_steps: optimisation steps of the run.
        keep_last: checkpoints that are kept.
        teacher: the adapter that makes a method's paths, on the meta device.
        placements: of frozen roles; those that are left out are where the launch puts them.

    Raises:
        NotImplementedError: by a method that doesn't say what it calls.
    """
    placed = placements or {}
    roles = tuple(measure_role(role, model, layout, placed.get(role, "auto")) for role, model in method.models.items())
    averaged = next(size for size in roles if size.role == "student") if has_average else None
    peaks, activations, checkpointing = _measure_peaks(method, clip, layout)
    phases = memory_phases(
        roles,
        peaks,
        _measure_optimizers(method, optimizers, layout),
        layout=layout,
        averaged_bytes=averaged.trained_rank_bytes if averaged else 0,
        text_encoder_bytes=text_encoder_bytes,
    )
    shape = ClipShape(clip.batch_size, clip.latents, clip.text)
    costs = CallCosts(method.models, shape, layout)
    calls = tuple(CountedCall(call, costs(call)) for call in average_calls(method, clip.latents[1]))
    averaged_total = averaged.trained_bytes if averaged else 0
    states = _measure_optimizers(method, optimizers, Layout(device_type=layout.device_type)).values()
    return Estimate(
        layout=layout,
        clip=clip,
        device=device,
        roles=roles,
        phases=tuple(phases),
        activations=activations,
        checkpointing=checkpointing,
        calls=calls,
        flops_per_step=clip.accumulation_steps * sum(c.call.count * c.cost.flops for c in calls),
        executed_flops_per_step=clip.accumulation_steps * sum(c.call.count * c.cost.executed_flops for c in calls),
        num_steps=num_steps,
        checkpoint_bytes=sum(size.trained_bytes for size in roles)
        + averaged_total
        + sum(size.state_bytes for size in states),
        num_checkpoints=keep_last,
        paths=_paths(clip, teacher, shape, layout),
        host_bytes=sum(size.total_bytes for size in roles) + averaged_total,
    )


def _paths(clip: Clip, teacher: ModelBase | None, shape: ClipShape, layout: Layout) -> TeacherPaths:
    if clip.trajectories is None or teacher is None:
        return NO_PATHS
    return measure_paths(clip.trajectories, teacher, shape, layout)


def _measure_optimizers(
    method: TrainingMethod, optimizers: Mapping[str, Optimizer], layout: Layout
) -> dict[str, OptimizerSize]:
    return {
        role: measure_optimizer(optimizers[role], trained_parameters(method.models[role]), layout)
        for role in method.roles
    }


def _measure_peaks(
    method: TrainingMethod, clip: Clip, layout: Layout
) -> tuple[list[UpdatePeak], dict[str, dict[str, int]], dict[str, bool]]:
    """The run's own peaks; activations without and with checkpointing by role; which of the two is the run's own."""
    batch = make_meta_batch(clip)

    peaks = simulate_updates(method, batch, layout=layout, accumulation_steps=clip.accumulation_steps)
    own = {peak.role: bool(_network(method, peak.role).is_gradient_checkpointing) for peak in peaks}
    with _checkpointing_flipped(method):
        # Only activations are looked at, which one micro-batch has as well as two.
        flipped = simulate_updates(method, batch, layout=layout, accumulation_steps=1)
    names = {False: "without", True: "with"}
    activations: dict[str, dict[str, int]] = {role: {} for role in own}
    for found, is_own in ((peaks, True), (flipped, False)):
        for peak in found:
            activations[peak.role][names[own[peak.role] == is_own]] = peak.activations
    return peaks, activations, own


@contextmanager
def _checkpointing_flipped(method: TrainingMethod) -> Iterator[None]:
    """On where it is off, and off where it is on, in trainable roles."""

    def flip() -> None:
        # Roles that share a network share this too.
        models = {id(method.models[role].transformer): method.models[role] for role in method.roles}
        for model in models.values():
            network: Any = model.transformer
            if network.is_gradient_checkpointing:
                network.disable_gradient_checkpointing()
            else:
                model.enable_gradient_checkpointing()

    flip()
    try:
        yield
    finally:
        flip()


def _network(method: TrainingMethod, role: str) -> Any:
    """A diffusers network; its own class says more than `nn.Module`."""
    return method.models[role].transformer
