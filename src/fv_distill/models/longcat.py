"""LongCat-Video over `LongCatVideoTransformer3DModel`: from text, from a first image, or continuing a clip."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .base import ModelBase
from .conditioning import Conditioning
from .latent_checks import check_clip_shape
from .longcat_encoders import LongCatEncoders
from .pretrained import load_component_config
from .transformers.longcat import LongCatVideoTransformer3DModel

# Below it a given frame's velocity is no longer divided by sigma: x_t is the given frame up to a thousandth of noise.
_SMALLEST_SIGMA = 1e-3


class LongCatVideoModel(ModelBase):
    """The network's output is the negative velocity; its timestep is 1000 sigma.

    Where the rows have `first_frame_latent`, raw latents `[C, k, H, W]` of a clip's beginning, these k latent frames
    are given: the network sees them clean at timestep 0, and the velocity there leads to them, from wherever `x_t` is.
    k is 1 for image-to-video and more for continuation.

    The arguments are those of `ModelBase`; use `LongCatVideoModel.from_pretrained` for the published repository or a
    diffusers directory.
    """

    network_class = LongCatVideoTransformer3DModel
    encoders_class = LongCatEncoders
    lora_presets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj"),
        "all": (
            *("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj"),
            *("ffn.w1", "ffn.w2", "ffn.w3"),
        ),
        # With the embedders of time and text, the modulation and the output.
        "linear": (
            *("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj"),
            *("ffn.w1", "ffn.w2", "ffn.w3", "t_embedder.mlp.0", "t_embedder.mlp.2"),
            *("y_proj.0", "y_proj.2", "adaLN_modulation.1", "final_layer.linear"),
        ),
    }

    def __init__(self, transformer: nn.Module, *, directory: str | Path, **kwargs: Any) -> None:
        super().__init__(transformer, directory=directory, **kwargs)
        self.network_config = cast(Any, transformer).config
        vae = load_component_config(self.directory, "vae")
        self.temporal_factor = int(vae["scale_factor_temporal"])
        self.latents_mean = torch.tensor(vae["latents_mean"]).view(1, -1, 1, 1, 1)
        self.latents_std = torch.tensor(vae["latents_std"]).view(1, -1, 1, 1, 1)

    def predict_velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelBase.predict_velocity`.

        Raises:
            ValueError: for given frames of another shape than the clip's.
        """
        given = conditioning.extras.get("first_frame_latent")
        if given is None:
            return self._velocity(x_t, sigma.float(), conditioning)
        _check_given(given, x_t)
        clean, count = self.normalize_latents(given), given.shape[2]
        sigma = sigma.float() if sigma.ndim == 2 else sigma.float()[:, None].expand(-1, x_t.shape[2])
        frames = torch.cat([clean.to(x_t.dtype), x_t[:, :, count:]], dim=2)
        levels = torch.cat([torch.zeros_like(sigma[:, :count]), sigma[:, count:]], dim=1)
        velocity = self._velocity(frames, levels, conditioning, num_cond_latents=count)
        scale = sigma[:, None, :count, None, None].clamp(min=_SMALLEST_SIGMA)
        return torch.cat([(x_t[:, :, :count].float() - clean) / scale, velocity[:, :, count:]], dim=2)

    def _velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, **options: Any) -> Tensor:
        assert conditioning.text is not None, "LongCat-Video has no network without text; see required_channels"
        (output,) = self.call_network(
            hidden_states=latents.to(self.dtype),
            timestep=1000 * sigma,
            encoder_hidden_states=conditioning.text.to(self.dtype),
            encoder_attention_mask=conditioning.text_mask,
            return_dict=False,
            **options,
        )
        return -output.float()

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """`(latents - mean) / std` with the VAE's per-channel statistics, fp32."""
        return (latents.float() - self.latents_mean.to(latents.device)) / self.latents_std.to(latents.device)

    def raw_latents(self, latents: Tensor) -> Tensor:
        """`latents * std + mean`, see `ModelBase.raw_latents`."""
        return latents.float() * self.latents_std.to(latents.device) + self.latents_mean.to(latents.device)

    def check_latent_shape(self, shape: Sequence[int], *, num_frames: int | None = None) -> None:
        """See `ModelBase.check_latent_shape`."""
        check_clip_shape(
            shape,
            channels=self.network_config.in_channels,
            patch_size=self.network_config.patch_size,
            temporal_factor=self.temporal_factor,
            num_frames=num_frames,
            directory=self.directory,
        )

    def check_text(self, shape: Sequence[int]) -> None:
        """See `ModelBase.check_text`."""
        if shape[-1] != self.network_config.caption_channels:
            raise ValueError(
                f"text embeddings of shape {tuple(shape)} don't fit {self.directory}, whose caption_channels is "
                f"{self.network_config.caption_channels}; encode the captions with this model's own text encoder"
            )


def _check_given(given: Tensor, x_t: Tensor) -> None:
    """Given frames must be a beginning of the clip, and leave something to generate."""
    channels, count, *size = given.shape[1:]
    if [channels, *size] != [x_t.shape[1], *x_t.shape[3:]] or not 0 < count < x_t.shape[2]:
        raise ValueError(
            f"first_frame_latent has shape {tuple(given.shape[1:])} but the clip's latents {tuple(x_t.shape[1:])}; it "
            "must be [C, k, H, W] of the same C, H and W, with fewer latent frames than the clip"
        )
