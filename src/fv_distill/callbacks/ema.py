"""An exponential moving average of what the student trains, its weights or its adapter, sharded and saved like it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fv_distill.training.checkpoint_state import role_tensors

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
        self.average: dict[str, Tensor] = {}
        self._adapter: str | None = None

    @property
    def started(self) -> bool:
        """Whether the average differs from the latest weights."""
        return self.num_updates > self.start_iter

    def on_train_start(self, trainer: "Trainer") -> None:
        """Copy what the student trains, where and as it is."""
        model = trainer.models[self.role]
        self._adapter = model.adapter
        student = role_tensors(model.transformer, model.adapter)
        self.average = {name: tensor.detach().clone() for name, tensor in student.items()}

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
        student = role_tensors(trainer.models[self.role].transformer, self._adapter)
        weight = 1 - self.decay if self.started else 1.0
        for name, average in self.average.items():
            if average.is_floating_point():
                average.lerp_(student[name].to(average.dtype), weight)
            else:
                average.copy_(student[name])

    @contextmanager
    @torch.no_grad()
    def ema_context(self, transformer: nn.Module) -> Iterator[None]:
        """Run the block with the averaged weights in `transformer`, the student's network; a no-op before the start."""
        if not self.started:
            yield
            return
        tensors = role_tensors(transformer, self._adapter)
        own = {name: tensor.clone() for name, tensor in tensors.items()}
        _copy(self.average, tensors)
        try:
            yield
        finally:
            _copy(own, role_tensors(transformer, self._adapter))

    def state_dict(self) -> dict[str, Any]:
        """The number of ticks; the average itself is saved with the networks."""
        return {"num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the number of ticks."""
        self.num_updates = int(state["num_updates"])

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The average."""
        return {"ema": self.average}


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])
