"""LTX-2 without its sound, over diffusers' `LTX2VideoTransformer3DModel`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from diffusers import LTX2VideoTransformer3DModel
from torch import Tensor, nn

from fv_distill.schedules import flow

from . import clean_frames
from .base import ModelBase
from .conditioning import Conditioning
from .latent_checks import check_clip_shape
from .ltx2_encoders import LTX2Encoders, read_statistics

_ATTENTION = tuple(f"{layer}.{part}" for layer in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0"))
# Parts of names of what the picture doesn't depend on: the sound's own branch, and what goes between the two.
_SOUND = ("audio", "av_cross_attn", "a2v")

# The pipeline's arguments for a picture that is blind to the sound and not guided; it takes a second pass for that.
_BLIND = {
    **{"modality_scale": 0.0, "audio_modality_scale": 2.0, "stg_scale": 0.0, "audio_stg_scale": 0.0},
    **{"guidance_rescale": 0.0, "audio_guidance_rescale": 0.0},
}


class LTX2VideoModel(ModelBase):
    """The network's output is the velocity and its timestep is 1000 sigma, per token; its modalities are isolated.

    Picture and sound don't see each other then, as in a pass of the pipeline's modality guidance. The sound's branch
    runs on one empty token, its weights stay as they are.

    Args:
        transformer: the network.
        directory: see `ModelBase`.
        fps: frames per second, which positions in time are scaled by.
        condition_frames: of the student, how many of a clip's first latent frames are given, 1 for image-to-video.
        kwargs: see `ModelBase`.

    Raises:
        ValueError: for a frame rate that is not positive, or a negative number of frames.
    """

    network_class = LTX2VideoTransformer3DModel
    encoders_class = LTX2Encoders
    gives_frames_in_place = True
    takes_sigma_per_frame = False
    lora_presets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": _ATTENTION,
        "all": (*_ATTENTION, "ff.net.0.proj", "ff.net.2"),
    }

    def __init__(
        self,
        transformer: nn.Module,
        *,
        directory: str | Path,
        fps: float = 24.0,
        condition_frames: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(transformer, directory=directory, **kwargs)
        network = cast(Any, transformer)
        self.network_config = network.config
        # diffusers lists the blocks for compilation only; sharding looks for them here.
        network._no_split_modules = list(network._repeated_blocks)
        for name, parameter in network.named_parameters():
            if not self.is_trained(name):
                parameter.requires_grad_(False)
        if fps <= 0:
            raise ValueError(f"fps={fps:g} must be positive")
        self.fps, self.condition_frames = fps, clean_frames.check_condition_frames(condition_frames)

    @classmethod
    def read_statistics(cls, directory: Path) -> tuple[Tensor, Tensor]:
        """See `ModelBase.read_statistics`."""
        return read_statistics(directory)

    @classmethod
    def from_pretrained(cls, init_from: str, *, text_length: int = 1024, **kwargs: Any) -> Self:
        """See `ModelBase.from_pretrained`; the connectors make 1,024 tokens of a text."""
        return super().from_pretrained(init_from, text_length=text_length, **kwargs)

    @classmethod
    def check_network(cls, network_config: Any, directory: Path) -> None:
        """See `ModelBase.check_network`."""
        if network_config.patch_size != 1 or network_config.patch_size_t != 1:
            raise ValueError(f"{directory} has patches of several latents; LTX-2 is published without")

    def is_trained(self, name: str) -> bool:
        """See `RoleNetwork.is_trained`; the sound's branch never is."""
        return super().is_trained(name) and not any(part in name for part in _SOUND)

    def predict_velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelBase.predict_velocity`; sigma is `[B]`, as parts of the network have one time per clip."""
        assert sigma.ndim == 1, "one noise level per clip; see takes_sigma_per_frame"
        given = conditioning.extras.get(clean_frames.COLUMN)
        if given is None:
            return self._velocity(x_t, flow.per_frame(sigma, x_t), sigma, conditioning)
        frames, levels = clean_frames.put_in_place(x_t, sigma, given)
        return clean_frames.lead_to(given, x_t, sigma, self._velocity(frames, levels, sigma, conditioning))

    def _velocity(self, latents: Tensor, levels: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.text is not None, "LTX-2 has no network without text; see required_channels"
        batch, _, frames, height, width = latents.shape
        config, text = self.network_config, conditioning.text.to(self.dtype)
        sound_width = config.caption_channels if config.use_prompt_embeddings else config.audio_cross_attention_dim
        velocity, _ = self.call_network(
            hidden_states=latents.flatten(2).transpose(1, 2).to(self.dtype),
            audio_hidden_states=text.new_zeros(batch, 1, config.audio_in_channels),
            encoder_hidden_states=text,
            audio_encoder_hidden_states=text.new_zeros(batch, 1, sound_width),
            timestep=1000 * levels.repeat_interleave(height * width, dim=1),
            audio_timestep=1000 * sigma.float(),
            sigma=1000 * sigma.float(),
            encoder_attention_mask=None if conditioning.text_mask is None else conditioning.text_mask.to(self.dtype),
            num_frames=frames,
            height=height,
            width=width,
            fps=self.fps,
            audio_num_frames=1,
            isolate_modalities=True,
            return_dict=False,
        )
        return velocity.transpose(1, 2).unflatten(2, (frames, height, width)).float()

    def _conditioning(self, batch: Mapping[str, Any]) -> Conditioning:
        conditioning = super()._conditioning(batch)
        return clean_frames.give_frames(conditioning, batch, self.condition_frames, self.normalize_latents)

    def sampling_arguments(self, guidance_scale: float | None) -> dict[str, Any]:
        """See `ModelBase.sampling_arguments`; without guidance the picture is made blind to the sound."""
        call: dict[str, Any] = {"frame_rate": self.fps}
        if guidance_scale is not None:
            call |= {"guidance_scale": guidance_scale, "audio_guidance_scale": guidance_scale}
        return {**call, **_BLIND} if guidance_scale == 1 else call

    def text_width(self, encoder_width: int) -> int:
        """See `ModelBase.text_width`; the text is what the connectors make of all layers of the encoder."""
        config = self.network_config
        return int(config.caption_channels if config.use_prompt_embeddings else config.cross_attention_dim)

    def check_latent_shape(self, shape: Sequence[int], *, num_frames: int | None = None) -> None:
        """See `ModelBase.check_latent_shape`."""
        check_clip_shape(
            shape,
            channels=self.network_config.in_channels,
            patch_size=(1, 1, 1),
            temporal_factor=self.network_config.vae_scale_factors[0],
            num_frames=num_frames,
            directory=self.directory,
        )
        clean_frames.check_condition_frames(self.condition_frames, shape[1])

    def check_conditions(self, shapes: Mapping[str, Sequence[int]], latent_shape: Sequence[int]) -> None:
        """See `ModelBase.check_conditions`."""
        clean_frames.check_clean_column(shapes, latent_shape, self.condition_frames)

    def check_text(self, shape: Sequence[int]) -> None:
        """See `ModelBase.check_text`."""
        if shape[-1] != self.text_width(0):
            raise ValueError(
                f"text embeddings of shape {tuple(shape)} don't fit {self.directory}, which reads its connectors' "
                f"{self.text_width(0)} channels; encode the captions with this model's own text encoder and connectors"
            )
