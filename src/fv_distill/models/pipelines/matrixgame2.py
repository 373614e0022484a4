"""Matrix-Game 2's sampling of whole clips as a diffusers pipeline; a causal network is streamed instead."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.loaders import Mochi1LoraLoaderMixin
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import CLIPVisionModel

from fv_distill.models.matrixgame2_encoders import first_frame_conditions
from fv_distill.models.transformers.matrixgame2 import MatrixGame2Transformer3DModel, beside_first_frame
from fv_distill.models.wan_vae import check_clip_size, decode_normalized

Generators = torch.Generator | list[torch.Generator] | None


class MatrixGame2Pipeline(DiffusionPipeline, Mochi1LoraLoaderMixin):  # the mixin is the plainest for one network
    """Samples the foundation model, its fine-tunes and few-step students; see `__call__`."""

    model_cpu_offload_seq = "image_encoder->transformer->vae"
    vae: Any
    image_encoder: Any
    scheduler: Any
    transformer: Any
    # DiffusionPipeline's, which hides them from type checkers.
    register_modules: Any
    progress_bar: Any
    maybe_free_model_hooks: Any
    _execution_device: Any

    def __init__(
        self,
        vae: AutoencoderKLWan,
        image_encoder: CLIPVisionModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        transformer: MatrixGame2Transformer3DModel,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, image_encoder=image_encoder, scheduler=scheduler, transformer=transformer)
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae.config.scale_factor_spatial)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        *,
        mouse_cond: Any = None,
        keyboard_cond: Any = None,
        height: int = 352,
        width: int = 640,
        num_frames: int = 57,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "np",
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> WanPipelineOutput:
        """Sample clips that go on from an image; size and length default to the release's.

        Args:
            image: the first frame, a PIL image or what else diffusers' `VideoProcessor` takes; or several.
            mouse_cond: of the clip's video frames, `[F, 2]` or `[B, F, 2]`: up and to the right. None leaves the
                mouse out.
            keyboard_cond: `[F, K]` or `[B, F, K]`; None leaves the keyboard out.
            height: in pixels, a multiple of 16.
            width: in pixels, a multiple of 16.
            num_frames: 4k + 1.
            num_inference_steps: noise levels.
            guidance_scale: `uncond + scale (cond - uncond)`, where `uncond` is without movement, all actions 0; 1 makes
                no second pass.
            generator: of the noise, or one for each clip.
            latents: start from this noise `[B, C, T, H, W]`.
            output_type: "np", "pt", "pil" or "latent".
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}) after each step.

        Raises:
            ValueError: for sizes that are no multiple of what the network and the VAE fold, or actions of too few
                frames.
        """
        patch_size = self.transformer.config.patch_size
        check_clip_size(self.vae, patch_size, height=height, width=width, num_frames=num_frames)
        device = self._execution_device
        first_frame, tokens = self._look(image, height, width, num_frames, device)
        batch = first_frame.shape[0]
        given = {"mouse_cond": mouse_cond, "keyboard_cond": keyboard_cond}
        actions = {name: _actions(value, batch, device) for name, value in given.items()}
        passes = [actions]
        if guidance_scale != 1:
            passes.append({name: None if of is None else torch.zeros_like(of) for name, of in actions.items()})
        if latents is None:
            latents = randn_tensor(first_frame.shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device, torch.float32)
        self._set_timesteps(num_inference_steps, device)
        for step, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            inputs = beside_first_frame(latents, first_frame).to(self.transformer.dtype)
            level = timestep.float().expand(batch)
            velocity, *others = (self.transformer(inputs, level, tokens, **done).sample.float() for done in passes)
            if others:
                velocity = others[0] + guidance_scale * (velocity - others[0])
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, step, timestep, {"latents": latents}).get("latents", latents)
        self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=self._decode(latents, output_type))

    def _look(
        self, image: Any, height: int, width: int, num_frames: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The first frame's latents for the whole clip, and CLIP's tokens of it."""
        pixels = self.video_processor.preprocess(image, height, width).to(device, torch.float32) / 2 + 0.5
        video = pixels[:, :, None].expand(-1, -1, num_frames, -1, -1)
        seen = first_frame_conditions(self.vae, self.image_encoder, video)
        return seen["first_frame_latent"], seen["clip_feature"].to(self.transformer.dtype)

    def _set_timesteps(self, steps: int, device: torch.device) -> None:
        # A few-step student's scheduler reaches its levels by itself; see fv_distill.export.scheduler.
        is_few_step = self.scheduler.config.shift_terminal is not None
        sigmas = None if is_few_step else np.linspace(1, 1 / steps, steps)
        self.scheduler.set_timesteps(steps, sigmas=sigmas, device=device)

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        video = decode_normalized(self.vae, latents)
        return self.video_processor.postprocess_video(video, output_type=output_type)


def _actions(given: Any, batch: int, device: torch.device) -> Tensor | None:
    """`[F, n]` or `[B, F, n]` of any kind as `[B, F, n]`, fp32."""
    if given is None:
        return None
    actions = torch.as_tensor(given, dtype=torch.float32, device=device)
    return (actions if actions.ndim == 3 else actions[None]).expand(batch, -1, -1)
