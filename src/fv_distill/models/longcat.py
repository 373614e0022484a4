"""LongCat-Video over `LongCatVideoTransformer3DModel`: from text, from a first image, or continuing a clip."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from . import clean_frames
from .base import ModelBase
from .conditioning import Conditioning
from .latent_checks import check_clip_shape, check_text_width
from .longcat_encoders import LongCatEncoders
from .pretrained import read_vae_factors
from .transformers.longcat import LongCatVideoTransformer3DModel


class LongCatVideoModel(ModelBase):
    """The network's output is the negative velocity; its timestep is 1000 sigma.

    Args:
        transformer: the network.
        directory: the published repository or a pipeline directory.
        condition_frames: of the student, how many of a clip's first latent frames are given to all roles: 1 is
            image-to-video, more is continuation, 0 is text-to-video. The network sees them clean at timestep 0, and the
            velocity there leads to them. They are taken from `vae_latent`, or from `first_frame_latent` where the rows
            hold no clips.
        kwargs: see `ModelBase`.

    Raises:
        ValueError: for a negative number.
    """

    network_class = LongCatVideoTransformer3DModel
    encoders_class = LongCatEncoders
    gives_frames_in_place = True
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

    def __init__(
        self, transformer: nn.Module, *, directory: str | Path, condition_frames: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(transformer, directory=directory, **kwargs)
        self.condition_frames = clean_frames.check_condition_frames(condition_frames)
        self.network_config = cast(Any, transformer).config
        self.temporal_factor, _ = read_vae_factors(self.directory)

    def predict_velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelBase.predict_velocity`."""
        given = conditioning.extras.get(clean_frames.COLUMN)
        if given is None:
            return self._velocity(x_t, sigma.float(), conditioning)
        frames, levels = clean_frames.put_in_place(x_t, sigma, given)
        velocity = self._velocity(frames, levels, conditioning, num_cond_latents=given.shape[2])
        return clean_frames.lead_to(given, x_t, sigma, velocity)

    def _conditioning(self, batch: Mapping[str, Any]) -> Conditioning:
        conditioning = super()._conditioning(batch)
        return clean_frames.give_frames(conditioning, batch, self.condition_frames, self.normalize_latents)

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
        clean_frames.check_condition_frames(self.condition_frames, shape[1])

    def check_conditions(self, shapes: Mapping[str, Sequence[int]], latent_shape: Sequence[int]) -> None:
        """See `ModelBase.check_conditions`."""
        clean_frames.check_clean_column(shapes, latent_shape, self.condition_frames)

    def check_text(self, shape: Sequence[int]) -> None:
        """See `ModelBase.check_text`."""
        check_text_width(shape, self.network_config.caption_channels, key="caption_channels", directory=self.directory)
