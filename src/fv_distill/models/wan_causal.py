"""Causal Wan: text-to-video in chunks of latent frames, streamed over a `KVCache`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from fv_distill.schedules import flow

from .base import ModelBase
from .causal_base import CausalModelBase
from .conditioning import Conditioning
from .kv_cache import KVCache
from .pretrained import resolve_directory
from .transformers.block_causal import ChunkLayout
from .transformers.wan_causal import CausalWanTransformer3DModel
from .wan import WanModel
from .wan_encoders import WanEncoders
from .wan_streaming_decode import WanStreamingDecoder
from .wan_two_experts import has_two_experts

_ONE_EXPERT = (
    "{directory} has two networks, one for high and one for low noise, and a causal student is one network for all "
    "noise levels; use Wan 2.1 or Wan 2.2 TI2V 5B"
)


class CausalWanModel(CausalModelBase, WanModel):
    """Wan over a block-causal network with a bidirectional Wan's parameters, so that it starts from any Wan directory.

    The arguments are those of `CausalModelBase`; use `CausalWanModel.from_pretrained` for a diffusers directory.
    """

    network_class = CausalWanTransformer3DModel

    def __init__(self, transformer: nn.Module, *, directory: str | Path, **kwargs: Any) -> None:
        if not isinstance(transformer, CausalWanTransformer3DModel):
            raise ValueError(
                f"CausalWanModel needs a CausalWanTransformer3DModel, not a {type(transformer).__name__}; load one "
                "with CausalWanModel.from_pretrained"
            )
        super().__init__(transformer, directory=directory, **kwargs)
        # Stock pipelines call the network without an adapter, in validation for instance: it knows its chunks itself.
        transformer.layout = self.layout

    @classmethod
    def on_base(cls, base: ModelBase, **kwargs: Any) -> Self:
        """See `ModelBase.on_base`; the base's network is made able to see in chunks, and still sees whole clips."""
        if base.is_expert:
            raise ValueError(_ONE_EXPERT.format(directory=base.directory))
        CausalWanTransformer3DModel.convert(base.transformer)
        model = super().on_base(base, **kwargs)
        # The other roles, and whoever knows of none, see whole clips.
        cast(CausalWanTransformer3DModel, base.transformer).layout = ChunkLayout()
        return model

    @classmethod
    def from_pretrained(cls, init_from: str, **kwargs: Any) -> Self:
        """See `WanModel.from_pretrained`; the directory may be of a causal Wan or not, and has one network."""
        directory = resolve_directory(init_from)
        if has_two_experts(directory):
            raise ValueError(_ONE_EXPERT.format(directory=directory))
        return super().from_pretrained(init_from, **kwargs)

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
        history = self.check_history(x_t, clean_history, history_sigma)
        if history is None:
            return self._velocity(x_t, sigma.float(), conditioning)
        clean, levels = history
        frames = torch.cat([clean.to(x_t.dtype), x_t], dim=2)
        sigmas = torch.cat([levels, flow.per_frame(sigma, x_t)], dim=1)
        return self._velocity(frames, sigmas, conditioning, num_history_frames=clean.shape[2])

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
        assert conditioning.text is not None, "Wan has no network without text; see required_channels"
        cache.use_text(conditioning.text)
        return self._velocity(x_t, sigma.float(), conditioning, cache=cache, start_frame=start_frame, store_kv=store_kv)

    def new_cache(
        self, batch_size: int, latent_shape: Sequence[int], *, rolling: bool = False, dtype: torch.dtype | None = None
    ) -> KVCache:
        """See `CausalModelBase.new_cache`."""
        return KVCache(
            **self.cache_sizes(batch_size, latent_shape, rolling=rolling),
            # No frame of so short a clip sees its last one, which need not be kept as a sink.
            sink_frames=min(self.sink_frames, latent_shape[1] - 1),
            local_window=self.local_window,
            device=self.device,
            dtype=dtype or self.dtype,
        )

    def cache_sizes(self, batch_size: int, latent_shape: Sequence[int], *, rolling: bool = False) -> dict[str, int]:
        """What `KVCache` and `KVCache.required_bytes` want to know of a clip; see `new_cache`."""
        self.check_latent_shape(latent_shape)
        _, _, height, width = latent_shape
        config = self.network_config
        return {
            "num_layers": config.num_layers,
            "batch_size": batch_size,
            "num_heads": config.num_attention_heads,
            "head_dim": config.attention_head_dim,
            "tokens_per_frame": (height // config.patch_size[1]) * (width // config.patch_size[2]),
            "capacity_frames": self.cache_frames(latent_shape[1], rolling=rolling),
        }

    def streaming_decoder(self) -> Callable[[Tensor], Tensor]:
        """See `CausalModelBase.streaming_decoder`."""
        vae = cast(WanEncoders, self.encoders()).vae
        decoder = WanStreamingDecoder(vae)
        return lambda chunk: (decoder(self.raw_latents(chunk).to(vae.dtype)).float() / 2 + 0.5).clamp(0, 1)

    def _velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, **options: Any) -> Tensor:
        assert conditioning.text is not None, "Wan has no network without text; see required_channels"
        (velocity,) = self.call_network(
            layout=self.layout,
            hidden_states=latents.to(self.dtype),
            timestep=1000 * sigma,
            encoder_hidden_states=conditioning.text.to(self.dtype),
            return_dict=False,
            **options,
        )
        return velocity.float()
