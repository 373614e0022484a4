"""Kandinsky 5's text encoders and VAE, called as `Kandinsky5T2VPipeline` and `Kandinsky5I2VPipeline` call them."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, Kandinsky5I2VPipeline, Kandinsky5T2VPipeline
from torch import Tensor

from .clean_frames import COLUMN
from .conditioning import Conditioning
from .encoders import Encoders
from .pretrained import read_pipeline_class, read_vae_factors

IMAGE_PIPELINE = Kandinsky5I2VPipeline.__name__
PIPELINES: dict[str, Any] = {
    Kandinsky5T2VPipeline.__name__: Kandinsky5T2VPipeline,
    IMAGE_PIPELINE: Kandinsky5I2VPipeline,
}

# `Kandinsky5I2VPipeline.normalize_first_frame` moves so many latent frames to the mean and deviation of those after
# them; where there are none after them, it makes NaN.
_ADJUSTED_FRAMES = 4


class Kandinsky5Encoders(Encoders):
    """See `Encoders`; Qwen2.5-VL's tokens are the text, CLIP's pooled vector is `pooled_text_embedding`.

    An image is its latents alone; the text encoder doesn't see it.
    """

    vae_class = AutoencoderKLHunyuanVideo

    @classmethod
    def fewest_frames(cls, directory: Path) -> int:
        """See `Encoders.fewest_frames`."""
        factor, _ = read_vae_factors(directory)
        return _ADJUSTED_FRAMES * factor + 1 if read_pipeline_class(directory) == IMAGE_PIPELINE else 1

    @cached_property
    def text_pipeline(self) -> Any:
        """The directory's pipeline with nothing but its two text encoders and their tokenizers."""
        return self.load_text_pipeline(PIPELINES[read_pipeline_class(self.directory)])

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """See `Encoders.encode_prompts`; cleaning, template and cropping are the pipeline's own."""
        text, pooled, ends = self.text_pipeline.encode_prompt(
            list(prompts), max_sequence_length=self.text_length, device=self.device
        )
        mask = torch.arange(self.text_length, device=self.device) < ends.diff()[:, None]
        # The pipeline pads to the longest of its prompts.
        padded = torch.zeros(len(prompts), self.text_length, text.shape[-1], device=self.device)
        padded[:, : text.shape[1]] = text.float()
        return Conditioning(padded * mask[..., None], mask, {"pooled_text_embedding": pooled.float()})

    @torch.no_grad()
    def encode_images(self, video: Tensor) -> dict[str, Tensor]:
        """See `Encoders.encode_images`: of the first frames alone, which this VAE makes other latents of than of clips.

        Returns:
            Of image-to-video `first_frame_latent`, normalised, `[B, C, 1, h, w]`.
        """
        if read_pipeline_class(self.directory) != IMAGE_PIPELINE:
            return {}
        return {COLUMN: self.encode_first_frame(video)}
