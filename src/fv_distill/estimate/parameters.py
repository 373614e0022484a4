"""The size of a role: its parameters, and what of them a process holds."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fv_distill.models.base import ModelBase
from fv_distill.models.quantization import stored_bytes

from .depth import all_blocks
from .layout import Layout, Placement


@dataclass(frozen=True)
class RoleSize:
    """One role's network.

    Attributes:
        parameters: their number; of a role on another's network only its adapter's.
        dtype: of the weights that a process keeps.
        total_bytes: of these weights, whole.
        rank_bytes: of what a process keeps of them.
        trained_bytes: of those that are trained, whole.
        trained_rank_bytes: of what a process keeps of these.
        gradient_bytes: of what a process keeps of its gradients; 0 for a frozen role.
        block_parameters: of the largest block that sharding gathers at once.
        root_parameters: of all that is in no block, and stays gathered while a step runs.
    """

    role: str
    trainable: bool
    parameters: int
    dtype: torch.dtype
    total_bytes: int
    rank_bytes: int
    trained_bytes: int
    trained_rank_bytes: int
    gradient_bytes: int
    block_parameters: int
    root_parameters: int


def measure_role(role: str, model: ModelBase, layout: Layout, placement: Placement = "auto") -> RoleSize:
    """The sizes of an adapter's network, which may be on the meta device.

    A frozen role that is replicated is whole on every process; of an offloaded one a block is on the device at a time.
    """
    if placement != "auto":
        layout = replace(layout, kind="replicated", num_shards=1)
    network = model.transformer
    trained = trained_parameters(model)
    held = trained if model.is_on_base else _with_own_adapter(model)
    count = sum(parameter.numel() for parameter in held)
    blocks = [] if model.is_on_base else [_count(block) for block in all_blocks(network)]
    # Accelerate upcasts what is trained under mixed precision (FSDP2); the config loads it in float32 anyway.
    is_upcast = model.trainable and model.adapter is None and layout.mixed_precision == "bf16"
    dtype = torch.float32 if is_upcast else model.dtype

    def total(parameters: list[nn.Parameter], *, share: bool) -> int:
        counts = [rank_share(parameter, layout) if share else parameter.numel() for parameter in parameters]
        sizes = [_itemsize(parameter, model, dtype) for parameter in parameters]
        return round(sum(number * size for number, size in zip(counts, sizes, strict=True)))

    trained_rank_bytes = total(trained, share=True)
    rank_bytes = total(held, share=True)
    if placement == "offloaded":
        # While one block computes, the next is on its way.
        rank_bytes = min(rank_bytes, 2 * max(blocks, default=count) * model.dtype.itemsize)
    # What is whole is never gathered.
    is_gathered = placement == "auto" and not model.is_on_base
    return RoleSize(
        role=role,
        trainable=model.trainable,
        parameters=count,
        dtype=dtype,
        total_bytes=total(held, share=False),
        rank_bytes=rank_bytes,
        trained_bytes=total(trained, share=False),
        trained_rank_bytes=trained_rank_bytes,
        gradient_bytes=trained_rank_bytes,
        block_parameters=max(blocks, default=0) if is_gathered else 0,
        root_parameters=count - sum(blocks) if is_gathered else 0,
    )


def trained_parameters(model: ModelBase) -> list[nn.Parameter]:
    """Those that the role's optimizer updates."""
    return [parameter for name, parameter in model.transformer.named_parameters() if model.is_trained(name)]


def _with_own_adapter(model: ModelBase) -> list[nn.Parameter]:
    """A network's parameters without the adapters of other roles."""
    named = model.transformer.named_parameters()
    return [parameter for name, parameter in named if ".lora_" not in name or model.is_trained(name)]


def rank_share(parameter: Tensor, layout: Layout) -> int:
    """Numbers of a parameter on the fullest process: FSDP2 cuts the first dimension."""
    if not layout.is_sharded or parameter.ndim == 0:
        return parameter.numel()
    rows = parameter.shape[0]
    return -(-rows // layout.num_shards) * (parameter.numel() // max(rows, 1))


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Of tensors that share no memory."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _itemsize(parameter: Tensor, model: ModelBase, dtype: torch.dtype) -> float:
    if model.trainable and model.adapter is None:
        return dtype.itemsize
    return stored_bytes(parameter) / max(parameter.numel(), 1)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
