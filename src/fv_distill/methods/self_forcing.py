"""Self-Forcing: DMD2 whose student is causal and sees its own earlier chunks in training, as it will when streaming.

Huang et al. 2025, "Self Forcing: bridging the train-test gap in autoregressive video diffusion".
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from fv_distill.losses.distribution_matching import direction_loss
from fv_distill.models.base import ModelBase
from fv_distill.models.causal_base import CausalModelBase, causal_adapters
from fv_distill.models.conditioning import PreparedBatch
from fv_distill.rng import SampleRng
from fv_distill.rollouts.autoregressive import Rollout, autoregressive_rollout

from .base import LossTerm
from .calls import NetworkCall
from .dmd2 import DMD2Method
from .options import MethodOptions, SelfForcingOptions


class SelfForcingMethod(DMD2Method):
    """Teacher and critic judge whole clips, as in DMD2; the student makes them chunk by chunk over a cache.

    The gradient of the DMD loss with respect to the clip is known before any graph is built. So the clip is rolled out
    without gradients, and then each chunk's last call is made again with them, one chunk at a time
    (`gradient_replay`). The history that a chunk saw is a constant either way, which makes the two equal.
    """

    options_class = SelfForcingOptions

    def __init__(self, models: Mapping[str, ModelBase], options: MethodOptions | None = None) -> None:
        options = SelfForcingOptions() if options is None else options
        super().__init__(models, options)
        assert isinstance(options, SelfForcingOptions) and isinstance(self.options, SelfForcingOptions)
        self.options: SelfForcingOptions = options
        self.causal_student = _checked_student(self.student, options)
        self.context_noise = options.context_noise

    def updates(self, step: int) -> tuple[str, ...]:
        """As in DMD2; the critic alone where `enable_gradient_in_rollout` is off."""
        return super().updates(step) if self.options.enable_gradient_in_rollout else ("critic",)

    def _rollout_calls(self, num_frames: int, *, grad: bool) -> list[NetworkCall]:
        """Each chunk's steps, its pass that becomes history, and with replay the last step once more."""
        options, size = self.options, self.causal_student.chunk_size
        num_steps = len(self.few_step_sigmas)
        depth = num_steps if options.last_step_only else (num_steps + 1) / 2
        calls = []
        for start in range(0, num_frames, size):
            chunk = NetworkCall("student", span="chunk", start_frame=start)
            has_graph = grad and start >= options.start_gradient_frame
            is_last = start + size >= num_frames
            without = depth + (not is_last) - (has_graph and not options.gradient_replay)
            calls.append(chunk.times(without))
            if has_graph:
                calls.append(replace(chunk, grad=True))
        return calls

    def _student_losses(self, prepared: PreparedBatch, rng: SampleRng) -> Iterator[LossTerm]:
        first = self._first_gradient_frame(prepared)
        rollout = self._generate(prepared, rng, "student", grad=not self.options.gradient_replay)
        self._keep_for_critic(rollout.x0, rng)
        direction = self._direction(rollout.x0, prepared.conditioning, rng)
        if not self.options.gradient_replay:
            yield _term(rollout.x0[:, :, first:], direction[:, :, first:], share=1.0)
            return
        calls = [call for call in rollout.calls if call.start_frame >= first]
        for call in calls:
            x0 = call.predict_x0(self.causal_student, prepared.conditioning, rollout.cache)
            frames = slice(call.start_frame, call.start_frame + x0.shape[2])
            yield _term(x0, direction[:, :, frames], share=1 / len(calls))

    def _rollout(self, prepared: PreparedBatch, rng: SampleRng, role: str, *, grad: bool) -> Tensor:
        return self._generate(prepared, rng, role, grad=grad).x0

    def _generate(self, prepared: PreparedBatch, rng: SampleRng, role: str, *, grad: bool) -> Rollout:
        """A clip by the student; `role` only names the random streams, which are DMD2's cut into chunks."""
        shape, size = prepared.latents.shape[1:], self.causal_student.chunk_size

        @functools.cache
        def clip_noise(stream: str) -> Tensor:
            return rng.normal(stream, shape)

        def chunk_noise(stream: str, chunk: int) -> Tensor:
            return clip_noise(stream)[:, :, chunk * size : (chunk + 1) * size]

        return autoregressive_rollout(
            self.causal_student,
            clip_noise(f"{role}/rollout"),
            prepared.conditioning,
            self.few_step_sigmas,
            exit_steps=self._exit_steps(rng, role, shape[1] // size),
            sample_type=self.sample_type,
            fresh_noise=lambda chunk, step: chunk_noise(f"{role}/rollout/{step}", chunk),
            context_noise=self.options.context_noise,
            context_fresh_noise=lambda chunk: chunk_noise(f"{role}/context", chunk),
            grad=grad,
            start_gradient_frame=self.options.start_gradient_frame,
        )

    def _exit_steps(self, rng: SampleRng, role: str, num_chunks: int) -> list[int]:
        """Shared by all ranks: with sharded networks every rank has to make the same calls."""
        count = len(self.few_step_sigmas)
        if self.options.last_step_only:
            return [count - 1] * num_chunks
        if self.options.same_step_across_blocks:
            return [rng.shared_integer(f"{role}/exit", count)] * num_chunks
        return [rng.shared_integer(f"{role}/exit/{chunk}", count) for chunk in range(num_chunks)]

    def _first_gradient_frame(self, prepared: PreparedBatch) -> int:
        first, frames = self.options.start_gradient_frame, prepared.latents.shape[2]
        if first >= frames:
            raise ValueError(
                f"method.start_gradient_frame={first} leaves no gradient: the clips have {frames} latent frames"
            )
        return first


def _term(x0: Tensor, direction: Tensor, *, share: float) -> LossTerm:
    loss = share * direction_loss(x0, direction)
    return LossTerm(loss, {"loss/student": loss.detach(), "dmd/direction": share * direction.abs().mean()})


def _checked_student(student: ModelBase, options: SelfForcingOptions) -> CausalModelBase:
    """The student, if it is causal and fits the options.

    Raises:
        ValueError: naming the keys that contradict each other.
    """
    if not isinstance(student, CausalModelBase):
        raise ValueError(
            f"SelfForcingMethod needs a causal student, not {type(student).__name__}; set models.student._target_: "
            f"{causal_adapters(student)}"
        )
    size = student.chunk_size
    if options.chunk_size not in (None, size):
        raise ValueError(
            f"method.chunk_size={options.chunk_size} contradicts models.student.chunk_size={size}; leave the former out"
        )
    if options.start_gradient_frame % size:
        raise ValueError(
            f"method.start_gradient_frame={options.start_gradient_frame} is not the beginning of a chunk; give a "
            f"multiple of models.student.chunk_size={size}"
        )
    return student
