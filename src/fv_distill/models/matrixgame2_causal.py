"""Causal Matrix-Game 2: chunks of latent frames that follow the actions, streamed over an `ActionKVCache`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from fv_distill.schedules import flow

from .action_cache import ActionKVCache
from .base import ModelBase
from .causal_base import CausalModelBase
from .conditioning import Conditioning
from .kv_cache import KVCache
from .matrixgame2 import MatrixGame2Model
from .matrixgame2_encoders import MatrixGame2Encoders
from .transformers.block_causal import ChunkLayout
from .transformers.matrixgame2 import MatrixGame2Transformer3DModel
from .wan_streaming_decode import WanStreamingDecoder


class CausalMatrixGame2Model(CausalModelBase, MatrixGame2Model):
    """Matrix-Game 2 chunk by chunk: the same network, so that it starts from any directory of it.

    A chunk reads the actions up to its own last video frame but one and no later ones; conditions are always given for
    the whole clip, from its first frame, and it takes its part.

    The arguments are those of `CausalModelBase`; use `CausalMatrixGame2Model.from_pretrained` for a directory.
    """

    def __init__(self, transformer: nn.Module, *, directory: str | Path, **kwargs: Any) -> None:
        super().__init__(transformer, directory=directory, **kwargs)
        # Who calls the network without an adapter sees what the student sees: it knows its chunks itself.
        cast(MatrixGame2Transformer3DModel, transformer).layout = self.layout

    @classmethod
    def on_base(cls, base: ModelBase, **kwargs: Any) -> Self:
        """See `ModelBase.on_base`; the other roles still see whole clips."""
        model = super().on_base(base, **kwargs)
        cast(MatrixGame2Transformer3DModel, base.transformer).layout = ChunkLayout()
        return model

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

    def new_cache(
        self, batch_size: int, latent_shape: Sequence[int], *, rolling: bool = False, dtype: torch.dtype | None = None
    ) -> KVCache:
        """See `CausalModelBase.new_cache`."""
        return ActionKVCache(
            **self.cache_sizes(batch_size, latent_shape, rolling=rolling),
            # No frame of so short a clip sees its last one, which need not be kept as a sink.
            sink_frames=min(self.sink_frames, latent_shape[1] - 1),
            local_window=self.local_window,
            device=self.device,
            dtype=dtype or self.dtype,
        )

    def cache_sizes(self, batch_size: int, latent_shape: Sequence[int], *, rolling: bool = False) -> dict[str, Any]:
        """What `ActionKVCache` and `ActionKVCache.required_bytes` want to know of a clip; see `new_cache`."""
        self.check_latent_shape(latent_shape)
        _, _, height, width = latent_shape
        config, actions = self.network_config, self.actions
        return {
            "num_layers": config.num_layers,
            "batch_size": batch_size,
            "num_heads": config.num_attention_heads,
            "head_dim": config.attention_head_dim,
            "tokens_per_frame": (height // config.patch_size[1]) * (width // config.patch_size[2]),
            "capacity_frames": self.cache_frames(latent_shape[1], rolling=rolling),
            "action_layers": actions.blocks,
            "mouse": actions.enable_mouse,
            "keyboard": actions.enable_keyboard,
            "action_heads": actions.heads_num,
            "action_head_dim": actions.head_dim,
        }

    def streaming_decoder(self) -> Callable[[Tensor], Tensor]:
        """See `CausalModelBase.streaming_decoder`."""
        vae = cast(MatrixGame2Encoders, self.encoders()).vae
        decoder = WanStreamingDecoder(vae)
        return lambda chunk: (decoder(self.raw_latents(chunk).to(vae.dtype)).float() / 2 + 0.5).clamp(0, 1)
