"""DMD2: a few-step student, a critic that tracks it, and the teacher whose distribution it is to match.

Yin et al. 2024, "Improved distribution matching distillation for fast image synthesis", without its GAN term.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fv_distill.losses.distribution_matching import direction_loss, dmd_direction
from fv_distill.losses.flow_matching import errors_by_sigma, flow_matching_loss
from fv_distill.models.base import ModelBase
from fv_distill.models.conditioning import CHANNEL_COLUMNS, Conditioning, PreparedBatch, UncondPolicy, unconditional
from fv_distill.rng import SampleRng
from fv_distill.rollouts.few_step import VelocityNetwork, few_step_rollout
from fv_distill.schedules import flow
from fv_distill.schedules.few_step import few_step_sigmas
from fv_distill.schedules.timesteps import score_sigma, within_range

from .base import LossTerm, SigmaErrors, TrainingMethod
from .calls import NetworkCall
from .options import DMD2Options, MethodOptions

# Pipelines compare timesteps, 1000 sigma, that went through float32.
_EDGE = 1e-5


class DMD2Method(TrainingMethod):
    """The student follows `score_fake - score_real` at its own samples; the critic fits those samples in every step."""

    options_class = DMD2Options
    trainable_roles = ("student", "critic")
    frozen_roles = ("teacher",)
    # Makes a low-noise expert's rollouts down to where its own noise levels begin.
    optional_roles = ("high_expert",)
    trains_experts = True

    def __init__(self, models: Mapping[str, ModelBase], options: MethodOptions | None = None) -> None:
        super().__init__(models, options)
        self.options = options if isinstance(options, DMD2Options) else DMD2Options()
        self.student, self.teacher, self.critic = (self.models[role] for role in ("student", "teacher", "critic"))
        self.few_step_sigmas: tuple[float, ...] = few_step_sigmas(
            self.options.dmd_denoising_steps,
            flow_shift=self.student.flow_shift,
            warp=self.options.warp_denoising_step,
        )
        self.sample_type = self.options.student_sample_type
        self._exits = self._own_steps()
        cfg = self.options.cfg_uncond
        self._policy = UncondPolicy(text=cfg.text, image=cfg.image or "keep", action=cfg.action or "keep")
        if self._uses_guidance and not self.teacher.reads_text and self._policy.image == self._policy.action == "keep":
            raise ValueError(
                f"method.real_score_guidance_scale={self.options.real_score_guidance_scale:g}, but "
                f"{type(self.teacher).__name__} reads no text and method.cfg_uncond keeps image and actions: both "
                "passes would be the same; set method.cfg_uncond.action or .image to zero or drop, or the scale to 1"
            )
        if self._uses_guidance:
            self._check_unconditional()
        # The student's rollout on its way to the critic's loss of the same step, by the micro-batch's first sample.
        self._rollouts: dict[tuple[int, int], Tensor] = {}

    def _check_unconditional(self) -> None:
        for channel, check in (
            ("text", self.teacher.check_unconditional_text),
            ("image", self.teacher.check_unconditional_image),
        ):
            try:
                check(getattr(self._policy, channel))
            except ValueError as error:
                raise ValueError(f"method.cfg_uncond.{channel}: {error}") from error

    def _own_steps(self) -> tuple[int, ...]:
        """Indices of the steps that the student is trained at: all, or those of an expert's noise levels.

        Raises:
            ValueError: if the roles are experts for different levels, or the student has none to be trained at.
        """
        own, levels = self.student.sigma_range, ", ".join(f"{sigma:.4g}" for sigma in self.few_step_sigmas)
        self._check_ranges(own)
        for sigma in self.few_step_sigmas:
            if any(0 < edge < 1 and abs(sigma - edge) < _EDGE for edge in own):
                raise ValueError(
                    f"method.dmd_denoising_steps: of the sigmas {levels}, {sigma:.4g} is the boundary between the "
                    "experts, where rounding decides which one a pipeline calls; choose other steps or flow_shift"
                )
        steps = tuple(step for step, sigma in enumerate(self.few_step_sigmas) if self.student.covers(sigma))
        if not steps:
            raise ValueError(f"method.dmd_denoising_steps: none of the sigmas {levels} is in the expert's range {own}")
        self._check_high_expert(needed=self.options.rollout_mode == "simulate" and steps[0] != 0)
        return steps

    def _check_ranges(self, own: tuple[float, float]) -> None:
        for role in ("teacher", "critic"):
            if (model := self.models[role]).sigma_range != own:
                raise ValueError(
                    f"models.{role} is for sigma {model.sigma_range}, but the student for {own}; give all roles the "
                    "same expert and boundary_ratio"
                )
        minimum, maximum = self.options.min_score_sigma, self.options.max_score_sigma
        if maximum <= own[0] or minimum >= own[1]:
            raise ValueError(
                f"method.min_score_sigma={minimum:g} and max_score_sigma={maximum:g} leave out the expert's whole "
                f"range {own}"
            )

    def _check_high_expert(self, *, needed: bool) -> None:
        own, high = self.student.sigma_range, self.models.get("high_expert")
        if high is None and needed:
            raise ValueError(
                f"method.rollout_mode: simulate starts at pure noise, which is not in the expert's range {own}; set "
                "models.high_expert to the expert that makes the steps before, or rollout_mode: data_latent for clips"
            )
        if high is not None and not needed:
            raise ValueError(
                "models.high_expert is only called in the rollouts (rollout_mode: simulate) of a low-noise expert; "
                "remove it"
            )
        if high is not None and high.sigma_range != (own[1], 1.0):
            raise ValueError(
                f"models.high_expert is for sigma {high.sigma_range}, but the student's range {own} ends at {own[1]:g}"
                "; set models.high_expert.expert: high, and the same boundary_ratio for all roles"
            )

    @property
    def _uses_guidance(self) -> bool:
        return self.options.real_score_guidance_scale != 1

    def updates(self, step: int) -> tuple[str, ...]:
        """The critic in every step; before it, in every k-th step, the student."""
        return ("student", "critic") if step % self.options.generator_update_interval == 0 else ("critic",)

    @property
    def update_cycle(self) -> int:
        """The student's interval."""
        return self.options.generator_update_interval

    def network_calls(self, step: int, num_frames: int) -> tuple[NetworkCall, ...]:
        """A rollout for each update that needs its own, scores for the student, one critic call for the critic."""
        roles = self.updates(step)
        calls = [NetworkCall("critic", grad=True)] if "critic" in roles else []
        if "student" in roles:
            calls += [*self._rollout_calls(num_frames, grad=True), NetworkCall("teacher"), NetworkCall("critic")]
            if self._uses_guidance:
                calls.append(NetworkCall("teacher", guided=True))
        if "critic" in roles and not ("student" in roles and self.options.reuse_rollout):
            calls += self._rollout_calls(num_frames, grad=False)
        return tuple(calls)

    def _rollout_calls(self, num_frames: int, *, grad: bool) -> list[NetworkCall]:
        """The student's calls of one rollout; exit steps are drawn evenly among those that it is trained at."""
        last = NetworkCall("student", grad=grad)
        if self.options.rollout_mode == "data_latent":
            return [last]
        # Steps before the student's own are another expert's.
        before = self._exits[0]
        mean_exit = sum(self._exits) / len(self._exits)
        calls = [NetworkCall("high_expert", count=before)] if before else []
        return [*calls, NetworkCall("student", count=mean_exit - before), last]

    def optimizer_overrides(self, role: str) -> dict[str, Any]:
        """The critic's own learning rate, betas and scheduler where the options give them."""
        if role != "critic":
            return {}
        own = {
            "learning_rate": self.options.fake_score_learning_rate,
            "betas": self.options.fake_score_betas,
            "lr_scheduler": self.options.fake_score_lr_scheduler,
        }
        return {key: value for key, value in own.items() if value is not None}

    def prompts(self) -> tuple[str, ...]:
        """The empty prompt, where caption dropout puts it in, and the negative one that guidance needs."""
        needs_negative = self._uses_guidance and self._policy.text == "negative_prompt"
        empty = ("",) if self.student.drops_captions else ()
        return (*empty, self.student.negative_prompt) if needs_negative else empty

    def losses(self, role: str, batch: Mapping[str, Any], rng: SampleRng) -> Iterable[LossTerm]:
        """The DMD loss for the student, flow matching on the student's samples for the critic."""
        if role == "student":
            yield from self._student_losses(self._prepare(batch), rng)
        else:
            yield self._critic_loss(self._prepare(batch), rng)

    def _student_losses(self, prepared: PreparedBatch, rng: SampleRng) -> Iterator[LossTerm]:
        generated = self._rollout(prepared, rng, "student", grad=True)
        self._keep_for_critic(generated, rng)
        direction = self._direction(generated, prepared.conditioning, rng)
        loss = direction_loss(generated, direction)
        yield LossTerm(loss, {"loss/student": loss.detach(), "dmd/direction": direction.abs().mean()})

    def _keep_for_critic(self, generated: Tensor, rng: SampleRng) -> None:
        if self.options.reuse_rollout:
            self._rollouts = {key: kept for key, kept in self._rollouts.items() if key[0] == rng.step}
            self._rollouts[rng.step, rng.sample_indices[0]] = generated.detach()

    def _critic_loss(self, prepared: PreparedBatch, rng: SampleRng) -> LossTerm:
        generated = self._rollouts.pop((rng.step, rng.sample_indices[0]), None)
        if generated is None:
            generated = self._rollout(prepared, rng, "critic", grad=False)
        noise = rng.normal("critic/noise", generated.shape[1:])
        sigma = self._draw_score_sigma(rng, "critic/sigma")
        x_t = flow.add_noise(generated, noise, sigma)
        velocity = self.critic.predict_velocity(x_t, sigma, prepared.conditioning)
        target = flow.velocity_target(generated, noise)
        loss = flow_matching_loss(velocity, target)
        errors = SigmaErrors(sigma, errors_by_sigma(velocity, target, sigma))
        return LossTerm(loss, {"loss/critic": loss.detach()}, {"critic": errors})

    @torch.no_grad()
    def _direction(self, generated: Tensor, conditioning: Conditioning, rng: SampleRng) -> Tensor:
        """The DMD direction at the student's samples, a constant; teacher and critic see the same noised copy."""
        generated = generated.detach()
        sigma = self._draw_score_sigma(rng, "score/sigma")
        x_t = flow.add_noise(generated, rng.normal("score/noise", generated.shape[1:]), sigma)
        scale = self.options.real_score_guidance_scale
        uncond = self._unconditional(conditioning) if self._uses_guidance else None
        real_x0 = self.teacher.predict_x0_guided(x_t, sigma, conditioning, uncond, scale)
        fake_x0 = self.critic.predict_x0(x_t, sigma, conditioning)
        return dmd_direction(generated, real_x0=real_x0, fake_x0=fake_x0, normalizer=self.options.dmd_normalizer)

    def _rollout(self, prepared: PreparedBatch, rng: SampleRng, role: str, *, grad: bool) -> Tensor:
        """The student's x0 for a batch; `role` only names the random streams."""
        shape = prepared.latents.shape[1:]
        noise = rng.normal(f"{role}/rollout", shape)
        if self.options.rollout_mode == "data_latent":
            return self._denoise_data(prepared, noise, rng.uniform(f"{role}/exit"), grad=grad)
        # The depth is shared by all ranks: with sharded networks every rank has to make the same calls.
        return few_step_rollout(
            self._rollout_network(),
            noise,
            prepared.conditioning,
            self.few_step_sigmas,
            exit_step=self._exits[rng.shared_integer(f"{role}/exit", len(self._exits))],
            sample_type=self.sample_type,
            fresh_noise=lambda step: rng.normal(f"{role}/rollout/{step}", shape),
            grad=grad,
        )

    def _rollout_network(self) -> VelocityNetwork:
        """The student, behind the expert that makes the steps before its own."""
        high = self.models.get("high_expert")
        return self.student if high is None else _InTurns(high, self.student, first_low=self._exits[0])

    def _denoise_data(self, prepared: PreparedBatch, noise: Tensor, u: Tensor, *, grad: bool) -> Tensor:
        """One student call on clips noised to a level drawn per sample."""
        levels = torch.tensor([self.few_step_sigmas[step] for step in self._exits], device=u.device)
        sigma = levels[(u * len(levels)).long()]
        x_t = flow.add_noise(prepared.latents, noise, sigma)
        with torch.set_grad_enabled(grad):
            return self.student.predict_x0(x_t, sigma, prepared.conditioning)

    def _draw_score_sigma(self, rng: SampleRng, stream: str) -> Tensor:
        options = self.options
        u = rng.uniform(stream)
        if options.score_sigma == "per_batch":
            u = torch.full_like(u, rng.shared_uniform(stream))
        shift = options.score_flow_shift or self.student.flow_shift

        def sigma_at(u: Tensor) -> Tensor:
            return score_sigma(u, shift=shift, minimum=options.min_score_sigma, maximum=options.max_score_sigma)

        return within_range(u, sigma_at, self.student.sigma_range)

    def _unconditional(self, conditioning: Conditioning) -> Conditioning:
        negative = self.student.negative_conditioning() if self._policy.text == "negative_prompt" else None
        return unconditional(conditioning, self._policy, negative)

    def _prepare(self, batch: Mapping[str, Any]) -> PreparedBatch:
        source: Literal["data", "zeros"] = "data" if self.options.rollout_mode == "data_latent" else "zeros"
        prepared = self.student.prepare_batch(batch, latents_source=source)
        cfg = self.options.cfg_uncond
        if cfg.on_missing == "error":
            for channel, columns in CHANNEL_COLUMNS.items():
                extras = prepared.conditioning.extras
                if getattr(cfg, channel) is not None and not any(column in extras for column in columns):
                    raise ValueError(
                        f"method.cfg_uncond.{channel} is set but the data has none of {', '.join(columns)}; "
                        "remove the key or set method.cfg_uncond.on_missing: ignore"
                    )
        return prepared


class _InTurns:
    """Two experts as one network for one rollout, whose first calls are the other expert's."""

    def __init__(self, high: ModelBase, low: ModelBase, *, first_low: int) -> None:
        self._high, self._low, self._left = high, low, first_low

    def predict_velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity by the expert whose turn it is, which is known without looking at the device's sigma."""
        self._left -= 1
        expert = self._high if self._left >= 0 else self._low
        return expert.predict_velocity(x_t, sigma, conditioning)
