"""Reading diffusers directories: where a model is, what its configs say, and replacing its weights."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, attention_backend
from safetensors.torch import load_file
from torch import Tensor, nn

from .pipeline_index import is_pipeline_directory, network_folder, read_index

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """The torch dtype called `name`.

    Raises:
        ValueError: listing the known names.
    """
    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def resolve_directory(init_from: str | Path, *, name: str = "init_from", patterns: Sequence[str] | None = None) -> Path:
    """The local directory of a diffusers pipeline; a Hub id is downloaded (or found in the cache).

    Args:
        init_from: the directory or Hub id.
        name: what messages call it.
        patterns: the files of a Hub repository that are needed; None for all.

    Raises:
        FileNotFoundError: if it is neither, saying what was tried.
    """
    path = Path(init_from).expanduser()
    if path.is_dir():
        if not is_pipeline_directory(path):
            raise FileNotFoundError(f"{name}={str(init_from)!r} has no model_index.json; give a diffusers directory")
        return path
    hub_id = str(init_from)
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name}={hub_id!r}: no such directory (a Hub id would look like owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=None if patterns is None else list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{name}={hub_id!r} is no local directory and could not be had from the Hub ({type(error).__name__}); "
            "check the spelling, your connection and `hf auth login`"
        ) from error


def load_component_config(directory: Path, component: str) -> dict[str, Any]:
    """The `config.json` of one component of a pipeline directory.

    Raises:
        FileNotFoundError: if the directory lacks it.
    """
    path = directory / component / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {directory} is no complete diffusers pipeline directory")
    return json.loads(path.read_text())


def read_pipeline_class(directory: Path) -> str:
    """The name of the class that a pipeline directory says it is of."""
    return read_index(directory)["_class_name"]


def load_vae_config(directory: Path) -> dict[str, Any]:
    """The VAE's config, completed by the defaults of its diffusers class: older directories leave out what came later.

    Raises:
        FileNotFoundError: if the directory has no VAE.
    """
    config = load_component_config(directory, "vae")
    kind = getattr(diffusers, config.get("_class_name", ""), None)
    parameters = {} if kind is None else inspect.signature(kind.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    return {**defaults, **config}


def read_vae_factors(directory: Path) -> tuple[int, int]:
    """Frames per latent frame, and pixels per latent along height and width, as the directory's VAE config tells them.

    Raises:
        FileNotFoundError: if the directory has no VAE.
        ValueError: if its config names neither factor as diffusers' VAEs do.
    """
    config = load_vae_config(directory)
    for temporal, spatial in (
        ("scale_factor_temporal", "scale_factor_spatial"),
        ("temporal_compression_ratio", "spatial_compression_ratio"),
    ):
        if config.get(temporal) is not None and config.get(spatial) is not None:
            return int(config[temporal]), int(config[spatial])
    raise ValueError(f"{directory / 'vae' / 'config.json'} doesn't tell how much larger clips are than latents")


def read_latent_statistics(directory: Path) -> tuple[Tensor, Tensor]:
    """Mean and deviation of raw latents, broadcastable to `[B, C, T, H, W]`: by channel, or of a scaling factor."""
    config = load_vae_config(directory)
    if config.get("latents_mean") is None:
        return torch.zeros(1, 1, 1, 1, 1), torch.full((1, 1, 1, 1, 1), 1 / float(config["scaling_factor"]))
    mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return mean, std


def read_flow_shift(directory: Path) -> float:
    """The shift in a pipeline's scheduler config: `flow_shift` (UniPC) or `shift` (flow-match Euler).

    Raises:
        ValueError: if the scheduler has neither, or one that depends on the clip.
    """
    path = directory / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    if config.get("use_dynamic_shifting"):
        raise ValueError(
            f"{path} has use_dynamic_shifting: the shift depends on the size of the clip. Set "
            "models.<role>.flow_shift to that of yours, exp(mu) with the pipeline's mu"
        )
    for key in ("flow_shift", "shift"):
        if config.get(key) is not None:
            return float(config[key])
    raise ValueError(f"{path} tells no flow shift; set models.<role>.flow_shift")


def load_network(
    network_class: type[Any],
    directory: Path,
    *,
    check: Callable[[Any, Path], None],
    dtype: str | torch.dtype,
    weights: str | None,
    gradient_checkpointing: bool,
    attention_backend: str | None,
    subfolder: str = "transformer",
) -> nn.Module:
    """A directory's network; errors as in `ModelBase.from_pretrained`.

    Under `torch.device("meta")` its config is all that is read: the shapes without the weights.

    Args:
        network_class: the diffusers class of the network.
        directory: the pipeline directory.
        check: raises if the network of a config (its first argument) isn't what the adapter takes.
        dtype: see `ModelBase.from_pretrained`.
        weights: see `ModelBase.from_pretrained`.
        gradient_checkpointing: see `ModelBase.from_pretrained`.
        attention_backend: see `ModelBase.from_pretrained`.
        subfolder: where in the directory it is; see also `network_folder`.
    """
    subfolder = network_folder(directory, subfolder)
    is_meta = torch.get_default_device().type == "meta"
    transformer: Any = (
        _without_weights(network_class, directory, subfolder, parse_dtype(dtype))
        if is_meta
        else network_class.from_pretrained(directory, subfolder=subfolder, dtype=parse_dtype(dtype))
    )
    check(transformer.config, directory)
    if weights is not None and not is_meta:
        load_weights_override(transformer, weights)
    if gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if attention_backend is not None:
        set_attention_backend(transformer, attention_backend)
    return transformer


def set_attention_backend(network: Any, backend: str) -> None:
    """Let one network compute attention by a diffusers backend, and no other.

    diffusers' method of that name makes the backend also the default of the whole process: of every network that has
    none of its own, the other roles for instance.

    Raises:
        ValueError: for a backend that diffusers doesn't know.
    """
    default, _ = _AttentionBackendRegistry.get_active_backend()
    try:
        network.set_attention_backend(backend)
    finally:
        _AttentionBackendRegistry.set_active_backend(default)
    for module in network.modules():
        processor = getattr(module, "processor", None)
        # Cosmos' processors have no backend of their own and take the process's.
        if processor is not None and not hasattr(processor, "_attention_backend"):
            module.processor = _UnderBackend(processor, backend.lower())


@dataclass
class _UnderBackend:
    """An attention processor with a backend made the process's for as long as it runs, in recomputation too."""

    processor: Any
    backend: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with attention_backend(self.backend):
            return self.processor(*args, **kwargs)


def _without_weights(network_class: type[Any], directory: Path, subfolder: str, dtype: torch.dtype) -> nn.Module:
    """The network on the meta device, its parameters in the types that `from_pretrained` would give them."""
    load_component_config(directory, subfolder)
    network = network_class.from_config(network_class.load_config(directory, subfolder=subfolder))
    kept_in_fp32 = network_class._keep_in_fp32_modules or []
    for name, parameter in network.named_parameters():
        if not any(part in name.split(".") for part in kept_in_fp32):
            parameter.data = parameter.data.to(dtype)
    return network.eval()


def load_weights_override(transformer: nn.Module, path: str) -> None:
    """Replace all weights of a network by those of a safetensors file, or of all in a directory, in the same key names.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: listing missing, unexpected and mis-shaped keys.
    """
    files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else [Path(path)]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"weights={path!r}: no such file, and no directory with .safetensors files")
    weights = {key: value for file in files for key, value in load_file(file).items()}
    try:
        check_weights_fit(transformer.state_dict(), weights)
    except ValueError as error:
        raise ValueError(f"weights={path!r}: {error}") from error
    transformer.load_state_dict(weights)


def check_weights_fit(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, shown: int = 8) -> None:
    """Compare keys and shapes.

    Raises:
        ValueError: listing what is missing, unexpected or of another shape, `shown` of each kind.
    """
    kinds = {
        "missing": [f"missing {key}" for key in expected if key not in weights],
        "unexpected": [f"unexpected {key}" for key in weights if key not in expected],
        "of another shape": [
            f"{key} has shape {tuple(weights[key].shape)}, expected {tuple(value.shape)}"
            for key, value in expected.items()
            if key in weights and weights[key].shape != value.shape
        ],
    }
    # Each kind has its own limit: a renamed layer is only understood by who sees its new name beside its old one.
    problems = [
        "; ".join(found[:shown]) + (f" and {len(found) - shown} more {kind}" if len(found) > shown else "")
        for kind, found in kinds.items()
        if found
    ]
    if problems:
        raise ValueError(f"the weights don't fit the network: {'; '.join(problems)}")
