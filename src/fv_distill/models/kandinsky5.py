"""Kandinsky 5 text-to-video over diffusers' `Kandinsky5Transformer3DModel`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from diffusers import Kandinsky5Transformer3DModel
from torch import Tensor, nn

from .base import ModelBase
from .conditioning import Conditioning
from .kandinsky5_encoders import Kandinsky5Encoders
from .latent_checks import check_clip_shape
from .pipeline_index import read_index
from .pretrained import load_component_config

_POOLED = "pooled_text_embedding"
_ATTENTION = ("to_query", "to_key", "to_value", "self_attention.out_layer", "cross_attention.out_layer")
_FEED_FORWARD = ("feed_forward.in_layer", "feed_forward.out_layer")
_MODULATION = ("modulation.out_layer", "text_modulation.out_layer", "visual_modulation.out_layer")
_EMBEDDERS = ("time_embeddings.in_layer", "time_embeddings.out_layer", "text_embeddings.in_layer")
# Positions in space are scaled by the resolution: `Kandinsky5T2VPipeline` knows two kinds.
_SIDES_480P = range(480, 855)
_SCALE_480P, _SCALE_LARGE = 2.0, 3.16


class Kandinsky5Model(ModelBase):
    """The network's output is the velocity and its timestep is 1000 sigma; its latents have their channels last.

    It takes no mask of the text, so that clips are run one by one, each with its own tokens.

    The arguments are those of `ModelBase`; use `Kandinsky5Model.from_pretrained` for a diffusers directory.
    """

    network_class = Kandinsky5Transformer3DModel
    encoders_class = Kandinsky5Encoders
    required_columns = (_POOLED,)
    takes_sigma_per_frame = False
    lora_presets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": _ATTENTION,
        "all": (*_ATTENTION, *_FEED_FORWARD),
        # With the embedders of time, text and latents, the modulation and the output.
        "linear": (
            *(*_ATTENTION, *_FEED_FORWARD, *_MODULATION, *_EMBEDDERS),
            *("pooled_text_embeddings.in_layer", "visual_embeddings.in_layer", "out_layer.out_layer"),
        ),
    }

    def __init__(self, transformer: nn.Module, *, directory: str | Path, **kwargs: Any) -> None:
        super().__init__(transformer, directory=directory, **kwargs)
        network = cast(Any, transformer)
        self.network_config = network.config
        # diffusers lists the blocks for compilation only; sharding looks for them here.
        network._no_split_modules = list(network._repeated_blocks)
        vae = load_component_config(self.directory, "vae")
        self.scaling_factor = float(vae["scaling_factor"])
        self.temporal_factor = int(vae["temporal_compression_ratio"])
        self.spatial_factor = int(vae["spatial_compression_ratio"])

    @classmethod
    def check_network(cls, network_config: Any, directory: Path) -> None:
        """See `ModelBase.check_network`."""
        if network_config.attention_type != "regular":
            raise ValueError(
                f"{directory} has {network_config.attention_type} attention, which its 10 second models have: it is "
                "sparse, and its kernel is not handled; use a 5 second model"
            )
        name = read_index(directory)["_class_name"]
        if name != "Kandinsky5T2VPipeline":
            raise ValueError(f"{directory} is a {name}; of Kandinsky 5 only text-to-video is handled")

    def predict_velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelBase.predict_velocity`; sigma is `[B]`, as the network has one time embedding per clip."""
        assert sigma.ndim == 1, "one noise level per clip; see takes_sigma_per_frame"
        # As many calls on every process, whatever the texts' lengths: a sharded network needs that.
        rows = [self._run_clip(x_t[i : i + 1], sigma[i : i + 1], conditioning.row(i)) for i in range(len(x_t))]
        return torch.cat(rows)

    def _run_clip(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.text is not None, "Kandinsky 5 has no network without text; see required_channels"
        text = conditioning.text if conditioning.text_mask is None else conditioning.text[conditioning.text_mask][None]
        _, _, frames, height, width = x_t.shape
        latents = x_t.permute(0, 2, 3, 4, 1)
        if self.network_config.visual_cond:
            # Given frames and the mask of them: none in text-to-video.
            latents = torch.cat([latents, torch.zeros_like(latents), torch.zeros_like(latents[..., :1])], dim=-1)
        _, rows, columns = self.network_config.patch_size
        positions = [torch.arange(count, device=x_t.device) for count in (frames, height // rows, width // columns)]
        (velocity,) = self.call_network(
            hidden_states=latents.to(self.dtype),
            timestep=1000 * sigma.float(),
            encoder_hidden_states=text.to(self.dtype),
            pooled_projections=conditioning.extras[_POOLED].to(self.dtype),
            visual_rope_pos=positions,
            text_rope_pos=torch.arange(text.shape[1], device=x_t.device),
            scale_factor=self._position_scale(height, width),
            return_dict=True,
        ).to_tuple()
        return velocity.permute(0, 4, 1, 2, 3).float()

    def _position_scale(self, height: int, width: int) -> tuple[float, float, float]:
        is_480p = all(size * self.spatial_factor in _SIDES_480P for size in (height, width))
        scale = _SCALE_480P if is_480p else _SCALE_LARGE
        return 1.0, scale, scale

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """`latents * scaling_factor` of the VAE, fp32."""
        return latents.float() * self.scaling_factor

    def raw_latents(self, latents: Tensor) -> Tensor:
        """`latents / scaling_factor`, see `ModelBase.raw_latents`."""
        return latents.float() / self.scaling_factor

    def condition_shapes(self, latent_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """See `ModelBase.condition_shapes`."""
        return {_POOLED: (self.network_config.in_text_dim2,)}

    def extra_shapes(self, latent_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """See `ModelBase.extra_shapes`."""
        return {_POOLED: (self.network_config.in_text_dim2,)}

    def check_latent_shape(self, shape: Sequence[int], *, num_frames: int | None = None) -> None:
        """See `ModelBase.check_latent_shape`."""
        check_clip_shape(
            shape,
            channels=self.network_config.in_visual_dim,
            patch_size=self.network_config.patch_size,
            temporal_factor=self.temporal_factor,
            num_frames=num_frames,
            directory=self.directory,
        )

    def check_text(self, shape: Sequence[int]) -> None:
        """See `ModelBase.check_text`."""
        if shape[-1] != self.network_config.in_text_dim:
            raise ValueError(
                f"text embeddings of shape {tuple(shape)} don't fit {self.directory}, whose in_text_dim is "
                f"{self.network_config.in_text_dim}; encode the captions with this model's own text encoders"
            )
