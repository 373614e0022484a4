"""An exponential moving average of the student's weights, sharded and saved like the student."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fv_distill.training.sharding import local_parameters, prepare_averaged

from .base import Callback
from .options import require_boolean

if TYPE_CHECKING:
    from fv_distill.training.trainer import Trainer


class EMACallback(Callback):
    """`ema <- decay ema + (1 - decay) weights` after each of the student's optimizer steps, or after every step.

    Args:
        decay: in [0, 1).
        start_iter: the tick after which averaging starts; until then the average is a copy.
        every_step: tick once in every training step, at the end of its last update, whether or not the student moved in
            it. Some recipes count a decay that way: where the student moves in one step of five, `decay` then counts as
            `decay ** 5` does without.

    Raises:
        ValueError: for a decay outside [0, 1), a negative start, or an `every_step` that is neither true nor false.
    """

    role = "student"

    def __init__(self, decay: float = 0.9999, start_iter: int = 0, every_step: bool = False) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"callbacks.ema.decay={decay:g} must be in [0, 1)")
        if start_iter < 0:
            raise ValueError(f"callbacks.ema.start_iter={start_iter} must not be negative")
        self.decay = decay
        self.start_iter = start_iter
        self.every_step = require_boolean("callbacks.ema.every_step", every_step)
        self.num_updates = 0
        self.module: nn.Module | None = None

    @property
    def started(self) -> bool:
        """Whether the average differs from the latest weights."""
        return self.num_updates > self.start_iter

    def on_before_prepare(self, trainer: "Trainer") -> None:
        """Copy the student while it is whole."""
        self.module = copy.deepcopy(trainer.models[self.role].transformer).requires_grad_(False).eval()

    def on_train_start(self, trainer: "Trainer") -> None:
        """Shard the copy and register it for checkpoints."""
        assert self.module is not None
        self.module = prepare_averaged(trainer.accelerator, self.module)

    def on_after_optimizer_step(self, trainer: "Trainer", role: str) -> None:
        """Tick when the student has moved, or at the end of the step's updates."""
        if role == (self._last_role(trainer) if self.every_step else self.role):
            self._tick(trainer)

    def on_nonfinite_update(self, trainer: "Trainer", role: str, metrics: Mapping[str, float]) -> None:
        """A step whose last update is skipped is a step all the same."""
        if self.every_step and role == self._last_role(trainer):
            self._tick(trainer)

    @staticmethod
    def _last_role(trainer: "Trainer") -> str:
        # Not at `on_training_step_end`, where a validation listed earlier would see the average of the last step.
        return trainer.method.updates(trainer.step)[-1]

    @torch.no_grad()
    def _tick(self, trainer: "Trainer") -> None:
        self.num_updates += 1
        student = local_parameters(trainer.models[self.role].transformer)
        weight = 1 - self.decay if self.started else 1.0
        for average, current in zip(self._parameters(), student, strict=True):
            average.lerp_(current.to(average.dtype), weight)

    @contextmanager
    def ema_context(self, transformer: nn.Module) -> Iterator[None]:
        """Run the block with the averaged weights in `transformer`, the student's network; a no-op before the start."""
        if not self.started:
            yield
            return
        own = [parameter.detach().clone() for parameter in local_parameters(transformer)]
        _copy_into(transformer, self._parameters())
        try:
            yield
        finally:
            _copy_into(transformer, own)

    def state_dict(self) -> dict[str, Any]:
        """The number of ticks; the weights are saved with the networks."""
        return {"num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the number of ticks."""
        self.num_updates = int(state["num_updates"])

    def _parameters(self) -> list[nn.Parameter]:
        assert self.module is not None
        return list(local_parameters(self.module))


@torch.no_grad()
def _copy_into(transformer: nn.Module, values: list[Any]) -> None:
    for parameter, value in zip(local_parameters(transformer), values, strict=True):
        parameter.copy_(value)
