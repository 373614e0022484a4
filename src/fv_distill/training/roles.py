"""A trainable role at run time: its adapter, its optimizer and how far it has come."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch.optim import Optimizer

from fv_distill.config.schema import Placement
from fv_distill.methods.base import TrainingMethod
from fv_distill.models.base import ModelBase

from .optim import LearningRate, build_optimizer
from .sharding import local_parameters, prepare_adapted, prepare_frozen, prepare_trainable


@dataclass
class Role:
    """One trainable role.

    Attributes:
        updates: optimizer steps made so far; one skipped for a non-finite loss counts, so that schedules depend on the
            step alone.
    """

    name: str
    model: ModelBase
    optimizer: Optimizer
    learning_rate: LearningRate
    updates: int = 0

    def set_learning_rate(self) -> float:
        """Give the optimizer the rate of the coming update and return it."""
        rate = self.learning_rate.at(self.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate


def prepare_roles(
    accelerator: Accelerator,
    method: TrainingMethod,
    optimizer_options: Mapping[str, Any],
    *,
    max_train_steps: int,
    placements: Mapping[str, Placement],
) -> dict[str, Role]:
    """Build optimizers and put every network of the method where it runs.

    Trainable roles come first, in the method's order. `placements` has one for each frozen role.
    """
    roles = {}
    adapted = _by_network(method.models)
    for models in adapted.values():
        prepare_adapted(accelerator, models)
    for name in method.roles:
        model = method.models[name]
        options = {**optimizer_options, **method.optimizer_overrides(name)}
        rate = LearningRate(
            base=options["learning_rate"],
            scheduler=options["lr_scheduler"],
            warmup=options["lr_warmup_steps"],
            total=sum(name in method.updates(step) for step in range(1, max_train_steps + 1)),
            min_ratio=options["lr_min_ratio"],
            power=options["lr_power"],
        )
        if model.adapter is None:
            optimizer = build_optimizer(model.transformer.parameters(), options)
            optimizer = prepare_trainable(accelerator, model, optimizer)
        else:
            optimizer = build_optimizer(local_parameters(model).values(), options)
        roles[name] = Role(name, model, optimizer, rate)
    for name, model in method.models.items():
        if name not in roles and model.switch is None:
            prepare_frozen(accelerator, model, placements[name])
    return roles


def _by_network(models: Mapping[str, ModelBase]) -> dict[int, list[ModelBase]]:
    """The roles that train adapters, and those that share their networks, by network."""
    found: dict[int, list[ModelBase]] = {}
    for model in models.values():
        if model.switch is not None:
            found.setdefault(id(model.transformer), []).append(model)
    return found
