"""Causal Matrix-Game 2: chunks of latent frames that follow the actions, streamed over an `ActionKVCache`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fv_distill.schedules import flow

from .action_cache import ActionKVCache
from .causal_base import CausalModelBase
from .conditioning import Conditioning
from .kv_cache import KVCache
from .matrixgame2 import MatrixGame2Model
from .wan_streaming_decode import streaming_decoder


class CausalMatrixGame2Model(CausalModelBase, MatrixGame2Model):
    """Matrix-Game 2 chunk by chunk: the same network, so that it starts from any directory of it.

    A chunk reads the actions up to its own last video frame but one and no later ones; conditions are always given for
    the whole clip, from its first frame, and it takes its part.

    The arguments are those of `CausalModelBase`; use `CausalMatrixGame2Model.from_pretrained` for a directory.
    """

    cache_class = ActionKVCache

    def predict_velocity(
        self,
        x_t: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        clean_history: Tensor | None = None,
        history_sigma: Tensor | None = None,
    ) -> Tensor:
        """See `CausalModelBase.predict_velocity`."""
        latents = self.beside_first_frame(x_t, conditioning)
        history = self.check_history(x_t, clean_history, history_sigma)
        if history is None:
            return self.run_network(latents, sigma.float(), conditioning, layout=self.layout)
        clean, levels = history
        frames = torch.cat([self.beside_first_frame(clean.to(x_t.dtype), conditioning), latents], dim=2)
        sigmas = torch.cat([levels, flow.per_frame(sigma, x_t)], dim=1)
        return self.run_network(frames, sigmas, conditioning, layout=self.layout, num_history_frames=clean.shape[2])

    def predict_velocity_streaming(
        self,
        x_t: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        cache: KVCache,
        start_frame: int,
        store_kv: bool = False,
    ) -> Tensor:
        """See `CausalModelBase.predict_velocity_streaming`."""
        self.check_chunk(x_t, start_frame)
        if "clip_feature" in conditioning.extras:
            cache.use_text(conditioning.extras["clip_feature"])
        latents = self.beside_first_frame(x_t, conditioning, start_frame=start_frame)
        return self.run_network(
            latents, sigma.float(), conditioning, cache=cache, start_frame=start_frame, store_kv=store_kv
        )

    def cache_sizes(self, batch_size: int, latent_shape: Sequence[int], *, rolling: bool = False) -> dict[str, Any]:
        """See `CausalModelBase.cache_sizes`; with those of the actions."""
        actions = self.actions
        return {
            **super().cache_sizes(batch_size, latent_shape, rolling=rolling),
            "action_layers": actions.blocks,
            "mouse": actions.enable_mouse,
            "keyboard": actions.enable_keyboard,
            "action_heads": actions.heads_num,
            "action_head_dim": actions.head_dim,
        }

    def streaming_decoder(self) -> Callable[[Tensor], Tensor]:
        """See `CausalModelBase.streaming_decoder`."""
        return streaming_decoder(self)
