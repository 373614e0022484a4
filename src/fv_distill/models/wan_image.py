"""Wan image-to-video over diffusers' `WanTransformer3DModel`: Wan 2.1, one expert of Wan 2.2 A14B, and TI2V 5B.

The column `first_frame_latent` holds *normalised* latents, unlike `vae_latent`: that is how FastVideo's preprocessing
writes it (fastvideo/pipelines/preprocess/preprocess_pipeline_i2v.py) and its training concatenates it as it is.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import clean_frames
from .clean_frames import COLUMN
from .conditioning import Conditioning
from .pipeline_index import read_index
from .pretrained import load_component_config, read_vae_factors
from .wan import WanModel
from .wan_encoders import WanImageEncoders

# diffusers' `WanAttnProcessor` takes what is left of this many tokens of text for the image's.
_TEXT_TOKENS = 512

_CLIP = "clip_feature"


class WanImageToVideoModel(WanModel):
    """Wan whose first frame is given; which of the two ways is told by the directory.

    Wan 2.1 and 2.2 A14B read, beside the noisy latents, a mask of the given frames and the latents of a video that is
    the given frame and then grey; Wan 2.1 also reads the frame's CLIP features. TI2V 5B (`expand_timesteps` in its
    `model_index.json`) reads the given frame in the place of the noisy one, at timestep 0.

    Without `first_frame_latent` (policy `drop`) no frame is given: mask, latents and CLIP tokens are left out.

    The arguments are those of `WanModel`.

    Raises:
        ValueError: for a text length that the network's image attention can't tell from image tokens.
    """

    encoders_class = WanImageEncoders
    lora_presets: ClassVar[dict[str, tuple[str, ...]]] = {
        **WanModel.lora_presets,
        # Wan 2.1 only: with attention's projections of the image.
        "image_attention": (*WanModel.lora_presets["attention"], "add_k_proj", "add_v_proj"),
    }

    def __init__(self, transformer: nn.Module, *, directory: str | Path, **kwargs: Any) -> None:
        super().__init__(transformer, directory=directory, **kwargs)
        self.expands_timesteps = self.gives_frames_in_place = expands_timesteps(self.directory)
        self.reads_clip = self.network_config.image_dim is not None
        if self.reads_clip and self.text_length != _TEXT_TOKENS:
            raise ValueError(
                f"text_length={self.text_length}, but diffusers' Wan 2.1 image-to-video network takes exactly "
                f"{_TEXT_TOKENS} tokens of text; set training.data.text_length: {_TEXT_TOKENS}"
            )

    @classmethod
    def check_network(cls, network_config: Any, directory: Path) -> None:
        """See `ModelBase.check_network`."""
        own, read = network_config.out_channels, network_config.in_channels
        if network_config.pos_embed_seq_len is not None:
            raise ValueError(f"{directory} is a first-last-frame-to-video Wan, which is not handled")
        if expands_timesteps(directory):
            if read != own:
                raise ValueError(f"{directory} has expand_timesteps, but its network reads {read} channels, not {own}")
            return
        frames, _ = read_vae_factors(directory)
        if read != 2 * own + frames:
            raise ValueError(
                f"{directory} is no image-to-video Wan: its network reads {read} channels, not {own} noisy ones, a "
                f"mask of {frames} and {own} of the image; use fv_distill.models.WanModel"
            )

    @property
    def pipeline_config(self) -> dict[str, Any]:
        """See `ModelBase.pipeline_config`; TI2V 5B's own index names the text-to-video pipeline."""
        return {**super().pipeline_config, "_class_name": "WanImageToVideoPipeline"}

    def condition_shapes(self, latent_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """See `ModelBase.condition_shapes`."""
        channels, frames, height, width = latent_shape
        shapes: dict[str, tuple[int, ...]] = {
            COLUMN: (channels, 1 if self.expands_timesteps else frames, height, width)
        }
        if not self.reads_clip:
            return shapes
        encoder = load_component_config(self.directory, "image_encoder")
        patches = (encoder["image_size"] // encoder["patch_size"]) ** 2
        return {**shapes, _CLIP: (patches + 1, self.network_config.image_dim)}

    def check_conditions(self, shapes: Mapping[str, Sequence[int]], latent_shape: Sequence[int]) -> None:
        """See `ModelBase.check_conditions`; TI2V takes its frame from the clip or a longer `first_frame_latent`."""
        if self.expands_timesteps and clean_frames.hold_clips(shapes):
            return
        if self.expands_timesteps and len(shapes.get(COLUMN, ())) == 4:
            channels, _, height, width = shapes[COLUMN]
            shapes = {**shapes, COLUMN: (channels, 1, height, width)}
        super().check_conditions(shapes, latent_shape)

    def _conditioning(self, batch: Mapping[str, Any]) -> Conditioning:
        conditioning = super()._conditioning(batch)
        if not self.expands_timesteps:
            return conditioning
        if COLUMN in batch:
            batch = {**batch, COLUMN: batch[COLUMN][:, :, :1]}
        return clean_frames.give_frames(conditioning, batch, 1, self.normalize_latents)

    def predict_velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelBase.predict_velocity`.

        TI2V 5B's velocity of the given frame is the one that leads to it, whatever the network says there.
        """
        image = conditioning.extras.get(COLUMN)
        if not self.expands_timesteps:
            return self._beside_image(x_t, sigma, conditioning, image)
        if image is None:
            return super().predict_velocity(x_t, sigma, conditioning)
        first = image[:, :, :1]
        frames, levels = clean_frames.put_in_place(x_t, sigma, first)
        return clean_frames.lead_to(first, x_t, sigma, self.run_network(frames, levels, conditioning))

    def _beside_image(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning, image: Tensor | None) -> Tensor:
        batch, _, frames, height, width = x_t.shape
        mask = x_t.new_zeros(batch, self.temporal_factor, frames, height, width)
        if image is not None:
            # A latent frame is `temporal_factor` frames of video, and the first one is that many copies of one frame.
            mask[:, :, 0] = 1
        latents = torch.cat([x_t, mask, torch.zeros_like(x_t) if image is None else image.to(x_t.dtype)], dim=1)
        inputs = {}
        if self.reads_clip and _CLIP in conditioning.extras:
            inputs["encoder_hidden_states_image"] = conditioning.extras[_CLIP].to(self.dtype)
        return self.run_network(latents, sigma, conditioning, **inputs)


def expands_timesteps(directory: Path) -> bool:
    """Whether the directory's network takes a timestep for each token, as Wan 2.2 TI2V 5B's does."""
    return bool(read_index(directory).get("expand_timesteps"))
