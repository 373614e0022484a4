"""Diffusion forcing: fine-tuning in which every chunk has a noise level of its own.

Chen et al. 2024, "Diffusion forcing: next-token prediction meets full-sequence diffusion".
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fv_distill.losses.flow_matching import errors_by_sigma, flow_matching_loss
from fv_distill.models.base import ModelBase
from fv_distill.models.causal_base import CausalModelBase, causal_adapters
from fv_distill.rng import SampleRng
from fv_distill.schedules import flow
from fv_distill.schedules.shift import shift_sigma, unshift_sigma
from fv_distill.schedules.timesteps import gaussian_timestep_weight

from .base import LossTerm, SigmaErrors, TrainingMethod
from .calls import NetworkCall
from .options import DiffusionForcingSFTOptions, MethodOptions


class DiffusionForcingSFTMethod(TrainingMethod):
    """Train one role, the student, on clips whose chunks are noised independently.

    With `teacher_forcing` every chunk sees the clean (or slightly noised) chunks before it instead of their noisy
    copies, as it will when streaming; that takes a causal student.
    """

    options_class = DiffusionForcingSFTOptions
    trainable_roles = ("student",)

    def __init__(self, models: Mapping[str, ModelBase], options: MethodOptions | None = None) -> None:
        super().__init__(models, options)
        self.options = options if isinstance(options, DiffusionForcingSFTOptions) else DiffusionForcingSFTOptions()
        self.student = self.models["student"]
        self.chunk_size = self.options.chunk_size
        if not self.student.takes_sigma_per_frame:
            raise ValueError(
                "DiffusionForcingSFTMethod gives every chunk a noise level of its own, but "
                f"{type(self.student).__name__} has one time embedding for the whole clip; use FineTuneMethod, or a "
                "family that takes one per frame"
            )
        if isinstance(self.student, CausalModelBase):
            if self.chunk_size % self.student.chunk_size:
                raise ValueError(
                    f"method.chunk_size={self.chunk_size} cuts through the student's chunks; give a multiple of "
                    f"models.student.chunk_size={self.student.chunk_size}"
                )
        elif self.options.teacher_forcing:
            raise ValueError(
                f"method.teacher_forcing needs a causal student, not {type(self.student).__name__}; set "
                f"models.student._target_: {causal_adapters(self.student)}"
            )

    def updates(self, step: int) -> tuple[str, ...]:
        """The student, in every step."""
        return ("student",)

    def network_calls(self, step: int, num_frames: int) -> tuple[NetworkCall, ...]:
        """One call of the student, behind the clean clip with teacher forcing."""
        return (
            NetworkCall("student", grad=True, span="clip_after_history" if self.options.teacher_forcing else "clip"),
        )

    def prompts(self) -> tuple[str, ...]:
        """The empty prompt, where caption dropout puts it in."""
        return ("",) if self.student.drops_captions else ()

    def losses(self, role: str, batch: Mapping[str, Any], rng: SampleRng) -> Iterable[LossTerm]:
        """One weighted flow-matching term."""
        prepared = self.student.prepare_batch(batch)
        x0 = prepared.latents
        noise = rng.normal("noise", x0.shape[1:])
        sigma = self._draw_sigma(rng, x0.shape[2])
        x_t = flow.add_noise(x0, noise, sigma)
        if self.options.teacher_forcing:
            assert isinstance(self.student, CausalModelBase)
            history, level = self._history(x0, rng)
            velocity = self.student.predict_velocity(
                x_t, sigma, prepared.conditioning, clean_history=history, history_sigma=level
            )
        else:
            velocity = self.student.predict_velocity(x_t, sigma, prepared.conditioning)
        target = flow.velocity_target(x0, noise)
        loss = flow_matching_loss(velocity, target, weight=self._weight(sigma))
        errors = SigmaErrors(sigma, errors_by_sigma(velocity, target, sigma))
        yield LossTerm(loss, {"loss/student": loss.detach()}, {"student": errors})

    def _draw_sigma(self, rng: SampleRng, frames: int) -> Tensor:
        """One level per chunk, spread over its frames, `[B, T]`."""
        if frames % self.chunk_size:
            raise ValueError(
                f"{frames} latent frames do not divide into chunks of method.chunk_size={self.chunk_size}; crop the "
                "data or change it"
            )
        low, high = self.options.min_timestep_ratio, self.options.max_timestep_ratio
        u = low + (high - low) * rng.uniform("sigma", (frames // self.chunk_size,))
        return shift_sigma(u, self.student.flow_shift).repeat_interleave(self.chunk_size, dim=1)

    def _history(self, x0: Tensor, rng: SampleRng) -> tuple[Tensor, Tensor]:
        """What later chunks see of a clip, and its noise level `[B]`, drawn up to `history_noise`."""
        level = self.options.history_noise * rng.uniform("history/sigma")
        return flow.add_noise(x0, rng.normal("history/noise", x0.shape[1:]), level), level

    def _weight(self, sigma: Tensor) -> Tensor | None:
        shift = self.student.flow_shift
        if self.options.weighting == "none":
            return None
        if self.options.weighting == "gaussian":
            return gaussian_timestep_weight(sigma, flow_shift=shift)
        return gaussian_timestep_weight(unshift_sigma(torch.as_tensor(sigma), shift), flow_shift=1.0)
