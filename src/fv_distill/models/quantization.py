"""Frozen weights in fewer bits, by torchao: a teacher, or the base of LoRA adapters (QLoRA, Dettmers et al. 2023)."""

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

Quantization = Literal["int8", "float8", "nf4"]
NF4_BLOCK = 64
"""Weights with a scale of their own (QLoRA, section 3)."""
NF4_SCALES = 256
"""Such scales that are quantised together."""


def quantize_network(network: nn.Module, kind: Quantization) -> int:
    """Replace the weights of the linear layers in a network's blocks by quantised ones.

    What is outside of the blocks stays: the layers that read times and texts, and the output. A layer computes in the
    type that its weights had, with weights that are expanded while it runs.

    Args:
        network: a diffusers network with frozen weights, on any device.
        kind: int8 and float8 have a scale for each output channel, nf4 one for each 64 weights.

    Returns:
        The number of layers that were replaced.

    Raises:
        ValueError: if torchao isn't there, there are no such layers, or one's size doesn't fit.
    """
    quantize = _quantizer(kind)
    layers = [
        (f"{prefix}.{name}", layer)
        for prefix, blocks in network.named_children()
        if isinstance(blocks, nn.ModuleList)
        for name, layer in blocks.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    if not layers:
        raise ValueError(f"{type(network).__name__} has no blocks with linear layers to quantise")
    for name, layer in layers:
        if kind == "nf4" and layer.weight.numel() % NF4_BLOCK:
            raise ValueError(
                f"{name} has {layer.weight.numel()} weights, which don't divide into nf4's blocks of {NF4_BLOCK}; "
                "use int8"
            )
        quantize(layer)
        layer.__class__ = QuantizedLinear
    return len(layers)


class QuantizedLinear(nn.Linear):
    """A linear layer with a frozen quantised weight, which is expanded anew for the backward pass.

    torchao's own int8 and float8 layers keep the expanded weight for it: with adapters on every layer, all that
    quantisation saved.
    """

    def forward(self, input: Tensor) -> Tensor:
        """See `nn.Linear`."""
        return _ExpandedTwice.apply(input, self.weight, self.bias)


class _ExpandedTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        # Autocast acts in here as it does on a plain layer.
        return nn.functional.linear(input, _expanded(weight, weight.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grad @ _expanded(weight, grad.dtype), None, None


def _expanded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    # NF4's name for it is `to`; the others have no other way than `dequantize`.
    return weight.to(dtype) if type(weight).__name__ == "NF4Tensor" else cast(Any, weight).dequantize().to(dtype)


def stored_tensors(tensor: Tensor) -> list[Tensor]:
    """What holds a tensor's numbers: of a quantised one, its codes and scales; else the tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = cast(Any, tensor).__tensor_flatten__()
    return [inner for name in names for inner in stored_tensors(getattr(tensor, name))]


def stored_bytes(tensor: Tensor) -> int:
    """The size of `stored_tensors`."""
    return sum(inner.numel() * inner.element_size() for inner in stored_tensors(tensor))


def _quantizer(kind: Quantization) -> Callable[[nn.Linear], None]:
    try:
        from torchao import quantization
    except ImportError as error:
        raise ValueError(
            f"{kind} needs torchao, which isn't installed: pip install 'fv_distill[quantization]'"
        ) from error
    if kind == "nf4":
        return lambda layer: _set_frozen(layer, _to_nf4(quantization.NF4Tensor, layer.weight))
    config = quantization.Int8WeightOnlyConfig(version=2) if kind == "int8" else quantization.Float8WeightOnlyConfig()

    def quantize(layer: nn.Linear) -> None:
        with warnings.catch_warnings():
            # torchao says where its own names will move to.
            warnings.simplefilter("ignore")
            quantization.quantize_(layer, config)
        layer.weight.requires_grad_(False)

    return quantize


def _to_nf4(kind: Any, weight: Tensor) -> Tensor:
    # The scales are quantised too, and a small layer has fewer of them than are taken together.
    return kind.from_tensor(weight.detach(), NF4_BLOCK, math.gcd(NF4_SCALES, weight.numel() // NF4_BLOCK))


def _set_frozen(layer: nn.Linear, weight: Tensor) -> None:
    layer.weight = nn.Parameter(weight, requires_grad=False)
