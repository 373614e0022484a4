"""HunyuanVideo text-to-video over diffusers' `HunyuanVideoTransformer3DModel`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor, nn

from .base import ModelBase
from .conditioning import Conditioning
from .hunyuan_encoders import HunyuanVideoEncoders
from .latent_checks import check_clip_shape, check_text_width
from .pretrained import read_vae_factors

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out")

# `HunyuanVideoPipeline`'s.
_DEFAULT_GUIDANCE = 6.0


class HunyuanVideoModel(ModelBase):
    """HunyuanVideo's network output is the velocity; its timestep is 1000 sigma, and a guidance scale is embedded.

    Args:
        transformer: the network.
        directory: see `ModelBase`.
        embedded_guidance: the scale that a guidance-distilled network reads as an input (times 1000, as
            `HunyuanVideoPipeline` passes its `guidance_scale`). It takes the place of an unconditional pass; the
            guidance of methods comes on top, as the pipeline's `true_cfg_scale` does. None is 6, the pipeline's
            default, and nothing for networks that read none.
        kwargs: see `ModelBase`.

    Raises:
        ValueError: for an embedded guidance that is not positive, or that the network doesn't read.
    """

    network_class = HunyuanVideoTransformer3DModel
    encoders_class = HunyuanVideoEncoders
    takes_sigma_per_frame = False
    lora_presets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": _ATTENTION,
        "all": (*_ATTENTION, *_FEED_FORWARD),
        # With the refiner of the text, the embedders of time, guidance and text, and the modulation.
        "linear": (*_ATTENTION, *_FEED_FORWARD, "proj_in", "linear_1", "linear_2", "linear"),
    }

    def __init__(
        self, transformer: nn.Module, *, directory: str | Path, embedded_guidance: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(transformer, directory=directory, **kwargs)
        self.network_config = cast(Any, transformer).config
        self.embedded_guidance = self._checked_guidance(embedded_guidance)
        self.temporal_factor, _ = read_vae_factors(self.directory)

    @classmethod
    def check_network(cls, network_config: Any, directory: Path) -> None:
        """See `ModelBase.check_network`."""
        if network_config.image_condition_type is not None:
            raise ValueError(
                f"{directory} is an image-to-video HunyuanVideo (image_condition_type: "
                f"{network_config.image_condition_type}); use fv_distill.models.HunyuanVideoImageToVideoModel"
            )

    def predict_velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelBase.predict_velocity`; sigma is `[B]`, as the network has one time embedding per clip."""
        return self.run_network(x_t, sigma, conditioning)

    def run_network(self, hidden_states: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output, fp32, for an input that may be more than `x_t`."""
        assert conditioning.text is not None, "HunyuanVideo has no network without text; see required_channels"
        assert conditioning.text_mask is not None, "HunyuanVideo's attention needs to know which tokens are real"
        assert sigma.ndim == 1, "one noise level per clip; see takes_sigma_per_frame"
        guidance = None
        if self.embedded_guidance is not None:
            guidance = torch.full((len(sigma),), 1000.0 * self.embedded_guidance, dtype=self.dtype, device=sigma.device)
        (velocity,) = self.call_network(
            hidden_states=hidden_states.to(self.dtype),
            timestep=1000 * sigma.float(),
            encoder_hidden_states=conditioning.text.to(self.dtype),
            encoder_attention_mask=conditioning.text_mask.to(self.dtype),
            pooled_projections=conditioning.extras["pooled_text_embedding"].to(self.dtype),
            guidance=guidance,
            return_dict=False,
        )
        return velocity.float()

    def sampling_arguments(self, guidance_scale: float | None) -> dict[str, Any]:
        """See `ModelBase.sampling_arguments`; the pipeline's `guidance_scale` is the embedded one."""
        true_guidance = {} if guidance_scale is None else {"true_cfg_scale": guidance_scale}
        return {"guidance_scale": self.embedded_guidance or 1.0, **true_guidance}

    def _checked_guidance(self, scale: float | None) -> float | None:
        if not self.network_config.guidance_embeds:
            if scale is not None:
                raise ValueError(
                    f"models.<role>.embedded_guidance={scale:g}, but the network of {self.directory} reads no guidance "
                    "scale (guidance_embeds: false); leave the key out"
                )
            return None
        scale = _DEFAULT_GUIDANCE if scale is None else scale
        if scale <= 0:
            raise ValueError(f"embedded_guidance={scale:g} must be positive; HunyuanVideoPipeline's default is 6")
        return scale

    def condition_shapes(self, latent_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """See `ModelBase.condition_shapes`."""
        return {"pooled_text_embedding": (self.network_config.pooled_projection_dim,)}

    def check_latent_shape(self, shape: Sequence[int], *, num_frames: int | None = None) -> None:
        """See `ModelBase.check_latent_shape`: channels, patch divisibility and 4k + 1 frames."""
        config = self.network_config
        check_clip_shape(
            shape,
            channels=config.out_channels,
            patch_size=(config.patch_size_t, config.patch_size, config.patch_size),
            temporal_factor=self.temporal_factor,
            num_frames=num_frames,
            directory=self.directory,
        )

    def check_text(self, shape: Sequence[int]) -> None:
        """See `ModelBase.check_text`."""
        check_text_width(shape, self.network_config.text_embed_dim, key="text_embed_dim", directory=self.directory)
