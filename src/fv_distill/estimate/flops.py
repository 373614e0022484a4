"""The arithmetic of a method's network calls, counted on meta tensors by torch's own counter.

Counted are the multiplications and additions of matrix products, convolutions and attention, 2 for a product and its
sum. What else a network does is less than a percent of that.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fv_distill.methods.base import TrainingMethod
from fv_distill.methods.calls import NetworkCall
from fv_distill.models.base import ModelBase
from fv_distill.models.causal_base import CausalModelBase
from fv_distill.models.conditioning import Conditioning
from fv_distill.models.transformers.block_causal import visible_history

from .batch import meta_conditions
from .depth import DEEPER, SHALLOW, can_be_cut, cut_to, extrapolate, find_blocks
from .layout import Layout
from .meta_execution import MASKED_ATTENTION, MetaExecution


@dataclass(frozen=True)
class CallCost:
    """Arithmetic of one call on one micro-batch, with its backward pass if it builds a graph.

    Attributes:
        flops: without recomputation, what MFU is measured by.
        executed_flops: with the recomputation of gradient checkpointing.
    """

    flops: int
    executed_flops: int


@dataclass(frozen=True)
class CountedCall:
    """Calls of the average step, on one micro-batch, with the cost of each."""

    call: NetworkCall
    cost: CallCost


@dataclass(frozen=True)
class ClipShape:
    """What a network is called with: batch size, latents `[C, T, H, W]`, text `[L, D]`."""

    batch_size: int
    latents: tuple[int, int, int, int]
    text: tuple[int, int]


def average_calls(method: TrainingMethod, num_frames: int) -> list[NetworkCall]:
    """The calls of one micro-batch in the average step of an update cycle; the same calls are one entry."""
    counts: dict[NetworkCall, float] = {}
    for step in range(1, method.update_cycle + 1):
        for call in method.network_calls(step, num_frames):
            one = NetworkCall(call.role, call.grad, 1.0, call.span, call.start_frame, call.guided)
            counts[one] = counts.get(one, 0.0) + call.count / method.update_cycle
    return [call.times(count) for call, count in counts.items() if count > 0]


class CallCosts:
    """Counts each kind of call once.

    Args:
        models: adapters on the meta device, by role.
        shape: of the calls.
        layout: whose device decides what a mask saves.
    """

    def __init__(self, models: Mapping[str, ModelBase], shape: ClipShape, layout: Layout) -> None:
        self._models = models
        self._shape = shape
        self._layout = layout
        self._counted: dict[str, CallCost] = {}

    def __call__(self, call: NetworkCall) -> CallCost:
        """The cost of one call, whatever its `count`."""
        model = self._models[call.role]
        if call.span != "chunk":
            return self._at(model, call, call.start_frame)
        # Attention over history is the only part that depends on the place, and linear in its length.
        assert isinstance(model, CausalModelBase)
        starts = range(0, self._shape.latents[1], model.chunk_size)
        seen = {start: _visible_frames(model, start) for start in starts}
        longest = max(starts, key=lambda start: seen[start])
        first, last = self._at(model, call, 0), self._at(model, call, longest)
        share = seen[call.start_frame] / seen[longest] if seen[longest] else 0.0
        return CallCost(
            *(round(a + share * (b - a)) for a, b in zip(_pair(first), _pair(last), strict=True)),
        )

    def _at(self, model: ModelBase, call: NetworkCall, start_frame: int) -> CallCost:
        network: Any = model.transformer
        recomputes = call.grad and network.is_gradient_checkpointing
        causal_layout = vars(model.layout) if isinstance(model, CausalModelBase) else None
        kind = type(model).__name__, type(network).__name__, str(network.config), causal_layout
        key = json.dumps([kind, call.span, start_frame, call.grad, recomputes], default=str)
        if key not in self._counted:
            executed = self._count(model, call, start_frame)
            flops = executed
            if recomputes:
                with _without_checkpointing(network):
                    flops = self._count(model, call, start_frame)
            self._counted[key] = CallCost(flops, executed)
        return self._counted[key]

    def _count(self, model: ModelBase, call: NetworkCall, start_frame: int) -> int:
        network = model.transformer
        if not can_be_cut([network]):
            return self._count_now(model, call, start_frame)
        found = find_blocks(network)
        assert found is not None
        counts = []
        for depth in (SHALLOW, DEEPER):
            with cut_to([network], depth):
                counts.append(self._count_now(model, call, start_frame))
        return extrapolate(counts[0], counts[1], len(found[1]))

    def _count_now(self, model: ModelBase, call: NetworkCall, start_frame: int) -> int:
        execution, counter = MetaExecution(), FlopCounterMode(display=False)
        inputs = _make_inputs(model, call, self._shape, start_frame)
        with execution, counter, torch.set_grad_enabled(call.grad):
            velocity = _make_call(model, call, inputs, start_frame)
            if call.grad:
                execution.backward(velocity.sum())
        for parameter in model.transformer.parameters():
            parameter.grad = None
        by_operation: dict[Any, int] = counter.get_flop_counts()["Global"]
        masked = sum(flops for operation, flops in by_operation.items() if operation in MASKED_ATTENTION)
        return counter.get_total_flops() - round(masked * (1 - self._visible_share(model, call)))

    def _visible_share(self, model: ModelBase, call: NetworkCall) -> float:
        """Of the pairs of tokens under a mask; flex_attention leaves the others out, a CPU computes them all."""
        if not isinstance(model, CausalModelBase) or self._layout.device_type == "cpu":
            return 1.0
        frames = self._shape.latents[1]
        history = frames - model.chunk_size if call.span == "clip_after_history" else 0
        return float(model.layout.frame_mask(frames, history).float().mean())


@dataclass(frozen=True)
class _Inputs:
    x_t: Tensor
    sigma: Tensor
    conditioning: Conditioning
    cache: Any = None


def _make_inputs(model: ModelBase, call: NetworkCall, shape: ClipShape, start_frame: int) -> _Inputs:
    channels, frames, height, width = shape.latents
    dtype = model.dtype
    text = torch.empty(shape.batch_size, *shape.text, device="meta", dtype=dtype)
    conditioning = Conditioning(
        text,
        torch.ones(text.shape[:2], dtype=torch.bool, device="meta"),
        meta_conditions(model.condition_shapes(shape.latents), shape.batch_size),
    )
    cache = None
    if call.span == "chunk":
        assert isinstance(model, CausalModelBase)
        frames = model.chunk_size
        cache = model.new_cache(shape.batch_size, shape.latents)
        _fill(cache, start_frame, model.chunk_size)
    x_t = torch.empty(shape.batch_size, channels, frames, height, width, device="meta")
    return _Inputs(x_t, torch.empty(shape.batch_size, device="meta"), conditioning, cache)


def _fill(cache: Any, start_frame: int, chunk_size: int) -> None:
    """Store the history of a chunk."""
    for part in cache.parts:
        layers, _, batch, _, heads, head_dim = part.entries.shape
        entry = torch.empty(batch, chunk_size * part.tokens_per_frame, heads, head_dim, device="meta")
        for start in range(0, start_frame, chunk_size):
            for layer in range(layers):
                part.write(layer, start, entry, entry)


def _make_call(model: ModelBase, call: NetworkCall, inputs: _Inputs, start_frame: int) -> Tensor:
    x_t, sigma, conditioning = inputs.x_t, inputs.sigma, inputs.conditioning
    if call.span == "clip":
        return model.predict_velocity(x_t, sigma, conditioning)
    assert isinstance(model, CausalModelBase), f"{call.span} is a causal network's"
    if call.span == "clip_after_history":
        return model.predict_velocity(x_t, sigma, conditioning, clean_history=x_t)
    return model.predict_velocity_streaming(x_t, sigma, conditioning, cache=inputs.cache, start_frame=start_frame)


def _visible_frames(model: CausalModelBase, start_frame: int) -> int:
    visible = visible_history(start_frame, local_window=model.local_window, sink_frames=model.sink_frames)
    return sum(len(frames) for frames in visible)


def _pair(cost: CallCost) -> Sequence[int]:
    return cost.flops, cost.executed_flops


@contextmanager
def _without_checkpointing(network: Any) -> Iterator[None]:
    network.disable_gradient_checkpointing()
    try:
        yield
    finally:
        network.enable_gradient_checkpointing()
