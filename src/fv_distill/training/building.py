"""The adapters of a config's roles: networks of their own or shared, trained whole or as LoRA adapters."""

import os
from collections.abc import Sequence
from typing import Any

from accelerate import PartialState

from fv_distill.config.instantiate import instantiate
from fv_distill.config.local_modules import search_beside
from fv_distill.config.schema import RunConfig
from fv_distill.console import console
from fv_distill.models.base import ModelBase
from fv_distill.models.quantization import quantize_network
from fv_distill.rng import derive_seed


def build_models(config: RunConfig, roles: Sequence[str] | None = None) -> dict[str, ModelBase]:
    """Load the adapters of `models`, or of some of its roles; roles that share a network get the same one.

    Raises:
        ValueError: if the config has no such role or its keys don't fit the adapter.
        FileNotFoundError: if a model isn't there.
    """
    wanted = list(config.models if roles is None else roles)
    for role in wanted:
        if role not in config.models:
            raise ValueError(
                f"models.{role} is missing from the config; it has {', '.join(config.models) or 'no roles'}"
            )
    bases = {role: config.models[role].share_base_with for role in wanted}
    loaded: dict[str, ModelBase] = {}
    for role in dict.fromkeys(base or role for role, base in bases.items()):
        loaded[role] = _load_model(config, role)
    for role, base in bases.items():
        if base is not None:
            loaded[role] = _model_on_base(config, role, loaded[base])
    for model in loaded.values():
        model.drops_captions = config.training.data.caption_dropout > 0
    for role in wanted:
        _add_lora(config, role, loaded[role])
    if PartialState().is_main_process:
        for role in (role for role in wanted if loaded[role].lora is not None):
            console.print(describe_role(config, role, loaded[role]), highlight=False)
    return {role: loaded[role] for role in wanted}


def build_model(config: RunConfig, role: str) -> ModelBase:
    """Load one role's adapter; errors as in `build_models`."""
    return build_models(config, [role])[role]


def _load_model(config: RunConfig, role: str) -> ModelBase:
    """A role's adapter on a network of its own, still without a LoRA."""
    model = config.models[role]
    defaults = config.training.model
    trains_weights = model.trainable and not model.lora.enable
    kwargs = {
        "init_from": model.init_from,
        "trainable": trains_weights,
        "dtype": _dtype_name(config, role),
        "weights": model.weights,
        "gradient_checkpointing": trains_weights and _wants_checkpointing(config, role),
        "attention_backend": model.attention_backend or defaults.attention_backend,
        **_role_options(config, role),
    }
    search_beside(config.source_folder)
    try:
        adapter = instantiate({"_target_": f"{model.target}.from_pretrained", **kwargs})
    except FileNotFoundError as error:
        raise FileNotFoundError(f"models.{role}: {error}") from error
    if model.quantization is not None:
        try:
            quantize_network(adapter.transformer, model.quantization)
        except ValueError as error:
            raise ValueError(f"models.{role}.quantization: {error}") from error
    return adapter


def _model_on_base(config: RunConfig, role: str, base: ModelBase) -> ModelBase:
    return instantiate({"_target_": f"{config.models[role].target}.on_base", **_role_options(config, role)}, base=base)


def _role_options(config: RunConfig, role: str) -> dict[str, Any]:
    """What belongs to a role whatever its network is."""
    model = config.models[role]
    return {
        "flow_shift": model.flow_shift,
        "negative_prompt": model.negative_prompt,
        "text_length": config.training.data.text_length,
        **(model.model_extra or {}),
    }


def _add_lora(config: RunConfig, role: str, model: ModelBase) -> None:
    lora = config.models[role].lora
    if not lora.enable:
        return
    options = lora.model_dump(exclude={"enable"})
    try:
        model.add_lora(role, **options, seed=derive_seed(config.training.seed, "lora", role))
    except ValueError as error:
        raise ValueError(f"models.{role}.lora.{error}") from error
    if _wants_checkpointing(config, role):
        model.enable_gradient_checkpointing()


def _wants_checkpointing(config: RunConfig, role: str) -> bool:
    return config.models[role].gradient_checkpointing or config.training.model.gradient_checkpointing


def describe_role(config: RunConfig, role: str, model: ModelBase) -> str:
    """A line on what a role trains, and of how many parameters."""
    sizes = {name: parameter.numel() for name, parameter in model.transformer.named_parameters()}
    whole = sum(size for name, size in sizes.items() if ".lora_" not in name)
    trained = sum(size for name, size in sizes.items() if model.is_trained(name))
    if model.lora is not None:
        base = config.models[role].share_base_with or "a network of its own"
        return (
            f"{role}: LoRA of rank {model.lora.rank} on {base}, {_millions(trained)} of {_millions(whole)} parameters"
        )
    return f"{role}: {_millions(whole)} parameters, {model.dtype}, {'trained' if model.trainable else 'frozen'}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"


def _dtype_name(config: RunConfig, role: str) -> str:
    model = config.models[role]
    if model.dtype != "auto":
        return model.dtype
    if model.trainable and not model.lora.enable:
        return "float32"
    return "bfloat16" if _mixed_precision(config) == "bf16" else "float32"


def _mixed_precision(config: RunConfig) -> str:
    return config.training.distributed.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
