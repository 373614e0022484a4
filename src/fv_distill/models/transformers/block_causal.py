"""Block-causal attention: which latent frames see which, and attention under that rule.

A clip is cut into chunks of `chunk_size` latent frames. Frames of a chunk see each other and earlier chunks, never
later ones (Yin et al. 2025, "CausVid", sec. 4.1). A local window limits how far back they see, except for the first
frames, the sinks, which stay in sight (Xiao et al. 2024, "StreamingLLM").
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

# The smallest head that flex_attention's kernels take (torch 2.13).
_FLEX_MIN_HEAD_DIM = 16


def visible_history(start_frame: int, *, local_window: int | None, sink_frames: int) -> list[range]:
    """The earlier frames that a chunk starting at `start_frame` sees: the sinks, then the window, without overlap.

    Args:
        start_frame: the chunk's first frame.
        local_window: how many frames before the chunk it sees; None means all.
        sink_frames: how many first frames of the clip it sees in any case.
    """
    window = range(0 if local_window is None else max(start_frame - local_window, 0), start_frame)
    sinks = range(min(sink_frames, window.start))
    return [frames for frames in (sinks, window) if frames]


@dataclass(frozen=True)
class ChunkLayout:
    """How a network's clip is cut, and how far back a chunk sees.

    Attributes:
        chunk_size: latent frames per chunk; None takes the whole clip as one chunk, which is no causality at all.
        local_window: latent frames of history that a chunk sees besides itself; None means all.
        sink_frames: first latent frames that every chunk sees.

    Raises:
        ValueError: for a negative number, or chunks without a frame.
    """

    chunk_size: int | None = None
    local_window: int | None = None
    sink_frames: int = 0

    def __post_init__(self) -> None:
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size={self.chunk_size} must be at least 1 latent frame")
        if self.local_window is not None and self.local_window < 0:
            raise ValueError(
                f"local_window={self.local_window} must be the number of earlier latent frames that a chunk sees, "
                "or null for all of them"
            )
        if self.sink_frames < 0:
            raise ValueError(f"sink_frames={self.sink_frames} must be a number of latent frames, 0 for none")

    def frame_mask(self, num_frames: int, num_history_frames: int = 0) -> Tensor:
        """Which frame (row) sees which (column), boolean.

        Args:
            num_frames: of the clip. Without history its chunks see each other: diffusion forcing.
            num_history_frames: frames of a clean copy that stand before the clip, counted from its first frame; the
                clip's chunks then see their past there and only there: teacher forcing.

        Returns:
            `[num_history_frames + num_frames] * 2` booleans.
        """
        size = self.chunk_size or num_frames
        assert num_history_frames == 0 or num_frames - size <= num_history_frames, "a chunk's history is missing"
        total = num_history_frames + num_frames
        mask = torch.zeros(total, total, dtype=torch.bool)
        for offset, count in ((0, num_history_frames), (num_history_frames, num_frames)):
            for start in range(0, count, size):
                chunk = slice(offset + start, offset + min(start + size, count))
                mask[chunk, chunk] = True
                # The past is at the sequence's beginning in both halves: the clean copy, or the clip itself.
                for past in visible_history(start, local_window=self.local_window, sink_frames=self.sink_frames):
                    mask[chunk, past.start : past.stop] = True
        return mask


class FrameMask:
    """A frame mask spread over each frame's tokens, in the forms that attention kernels want; each is made once.

    Args:
        frames: `[N, N]` booleans, True where the row's frame sees the column's.
        tokens_per_frame: consecutive tokens that share a frame.
    """

    def __init__(self, frames: Tensor, tokens_per_frame: int) -> None:
        self.frames = frames
        self.tokens_per_frame = tokens_per_frame
        self.num_tokens = frames.shape[0] * tokens_per_frame

    # Kept for later passes, so never made as an inference tensor, which autograd refuses to save.
    @functools.cached_property
    @torch.inference_mode(False)
    def dense(self) -> Tensor:
        """`[tokens, tokens]` booleans."""
        rows = self.frames.repeat_interleave(self.tokens_per_frame, dim=0)
        return rows.repeat_interleave(self.tokens_per_frame, dim=1)

    @functools.cached_property
    @torch.inference_mode(False)
    def blocks(self) -> BlockMask:
        """For `flex_attention`; compiled, since the plain function builds the dense mask first."""
        frames, size = self.frames, self.tokens_per_frame

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return frames[query // size, key // size]

        make = torch.compile(create_block_mask) if frames.is_cuda else create_block_mask
        return make(sees, None, None, self.num_tokens, self.num_tokens, device=str(frames.device))


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def cached_mask(
    layout: ChunkLayout, num_frames: int, num_history_frames: int, tokens_per_frame: int, device: torch.device
) -> FrameMask | None:
    """The mask of a clip's shape; None where every frame sees every other."""
    frames = layout.frame_mask(num_frames, num_history_frames)
    return None if bool(frames.all()) else FrameMask(frames.to(device), tokens_per_frame)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: FrameMask) -> Tensor:
    """Attention over `[B, tokens, heads, head_dim]` in which a token sees what its frame may see.

    On CUDA by `flex_attention`, which skips what nobody sees; elsewhere, where that has no backward pass, by scaled
    dot-product attention with the dense mask.
    """
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    if query.is_cuda and query.shape[-1] >= _FLEX_MIN_HEAD_DIM:
        out = _compiled_flex_attention()(query, key, value, block_mask=mask.blocks)
    else:
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask.dense)
    return out.transpose(1, 2)
