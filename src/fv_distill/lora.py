"""LoRA adapters by role: several on one frozen network, switched explicitly and locally.

PEFT's own `set_adapter` and `disable_adapters` also flip `requires_grad`. A backward pass after such a switch gives no
gradients, without an error. So all adapters keep their gradients on here, and only what a layer's forward pass reads is
switched: which adapter is active, and whether any is.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint


class AdapterSwitch:
    """Which adapter the LoRA layers of a network apply.

    Args:
        network: holds the layers.
        resting: the adapter outside of any `using`, for callers that know of no roles, such as pipelines; None is the
            bare network.
    """

    def __init__(self, network: nn.Module, *, resting: str | None) -> None:
        self._network = network
        self._layers: list[Any] = []
        self.current = resting
        self.refresh()

    def refresh(self) -> None:
        """Look for the layers anew, after an adapter was added."""
        self._layers = [module for module in self._network.modules() if isinstance(module, BaseTunerLayer)]
        self._set(self.current)

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Apply one adapter, or with None none, inside the block."""
        before = self.current
        self._set(adapter)
        try:
            yield
        finally:
            self._set(before)

    def checkpoint(self, function: Callable[..., Any], *args: Any) -> Any:
        """Gradient checkpointing whose recomputation applies the adapter of the forward pass."""
        adapter = self.current

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), self.using(adapter)

        return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)

    def _set(self, adapter: str | None) -> None:
        self.current = adapter
        for layer in self._layers:
            # The public setters are those that flip requires_grad.
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]


@dataclass(frozen=True)
class LoraSpec:
    """What an adapter is (Hu et al. 2021).

    Attributes:
        rank: of the two factors.
        alpha: the product is scaled by alpha / rank, or alpha / sqrt(rank) with `rslora` (Kalajdzievski 2023).
        target_modules: ends of the names of the linear layers that it changes, such as `to_q`.
        rslora: see `alpha`.
        dora: train each layer's magnitude apart from its direction (Liu et al. 2024).
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    rslora: bool = False
    dora: bool = False

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied with."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def peft_config(self) -> PeftLoraConfig:
        """The same for PEFT."""
        return PeftLoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # annotated as an int, used as a number
            target_modules=list(self.target_modules),
            use_rslora=self.rslora,
            use_dora=self.dora,
        )


def inject_lora(network: nn.Module, adapter: str, spec: LoraSpec, *, seed: int = 0) -> None:
    """Add a LoRA adapter that changes nothing yet, in float32.

    Args:
        network: in whose linear layers it goes; its other parameters' `requires_grad` stay.
        adapter: the name, a role's.
        spec: what it is.
        seed: of the first factor's random start; the second one is zero.

    Raises:
        ValueError: if a target matches no linear layer, listing the network's.
    """
    linear = [name for name, module in network.named_modules() if _is_linear(module)]
    targets = spec.target_modules
    unmatched = [target for target in targets if not any(_matches(name, target) for name in linear)]
    if unmatched or not targets:
        raise ValueError(
            f"target_modules: {', '.join(unmatched) or 'the list is empty and'} matches no linear layer of "
            f"{type(network).__name__}; it has {', '.join(layer_kinds(linear))}"
        )
    states = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Several adapters on one network are what is meant here.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        # Adapters on quantised weights are merged into the whole ones, by `fv_distill export`.
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")
        torch.manual_seed(seed)
        inject_adapter_in_model(spec.peft_config(), network, adapter_name=adapter)
    for parameter, requires_grad in states:
        parameter.requires_grad_(requires_grad)
    for name, parameter in network.named_parameters():
        if is_lora_parameter(name, adapter):
            # PEFT gives it the base's type; updates of 1e-5 are lost in bf16.
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def is_lora_parameter(name: str, adapter: str) -> bool:
    """Whether a parameter, by its name in the network, belongs to an adapter: `... .lora_A.<adapter>.weight`."""
    parts = name.split(".")
    return len(parts) > 2 and parts[-2] == adapter and parts[-3].startswith("lora_")


def lora_key(name: str, adapter: str) -> str:
    """An adapter's parameter without the adapter's name, as PEFT's and diffusers' files have it."""
    head, _, tail = name.rpartition(f".{adapter}.")
    return f"{head}.{tail}"


def layer_kinds(names: Sequence[str]) -> list[str]:
    """Module names without the numbers of repeated blocks, each once: `blocks.*.attn1.to_q`."""
    return list(dict.fromkeys(".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names))


def _is_linear(module: nn.Module) -> bool:
    # A layer that has an adapter already is wrapped; what it wraps has another name, `... .base_layer`.
    return isinstance(module, nn.Linear | BaseTunerLayer)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
