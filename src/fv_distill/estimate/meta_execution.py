"""Running networks on meta tensors: shapes and types without numbers, with the memory and arithmetic of a GPU.

Three things differ on the meta device and are put right here. Attention falls back to matrices of all scores there,
where a GPU has a fused kernel that keeps queries, keys, values, outputs and one number per row. Autocast does not act.
And the mode that does both must stay on in the backward pass, where checkpointed blocks run again.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fv_distill.rng import SampleRng

_aten = torch.ops.aten

MASKED_ATTENTION = _aten._scaled_dot_product_efficient_attention, _aten._scaled_dot_product_efficient_attention_backward
"""What attention under a mask is counted as; attention without is `_scaled_dot_product_flash_attention`."""

# What autocast runs in the lower type and networks are made of.
_CAST_LAYERS: tuple[Callable[..., Tensor], ...] = (
    functional.linear,
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
)


class MetaExecution(TorchFunctionMode):
    """Fused attention and, for some networks, autocast to bfloat16.

    Args:
        autocast_networks: whose linear and convolution layers run in bfloat16. Their cast weights are kept until the
            network's forward pass ends, as autocast's cache keeps them, and longer where a graph needs them.
    """

    def __init__(self, autocast_networks: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        networks = list(autocast_networks)
        self._cast = {id(parameter) for network in networks for parameter in network.parameters()}
        self._copies: dict[int, Tensor] = {}
        self._handles = [network.register_forward_hook(self._end_of_forward) for network in networks]

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*exception)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is functional.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        if func in _CAST_LAYERS and len(args) > 1 and id(args[1]) in self._cast:
            args = tuple(self._lowered(arg) if isinstance(arg, Tensor) else arg for arg in args)
            kwargs = {name: self._lowered(arg) if isinstance(arg, Tensor) else arg for name, arg in kwargs.items()}
        return func(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`, but that goes through this mode's own hook, which would switch the mode off meanwhile."""
        engine: Any = torch.autograd.Variable._execution_engine
        gradient = torch.empty_like(loss)
        engine.run_backward((loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)

    def _lowered(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.dtype == torch.bfloat16:
            return tensor
        # Recomputation enters autocast block by block, and leaves it with nothing kept.
        is_recomputed = torch._C._current_graph_task_id() != -1
        if id(tensor) not in self._cast or is_recomputed:
            return tensor.to(torch.bfloat16)
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = tensor.to(torch.bfloat16)
        return self._copies[id(tensor)]

    def _end_of_forward(self, *_: Any) -> None:
        self._copies.clear()


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    dtype = min((query.dtype, key.dtype, value.dtype), key=lambda kind: kind.itemsize)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if attn_mask is None:
        return _aten._scaled_dot_product_flash_attention(query, key, value)[0]
    # flex_attention holds no mask of tokens, so that none is handed on.
    keeps_graph = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    return _aten._scaled_dot_product_efficient_attention(query, key, value, None, keeps_graph)[0]


class MetaRng(SampleRng):
    """Draws without numbers; what steers the calls, the exit steps, is fixed."""

    def normal(self, stream: str, shape: Any) -> Tensor:
        """Fp32 `[B, *shape]` on the meta device."""
        return torch.empty((len(self.sample_indices), *shape), device="meta")

    def uniform(self, stream: str, shape: Any = ()) -> Tensor:
        """Fp32 `[B, *shape]` on the meta device."""
        return torch.empty((len(self.sample_indices), *shape), device="meta")

    def shared_uniform(self, stream: str) -> float:
        """The middle."""
        return 0.5

    def shared_integer(self, stream: str, high: int) -> int:
        """0, the shortest rollout; a longer one repeats its passes without graph and needs no more memory."""
        return 0
