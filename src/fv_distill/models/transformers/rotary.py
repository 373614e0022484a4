"""Rotary position embedding over time, height and width (Su et al. 2021), for networks that diffusers lacks."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, broadcast over `[B, tokens, heads, head_dim / 2]`."""


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def axis_table(first: int, stop: int, dim: int, device: torch.device, theta: float = 10000.0) -> Rotary:
    """Cosines and sines of positions `first ... stop - 1` on one axis, `[positions, dim / 2]`.

    In float64 until the end, as in diffusers, and on the CPU, since MPS has no float64.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.outer(torch.arange(first, stop, dtype=torch.float64), frequencies)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def clip_table(
    frames: Sequence[range], rows: int, columns: int, dims: tuple[int, int, int], device: torch.device
) -> Rotary:
    """The tables of all tokens of a clip at absolute frame positions, each `[1, tokens, 1, sum(dims) / 2]`, fp32.

    Args:
        frames: positions in time, one run after the other.
        rows: tokens in height.
        columns: tokens in width.
        dims: of a head that turn with time, height and width.
        device: of the tables.
    """
    parts = [
        [axis_table(run.start, run.stop, dims[0], device) for run in frames],
        [axis_table(0, rows, dims[1], device)],
        [axis_table(0, columns, dims[2], device)],
    ]
    cos, sin = (over_tokens(*(torch.cat([table[index] for table in part]) for part in parts)) for index in (0, 1))
    return cos, sin


def over_tokens(time: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Axis tables `[positions, d]` to one row per token, `[1, tokens, 1, sum of d]`."""
    shape = (time.shape[0], height.shape[0], width.shape[0], -1)
    parts = (time[:, None, None].expand(shape), height[:, None].expand(shape), width.expand(shape))
    return torch.cat(parts, dim=-1).flatten(0, 2)[None, :, None]


def apply_rotary(states: Tensor, rotary: Rotary) -> Tensor:
    """Turn neighbouring pairs of `[B, tokens, heads, head_dim]` by their token's angles."""
    cos, sin = rotary
    even, odd = states[..., 0::2], states[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).type_as(states)
