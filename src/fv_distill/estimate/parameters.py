"""The size of a role: its parameters, and what of them a process holds."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fv_distill.models.base import ModelBase

from .depth import find_blocks
from .layout import Layout


@dataclass(frozen=True)
class RoleSize:
    """One role's network.

    Attributes:
        parameters: their number.
        dtype: of the weights that a process keeps.
        total_bytes: of these weights, whole.
        rank_bytes: of what a process keeps of them.
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
    gradient_bytes: int
    block_parameters: int
    root_parameters: int


def measure_role(role: str, model: ModelBase, layout: Layout) -> RoleSize:
    """The sizes of an adapter's network, which may be on the meta device."""
    network = model.transformer
    parameters = list(network.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    found = find_blocks(network)
    blocks = [_count(block) for block in found[1]] if found is not None else []
    # Accelerate upcasts what is trained under mixed precision (FSDP2); the config loads it in float32 anyway.
    dtype = torch.float32 if model.trainable and layout.mixed_precision == "bf16" else model.dtype
    sizes = [(parameter, _itemsize(parameter, model, dtype)) for parameter in parameters]
    rank_bytes = sum(rank_share(parameter, layout) * size for parameter, size in sizes)
    return RoleSize(
        role=role,
        trainable=model.trainable,
        parameters=count,
        dtype=dtype,
        total_bytes=sum(parameter.numel() * size for parameter, size in sizes),
        rank_bytes=rank_bytes,
        gradient_bytes=rank_bytes if model.trainable else 0,
        block_parameters=max(blocks, default=0),
        root_parameters=count - sum(blocks),
    )


def rank_share(parameter: Tensor, layout: Layout) -> int:
    """Numbers of a parameter on the fullest process: FSDP2 cuts the first dimension."""
    if not layout.is_sharded or parameter.ndim == 0:
        return parameter.numel()
    rows = parameter.shape[0]
    return -(-rows // layout.num_shards) * (parameter.numel() // max(rows, 1))


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Of tensors that share no memory."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _itemsize(parameter: Tensor, model: ModelBase, dtype: torch.dtype) -> int:
    return dtype.itemsize if model.trainable else parameter.element_size()


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
