"""Knowledge distillation from a teacher's sampling paths: regression of a path's end from its earlier states.

Luhman & Luhman 2021, "Knowledge distillation in iterative generative models"; with a causal student this is the "ODE
initialisation" of CausVid (Yin et al. 2025, sec. 4.3) and Self-Forcing.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fv_distill.losses.regression import x0_regression_loss
from fv_distill.models.base import ModelBase
from fv_distill.models.causal_base import CausalModelBase, causal_adapters
from fv_distill.models.conditioning import Conditioning
from fv_distill.rng import SampleRng
from fv_distill.rollouts.ode import STATES, TIMESTEPS

from .base import LossTerm, TrainingMethod
from .calls import NetworkCall
from .options import KDCausalOptions, KDOptions, MethodOptions


class KDMethod(TrainingMethod):
    """Train the student to jump from any kept state of a path to its end.

    The rows hold normalised states `trajectory_latents` `[S, C, T, H, W]` and their timesteps; the trainer makes them
    on first use where `teacher_path_cache` is empty.
    """

    options_class = KDOptions
    trainable_roles = ("student",)
    cache_roles = ("teacher",)

    def __init__(self, models: Mapping[str, ModelBase], options: MethodOptions | None = None) -> None:
        super().__init__(models, options)
        self.options = options if isinstance(options, KDOptions) else self.options_class()
        assert isinstance(self.options, KDOptions)
        self.student = self.models["student"]
        # Without the path's end, where there is nothing left to do.
        self.few_step_sigmas: tuple[float, ...] = self.options.sigmas[:-1]
        self.sample_type = self.options.student_sample_type
        self._loss_scale = 0.5 if self.options.kd_loss == "half_mse" else 1.0

    def updates(self, step: int) -> tuple[str, ...]:
        """The student, in every step."""
        return ("student",)

    def network_calls(self, step: int, num_frames: int) -> tuple[NetworkCall, ...]:
        """One call of the student; the teacher's were made with the paths."""
        return (NetworkCall("student", grad=True),)

    def prompts(self) -> tuple[str, ...]:
        """The empty prompt, where caption dropout puts it in."""
        return ("",) if self.student.drops_captions else ()

    def losses(self, role: str, batch: Mapping[str, Any], rng: SampleRng) -> Iterable[LossTerm]:
        """One regression term."""
        states, conditioning = self._prepare(batch)
        target = states[:, -1]
        predicted = self._predict(states, conditioning, rng)
        loss = x0_regression_loss(predicted, target, scale=self._loss_scale)
        yield LossTerm(loss, {"loss/student": loss.detach()})

    def _predict(self, states: Tensor, conditioning: Conditioning, rng: SampleRng) -> Tensor:
        """The student's x0 from a state drawn for each sample."""
        levels = torch.tensor(self.few_step_sigmas, device=states.device)
        index = (rng.uniform("step") * len(levels)).long()
        x_t = states[torch.arange(len(states)), index]
        return self.student.predict_x0(x_t, levels[index], conditioning)

    def _prepare(self, batch: Mapping[str, Any]) -> tuple[Tensor, Conditioning]:
        """The wanted states of each row's path `[B, S, C, T, H, W]`, and the conditioning.

        Raises:
            ValueError: if the rows are no paths, or lack a wanted state.
        """
        if STATES not in batch or TIMESTEPS not in batch:
            raise ValueError(
                f"the rows have no {STATES}; {type(self).__name__} trains on teacher paths: set "
                "method.teacher_path_cache and let training make them, or run `fv-distill make-trajectories`"
            )
        latents = batch[STATES].float()
        prepared = self.student.prepare_batch(
            {**batch, "latent_shape": tuple(latents.shape[2:])}, latents_source="zeros"
        )
        kept = [round(t, 2) for t in batch[TIMESTEPS][0].tolist()]
        wanted = [round(1000 * sigma, 2) for sigma in self.options.sigmas]
        missing = [t for t in wanted if t not in kept]
        if missing:
            raise ValueError(
                f"the paths in method.teacher_path_cache hold the timesteps {kept} and lack {missing} of "
                "method.t_list; make them anew in another directory"
            )
        return latents[:, [kept.index(t) for t in wanted]], prepared.conditioning


class KDCausalMethod(KDMethod):
    """The same for a causal student; every block of frames is taken from a state of its own."""

    options_class = KDCausalOptions

    def __init__(self, models: Mapping[str, ModelBase], options: MethodOptions | None = None) -> None:
        super().__init__(models, options)
        assert isinstance(self.options, KDCausalOptions)
        if not isinstance(self.student, CausalModelBase):
            raise ValueError(
                f"KDCausalMethod needs a causal student, not {type(self.student).__name__}; set "
                f"models.student._target_: {causal_adapters(self.student)}"
            )
        self.causal_student = self.student
        self.teacher_forcing = self.options.teacher_forcing
        self.block_size = self.options.num_frames_per_block or self.student.chunk_size
        if self.block_size % self.student.chunk_size:
            raise ValueError(
                f"method.num_frames_per_block={self.block_size} cuts through chunks; give a multiple of "
                f"models.student.chunk_size={self.student.chunk_size}"
            )

    def network_calls(self, step: int, num_frames: int) -> tuple[NetworkCall, ...]:
        """One call of the student, behind the paths' ends with teacher forcing."""
        return (NetworkCall("student", grad=True, span="clip_after_history" if self.teacher_forcing else "clip"),)

    def _predict(self, states: Tensor, conditioning: Conditioning, rng: SampleRng) -> Tensor:
        batch, _, _, frames = states.shape[:4]
        if frames % self.block_size:
            raise ValueError(
                f"{frames} latent frames do not divide into blocks of method.num_frames_per_block={self.block_size}"
            )
        levels = torch.tensor(self.few_step_sigmas, device=states.device)
        per_block = (rng.uniform("step", (frames // self.block_size,)) * len(levels)).long()
        index = per_block.repeat_interleave(self.block_size, dim=1)
        rows, columns = torch.arange(batch, device=index.device)[:, None], torch.arange(frames, device=index.device)
        # Advanced indices around a slice move to the front: [B, T, C, H, W].
        x_t = states[rows, index, :, columns].transpose(1, 2)
        history = states[:, -1] if self.teacher_forcing else None
        return self.causal_student.predict_x0(x_t, levels[index], conditioning, clean_history=history)
