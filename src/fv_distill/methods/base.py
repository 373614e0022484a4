"""`TrainingMethod`: which role minimises what, and when. It never sees an optimizer, a file or a process group."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from fv_distill.models.base import ModelBase
from fv_distill.rng import SampleRng

from .calls import NetworkCall
from .options import MethodOptions


@dataclass(frozen=True)
class SigmaErrors:
    """Unweighted errors and the noise levels they were made at, detached and of one shape, `[B]` or `[B, T]`."""

    sigma: Tensor
    error: Tensor


@dataclass(frozen=True)
class LossTerm:
    """One scalar to back-propagate, with what is to be logged, which stays on the device until then.

    Args:
        loss: the scalar.
        metrics: detached scalars, by name.
        by_sigma: errors that are averaged per noise level, by the name of the role whose errors they are.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    by_sigma: Mapping[str, SigmaErrors] = field(default_factory=dict)


class TrainingMethod(ABC):
    """What a trainer needs to know about a training algorithm.

    Args:
        models: an adapter for each name in `trainable_roles` and `frozen_roles`.
        options: an instance of the class's `options_class`, or None for its defaults.

    Raises:
        ValueError: for missing or surplus roles, or a `trainable` flag that contradicts the method.
    """

    options_class: ClassVar[type[MethodOptions]]
    trainable_roles: ClassVar[tuple[str, ...]]
    frozen_roles: ClassVar[tuple[str, ...]] = ()

    optional_roles: ClassVar[tuple[str, ...]] = ()
    """Frozen roles that the method can do without."""

    cache_roles: ClassVar[tuple[str, ...]] = ()
    """Roles that make the method's training data beforehand, and that a config may therefore name."""

    trains_experts: ClassVar[bool] = False
    """Whether the networks may be experts for a part of the noise levels."""

    few_step_sigmas: tuple[float, ...] | None = None
    """The levels that the trained student is sampled at, without the final 0; None for a many-step model."""

    sample_type: str = "ode"
    """How the student moves between two of them, "sde" or "ode"."""

    context_noise: float = 0.0
    """The noise level at which a causal student's finished chunks become history."""

    def __init__(self, models: Mapping[str, ModelBase], options: MethodOptions | None = None) -> None:
        self.models = dict(models)
        self._check_roles()
        if options is not None and not isinstance(options, self.options_class):
            raise TypeError(f"{type(self).__name__} takes {self.options_class.__name__}, not {type(options).__name__}")

    @property
    def roles(self) -> tuple[str, ...]:
        """Trainable role names, in the order of optimizers and checkpoints."""
        return self.trainable_roles

    @abstractmethod
    def updates(self, step: int) -> tuple[str, ...]:
        """The roles that are updated in `step` (counted from 1), in order."""

    @abstractmethod
    def losses(self, role: str, batch: Mapping[str, Any], rng: SampleRng) -> Iterable[LossTerm]:
        """The loss terms of one role on one micro-batch, lazily: each graph is freed before the next is built."""

    def optimizer_overrides(self, role: str) -> dict[str, Any]:
        """Entries of `training.optimizer` that differ for this role."""
        return {}

    @property
    def update_cycle(self) -> int:
        """After how many steps `updates` and `network_calls` repeat."""
        return 1

    def network_calls(self, step: int, num_frames: int) -> tuple[NetworkCall, ...]:
        """What the updates of `step` call on one micro-batch of clips of `num_frames` latent frames.

        `fv-distill estimate` multiplies it by the cost of a call. Recomputation under gradient checkpointing is none.

        Raises:
            NotImplementedError: by a method that has not said so.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not say which networks it calls; define its network_calls(step, num_frames)"
        )

    def prompts(self) -> tuple[str, ...]:
        """The prompts beside the data's captions that the student has to have embeddings of; none by default."""
        return ()

    def encode_prompts(self) -> None:
        """Encode what the method needs from text encoders before the first step: `prompts`, unless overridden."""
        for prompt in self.prompts():
            self.models["student"].prompt_conditioning(prompt)

    def _check_roles(self) -> None:
        name = type(self).__name__
        expected = self.trainable_roles + self.frozen_roles
        missing = [role for role in expected if role not in self.models]
        surplus = [role for role in self.models if role not in expected + self.optional_roles]
        if missing or surplus:
            raise ValueError(
                f"{name} needs the roles {', '.join(expected)}; models has {', '.join(self.models) or 'none'}"
                + (f" (missing: {', '.join(missing)})" if missing else "")
                + (f" (remove: {', '.join(surplus)})" if surplus else "")
            )
        for role, model in self.models.items():
            if model.trainable != (role in self.trainable_roles):
                should = "true" if role in self.trainable_roles else "false"
                raise ValueError(f"{name} needs models.{role}.trainable: {should}")
            if model.is_expert and not self.trains_experts:
                low, high = model.sigma_range
                raise ValueError(
                    f"{name} calls its networks at all noise levels, but models.{role} is an expert for sigma {low:g} "
                    f"to {high:g} only; FineTuneMethod and DMD2Method train experts"
                )
