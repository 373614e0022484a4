"""Optimizers by dotted path, and learning rates as a function of the update: schedules have no state to save."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fv_distill.config.instantiate import instantiate

SCHEDULERS = ("constant", "linear", "cosine", "polynomial")


@dataclass(frozen=True)
class LearningRate:
    """A learning rate over `total` updates: linear warm-up, then the named decay down to `min_ratio` of the base.

    Attributes:
        base: the rate after warm-up.
        scheduler: one of `SCHEDULERS`.
        warmup: updates over which the rate rises; update i (from 0) of them has (i + 1) / (warmup + 1) of the base.
        total: all updates of the run; later ones keep the last value.
        min_ratio: where linear, cosine and polynomial decay end.
        power: of the polynomial.
    """

    base: float
    scheduler: str = "constant"
    warmup: int = 0
    total: int = 1
    min_ratio: float = 0.0
    power: float = 1.0

    def __post_init__(self) -> None:
        if self.scheduler not in SCHEDULERS:
            raise ValueError(f"lr_scheduler={self.scheduler!r} is not one of {', '.join(SCHEDULERS)}")

    def at(self, update: int) -> float:
        """The rate of the update with this index, counted from 0."""
        if update < self.warmup:
            return self.base * (update + 1) / (self.warmup + 1)
        if self.scheduler == "constant":
            return self.base
        progress = min(1.0, (update - self.warmup) / max(1, self.total - self.warmup))
        remaining = {
            "linear": 1 - progress,
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
            "polynomial": (1 - progress) ** self.power,
        }[self.scheduler]
        return self.base * (self.min_ratio + (1 - self.min_ratio) * remaining)


def build_optimizer(parameters: Iterable[nn.Parameter], options: dict[str, Any]) -> Optimizer:
    """The optimizer that `options` (`training.optimizer` with a role's overrides) describes.

    `target` names the class; `learning_rate` becomes its `lr`; keys of the schedule are left out, all others passed on.

    Raises:
        ValueError: for a key that the class does not take.
        ImportError: if there is no such class.
    """
    kwargs = {key: value for key, value in options.items() if not key.startswith("lr_")}
    target = kwargs.pop("target")
    kwargs["lr"] = kwargs.pop("learning_rate")
    return instantiate({"_target_": target, **kwargs}, params=[p for p in parameters if p.requires_grad])
