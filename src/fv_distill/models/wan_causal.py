"""Causal Wan: text-to-video in chunks of latent frames, streamed over a `KVCache`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from fv_distill.schedules import flow

from .base import ModelBase
from .causal_base import CausalModelBase
from .conditioning import Conditioning
from .kv_cache import KVCache
from .pretrained import resolve_directory
from .transformers.wan_causal import CausalWanTransformer3DModel
from .wan import WanModel
from .wan_streaming_decode import streaming_decoder
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

    @classmethod
    def on_base(cls, base: ModelBase, **kwargs: Any) -> Self:
        """See `CausalModelBase.on_base`; the base's network is made able to see in chunks."""
        if base.is_expert:
            raise ValueError(_ONE_EXPERT.format(directory=base.directory))
        CausalWanTransformer3DModel.convert(base.transformer)
        return super().on_base(base, **kwargs)

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

    def streaming_decoder(self) -> Callable[[Tensor], Tensor]:
        """See `CausalModelBase.streaming_decoder`."""
        return streaming_decoder(self)

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
