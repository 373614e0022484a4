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
from .pretrained import read_pipeline_class, read_vae_factors

_ATTENTION = ("to_query", "to_key", "to_value", *(f"{kind}_attention.out_layer" for kind in ("self", "cross")))
_FEED_FORWARD = ("feed_forward.in_layer", "feed_forward.out_layer")


class Kandinsky5Model(ModelBase):
    """The network's output is the velocity, its timestep 1000 sigma, and its tensors have their channels last.

    It attends to all text that it is given: every sample is called by itself, with its own tokens and no padding.

    The arguments are those of `ModelBase`; use `Kandinsky5Model.from_pretrained` for a diffusers directory.
    """

    network_class = Kandinsky5Transformer3DModel
    encoders_class = Kandinsky5Encoders
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

    def __init__(self, transformer: nn.Module, *, directory: str | Path, **kwargs: Any) -> None:
        super().__init__(transformer, directory=directory, **kwargs)
        network = cast(Any, transformer)
        self.network_config = network.config
        # diffusers doesn't state what FSDP2 is to wrap; the whole network at once would defeat it.
        network._no_split_modules = ["Kandinsky5TransformerEncoderBlock", "Kandinsky5TransformerDecoderBlock"]
        self.temporal_factor, self.spatial_factor = read_vae_factors(self.directory)

    @classmethod
    def check_network(cls, network_config: Any, directory: Path) -> None:
        """See `ModelBase.check_network`."""
        name = read_pipeline_class(directory)
        if name != "Kandinsky5T2VPipeline":
            raise ValueError(
                f"{directory} is a {name}; of Kandinsky 5 only text-to-video (Kandinsky5T2VPipeline) is handled"
            )
        if network_config.attention_type == "nabla":
            raise ValueError(
                f"{directory} has attention_type: nabla, sparse attention for long clips, which is not handled; use a "
                "checkpoint for 5 seconds"
            )

    def predict_velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelBase.predict_velocity`; sigma is `[B]`, as the network has one time embedding per clip."""
        assert conditioning.text is not None, "Kandinsky has no network without text; see required_channels"
        assert conditioning.text_mask is not None, "the network has to be given real tokens only"
        assert sigma.ndim == 1, "one noise level per clip; see takes_sigma_per_frame"
        lengths = conditioning.text_mask.sum(dim=1).tolist()
        rows = [
            self._predict(x_t[row : row + 1], sigma[row : row + 1], conditioning.row(row), length)
            for row, length in enumerate(lengths)
        ]
        return torch.cat(rows)

    def _predict(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning, num_tokens: int) -> Tensor:
        """One sample's velocity."""
        assert conditioning.text is not None, "the caller looked"
        latents = x_t.movedim(1, -1)
        if self.network_config.visual_cond:
            # An empty place for an image's latents and its mask, as the pipeline leaves it.
            latents = torch.cat([latents, latents.new_zeros(*latents.shape[:-1], latents.shape[-1] + 1)], dim=-1)
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

    def condition_shapes(self, latent_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """See `ModelBase.condition_shapes`."""
        return {"pooled_text_embedding": (self.network_config.in_text_dim2,)}

    def check_latent_shape(self, shape: Sequence[int], *, num_frames: int | None = None) -> None:
        """See `ModelBase.check_latent_shape`: channels, patch divisibility and 4k + 1 frames."""
        check_clip_shape(
            shape,
            channels=self.network_config.out_visual_dim,
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
