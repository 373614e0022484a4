"""Wan text-to-video, 2.1 and 2.2, over diffusers' `WanTransformer3DModel`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from .base import ModelBase
from .conditioning import Conditioning
from .latent_checks import check_clip_shape, check_text_width
from .pretrained import read_vae_factors, resolve_directory
from .wan_encoders import WanEncoders
from .wan_two_experts import Expert, choose_expert


class WanModel(ModelBase):
    """Wan's network output is the velocity itself; its timestep is 1000 sigma and its text is padded with zeros.

    Use `WanModel.from_pretrained` for a diffusers directory.

    Args:
        transformer: see `ModelBase`.
        directory: see `ModelBase`.
        expert: which of the directory's networks it is.
        kwargs: see `ModelBase`.
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

    def __init__(
        self, transformer: nn.Module, *, directory: str | Path, expert: Expert | None = None, **kwargs: Any
    ) -> None:
        super().__init__(transformer, directory=directory, **kwargs)
        self.expert = expert or Expert()
        self.component, self.sigma_range = self.expert.component, self.expert.sigma_range
        self.network_config = cast(Any, transformer).config
        self.temporal_factor, _ = read_vae_factors(self.directory)

    @classmethod
    def from_pretrained(
        cls,
        init_from: str,
        *,
        expert: Literal["high", "low"] | None = None,
        boundary_ratio: float | None = None,
        **options: Any,
    ) -> Self:
        """Load a Wan pipeline directory or Hub repository.

        Args:
            init_from: a local diffusers directory or a Hub id `owner/name`.
            expert: which network of a directory with two: "high" (noise) or "low".
            boundary_ratio: the sigma from which on the high-noise expert is called; None reads it from the directory.
            options: further arguments, those of `ModelBase.from_pretrained` or of the class.

        Raises:
            FileNotFoundError: if there is no such model.
            ValueError: see `ModelBase.from_pretrained` and `choose_expert`.
        """
        directory = resolve_directory(init_from)
        return super().from_pretrained(
            str(directory), expert=choose_expert(directory, expert, boundary_ratio), **options
        )

    @classmethod
    def component_of(cls, options: Mapping[str, Any]) -> str:
        """See `ModelBase.component_of`: the expert's."""
        return options["expert"].component

    @classmethod
    def on_base(
        cls,
        base: ModelBase,
        *,
        expert: Literal["high", "low"] | None = None,
        boundary_ratio: float | None = None,
        **kwargs: Any,
    ) -> Self:
        """See `ModelBase.on_base`; the expert is the base's.

        Raises:
            ValueError: as there, or if the base is another family's or another expert.
        """
        if not isinstance(base, WanModel):
            raise ValueError(f"{cls.__name__} can't work on the network of a {type(base).__name__}")
        own = base.expert
        if expert not in (None, own.name) or boundary_ratio not in (None, own.boundary_ratio):
            raise ValueError(
                f"expert={expert} and boundary_ratio={boundary_ratio} contradict the role whose network is shared, "
                f"which has {own.name} and {own.boundary_ratio}; leave them out"
            )
        return super().on_base(base, expert=own, **kwargs)

    @classmethod
    def check_network(cls, network_config: Any, directory: Path) -> None:
        """See `ModelBase.check_network`."""
        if network_config.image_dim is not None or network_config.in_channels != network_config.out_channels:
            raise ValueError(
                f"{directory} is an image-to-video Wan, which {cls.__name__} does not handle; use "
                "fv_distill.models.WanImageToVideoModel (there is no causal adapter for it)"
            )

    @property
    def pipeline_config(self) -> dict[str, Any]:
        """See `ModelBase.pipeline_config`: the boundary that the expert was trained with."""
        return {} if self.expert.name is None else {"boundary_ratio": self.expert.boundary_ratio}

    def predict_velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelBase.predict_velocity`; a sigma per latent frame is spread over the frame's tokens."""
        return self.run_network(x_t, sigma, conditioning)

    def run_network(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, **inputs: Any) -> Tensor:
        """The network's output, fp32, at latents to which a family's further channels have been added."""
        assert conditioning.text is not None, "Wan has no network without text; see required_channels"
        timestep = 1000 * sigma.float()
        if timestep.ndim == 2:
            _, patch_height, patch_width = self.network_config.patch_size
            tokens_per_frame = (latents.shape[3] // patch_height) * (latents.shape[4] // patch_width)
            timestep = timestep.repeat_interleave(tokens_per_frame, dim=1)
        (velocity,) = self.call_network(
            hidden_states=latents.to(self.dtype),
            timestep=timestep,
            encoder_hidden_states=conditioning.text.to(self.dtype),
            return_dict=False,
            **inputs,
        )
        return velocity.float()

    def check_latent_shape(self, shape: Sequence[int], *, num_frames: int | None = None) -> None:
        """See `ModelBase.check_latent_shape`: channels, patch divisibility and 4k + 1 frames."""
        check_clip_shape(
            shape,
            channels=self.network_config.out_channels,
            patch_size=self.network_config.patch_size,
            temporal_factor=self.temporal_factor,
            num_frames=num_frames,
            directory=self.directory,
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
        check_text_width(shape, self.network_config.text_dim, key="text_dim", directory=self.directory)
