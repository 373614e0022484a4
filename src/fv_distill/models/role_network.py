"""One role's network: whole, with a LoRA adapter, or an adapter on a network that roles share."""

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import nn

from fv_distill.lora import AdapterSwitch, LoraSpec, inject_lora, is_lora_parameter


class RoleNetwork:
    """What is trained of a network, and how it is called with this role's adapter and no other.

    Args:
        transformer: the network.
        trainable: whether an optimizer will update its weights.

    Attributes:
        adapter: the name of the role's LoRA adapter; None is the network as it is.
        lora: what the adapter is.
        switch: of the network's adapters; roles that share a network share it.
        is_on_base: whether the network is another role's.
        dtype: of the network's weights.
        component: the pipeline's name of the network.
        sigma_range: the noise levels that the network is for; less than all where a family has several experts.
    """

    component: str = "transformer"
    sigma_range: tuple[float, float] = (0.0, 1.0)

    # Names for ends of module names, for `models.<role>.lora.target_modules`.
    lora_presets: ClassVar[dict[str, tuple[str, ...]]] = {}

    def __init__(self, transformer: nn.Module, *, trainable: bool) -> None:
        self.transformer = transformer
        self.trainable = trainable
        # diffusers' property, not the first parameter: some of a bf16 network's modules stay in fp32.
        self.dtype: torch.dtype = cast(Any, transformer).dtype
        self.adapter: str | None = None
        self.lora: LoraSpec | None = None
        self.switch: AdapterSwitch | None = None
        self.is_on_base = False
        self._device: torch.device | None = None
        self._compute_dtype: torch.dtype | None = None
        transformer.requires_grad_(trainable).train(trainable)

    def add_lora(
        self,
        adapter: str,
        *,
        rank: int,
        alpha: float | None = None,
        target_modules: str | Sequence[str] = "attention",
        rslora: bool = False,
        dora: bool = False,
        seed: int = 0,
    ) -> None:
        """Train a LoRA adapter of this role instead of the network; see `inject_lora`.

        Args:
            adapter: its name, the role's.
            rank: see `LoraSpec`.
            alpha: see `LoraSpec`; None is the rank.
            target_modules: one of the family's `lora_presets`, or ends of module names.
            rslora: see `LoraSpec`.
            dora: see `LoraSpec`.
            seed: of its start.

        Raises:
            ValueError: for an unknown preset, or targets that match nothing.
        """
        if self.switch is None:
            self.transformer.requires_grad_(False)
        spec = LoraSpec(
            rank, rank if alpha is None else alpha, self._lora_targets(target_modules), rslora=rslora, dora=dora
        )
        inject_lora(self.transformer, adapter, spec, seed=seed)
        if self.switch is None:
            self.switch = AdapterSwitch(self.transformer, resting=adapter)
        else:
            # The student is what a pipeline sees that knows of no roles.
            if self.switch.current is None or adapter == "student":
                self.switch.current = adapter
            self.switch.refresh()
        self.adapter, self.lora, self.trainable = adapter, spec, True
        self.transformer.train()

    def _lora_targets(self, targets: str | Sequence[str]) -> tuple[str, ...]:
        if not isinstance(targets, str):
            return tuple(targets)
        if targets not in self.lora_presets:
            raise ValueError(
                f"target_modules={targets!r} is no preset of {type(self).__name__}; it has "
                f"{', '.join(self.lora_presets) or 'none'}, or give a list of module names"
            )
        return self.lora_presets[targets]

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass, under the adapter of the forward pass."""
        network = cast(Any, self.transformer)
        if self.switch is None:
            network.enable_gradient_checkpointing()
        else:
            network.enable_gradient_checkpointing(self.switch.checkpoint)

    @property
    def is_expert(self) -> bool:
        """Whether another network is for some noise levels."""
        return self.sigma_range != (0.0, 1.0)

    def covers(self, sigma: float) -> bool:
        """Whether the network is for this level; a boundary belongs to the expert above it."""
        low, high = self.sigma_range
        return low <= sigma and (sigma < high or high == 1)

    def is_trained(self, name: str) -> bool:
        """Whether an optimizer of this role updates the network's parameter of that name."""
        if not self.trainable:
            return False
        return self.adapter is None or is_lora_parameter(name, self.adapter)

    def call_network(self, **kwargs: Any) -> Any:
        """The network's forward pass, with this role's adapter and no other."""
        if self.switch is None:
            return self.transformer(**kwargs)
        with self.switch.using(self.adapter):
            return self.transformer(**kwargs)

    @property
    def device(self) -> torch.device:
        """Where the network computes; offloaded weights are elsewhere between its calls."""
        return self._device or next(self.transformer.parameters()).device

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the network's layers compute in: another type than its weights' in mixed precision."""
        return self._compute_dtype or self.dtype

    def compute_on(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Say where the network computes, and in what, for weights that don't tell; no type is the weights' own."""
        self._device = device
        self._compute_dtype = dtype
