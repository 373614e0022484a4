"""The memory of a method's updates, found by running the method itself on meta tensors."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fv_distill.methods.base import TrainingMethod
from fv_distill.models.base import ModelBase
from fv_distill.models.causal_base import CausalModelBase

from .depth import DEEPER, SHALLOW, can_be_cut, cut_to, extrapolate, find_blocks
from .layout import Layout
from .live_bytes import ACTIVATIONS, LiveBytes
from .meta_execution import MetaExecution, MetaRng
from .parameters import trained_parameters

GRADIENTS, KV_CACHE = "gradients", "kv_cache"


@dataclass(frozen=True)
class UpdatePeak:
    """What is alive at the worst moment of one role's update, beside weights, optimizer states and averages.

    Attributes:
        activations: saved and passing tensors, the batch, all that is not the following.
        gradients: of the role's weights, whole; 0 where they are sharded, which is accounted for elsewhere.
        kv_cache: of causal students.
    """

    role: str
    activations: int
    gradients: int
    kv_cache: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.activations + self.gradients + self.kv_cache


@dataclass(frozen=True)
class _Segment:
    """The peak between two boundaries: a network call's start or end, a backward pass's start or end."""

    role: str
    peak: Counter[str]


def simulate_updates(
    method: TrainingMethod, batch: dict[str, Any], *, layout: Layout, accumulation_steps: int
) -> list[UpdatePeak]:
    """The peak of every role's update in the step in which most roles are updated.

    Args:
        method: over networks on the meta device.
        batch: a micro-batch on the meta device.
        layout: decides the types that networks compute in, and what becomes of gradients.
        accumulation_steps: micro-batches per step; one is run.
    """
    networks = distinct_networks(method.models)
    # Later micro-batches differ from the first in that they meet gradients; sharded ones are accounted for elsewhere.
    meets_gradients = accumulation_steps > 1 and not layout.is_sharded

    def run() -> list[_Segment]:
        return _run(method, batch, layout, meets_gradients=meets_gradients)

    with _computing_as(method.models, layout):
        if any(isinstance(model, CausalModelBase) for model in method.models.values()):
            _make_masks(method, batch, layout)
        if not can_be_cut(networks):
            return _worst(run())
        runs = []
        for depth in (SHALLOW, DEEPER):
            with cut_to(networks, depth):
                runs.append(run())
        return _worst(_deepened(method, *runs))


def distinct_networks(models: Mapping[str, ModelBase]) -> list[nn.Module]:
    """Every network once, however many roles share it."""
    return list({id(model.transformer): model.transformer for model in models.values()}.values())


def _make_masks(method: TrainingMethod, batch: dict[str, Any], layout: Layout) -> None:
    """Have masks made, which a network's first pass makes and keeps: those of a GPU take next to no memory."""
    spans = {call.span for call in method.network_calls(method.update_cycle, batch["latent_shape"][1])}
    networks = distinct_networks(method.models)
    if "chunk" not in spans:
        with cut_to(networks, 1) if can_be_cut(networks) else nullcontext():
            _run(method, batch, layout, meets_gradients=False)


def _run(method: TrainingMethod, batch: dict[str, Any], layout: Layout, *, meets_gradients: bool) -> list[_Segment]:
    """One micro-batch of a step as the trainer makes it, cut into segments."""
    networks = {role: model.transformer for role, model in method.models.items()}
    known = [t for network in distinct_networks(method.models) for t in (*network.parameters(), *network.buffers())]
    is_autocast = layout.mixed_precision == "bf16"
    autocast = [model for model in method.models.values() if is_autocast and model.trainable]
    for model in autocast:
        model.compute_on(torch.device("meta"), torch.bfloat16)
    step, segments = method.update_cycle, []
    execution, live = MetaExecution(model.transformer for model in autocast), LiveBytes(known)
    with execution, live, _caches_marked(method.models, live):
        for role in method.updates(step):

            def end_segment(*_: Any, role: str = role) -> None:
                segments.append(_Segment(role, live.start_segment()))

            if meets_gradients:
                _add_gradients(trained_parameters(method.models[role]), live)
            live.start_segment()
            with (
                _boundaries(distinct_networks(method.models), end_segment),
                _gradients_marked(networks[role], live, layout),
            ):
                rng = MetaRng(0, step, batch["sample_index"], "meta")
                for term in method.losses(role, batch, rng):
                    end_segment()
                    execution.backward(term.loss)
                    end_segment()
                    del term
            for parameter in networks[role].parameters():
                parameter.grad = None
    return segments


def _add_gradients(trained: Iterable[nn.Parameter], live: LiveBytes) -> None:
    """What earlier micro-batches have left."""
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
        live.mark(parameter.grad, GRADIENTS)


@contextmanager
def _boundaries(networks: Any, end_segment: Callable[..., None]) -> Iterator[None]:
    handles = [network.register_forward_pre_hook(end_segment) for network in networks]
    handles += [network.register_forward_hook(end_segment) for network in networks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _gradients_marked(network: nn.Module, live: LiveBytes, layout: Layout) -> Iterator[None]:
    """Name gradients as they are made; sharded ones are reduced and freed block by block, here at once."""

    def seen(parameter: Tensor) -> None:
        if layout.is_sharded:
            parameter.grad = None
        elif parameter.grad is not None:
            live.mark(parameter.grad, GRADIENTS)

    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    handles = [parameter.register_post_accumulate_grad_hook(seen) for parameter in trained]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _caches_marked(models: Mapping[str, ModelBase], live: LiveBytes) -> Iterator[None]:
    """Name the key-value caches that causal students make."""
    causal = [model for model in models.values() if isinstance(model, CausalModelBase)]
    for model in causal:
        make = model.new_cache

        def marked(*args: Any, make: Any = make, **kwargs: Any) -> Any:
            cache = make(*args, **kwargs)
            for part in cache.parts:
                live.mark(part.entries, KV_CACHE)
            return cache

        vars(model)["new_cache"] = marked
    try:
        yield
    finally:
        for model in causal:
            del vars(model)["new_cache"]


@contextmanager
def _computing_as(models: Mapping[str, ModelBase], layout: Layout) -> Iterator[None]:
    """Networks in the types that they compute in: sharded ones gather their weights in bfloat16, inputs follow."""
    if not (layout.is_sharded and layout.mixed_precision == "bf16"):
        with nullcontext():
            yield
        return

    def lower(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for name, value in kwargs.items():
            if name != "timestep" and isinstance(value, Tensor) and value.is_floating_point():
                kwargs[name] = value.to(torch.bfloat16)
        return args, kwargs

    networks = distinct_networks(models)
    parameters = [parameter for network in networks for parameter in network.parameters()]
    kept = [parameter.data for parameter in parameters]
    handles = [network.register_forward_pre_hook(lower, with_kwargs=True) for network in networks]
    try:
        for parameter in parameters:
            parameter.data = parameter.data.to(torch.bfloat16)
        yield
    finally:
        for parameter, data in zip(parameters, kept, strict=True):
            parameter.data = data
        for handle in handles:
            handle.remove()


def _deepened(method: TrainingMethod, shallow: list[_Segment], deeper: list[_Segment]) -> list[_Segment]:
    """Segments at the networks' own depth.

    A segment's slope comes from the role being trained: frozen networks keep nothing from block to block.
    """
    depths = {}
    for role in method.roles:
        found = find_blocks(method.models[role].transformer)
        assert found is not None, "checked by can_be_cut"
        depths[role] = len(found[1])
    result = []
    for one, other in zip(shallow, deeper, strict=True):
        names = {*one.peak, *other.peak}
        peak = Counter({name: extrapolate(one.peak[name], other.peak[name], depths[one.role]) for name in names})
        result.append(_Segment(one.role, peak))
    return result


def _worst(segments: list[_Segment]) -> list[UpdatePeak]:
    roles = dict.fromkeys(segment.role for segment in segments)
    worst = {role: max((s.peak for s in segments if s.role == role), key=lambda peak: peak.total()) for role in roles}
    return [
        UpdatePeak(role, activations=peak[ACTIVATIONS], gradients=peak[GRADIENTS], kv_cache=peak[KV_CACHE])
        for role, peak in worst.items()
    ]
