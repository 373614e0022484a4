"""Floating-point operations of a network's calls: each kind of call is measured once, then calls are counted."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from fv_distill.training.sharding import unwrap

_aten = torch.ops.aten


def _attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


# Attention of CPUs and of other accelerators, for which torch has no formula.
_MORE_FORMULAS: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _aten._scaled_dot_product_fused_attention_overrideable: _attention_flops,
}


class FlopCount(TorchDispatchMode):
    """Counts the operations inside it with torch's formulas: matrix products, convolutions, attention.

    Not `FlopCounterMode`: a compiled function that first runs under that one is never compiled again
    (pytorch issue 190286), and flex_attention, uncompiled, writes all scores to memory.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Leave torch.compile alone."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and add what it costs."""
        out = func(*args, **(kwargs or {}))
        packet = func if isinstance(func, HigherOrderOperator) else func._overloadpacket
        formula = _MORE_FORMULAS.get(packet) or flop_registry.get(packet)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


@runtime_checkable
class HasCostKey(Protocol):
    """An argument that isn't a tensor and that a call's cost depends on, such as a cache."""

    @property
    def cost_key(self) -> Hashable:
        """Equal for arguments with which a call costs the same."""


class CallMeter:
    """Adds up the operations of a prepared network's calls and of their backward passes.

    A backward pass costs one forward for the gradients of the inputs and another for those of the weights, this one in
    proportion to the weights that are trained: 2 forwards for a network that is trained whole (Kaplan et al. 2020,
    section 2.1). With gradient checkpointing the blocks run forward once more.

    Args:
        network: in whatever wrapper it is called. Its calls on this process are counted, all of them shards' owners'.

    Attributes:
        needed: operations without recomputation.
        performed: operations with it.
    """

    def __init__(self, network: nn.Module) -> None:
        inner = unwrap(network)
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in inner.parameters()]
        self._backward = 1 + sum(size for size, trained in sizes if trained) / max(1, sum(size for size, _ in sizes))
        self._recomputes = any(getattr(part, "gradient_checkpointing", False) is True for part in inner.modules())
        self._known: dict[Hashable, int] = {}
        self._measuring: FlopCount | None = None
        self._key: Hashable = None
        self.enabled = True
        self.needed = 0.0
        self.performed = 0.0
        self._hooks = [
            network.register_forward_pre_hook(self._before, with_kwargs=True),
            network.register_forward_hook(self._after, always_call=True),
        ]

    def reset(self) -> None:
        """Start again from nothing; what was measured is kept."""
        self.needed = self.performed = 0.0

    def detach(self) -> None:
        """Stop counting."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._key = (torch.is_grad_enabled(), _cost_key(args), _cost_key(kwargs)) if self.enabled else None
        if self._key is not None and self._key not in self._known:
            self._measuring = FlopCount()
            self._measuring.__enter__()

    def _after(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._measuring is not None:
            self._measuring.__exit__(None, None, None)
            self._known[self._key] = self._measuring.total
            self._measuring = None
        if self._key is None:
            return
        forward = self._known[self._key]
        differentiated = any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves(output))
        backward = self._backward * forward if differentiated else 0
        self.needed += forward + backward
        self.performed += forward + backward + (forward if differentiated and self._recomputes else 0)


def _cost_key(value: Any) -> Hashable:
    """What of an argument a call's cost depends on: shapes of tensors, plain values, the kinds of other objects."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, Mapping):
        return tuple((name, _cost_key(inner)) for name, inner in value.items())
    if isinstance(value, tuple | list):
        return tuple(_cost_key(inner) for inner in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return value.cost_key if isinstance(value, HasCostKey) else type(value).__qualname__
