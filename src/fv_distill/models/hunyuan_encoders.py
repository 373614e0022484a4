"""HunyuanVideo's text encoders and VAE, called as its two pipelines, with and without an image, call them."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import PIL.Image
import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoImageToVideoPipeline, HunyuanVideoPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE
from torch import Tensor

from .clean_frames import COLUMN
from .conditioning import Conditioning
from .encoders import Encoders
from .pretrained import load_component_config

# Of the image's tokens `HunyuanVideoImageToVideoPipeline` keeps every so many-th, by the network's
# `image_condition_type`; its unconditional pass has the default of `encode_prompt`, whatever the network.
_INTERLEAVES = {"latent_concat": 2, "token_replace": 4}
_UNCONDITIONAL_INTERLEAVE = 2
# `encode_prompt` cuts the assistant's header out of what it has padded to `max_sequence_length`.
_CUT_OUT = 4
# The processor brings images to its own size, so that one that is black all over is the same in any.
_BLACK = PIL.Image.new("RGB", (64, 64))


def prompt_length(directory: Path, text_length: int) -> int:
    """The pipeline's `max_sequence_length` for a text of so many tokens, an image's among them."""
    return _prompt_length(text_length, _interleave(directory))


def _prompt_length(text_length: int, interleave: int) -> int:
    return text_length - _num_image_tokens(interleave) + _CUT_OUT


def _interleave(directory: Path) -> int:
    """Every so many-th of the image's tokens is part of the text."""
    kind = load_component_config(directory, "transformer").get("image_condition_type")
    if kind not in _INTERLEAVES:
        raise ValueError(
            f"{directory} is no image-to-video HunyuanVideo: its image_condition_type is {kind}, which is neither "
            f"{' nor '.join(_INTERLEAVES)}"
        )
    return _INTERLEAVES[kind]


def _num_image_tokens(interleave: int) -> int:
    whole: Any = DEFAULT_PROMPT_TEMPLATE["image_emb_len"]
    return len(range(0, whole, interleave))


class HunyuanVideoEncoders(Encoders):
    """See `Encoders`; LLaMA's tokens are the text, CLIP's pooled vector is `pooled_text_embedding`."""

    vae_class = AutoencoderKLHunyuanVideo

    @cached_property
    def text_pipeline(self) -> Any:
        """A `HunyuanVideoPipeline` of nothing but its two text encoders and their tokenizers."""
        return self.load_text_pipeline(HunyuanVideoPipeline)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """See `Encoders.encode_prompts`; template, cropping and the choice of a hidden layer are the pipeline's own."""
        text, pooled, mask = self.text_pipeline.encode_prompt(
            list(prompts), max_sequence_length=self.text_length, device=self.device
        )
        mask = mask.bool()
        return Conditioning(text.float() * mask[..., None], mask, {"pooled_text_embedding": pooled.float()})


class HunyuanVideoImageEncoders(HunyuanVideoEncoders):
    """See `Encoders`; the text is LLaVA's tokens of an image, then of a prompt, `text_length` of both together."""

    text_reads_image: ClassVar[bool] = True
    image_tokens: ClassVar[int] = _num_image_tokens(_UNCONDITIONAL_INTERLEAVE)

    @classmethod
    def check_text_length(cls, directory: Path, text_length: int) -> None:
        """See `Encoders.check_text_length`; the directory has to be one of image-to-video."""
        _interleave(directory)
        super().check_text_length(directory, text_length)

    @cached_property
    def text_pipeline(self) -> Any:
        """A `HunyuanVideoImageToVideoPipeline` of nothing but what reads text."""
        return self.load_text_pipeline(HunyuanVideoImageToVideoPipeline)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """See `Encoders.encode_prompts`; beside a black image, as in the pipeline's unconditional pass."""
        return self._encode(prompts, [_BLACK] * len(prompts), _UNCONDITIONAL_INTERLEAVE)

    @torch.no_grad()
    def encode_clip_captions(self, captions: Sequence[str], video: Tensor) -> Conditioning:
        """See `Encoders.encode_clip_captions`; each beside its video's first frame."""
        images = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(video[:, :, 0]))
        return self._encode(captions, images, _interleave(self.directory))

    @torch.no_grad()
    def encode_images(self, video: Tensor) -> dict[str, Tensor]:
        """See `Encoders.encode_images`: the normalised latents of the first frames alone.

        They are not those that a clip begins with: the VAE's group norms see all of its frames.
        """
        return {COLUMN: self.encode_first_frame(video)}

    def _encode(self, prompts: Sequence[str], images: Sequence[PIL.Image.Image], interleave: int) -> Conditioning:
        rows = [
            # One by one: prompts that are too long are only cropped rightly alone.
            self.text_pipeline.encode_prompt(
                image=image,
                prompt=prompt,
                max_sequence_length=_prompt_length(self.text_length, interleave),
                image_embed_interleave=interleave,
                device=self.device,
            )
            for prompt, image in zip(prompts, images, strict=True)
        ]
        text, pooled, mask = (torch.cat(values) for values in zip(*rows, strict=True))
        mask = mask.bool()
        return Conditioning(text.float() * mask[..., None], mask, {"pooled_text_embedding": pooled.float()})
