"""HunyuanVideo image-to-video over diffusers' `HunyuanVideoTransformer3DModel`, in both forms that were published."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .clean_frames import COLUMN, begin_with_given, lead_to, put_in_place
from .conditioning import Conditioning, PreparedBatch
from .hunyuan import HunyuanVideoModel
from .hunyuan_encoders import HunyuanVideoImageEncoders, prompt_length


class HunyuanVideoImageToVideoModel(HunyuanVideoModel):
    """HunyuanVideo whose first frame is given; which of the two ways is told by the network's `image_condition_type`.

    `latent_concat` reads, beside the noisy latents, those of the image, zero but for the first frame, and a mask of
    that frame, and generates all frames. `token_replace` reads the image in the place of the first noisy frame, whose
    tokens it modulates by timestep 0 whatever the clip's, and generates the others.

    The given frame is always the column `first_frame_latent`, which the image alone was encoded to, as the pipeline
    does; this VAE's first latent frame of a clip is another.

    The arguments are those of `HunyuanVideoModel`.

    Raises:
        ValueError: for a text length that is not longer than an image's tokens.
    """

    encoders_class = HunyuanVideoImageEncoders

    def __init__(self, transformer: nn.Module, *, directory: str | Path, **kwargs: Any) -> None:
        super().__init__(transformer, directory=directory, **kwargs)
        self.encoders_class.check_text_length(self.directory, self.text_length)
        self.replaces_tokens = self.network_config.image_condition_type == "token_replace"
        self.fixed_given_frames = int(self.replaces_tokens)
        self.gives_frames_in_place = self.replaces_tokens

    @classmethod
    def check_network(cls, network_config: Any, directory: Path) -> None:
        """See `ModelBase.check_network`."""
        kind, own, read = (
            network_config.image_condition_type,
            network_config.out_channels,
            network_config.in_channels,
        )
        if kind is None:
            raise ValueError(f"{directory} is a text-to-video HunyuanVideo; use fv_distill.models.HunyuanVideoModel")
        if read != (expected := 2 * own + 1 if kind == "latent_concat" else own):
            raise ValueError(
                f"{directory} has image_condition_type: {kind}, but its network reads {read} channels, not {expected}"
            )

    def predict_velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelBase.predict_velocity`; `token_replace`'s velocity of the given frame is the one that leads to it.

        Sigma is `[B]`, as the network has one time embedding per clip.
        """
        image = conditioning.extras.get(COLUMN)
        if not self.replaces_tokens:
            return self._beside_image(x_t, sigma, conditioning, image)
        assert image is not None, "token_replace has no network without an image; see check_unconditional_image"
        clip, _ = put_in_place(x_t, sigma, image)
        return lead_to(image, x_t, sigma, self.run_network(clip, sigma, conditioning))

    def _beside_image(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning, image: Tensor | None) -> Tensor:
        batch, channels, *size = x_t.shape
        given = x_t.new_zeros(batch, channels + 1, *size)
        # An unconditional pass may drop the image.
        if image is not None:
            given[:, :channels, :1] = image.to(given.dtype)
            given[:, channels, 0] = 1
        return self.run_network(torch.cat([x_t, given], dim=1), sigma, conditioning)

    def prepare_batch(
        self, batch: Mapping[str, Any], *, latents_source: Literal["data", "zeros"] = "data"
    ) -> PreparedBatch:
        """See `ModelBase.prepare_batch`; `token_replace`'s clips begin with what is given: no loss counts it."""
        prepared = super().prepare_batch(batch, latents_source=latents_source)
        return begin_with_given(prepared) if self.replaces_tokens and latents_source == "data" else prepared

    def condition_shapes(self, latent_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """See `ModelBase.condition_shapes`."""
        channels, _, height, width = latent_shape
        return {**super().condition_shapes(latent_shape), COLUMN: (channels, 1, height, width)}

    def sampling_arguments(self, guidance_scale: float | None) -> dict[str, Any]:
        """See `ModelBase.sampling_arguments`; with the length of prompts as the pipeline counts it."""
        length = prompt_length(self.directory, self.text_length)
        return {**super().sampling_arguments(guidance_scale), "max_sequence_length": length}

    def check_unconditional_image(self, policy: str) -> None:
        """See `ModelBase.check_unconditional_image`."""
        if self.replaces_tokens and policy != "keep":
            raise ValueError(
                f"{policy}, but a token_replace HunyuanVideo takes its first frame for given in any case; leave the "
                "key out, as the pipeline's unconditional pass has the image too"
            )

    def check_latent_shape(self, shape: Sequence[int], *, num_frames: int | None = None) -> None:
        """See `ModelBase.check_latent_shape`; there has to be a frame beside the first."""
        super().check_latent_shape(shape, num_frames=num_frames)
        if shape[1] < 2:
            raise ValueError(f"latents {tuple(shape)} are a single frame, which is given; take longer clips")
