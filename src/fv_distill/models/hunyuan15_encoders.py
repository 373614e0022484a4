"""HunyuanVideo 1.5's text encoders and VAE, called as `HunyuanVideo15Pipeline` calls them."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15ImageToVideoPipeline, HunyuanVideo15Pipeline
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from .clean_frames import COLUMN
from .conditioning import Conditioning
from .encoders import Encoders, vae_without_weights
from .pretrained import read_pipeline_class

IMAGE_PIPELINE = HunyuanVideo15ImageToVideoPipeline.__name__
PIPELINES: dict[str, Any] = {
    HunyuanVideo15Pipeline.__name__: HunyuanVideo15Pipeline,
    IMAGE_PIPELINE: HunyuanVideo15ImageToVideoPipeline,
}


class HunyuanVideo15Encoders(Encoders):
    """See `Encoders`; Qwen2.5-VL's tokens are the text, ByT5's of what stands in quotes are `text_embedding_2`.

    An image is its latents and SigLIP's tokens of it, `clip_feature`.
    """

    vae_class = AutoencoderKLHunyuanVideo15

    @cached_property
    def text_pipeline(self) -> Any:
        """The directory's pipeline with nothing but its encoders, of text and, for image-to-video, of images."""
        vae = vae_without_weights(AutoencoderKLHunyuanVideo15, self.directory)
        kind = PIPELINES[read_pipeline_class(self.directory)]
        pipeline = self.load_text_pipeline(kind, vae=vae)
        # An attribute, where other pipelines have an argument.
        pipeline.tokenizer_max_length = self.text_length
        return pipeline

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """See `Encoders.encode_prompts`; template, cropping and the choice of a hidden layer are the pipeline's own."""
        text, mask, glyphs, glyph_mask = self.text_pipeline.encode_prompt(
            list(prompts), batch_size=len(prompts), device=self.device
        )
        mask, glyph_mask = mask.bool(), glyph_mask.bool()
        extras = {"text_embedding_2": glyphs.float() * glyph_mask[..., None], "text_mask_2": glyph_mask}
        return Conditioning(text.float() * mask[..., None], mask, extras)

    @torch.no_grad()
    def encode_video(self, video: Tensor) -> Tensor:
        """See `Encoders.encode_video`; one clip at a time, as this VAE's attention mask has no batch."""
        encode = super().encode_video
        return torch.cat([encode(clip) for clip in video.split(1)])

    @torch.no_grad()
    def encode_images(self, video: Tensor) -> dict[str, Tensor]:
        """See `Encoders.encode_images`: of the first frames."""
        if read_pipeline_class(self.directory) != IMAGE_PIPELINE:
            return {}
        images = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(video[:, :, 0]))
        pipeline = self.text_pipeline
        features = [
            pipeline.encode_image(image, batch_size=1, device=self.device, dtype=torch.float32) for image in images
        ]
        return {"clip_feature": torch.cat(features), COLUMN: self.encode_first_frame(video)}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See `Encoders.decode`."""
        decode = super().decode
        return torch.cat([decode(clip) for clip in latents.split(1)])
