"""HunyuanVideo 1.5, text-to-video and image-to-video, over diffusers' `HunyuanVideo15Transformer3DModel`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from diffusers import HunyuanVideo15Transformer3DModel
from torch import Tensor, nn

from .base import ModelBase
from .clean_frames import COLUMN, check_clean_column, give_frames
from .conditioning import Conditioning
from .hunyuan15_encoders import IMAGE_PIPELINE, PIPELINES, HunyuanVideo15Encoders
from .latent_checks import check_clip_shape, check_text_width
from .pretrained import load_component_config, read_pipeline_class, read_vae_factors

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
# ByT5's tokens, which `HunyuanVideo15Pipeline` always pads to this length.
_GLYPH_TOKENS = 256


class HunyuanVideo15Model(ModelBase):
    """The network's output is the velocity, its timestep 1000 sigma; text-to-video leaves its place for an image empty.

    The arguments are those of `ModelBase`; use `HunyuanVideo15Model.from_pretrained` for a diffusers directory.
    """

    network_class = HunyuanVideo15Transformer3DModel
    encoders_class = HunyuanVideo15Encoders
    takes_sigma_per_frame = False
    embeds_time_in_own_dtype = True
    # The last block also makes text of its text, which nothing reads.
    has_unused_parameters = True
    # The network sorts tokens by the values of their masks.
    runs_on_meta = False
    lora_presets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": _ATTENTION,
        "all": (*_ATTENTION, *_FEED_FORWARD),
        # With the refiner of the text, the embedders of time, text and image, the modulation and the output.
        "linear": (
            *_ATTENTION,
            *_FEED_FORWARD,
            *("proj_in", "proj_out", "linear_1", "linear_2", "linear_3", "linear"),
        ),
    }

    def __init__(self, transformer: nn.Module, *, directory: str | Path, **kwargs: Any) -> None:
        super().__init__(transformer, directory=directory, **kwargs)
        self.network_config = cast(Any, transformer).config
        self.sees_an_image = read_pipeline_class(self.directory) == IMAGE_PIPELINE
        self.temporal_factor, _ = read_vae_factors(self.directory)

    @classmethod
    def check_network(cls, network_config: Any, directory: Path) -> None:
        """See `ModelBase.check_network`."""
        # Not the network's `task_type`, which is "i2v" in the published 480p text-to-video checkpoint too.
        name = read_pipeline_class(directory)
        if name not in PIPELINES:
            raise ValueError(f"{directory} is a {name}, which is none of HunyuanVideo 1.5's ({', '.join(PIPELINES)})")
        if network_config.use_meanflow:
            raise ValueError(
                f"{directory} has use_meanflow: true, a network of two timesteps (super-resolution or distilled "
                "already); give one of the plain text-to-video checkpoints"
            )
        if network_config.in_channels != 2 * network_config.out_channels + 1:
            raise ValueError(
                f"{directory}: in_channels={network_config.in_channels} are not latents, condition latents and a mask "
                f"({2 * network_config.out_channels + 1})"
            )

    def predict_velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelBase.predict_velocity`; sigma is `[B]`, as the network has one time embedding per clip."""
        assert conditioning.text is not None, "HunyuanVideo has no network without text; see required_channels"
        assert conditioning.text_mask is not None, "HunyuanVideo's attention needs to know which tokens are real"
        assert sigma.ndim == 1, "one noise level per clip; see takes_sigma_per_frame"
        batch, channels, *size = x_t.shape
        # Behind the clip its first frame's latents, and a mask that tells where they are; both are empty without image.
        given = x_t.new_zeros(batch, channels + 1, *size)
        # Zeros tell the network to mask the image's tokens out: one of them does as well as the pipeline's 729.
        image = torch.zeros(batch, 1, self.network_config.image_embed_dim, device=x_t.device)
        # An unconditional pass may drop the image.
        if self.sees_an_image and COLUMN in conditioning.extras:
            given[:, :channels, :1] = conditioning.extras[COLUMN].to(given.dtype)
            given[:, channels, 0] = 1
            image = conditioning.extras["clip_feature"]
        (velocity,) = self.call_network(
            hidden_states=torch.cat([x_t, given], dim=1).to(self.dtype),
            # The network makes its time embedding in the type of this.
            timestep=(1000 * sigma.float()).to(self.dtype),
            encoder_hidden_states=conditioning.text.to(self.dtype),
            encoder_attention_mask=conditioning.text_mask,
            encoder_hidden_states_2=conditioning.extras["text_embedding_2"].to(self.dtype),
            encoder_attention_mask_2=conditioning.extras["text_mask_2"],
            image_embeds=image.to(self.dtype),
            return_dict=False,
        )
        return velocity.float()

    def sampling_arguments(self, guidance_scale: float | None) -> dict[str, Any]:
        """See `ModelBase.sampling_arguments`; this pipeline's guidance is a component of it, the guider."""
        return {}

    def check_conditions(self, shapes: Mapping[str, Sequence[int]], latent_shape: Sequence[int]) -> None:
        """See `ModelBase.check_conditions`."""
        super().check_conditions(shapes, latent_shape)
        check_clean_column(shapes, latent_shape, int(self.sees_an_image))

    def condition_shapes(self, latent_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """See `ModelBase.condition_shapes`."""
        width = self.network_config.text_embed_2_dim
        shapes: dict[str, tuple[int, ...]] = {
            "text_embedding_2": (_GLYPH_TOKENS, width),
            "text_mask_2": (_GLYPH_TOKENS,),
        }
        if self.sees_an_image:
            encoder = load_component_config(self.directory, "image_encoder")
            # SigLIP has no token beside those of the image's patches.
            tokens = (encoder["image_size"] // encoder["patch_size"]) ** 2
            shapes["clip_feature"] = (tokens, self.network_config.image_embed_dim)
        return shapes

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

    def _conditioning(self, batch: Mapping[str, Any]) -> Conditioning:
        return give_frames(super()._conditioning(batch), batch, int(self.sees_an_image), self.normalize_latents)
