"""The memory of one process, phase by phase: the run needs the largest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from .layout import Layout
from .parameters import RoleSize, rank_share, tensor_bytes
from .simulation import UpdatePeak

# FSDP2 holds up to three copies of a block's gathered weights: the running block's, the next one's being gathered, and
# the buffer that it is gathered into. In the backward pass also the block's gradients in the type of its weights, and
# in fp32 what is being reduced and what was before it.
_GATHERED_BLOCKS = 3
_REDUCE_BUFFERS = 2
_FP32 = 4


@dataclass(frozen=True)
class Phase:
    """What a process holds at the worst moment of a part of the run.

    Attributes:
        name: the part, such as "student update".
        parts: bytes by what they are.
    """

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class OptimizerSize:
    """One role's optimizer on one process.

    Attributes:
        state_bytes: kept from step to step.
        step_bytes: passing, while it steps.
    """

    state_bytes: int
    step_bytes: int


def measure_optimizer(optimizer: Optimizer, trained: Sequence[nn.Parameter], layout: Layout) -> OptimizerSize:
    """The states of an optimizer over parameters on the meta device, by letting it step once.

    On a GPU torch's optimizers step all weights at once and hold one temporary copy of their size meanwhile (the
    `foreach` implementation); on a CPU they go weight by weight.
    """
    if not optimizer.state:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
    states = 0
    for key, state in optimizer.state.items():
        share = rank_share(key, layout) / max(key.numel(), 1)
        tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
        # Scalars such as step counters are on every process.
        states += sum(round(tensor_bytes([t]) * (share if t.ndim else 1)) for t in tensors)
    sizes = [rank_share(parameter, layout) * parameter.element_size() for parameter in trained]
    for parameter in trained:
        parameter.grad = None
    return OptimizerSize(states, sum(sizes) if layout.device_type != "cpu" else max(sizes, default=0))


def memory_phases(
    roles: Sequence[RoleSize],
    peaks: Sequence[UpdatePeak],
    optimizers: Mapping[str, OptimizerSize],
    *,
    layout: Layout,
    averaged_bytes: int,
    text_encoder_bytes: int,
) -> list[Phase]:
    """All phases: prompts being encoded, each update's passes, each optimizer's step.

    Args:
        roles: the sizes of all networks.
        peaks: of the roles that are updated.
        optimizers: of the same.
        layout: where networks are.
        averaged_bytes: of the EMA's share on a process.
        text_encoder_bytes: whole; 0 where nothing is encoded.
    """
    by_role = {size.role: size for size in roles}
    weights = {"weights": sum(size.rank_bytes for size in roles)}
    buckets = sum(size.gradient_bytes for size in roles) if layout.kind == "replicated" else 0
    kept = {
        **weights,
        "optimizer states": sum(optimizer.state_bytes for optimizer in optimizers.values()),
        "average (EMA)": averaged_bytes,
        "DDP buckets": buckets,
    }
    phases = []
    if text_encoder_bytes:
        # Before the first step: no optimizer has states yet, and the average is still in host memory.
        phases.append(Phase("prompts", {**weights, "DDP buckets": buckets, "text encoder": text_encoder_bytes}))
    for peak in peaks:
        size = by_role[peak.role]
        passing = {
            "gradients": size.gradient_bytes if layout.is_sharded else peak.gradients,
            "activations": peak.activations,
            "KV cache": peak.kv_cache,
            **_gathered(roles, size, layout),
        }
        phases.append(Phase(f"{peak.role} update", {**kept, **passing}))
        step = {"gradients": size.gradient_bytes, "optimizer step": optimizers[peak.role].step_bytes}
        phases.append(Phase(f"{peak.role} optimizer step", {**kept, **step}))
    return [Phase(phase.name, {name: size for name, size in phase.parts.items() if size}) for phase in phases]


def _gathered(roles: Sequence[RoleSize], trained: RoleSize, layout: Layout) -> dict[str, int]:
    """What FSDP2 puts together while a step runs."""
    if not layout.is_sharded:
        return {}
    sizes = {role.role: 2 if layout.mixed_precision == "bf16" else role.dtype.itemsize for role in roles}
    # Roots stay gathered from a role's first pass on; whole networks where blocks aren't freed after theirs.
    kept = sum(
        (role.root_parameters if layout.reshard_after_forward else role.parameters) * sizes[role.role] for role in roles
    )
    block = max(role.block_parameters * sizes[role.role] for role in roles)
    reduced = trained.block_parameters * (sizes[trained.role] + _REDUCE_BUFFERS * _FP32)
    return {"gathered weights": kept + _GATHERED_BLOCKS * block, "gradients being reduced": reduced}
