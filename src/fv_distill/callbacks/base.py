"""`Callback`, the hooks of a training run, and `CallbackDict`, which builds them from a config and calls them."""

import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fv_distill.config.instantiate import instantiate, resolve_target

if TYPE_CHECKING:
    from fv_distill.training.trainer import Trainer

BUILT_IN = {
    "ema": "fv_distill.callbacks.ema.EMACallback",
    "grad_clip": "fv_distill.callbacks.grad_clip.GradNormClipCallback",
    "nan_guard": "fv_distill.callbacks.nan_guard.NaNGuardCallback",
    "profiler": "fv_distill.callbacks.profiler.ProfilerCallback",
    "throughput": "fv_distill.callbacks.throughput.ThroughputCallback",
    "validation": "fv_distill.callbacks.validation.ValidationCallback",
}


class Callback:
    """No-op hooks. A callback sees the trainer: its `method`, `models`, `roles`, `config`, `accelerator` and `step`."""

    def on_before_prepare(self, trainer: "Trainer") -> None:
        """Networks are loaded but neither sharded nor wrapped: the time to copy one."""

    def on_train_start(self, trainer: "Trainer") -> None:
        """Everything is prepared; a checkpoint, if any, is loaded next."""

    def on_training_step_begin(self, trainer: "Trainer") -> None:
        """Step `trainer.step` begins; its micro-batches are `trainer.micro_batches`, on the device."""

    def on_before_optimizer_step(self, trainer: "Trainer", role: str, metrics: dict[str, Any]) -> None:
        """The gradients of `role` are complete; entries put into `metrics` are logged."""

    def on_after_optimizer_step(self, trainer: "Trainer", role: str) -> None:
        """The weights of `role` have just changed."""

    def on_nonfinite_update(self, trainer: "Trainer", role: str, metrics: Mapping[str, float]) -> None:
        """One of the metrics of `role`, means over processes, is not finite: its update is skipped on all processes.

        The gradients are still there, and each micro-batch's loss on this process in `trainer.micro_losses`.
        """

    def on_training_step_end(self, trainer: "Trainer", metrics: Mapping[str, float]) -> None:
        """All updates of a step are done; `metrics` are means over processes."""

    def on_validation_begin(self, trainer: "Trainer") -> None:
        """Validation is about to run."""

    def on_validation_end(self, trainer: "Trainer") -> None:
        """Validation has run."""

    def on_train_end(self, trainer: "Trainer") -> None:
        """The last step is done and saved."""

    def on_close(self, trainer: "Trainer") -> None:
        """The run is over, however it ended: at its last step, by a signal or by an error. Give back what is held."""

    def state_dict(self) -> dict[str, Any]:
        """What travels in checkpoints, as JSON values; tensors belong into `tensors`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensors of the callback's own that travel in checkpoints, by a name for them all and by their own.

        Asked for after `on_train_start`. Not copies: what is loaded into them takes effect.
        """
        return {}


class CallbackDict:
    """The callbacks of a run, by name, in the order of the config.

    Args:
        configs: name -> options. `_target_` names the class; the built-in names need none.
        training_config: the run's training section, handed to callbacks whose constructor asks for `training_config`.

    Raises:
        ValueError: for a name that is not built in and has no `_target_`.
        TypeError: if a target is no `Callback`.
    """

    def __init__(self, configs: Mapping[str, Mapping[str, Any]], training_config: Any) -> None:
        self.training_config = training_config
        self._callbacks = {name: self._build(name, dict(config)) for name, config in configs.items()}

    def _build(self, name: str, config: dict[str, Any]) -> Callback:
        target = config.setdefault("_target_", BUILT_IN.get(name))
        if target is None:
            raise ValueError(
                f"callbacks.{name} has no _target_ and is not built in; built-in names: {', '.join(BUILT_IN)}"
            )
        kind = resolve_target(target)
        if not (isinstance(kind, type) and issubclass(kind, Callback)):
            raise TypeError(f"callbacks.{name}: {target} is not a subclass of fv_distill.callbacks.Callback")
        wants_config = "training_config" in inspect.signature(kind).parameters
        return instantiate(config, **({"training_config": self.training_config} if wants_config else {}))

    def __getitem__(self, name: str) -> Callback:
        return self._callbacks[name]

    def __contains__(self, name: str) -> bool:
        return name in self._callbacks

    def __iter__(self) -> Iterator[str]:
        return iter(self._callbacks)

    def add(self, name: str, callback: Callback) -> None:
        """Put a callback that was built by hand behind the others."""
        self._callbacks[name] = callback

    def call(self, hook: str, *args: Any) -> None:
        """Call one hook of every callback."""
        for callback in self._callbacks.values():
            getattr(callback, hook)(*args)

    def state_dict(self) -> dict[str, Any]:
        """Every callback's state, by name."""
        return {name: callback.state_dict() for name, callback in self._callbacks.items()}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Every callback's tensors, by their own names.

        Raises:
            ValueError: if two callbacks use a name.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for callback_name, callback in self._callbacks.items():
            for name, tensors in callback.tensors().items():
                if name in found:
                    raise ValueError(f"callbacks.{callback_name}: another callback has tensors named {name!r} too")
                found[name] = tensors
        return found

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Restore the callbacks that have a state; one that is new to the run starts fresh."""
        for name, callback in self._callbacks.items():
            if name in states:
                callback.load_state_dict(states[name])
