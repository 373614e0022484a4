"""`ActionKVCache`: a `KVCache` with those of an action module's attention beside it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .kv_cache import KVCache


class ActionKVCache(KVCache):
    """What streaming over a network with mouse and keyboard has to keep.

    The attention of the actions goes along time: the mouse's has a key per frame and place of the clip, the keyboard's
    one per frame.

    Args:
        action_layers: the blocks that have an action module.
        mouse: whether they have a mouse.
        keyboard: whether they have a keyboard.
        action_heads: heads of the actions' attention.
        action_head_dim: their size.
        kwargs: of `KVCache`, for the network's self-attention.
    """

    def __init__(
        self,
        *,
        action_layers: Iterable[int],
        mouse: bool,
        keyboard: bool,
        action_heads: int,
        action_head_dim: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        layers = tuple(action_layers)
        self.action_layer = {layer: index for index, layer in enumerate(layers)}
        own = {
            **kwargs,
            "num_layers": len(layers),
            "num_heads": action_heads,
            "head_dim": action_head_dim,
            "tokens_per_frame": 1,
        }
        places = kwargs["batch_size"] * kwargs["tokens_per_frame"]
        self.mouse = KVCache(**{**own, "batch_size": places}) if mouse and layers else None
        self.keyboard = KVCache(**own) if keyboard and layers else None

    @property
    def parts(self) -> tuple[KVCache, ...]:
        """See `KVCache.parts`."""
        return (self, *(part for part in (self.mouse, self.keyboard) if part is not None))

    @staticmethod
    def required_bytes(  # type: ignore[override]  # has more to count
        *,
        action_layers: Iterable[int],
        mouse: bool,
        keyboard: bool,
        action_heads: int,
        action_head_dim: int,
        dtype: torch.dtype = torch.float32,
        **sizes: int,
    ) -> int:
        """See `KVCache.required_bytes`."""
        total = KVCache.required_bytes(**sizes, dtype=dtype)
        own = {
            "num_layers": len(tuple(action_layers)),
            "num_heads": action_heads,
            "head_dim": action_head_dim,
            "tokens_per_frame": 1,
            "capacity_frames": sizes["capacity_frames"],
        }
        batch = sizes["batch_size"]
        for enabled, clips in ((mouse, batch * sizes["tokens_per_frame"]), (keyboard, batch)):
            if enabled:
                total += KVCache.required_bytes(**own, batch_size=clips, dtype=dtype)
        return total

    def memory_bytes(self) -> int:
        """See `KVCache.memory_bytes`."""
        others: list[Tensor] = [part.entries for part in self.parts[1:]]
        return super().memory_bytes() + sum(tensor.numel() * tensor.element_size() for tensor in others)

    def reset(self) -> None:
        """See `KVCache.reset`."""
        super().reset()
        for part in self.parts[1:]:
            part.reset()
