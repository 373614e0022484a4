"""What of networks and optimizers goes into a checkpoint: tensors by the network's own names, and JSON values.

Names don't depend on how a network is wrapped, sharded or replicated, so that any kind of run resumes any other.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fv_distill.export.checkpoint_weights import StoredTensor
from fv_distill.lora import is_lora_parameter, lora_key

from .sharding import reshard, unwrap

# What torch.compile and activation checkpointing insert into names.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}
_PARAMS = "params"


def role_tensors(network: nn.Module, adapter: str | None) -> dict[str, Tensor]:
    """What a role's checkpoint holds: its network's tensors, or its adapter's by their names in LoRA files.

    Not copies, so that what is loaded into them takes effect.
    """
    if adapter is None:
        return network_tensors(network)
    named = _parameters(network).items()
    return {lora_key(name, adapter): value.detach() for name, value in named if is_lora_parameter(name, adapter)}


def network_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A network's weights and persistent buffers by name; not copies.

    Raises:
        ValueError: if the network's state holds something else than tensors.
    """
    reshard(module)
    tensors = {}
    for name, value in unwrap(module).state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{type(unwrap(module)).__name__}.{name} is a {type(value).__name__}; only tensors are saved"
            )
        tensors[_plain(name)] = value
    return tensors


def optimizer_tensors(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The tensors of an optimizer's state as `<parameter>/<key>`, for instance `blocks.0.norm2.weight/exp_avg`.

    Raises:
        ValueError: for a tensor that is neither like its parameter nor a scalar, where the parameter is sharded.
    """
    tensors = {}
    for name, parameter in _parameters(module).items():
        for key, value in _inner(optimizer).state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                _check_placed(name, key, value, parameter, optimizer)
                tensors[f"{name}/{key}"] = value
    return tensors


def optimizer_facts(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The rest of an optimizer's state as JSON values: its class, parameter groups and plain numbers per parameter.

    Raises:
        ValueError: for a value that JSON doesn't have, or a parameter that isn't the network's.
    """
    inner = _inner(optimizer)
    parameters = _parameters(module)
    names = {parameter: name for name, parameter in parameters.items()}
    groups = []
    for group in inner.param_groups:
        if any(parameter not in names for parameter in group[_PARAMS]):
            raise ValueError(f"{_class_name(optimizer)} updates parameters that aren't its network's")
        groups.append({**group, _PARAMS: [names[parameter] for parameter in group[_PARAMS]]})
    if any(key not in names for key in inner.state):
        raise ValueError(f"{_class_name(optimizer)} keeps a state that belongs to none of its network's parameters")
    values = {
        name: plain
        for name, parameter in parameters.items()
        if (plain := {k: v for k, v in inner.state.get(parameter, {}).items() if not isinstance(v, Tensor)})
    }
    on_device = {
        key
        for state in inner.state.values()
        for key, value in state.items()
        if isinstance(value, Tensor) and value.ndim == 0 and value.device.type != "cpu"
    }
    facts = {
        "class": _class_name(optimizer),
        "defaults": inner.defaults,
        "groups": groups,
        "values": values,
        "scalars_on_device": sorted(on_device),
    }
    try:
        return json.loads(json.dumps(facts))
    except TypeError as error:
        raise ValueError(
            f"{_class_name(optimizer)} keeps something that a checkpoint can't hold ({error}); its options and state "
            "have to be tensors, numbers, strings, lists or null"
        ) from error


def restore_optimizer(
    module: nn.Module, optimizer: Optimizer, facts: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> dict[str, Tensor]:
    """Give an optimizer the options and numbers of `optimizer_facts`, and tensors of the right kinds to load into.

    An option that the present config sets to another value than the checkpoint's config did keeps the new one.

    Args:
        module: the network.
        optimizer: of the network, freshly made.
        facts: from `optimizer_facts`.
        stored: the tensors that the checkpoint has of this optimizer, by `<parameter>/<key>`.

    Returns:
        The new state's tensors, not yet filled, by `<parameter>/<key>`.

    Raises:
        ValueError: if the checkpoint's optimizer is another one.
    """
    inner = _inner(optimizer)
    parameters = _parameters(module)
    _check_same_optimizer(module, optimizer, facts)
    for group, saved in zip(inner.param_groups, facts["groups"], strict=True):
        for key, value in saved.items():
            is_unchanged = _as_json(inner.defaults.get(key)) == facts["defaults"].get(key)
            if key != _PARAMS and is_unchanged:
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    inner.state.clear()
    group_of = {parameter: group for group in inner.param_groups for parameter in group[_PARAMS]}
    tensors = {}
    for path, entry in stored.items():
        name, _, key = path.rpartition("/")
        parameter = parameters[name]
        group = group_of[parameter]
        on_device = key in facts["scalars_on_device"] or group.get("fused") or group.get("capturable")
        tensors[path] = _empty(path, entry, parameter, scalar_device=parameter.device if on_device else "cpu")
        inner.state[parameter][key] = tensors[path]
    for name, values in facts["values"].items():
        inner.state[parameters[name]].update(values)
    return tensors


def _empty(path: str, entry: StoredTensor, parameter: nn.Parameter, *, scalar_device: torch.device | str) -> Tensor:
    if not entry.shape:
        # Adam counts its steps on the CPU unless it is fused, and refuses a counter that is elsewhere.
        return torch.empty((), dtype=entry.dtype, device=scalar_device)
    if entry.shape == tuple(parameter.shape):
        return torch.empty_like(parameter, dtype=entry.dtype, requires_grad=False)
    if isinstance(parameter, DTensor) and torch.Size(entry.shape).numel() > 1:
        raise ValueError(
            f"the optimizer's {path} has shape {entry.shape} and its parameter {tuple(parameter.shape)}; such a state "
            "can't be sharded, resume with replicated weights"
        )
    return torch.empty(entry.shape, dtype=entry.dtype, device=parameter.device)


def _check_placed(name: str, key: str, value: Tensor, parameter: nn.Parameter, optimizer: Optimizer) -> None:
    """A sharded run's state has to be sharded like the weights, or else it can't be put together again."""
    if not isinstance(parameter, DTensor):
        return
    if isinstance(value, DTensor):
        is_alike = value.shape == parameter.shape and value.placements == parameter.placements
    else:
        is_alike = value.numel() == 1
    if not is_alike:
        raise ValueError(
            f"{_class_name(optimizer)} keeps {key} of shape {tuple(value.shape)} for {name} of shape "
            f"{tuple(parameter.shape)}; with sharded weights (FSDP2) only states of the parameter's own shape, and "
            "scalars, can be saved and resumed. Use another training.optimizer._target_, or replicated weights"
        )


def _check_same_optimizer(module: nn.Module, optimizer: Optimizer, facts: Mapping[str, Any]) -> None:
    if facts["class"] != _class_name(optimizer):
        raise ValueError(
            f"it was trained with {facts['class']}, this run uses {_class_name(optimizer)}; keep "
            "training.optimizer._target_ to resume"
        )
    names = {parameter: name for name, parameter in _parameters(module).items()}
    here = [[names[parameter] for parameter in group[_PARAMS]] for group in _inner(optimizer).param_groups]
    if here != [group[_PARAMS] for group in facts["groups"]]:
        raise ValueError("its optimizer updates other parameters, or groups them otherwise, than this run's")


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    reshard(module)
    return {_plain(name): parameter for name, parameter in unwrap(module).named_parameters()}


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _inner(optimizer: Optimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _class_name(optimizer: Optimizer) -> str:
    kind = type(_inner(optimizer))
    return f"{kind.__module__}.{kind.__qualname__}"


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
