"""Fine-tuning: flow matching on clips."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from fv_distill.losses.flow_matching import errors_by_sigma, flow_matching_loss
from fv_distill.models.base import ModelBase
from fv_distill.rng import SampleRng
from fv_distill.schedules import flow
from fv_distill.schedules.shift import shift_sigma
from fv_distill.schedules.timesteps import density_sigma, within_range

from .base import LossTerm, SigmaErrors, TrainingMethod
from .calls import NetworkCall
from .options import FineTuneOptions, MethodOptions


class FineTuneMethod(TrainingMethod):
    """Train one role, the student, to predict the velocity of noised clips (Lipman et al. 2023, eq. 14)."""

    options_class = FineTuneOptions
    trainable_roles = ("student",)
    trains_experts = True

    def __init__(self, models: Mapping[str, ModelBase], options: MethodOptions | None = None) -> None:
        super().__init__(models, options)
        self.options = options if isinstance(options, FineTuneOptions) else FineTuneOptions()
        self.student = self.models["student"]

    def updates(self, step: int) -> tuple[str, ...]:
        """The student, in every step."""
        return ("student",)

    def network_calls(self, step: int, num_frames: int) -> tuple[NetworkCall, ...]:
        """One call of the student."""
        return (NetworkCall("student", grad=True),)

    def prompts(self) -> tuple[str, ...]:
        """The empty prompt, where caption dropout puts it in."""
        return ("",) if self.student.drops_captions else ()

    def losses(self, role: str, batch: Mapping[str, Any], rng: SampleRng) -> Iterable[LossTerm]:
        """One flow-matching term."""
        prepared = self.student.prepare_batch(batch)
        x0 = prepared.latents
        noise = rng.normal("noise", x0.shape[1:])
        sigma = self._draw_sigma(rng)
        velocity = self.student.predict_velocity(flow.add_noise(x0, noise, sigma), sigma, prepared.conditioning)
        target = flow.velocity_target(x0, noise)
        loss = flow_matching_loss(velocity, target)
        errors = SigmaErrors(sigma, errors_by_sigma(velocity, target, sigma))
        yield LossTerm(loss, {"loss/student": loss.detach()}, {"student": errors})

    def _draw_sigma(self, rng: SampleRng) -> Tensor:
        """Of the configured density; an expert gets the part of it that lies in its range."""
        return within_range(rng.uniform("sigma"), self._sigma_at, self.student.sigma_range)

    def _sigma_at(self, u: Tensor) -> Tensor:
        options = self.options
        sigma = density_sigma(
            u,
            options.sigma_density,
            logit_mean=options.logit_mean,
            logit_std=options.logit_std,
            mode_scale=options.mode_scale,
        )
        return shift_sigma(sigma, self.student.flow_shift) if options.apply_flow_shift else sigma
