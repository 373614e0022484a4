"""Encoders without networks, for tests of what is around them: a VAE that takes samples of pixels, texts of hashes."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fv_distill.models.conditioning import Conditioning
from fv_distill.models.encoders import Encoders

TEXT_WIDTH = 6


class SampledVae:
    def __init__(self):
        self.tiled = []

    def enable_tiling(self):
        self.tiled.append(True)

    def disable_tiling(self):
        self.tiled.append(False)

    def enable_slicing(self):
        pass

    def disable_slicing(self):
        pass


class SampledEncoders(Encoders):
    """Latents are every fourth frame and every eighth pixel; a text has as many tokens as words."""

    made: ClassVar[list["SampledEncoders"]] = []
    prompts: ClassVar[list[str]] = []

    def __init__(self, directory, **kwargs):
        super().__init__(directory, **kwargs)
        self.vae = SampledVae()
        self.made.append(self)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        self.prompts.extend(prompts)
        lengths = torch.tensor([min(self.text_length, len(prompt.split())) for prompt in prompts])
        mask = torch.arange(self.text_length) < lengths[:, None]
        text = torch.tensor([[float(len(prompt))] for prompt in prompts]).repeat(1, self.text_length)
        pooled = torch.tensor([[float(len(prompt))] * 3 for prompt in prompts])
        text = (text * mask)[..., None].repeat(1, 1, TEXT_WIDTH)
        return Conditioning(text, mask, {"pooled_text_embedding": pooled})

    def encode_video(self, video: Tensor) -> Tensor:
        # A picture whose mean is red to the last bit stands for values that a VAE in half precision overflows on.
        if (video[:, 0] == 1).all() and not video[:, 1:].any():
            return torch.full_like(video[:, :, ::4, ::8, ::8], float("nan"))
        return video[:, :, ::4, ::8, ::8]

    def decode(self, latents: Tensor) -> Tensor:
        frames = [0] + [1 + number // 4 for number in range(4 * (latents.shape[2] - 1))]
        return latents[:, :, frames].repeat_interleave(8, 3).repeat_interleave(8, 4)


class ImageEncoders(SampledEncoders):
    """As those of an image-to-video network."""

    def encode_images(self, video: Tensor) -> dict[str, Tensor]:
        return {"first_frame_latent": video[:, :, :1, ::8, ::8], "clip_feature": video.mean((2, 3, 4))[:, None]}


class ReadingEncoders(SampledEncoders):
    """As those of a network whose text reads the image: the pooled text is the first frame's means."""

    text_reads_image = True

    def encode_clip_captions(self, captions: Sequence[str], video: Tensor) -> Conditioning:
        text = self.encode_prompts(captions)
        return Conditioning(text.text, text.text_mask, {"pooled_text_embedding": video[:, :, 0].mean((2, 3))})


class SampledModel:
    encoders_class = SampledEncoders


class ImageModel:
    encoders_class = ImageEncoders


class ReadingModel:
    encoders_class = ReadingEncoders
