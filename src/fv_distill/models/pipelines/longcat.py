"""LongCat-Video's sampling as a diffusers pipeline: text-to-video, image-to-video and continuation."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import PipelineImageInput
from diffusers.loaders import Mochi1LoraLoaderMixin
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from fv_distill.models.longcat_encoders import encode_text
from fv_distill.models.pipeline_index import indexed
from fv_distill.models.pretrained import resolve_directory
from fv_distill.models.transformers.longcat import LongCatVideoTransformer3DModel
from fv_distill.models.wan_vae import check_clip_size, decode_normalized, encode_normalized

Generators = torch.Generator | list[torch.Generator] | None
# The published sampling ends at timestep 1 before the shift.
_LAST_SIGMA = 1e-3
# An unconditional velocity of zero has no direction to project on.
_SMALLEST_SQUARE = 1e-8


class LongCatVideoPipeline(DiffusionPipeline, Mochi1LoraLoaderMixin):  # the mixin is the plainest for one network
    """Samples the published model, its fine-tunes and few-step students; see `__call__`."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    tokenizer: Any
    text_encoder: Any
    vae: Any
    scheduler: Any
    transformer: Any
    # DiffusionPipeline's, which hides them from type checkers.
    register_modules: Any
    progress_bar: Any
    maybe_free_model_hooks: Any
    _execution_device: Any

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKLWan,
        scheduler: FlowMatchEulerDiscreteScheduler,
        transformer: LongCatVideoTransformer3DModel,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, scheduler=scheduler, transformer=transformer
        )
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae.config.scale_factor_spatial)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """See `DiffusionPipeline.from_pretrained`; the published repository is taken too, which has no index."""
        with indexed(resolve_directory(pretrained_model_name_or_path)) as directory:
            return super().from_pretrained(directory, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str = "",
        image: PipelineImageInput | None = None,
        video: Tensor | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 93,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        zero_star: bool = True,
        generator: Generators = None,
        latents: Tensor | None = None,
        max_sequence_length: int = 512,
        output_type: str = "np",
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> WanPipelineOutput:
        """Sample clips; the defaults are the release's.

        Args:
            prompt: one or several.
            negative_prompt: what guidance's other pass reads.
            image: the clips' first frame, scaled to their size; a tensor is `[B, 3, H, W]` in [0, 1].
            video: the clips' beginnings `[B, 3, 4k + 1, height, width]` in [0, 1], in place of an image.
            height: in pixels, a multiple of 16.
            width: in pixels, a multiple of 16.
            num_frames: 4k + 1.
            num_inference_steps: noise levels.
            guidance_scale: `uncond + scale (cond - uncond)`; 1 makes no second pass.
            zero_star: scale `uncond` to its projection on `cond` before (CFG-Zero*, Fan et al. 2025), as the release.
            generator: of the noise, or one for each clip.
            latents: start from this noise `[B, C, T, H, W]`.
            max_sequence_length: text tokens; the published network was trained with 512, padding included.
            output_type: "np", "pt", "pil" or "latent".
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}) after each step.

        Raises:
            ValueError: for sizes that are no multiple of what the network and the VAE fold, or an image and a video.
        """
        patch_size = self.transformer.config.patch_size
        check_clip_size(self.vae, patch_size, height=height, width=width, num_frames=num_frames)
        if image is not None:
            if video is not None:
                raise ValueError("image and video are both given, but a clip begins in one way; leave one out")
            video = self.video_processor.preprocess(image, height=height, width=width)[:, :, None] / 2 + 0.5
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        device = self._execution_device
        texts = [self._encode(prompts, max_sequence_length, device)]
        if guidance_scale != 1:
            texts.append(self._encode([negative_prompt] * len(prompts), max_sequence_length, device))
        shape = (len(prompts), *self._latent_shape(height, width, num_frames))
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents, start = self._put_beginning(latents.to(device, torch.float32), video)
        self._set_timesteps(num_inference_steps, device)
        for step, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            velocity = self._velocity(latents, timestep, texts, start, guidance_scale, zero_star=zero_star)
            moved = self.scheduler.step(velocity, timestep, latents[:, :, start:], return_dict=False)[0]
            latents = torch.cat([latents[:, :, :start], moved], dim=2)
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, step, timestep, {"latents": latents}).get("latents", latents)
        self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=self._decode(latents, output_type))

    def _velocity(
        self,
        latents: Tensor,
        timestep: Tensor,
        texts: Sequence[tuple[Tensor, Tensor]],
        start: int,
        scale: float,
        *,
        zero_star: bool,
    ) -> Tensor:
        """The guided velocity of the frames from `start` on; the network's output points the other way."""
        timesteps = timestep.float().expand(latents.shape[0], latents.shape[2]).clone()
        timesteps[:, :start] = 0
        conditional, *others = (
            -self.transformer(latents.to(self.transformer.dtype), timesteps, text, mask, num_cond_latents=start).sample[
                :, :, start:
            ]
            for text, mask in texts
        )
        if not others:
            return conditional
        unconditional = others[0]
        if zero_star:
            products = (conditional * unconditional).flatten(1).sum(1)
            scales = products / unconditional.square().flatten(1).sum(1).clamp(min=_SMALLEST_SQUARE)
            unconditional = unconditional * scales.view(-1, 1, 1, 1, 1)
        return unconditional + scale * (conditional - unconditional)

    def _set_timesteps(self, steps: int, device: torch.device) -> None:
        # A few-step student's scheduler reaches its levels by itself; see fv_distill.export.scheduler.
        sigmas = None if self.scheduler.config.shift_terminal is not None else np.linspace(1, _LAST_SIGMA, steps)
        self.scheduler.set_timesteps(steps, sigmas=sigmas, device=device)

    def _encode(self, prompts: Sequence[str], text_length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        text = encode_text(self.tokenizer, self.text_encoder, prompts, text_length=text_length, device=device)
        assert text.text is not None and text.text_mask is not None
        return text.text.to(self.transformer.dtype), text.text_mask

    def _put_beginning(self, latents: Tensor, video: Tensor | None) -> tuple[Tensor, int]:
        """Noise with the normalised latents of the given frames for its first ones, and how many these are."""
        if video is None:
            return latents, 0
        given = encode_normalized(self.vae, (2 * video - 1).to(latents.device))
        given = given.expand(latents.shape[0], -1, -1, -1, -1)
        return torch.cat([given, latents[:, :, given.shape[2] :]], dim=2), given.shape[2]

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        video = decode_normalized(self.vae, latents)
        return self.video_processor.postprocess_video(video, output_type=output_type)

    def _latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        config = self.vae.config
        frames = (num_frames - 1) // config.scale_factor_temporal + 1
        rows, columns = height // config.scale_factor_spatial, width // config.scale_factor_spatial
        return self.transformer.config.in_channels, frames, rows, columns
