"""Kandinsky 5, text-to-video and image-to-video, over diffusers' `Kandinsky5Transformer3DModel`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from diffusers import Kandinsky5Transformer3DModel
from torch import Tensor, nn

from . import clean_frames
from .base import ModelBase
from .conditioning import Conditioning, PreparedBatch, check_condition_shapes
from .kandinsky5_encoders import IMAGE_PIPELINE, PIPELINES, Kandinsky5Encoders
from .latent_checks import check_clip_shape, check_text_width
from .pretrained import read_pipeline_class, read_vae_factors

_ATTENTION = ("to_query", "to_key", "to_value", *(f"{kind}_attention.out_layer" for kind in ("self", "cross")))
_FEED_FORWARD = ("feed_forward.in_layer", "feed_forward.out_layer")


class Kandinsky5Model(ModelBase):
    """The network's output is the velocity, its timestep 1000 sigma, and its tensors have their channels last.

    It attends to all text that it is given: every sample is called by itself, with its own tokens and no padding.

    Of image-to-video, which the directory's pipeline tells, the first latent frame is given: the network sees it clean
    in the place of the noisy one, at the clip's timestep and marked by a mask, and the velocity there leads to it.

    Args:
        transformer: the network.
        directory: see `ModelBase`.
        condition_frames: how many of a clip's first latent frames are given; None is what the directory's pipeline
            takes, 1 for image-to-video and 0 for text-to-video.
        kwargs: see `ModelBase`.

    Raises:
        ValueError: for another number of given frames than the pipeline takes.
    """

    network_class = Kandinsky5Transformer3DModel
    encoders_class = Kandinsky5Encoders
    gives_frames_in_place = True
    takes_sigma_per_frame = False
    mixes_types = True
    # The number of a text's tokens is a value of its mask.
    runs_on_meta = False
    lora_presets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": _ATTENTION,
        "all": (*_ATTENTION, *_FEED_FORWARD),
        # With the embedders of clip, text and time, the modulation and the output.
        "linear": (
            *(*_ATTENTION, *_FEED_FORWARD),
            *(f"{kind}_embeddings.in_layer" for kind in ("time", "text", "pooled_text", "visual")),
            *("time_embeddings.out_layer", "text_modulation.out_layer", "visual_modulation.out_layer"),
            *("out_layer.modulation.out_layer", "out_layer.out_layer"),
        ),
    }

    def __init__(
        self, transformer: nn.Module, *, directory: str | Path, condition_frames: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(transformer, directory=directory, **kwargs)
        network = cast(Any, transformer)
        self.network_config = network.config
        # diffusers doesn't state what FSDP2 is to wrap; the whole network at once would defeat it.
        network._no_split_modules = ["Kandinsky5TransformerEncoderBlock", "Kandinsky5TransformerDecoderBlock"]
        self.temporal_factor, self.spatial_factor = read_vae_factors(self.directory)
        self.condition_frames = self.fixed_given_frames = _given_frames(self.directory, condition_frames)
        self.fewest_frames = self.encoders_class.fewest_frames(self.directory)

    @classmethod
    def check_network(cls, network_config: Any, directory: Path) -> None:
        """See `ModelBase.check_network`."""
        name = read_pipeline_class(directory)
        if name not in PIPELINES:
            raise ValueError(
                f"{directory} is a {name}; of Kandinsky 5, text-to-video and image-to-video are handled "
                f"({', '.join(PIPELINES)})"
            )
        if network_config.attention_type == "nabla":
            raise ValueError(
                f"{directory} has attention_type: nabla, sparse attention for long clips, which is not handled; use a "
                "checkpoint for 5 seconds whose attention_type is regular"
            )

    def predict_velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelBase.predict_velocity`; sigma is `[B]`, as the network has one time embedding per clip."""
        assert conditioning.text is not None, "Kandinsky has no network without text; see required_channels"
        assert conditioning.text_mask is not None, "the network has to be given real tokens only"
        assert sigma.ndim == 1, "one noise level per clip; see takes_sigma_per_frame"
        # An unconditional pass may drop it.
        given = conditioning.extras.get(clean_frames.COLUMN)
        latents = x_t if given is None else clean_frames.put_in_place(x_t, sigma, given)[0]
        lengths = conditioning.text_mask.sum(dim=1).tolist()
        rows = [
            self._predict(latents[row : row + 1], sigma[row : row + 1], conditioning.row(row), length)
            for row, length in enumerate(lengths)
        ]
        velocity = torch.cat(rows)
        return velocity if given is None else clean_frames.lead_to(given, x_t, sigma, velocity)

    def _predict(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning, num_tokens: int) -> Tensor:
        """One sample's velocity."""
        assert conditioning.text is not None, "the caller looked"
        latents = x_t.movedim(1, -1)
        if self.network_config.visual_cond:
            # A place for an image's latents, which the pipelines leave empty, and a mask of the frames that are given.
            beside = latents.new_zeros(*latents.shape[:-1], latents.shape[-1] + 1)
            if clean_frames.COLUMN in conditioning.extras:
                beside[:, : self.condition_frames, ..., -1] = 1
            latents = torch.cat([latents, beside], dim=-1)
        patches = zip(x_t.shape[2:], self.network_config.patch_size, strict=True)
        (velocity,) = (
            self.call_network(
                hidden_states=latents.to(self.dtype),
                timestep=1000 * sigma.float(),
                encoder_hidden_states=conditioning.text[:, :num_tokens].to(self.dtype),
                pooled_projections=conditioning.extras["pooled_text_embedding"].to(self.dtype),
                visual_rope_pos=[torch.arange(size // patch, device=x_t.device) for size, patch in patches],
                text_rope_pos=torch.arange(num_tokens, device=x_t.device),
                scale_factor=self._position_scale(x_t.shape[3:]),
                return_dict=True,
            ).sample,
        )
        return velocity.float().movedim(-1, 1)

    def _position_scale(self, size: Sequence[int]) -> tuple[float, float, float]:
        """By what positions are divided along T, H and W, as `Kandinsky5T2VPipeline` chooses it by the clip's size."""
        is_480p = all(480 <= self.spatial_factor * length <= 854 for length in size)
        return (1.0, 2.0, 2.0) if is_480p else (1.0, 3.16, 3.16)

    def prepare_batch(
        self, batch: Mapping[str, Any], *, latents_source: Literal["data", "zeros"] = "data"
    ) -> PreparedBatch:
        """See `ModelBase.prepare_batch`; a clip begins with what is given, so that nothing is to be learnt there."""
        prepared = super().prepare_batch(batch, latents_source=latents_source)
        if clean_frames.COLUMN not in prepared.conditioning.extras or latents_source == "zeros":
            return prepared
        return clean_frames.begin_with_given(prepared)

    def _conditioning(self, batch: Mapping[str, Any]) -> Conditioning:
        conditioning = super()._conditioning(batch)
        # The pipeline encodes an image alone. HunyuanVideo's VAE normalises over all frames, so that a clip's first
        # latent frame is another; the column, where there is one, holds the image's.
        column = clean_frames.COLUMN
        source = {column: batch[column]} if column in batch else batch
        return clean_frames.give_frames(conditioning, source, self.condition_frames, self.normalize_latents)

    def check_conditions(self, shapes: Mapping[str, Sequence[int]], latent_shape: Sequence[int]) -> None:
        """See `ModelBase.check_conditions`."""
        super().check_conditions(shapes, latent_shape)
        clean_frames.check_clean_column(shapes, latent_shape, self.condition_frames)
        if self.condition_frames and clean_frames.COLUMN in shapes:
            channels, _, height, width = latent_shape
            expected = {clean_frames.COLUMN: (channels, self.condition_frames, height, width)}
            check_condition_shapes(shapes, expected, owner=f"{type(self).__name__} of {self.directory}")

    def condition_shapes(self, latent_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """See `ModelBase.condition_shapes`."""
        return {"pooled_text_embedding": (self.network_config.in_text_dim2,)}

    def check_latent_shape(self, shape: Sequence[int], *, num_frames: int | None = None) -> None:
        """See `ModelBase.check_latent_shape`: channels, patch divisibility, 4k + 1 frames, and enough of them."""
        check_clip_shape(
            shape,
            channels=self.network_config.out_visual_dim,
            patch_size=self.network_config.patch_size,
            temporal_factor=self.temporal_factor,
            num_frames=num_frames,
            directory=self.directory,
        )
        if (shape[1] - 1) * self.temporal_factor + 1 < self.fewest_frames:
            raise ValueError(
                f"latents {tuple(shape)}: {IMAGE_PIPELINE} ends by fitting a clip's first latent frames to those after "
                f"them, and makes NaN where there are none; use clips of at least {self.fewest_frames} frames "
                f"({(self.fewest_frames - 1) // self.temporal_factor + 1} latent frames)"
            )

    def check_text(self, shape: Sequence[int]) -> None:
        """See `ModelBase.check_text`."""
        check_text_width(shape, self.network_config.in_text_dim, key="in_text_dim", directory=self.directory)


def _given_frames(directory: Path, wanted: int | None) -> int:
    """The number of latent frames that the directory's pipeline is given, which is `wanted` unless that is None."""
    name = read_pipeline_class(directory)
    given = int(name == IMAGE_PIPELINE)
    if wanted not in (None, given):
        raise ValueError(
            f"models.<role>.condition_frames={wanted}, but {directory} is a {name}: image-to-video checkpoints "
            f"({IMAGE_PIPELINE}) are given 1 latent frame, others 0; leave the key out, or use another checkpoint"
        )
    return given
