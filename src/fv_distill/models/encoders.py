"""The frozen networks around a family's transformer: what makes latents and conditions of videos and captions."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .conditioning import Conditioning
from .pretrained import read_latent_statistics


def vae_without_weights(kind: Any, directory: Path) -> Any:
    """A directory's VAE on the meta device, for pipelines that can't be made without one and only read its config."""
    with torch.device("meta"):
        return kind.from_config(kind.load_config(directory, subfolder="vae"))


def encode_zero_padded(
    pipeline: Any, prompts: Sequence[str], *, text_length: int, device: torch.device
) -> Conditioning:
    """Text of a pipeline that pads with zeros and gives no mask, in which an encoded token is never exactly zero."""
    text, _ = pipeline.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, max_sequence_length=text_length, device=device
    )
    return Conditioning(text.float(), text.abs().sum(dim=-1) > 0)


class Encoders(ABC):
    """A pipeline directory's text encoders and VAE, each loaded when it is first used and kept as long as this object.

    Args:
        directory: the diffusers pipeline directory.
        device: where they compute.
        dtype: of their weights.
        text_length: the number of tokens that text embeddings are padded to.

    Raises:
        ValueError: for a text length that is too short for the family.

    Attributes:
        reads_text: False in families without a text encoder, whose rows have no text embedding.
        text_reads_image: True in families whose text encoder reads a clip's first frame beside its caption: text
            embeddings then belong to clips (`encode_clip_captions`), and `encode_prompts` is for what an unconditional
            pass reads.
        image_tokens: how many of a text's tokens are an image's, at most.
        vae_class: the diffusers class of the VAE.
    """

    reads_text: ClassVar[bool] = True
    text_reads_image: ClassVar[bool] = False
    image_tokens: ClassVar[int] = 0
    vae_class: ClassVar[Any]

    def __init__(self, directory: Path, *, device: torch.device, dtype: torch.dtype, text_length: int) -> None:
        self.check_text_length(directory, text_length)
        self.directory = directory
        self.device = device
        self.dtype = dtype
        self.text_length = text_length

    @classmethod
    def fewest_frames(cls, directory: Path) -> int:
        """The frames of the shortest clip that a directory's pipeline can make."""
        return 1

    @classmethod
    def check_text_length(cls, directory: Path, text_length: int) -> None:
        """Raise a `ValueError` that names the fix if a directory's text of so many tokens has no room for a prompt."""
        if cls.image_tokens and text_length <= cls.image_tokens:
            raise ValueError(
                f"text_length={text_length} leaves no room for prompts: up to {cls.image_tokens} tokens of "
                f"{cls.__name__}'s text are an image's; set it to {cls.image_tokens} plus what prompts may have"
            )

    @cached_property
    def vae(self) -> Any:
        """The diffusers autoencoder."""
        return self.vae_class.from_pretrained(self.directory, subfolder="vae", dtype=self.dtype).to(self.device)

    def load_text_pipeline(self, kind: Any, **components: Any) -> Any:
        """The directory as a pipeline of nothing but what encodes text and images, on the device.

        Args:
            kind: the diffusers class.
            components: what takes the place of its other components, beside transformer and VAE, which are None.
        """
        others = {"transformer": None, "vae": None, **components}
        pipeline = kind.from_pretrained(self.directory, dtype=self.dtype, **others)
        for name, part in pipeline.components.items():
            if name not in others and isinstance(part, nn.Module):
                part.to(self.device)
        return pipeline

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Text conditioning `[len(prompts), text_length, D]`, fp32 and zero at padding; see `Conditioning`."""

    def encode_clip_captions(self, captions: Sequence[str], video: Tensor) -> Conditioning:
        """Text conditioning of the captions of videos `[len(captions), 3, F, H, W]` in [0, 1]; see `encode_prompts`.

        The videos only matter to families with `text_reads_image`, which override this.
        """
        return self.encode_prompts(captions)

    @torch.no_grad()
    def encode_video(self, video: Tensor) -> Tensor:
        """Video `[B, 3, F, H, W]` in [0, 1] to raw VAE latents `[B, C, T, h, w]`: the distribution's mode, fp32.

        Raw is what data sets store; `ModelBase.normalize_latents` makes of it what the network is trained on.
        """
        pixels = 2 * video.to(self.device, self.vae.dtype) - 1
        return self.vae.encode(pixels).latent_dist.mode().float()

    def encode_first_frame(self, video: Tensor) -> Tensor:
        """Normalised latents `[B, C, 1, h, w]` of the first frames alone, which not every VAE begins a clip with."""
        mean, std = (value.to(self.device) for value in read_latent_statistics(self.directory))
        return (self.encode_video(video[:, :, :1]) - mean) / std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Raw VAE latents to video `[B, 3, F, H, W]` in [0, 1], fp32."""
        video = self.vae.decode(latents.to(self.device, self.vae.dtype), return_dict=False)[0]
        return (video.float() / 2 + 0.5).clamp(0, 1)

    def tile_vae(self, *, enabled: bool) -> None:
        """Encode and decode in overlapping tiles, one clip at a time, which takes less memory; or in one piece."""
        if enabled:
            self.vae.enable_tiling()
            self.vae.enable_slicing()
        else:
            self.vae.disable_tiling()
            self.vae.disable_slicing()

    def encode_images(self, video: Tensor) -> dict[str, Tensor]:
        """What an image-to-video network sees of videos `[B, 3, F, H, W]`: data column -> tensor, first dimension B.

        Nothing for networks that are conditioned on text alone.
        """
        return {}
