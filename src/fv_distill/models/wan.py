"""Wan 2.1 text-to-video over diffusers' `WanTransformer3DModel`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from .base import ModelBase
from .conditioning import Conditioning
from .pretrained import load_component_config
from .wan_encoders import WanEncoders


class WanModel(ModelBase):
    """Wan's network output is the velocity itself; its timestep is 1000 sigma and its text is padded with zeros.

    The arguments are those of `ModelBase`; use `WanModel.from_pretrained` for a diffusers directory.
    """

    network_class = WanTransformer3DModel
    encoders_class = WanEncoders
    lora_presets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        "all": ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"),
        # With the embedders of time and text, the modulation and the output.
        "linear": (
            *("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"),
            *("linear_1", "linear_2", "time_proj", "proj_out"),
        ),
    }

    def __init__(self, transformer: nn.Module, *, directory: str | Path, **kwargs: Any) -> None:
        super().__init__(transformer, directory=directory, **kwargs)
        self.network_config = cast(Any, transformer).config
        vae = load_component_config(self.directory, "vae")
        self.temporal_factor = int(vae["scale_factor_temporal"])
        self.latents_mean = torch.tensor(vae["latents_mean"]).view(1, -1, 1, 1, 1)
        self.latents_std = torch.tensor(vae["latents_std"]).view(1, -1, 1, 1, 1)

    @classmethod
    def check_network(cls, network_config: Any, directory: Path) -> None:
        """See `ModelBase.check_network`."""
        if network_config.image_dim is not None or network_config.in_channels != network_config.out_channels:
            raise ValueError(f"{directory} is an image-to-video Wan; only Wan 2.1 text-to-video is handled")

    def predict_velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelBase.predict_velocity`; a sigma per latent frame is spread over the frame's tokens."""
        assert conditioning.text is not None, "Wan has no network without text; see required_channels"
        timestep = 1000 * sigma.float()
        if timestep.ndim == 2:
            _, patch_height, patch_width = self.network_config.patch_size
            tokens_per_frame = (x_t.shape[3] // patch_height) * (x_t.shape[4] // patch_width)
            timestep = timestep.repeat_interleave(tokens_per_frame, dim=1)
        (velocity,) = self.call_network(
            hidden_states=x_t.to(self.dtype),
            timestep=timestep,
            encoder_hidden_states=conditioning.text.to(self.dtype),
            return_dict=False,
        )
        return velocity.float()

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """`(latents - mean) / std` with the VAE's per-channel statistics, fp32."""
        return (latents.float() - self.latents_mean.to(latents.device)) / self.latents_std.to(latents.device)

    def raw_latents(self, latents: Tensor) -> Tensor:
        """`latents * std + mean`, see `ModelBase.raw_latents`."""
        return latents.float() * self.latents_std.to(latents.device) + self.latents_mean.to(latents.device)

    def check_latent_shape(self, shape: Sequence[int], *, num_frames: int | None = None) -> None:
        """See `ModelBase.check_latent_shape`: channels, patch divisibility and 4k + 1 frames."""
        shown = tuple(shape)
        if len(shown) != 4:
            raise ValueError(f"latents have shape {shown}; expected [C, T, H, W]")
        channels, frames, height, width = shown
        if channels != self.network_config.in_channels:
            raise ValueError(
                f"latents {shown} have {channels} channels but {self.directory} takes "
                f"{self.network_config.in_channels}; encode the data with this model's own VAE"
            )
        for name, size, patch in zip(
            ("T", "H", "W"), (frames, height, width), self.network_config.patch_size, strict=True
        ):
            if size < patch or size % patch:
                raise ValueError(
                    f"latents {shown}: {name}={size} does not divide by the patch size {patch}; crop the data"
                )
        factor = self.temporal_factor
        if num_frames is not None and num_frames != (frames - 1) * factor + 1:
            raise ValueError(
                f"a clip of {num_frames} frames can't have {frames} latent frames: this VAE turns {factor}k+1 frames "
                f"into k+1, so {frames} latent frames are {(frames - 1) * factor + 1} frames; re-encode the clip"
            )

    def check_context_parallel(self, degree: int, latent_shape: Sequence[int]) -> None:
        """See `ModelBase.check_context_parallel`: the processes get equal shares of heads and of tokens."""
        heads = self.network_config.num_attention_heads
        if heads % degree:
            raise ValueError(f"{self.directory} has {heads} attention heads, which {degree} processes can't share")
        tokens = math.prod(latent_shape[1:]) // math.prod(self.network_config.patch_size)
        if tokens % degree:
            raise ValueError(
                f"latents {tuple(latent_shape)} have {tokens} tokens, which {degree} processes can't share; crop the "
                "data or choose another degree"
            )

    def check_text(self, shape: Sequence[int]) -> None:
        """See `ModelBase.check_text`."""
        if shape[-1] != self.network_config.text_dim:
            raise ValueError(
                f"text embeddings of shape {tuple(shape)} don't fit {self.directory}, whose text_dim is "
                f"{self.network_config.text_dim}; encode the captions with this model's own text encoder"
            )
