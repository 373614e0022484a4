"""Whether a run fits its device, and what to change where it does not."""

import math

from .estimate import Estimate

RESERVE = 0.1
"""Share of a device that no tensor gets: the driver's context, NCCL's buffers, gaps between blocks of the allocator."""

_SHARDED_PARTS = ("weights", "optimizer states", "average (EMA)", "gradients", "optimizer step")
_NEVER_SHARDED = ("activations", "KV cache", "text encoder")
_MAX_SHARDS = 4096


def usable_bytes(estimate: Estimate) -> float | None:
    """What a run may take of its device; None if its memory is not known."""
    memory = estimate.device.memory_bytes
    return None if memory is None else memory * (1 - RESERVE)


def fits(estimate: Estimate) -> bool | None:
    """Whether the largest phase fits; None if the device's memory is not known."""
    usable = usable_bytes(estimate)
    return None if usable is None else estimate.peak.total <= usable


def advice(estimate: Estimate) -> list[str]:
    """What to change in a run that does not fit, what saves most first."""
    usable = usable_bytes(estimate)
    if usable is None or fits(estimate):
        return []
    return _on_checkpointing(estimate) + _on_sharding(estimate, usable)


def _on_checkpointing(estimate: Estimate) -> list[str]:
    roles = [role for role, is_on in estimate.checkpointing.items() if not is_on]
    if not roles or "activations" not in estimate.peak.parts:
        return []
    before = max(estimate.activations[role]["without"] for role in roles)
    after = max(estimate.activations[role]["with"] for role in roles)
    return [f"set training.model.gradient_checkpointing: true: activations {gib(before)} -> {gib(after)}"]


def _on_sharding(estimate: Estimate, usable: float) -> list[str]:
    """The fewest processes to a copy with which every phase would fit."""
    num_shards = estimate.layout.num_shards
    whole = {phase.name: sum(phase.parts.get(part, 0) for part in _SHARDED_PARTS) for phase in estimate.phases}
    needed = 1
    for phase in estimate.phases:
        kept = sum(size for part, size in phase.parts.items() if part not in (*_SHARDED_PARTS, "DDP buckets"))
        room = usable - kept
        if room <= 0:
            parts = ", ".join(f"{part} {gib(phase.parts[part])}" for part in _NEVER_SHARDED if part in phase.parts)
            return [f"sharding alone is not enough for the {phase.name}: no process shares {parts}"]
        needed = max(needed, math.ceil(whole[phase.name] * num_shards / room))
    if needed <= num_shards or needed > _MAX_SHARDS:
        return []
    return [f"shard every network over at least {needed} processes (FSDP2; configs/accelerate/fsdp2_8gpu.yaml)"]


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.3g} GiB" if size < 99.5 * 2**30 else f"{size / 2**30:.0f} GiB"
