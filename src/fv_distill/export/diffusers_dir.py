"""A student as a complete diffusers directory, which stock diffusers loads without this library."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from torch import Tensor, nn

from fv_distill.models.pretrained import check_weights_fit, resolve_directory

from .model_card import write_model_card
from .scheduler import few_step_scheduler

INFO_FILE = "fv_distill.json"


@dataclass(frozen=True)
class StudentInfo:
    """What a user has to know to sample from an export; written to `fv_distill.json`.

    Attributes:
        base_model: the directory or Hub id it was distilled from.
        method: dotted path of the training method.
        sigmas: the trained noise levels without the final 0, or None to sample as the base model is sampled.
        sample_type: "sde" or "ode".
        step: optimisation steps of the training run.
        averaged: whether these are EMA weights.
        call: further arguments of the pipeline's call: size, frames, text length.
        versions: of the libraries that trained it.
    """

    base_model: str
    method: str
    sigmas: tuple[float, ...] | None = None
    sample_type: str = "sde"
    step: int = 0
    averaged: bool = False
    call: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def export_diffusers_directory(
    output_dir: str | Path,
    weights: Mapping[str, Tensor],
    info: StudentInfo,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the base model's directory with the student's transformer and a scheduler that visits its sigmas.

    The directory is written beside its final name and renamed when complete.

    Args:
        output_dir: the directory to make.
        weights: the transformer's, in the base transformer's key names.
        info: where it comes from and how it is sampled; `num_inference_steps` is `len(info.sigmas)`, guidance 1.
        dtype: of the written transformer; None keeps the weights' own.
        overwrite: replace an existing directory.

    Raises:
        FileExistsError: if the directory exists, isn't empty, and `overwrite` is off.
        ValueError: if the weights don't fit the base transformer, or no stock scheduler visits the sigmas.
    """
    output_dir, base = Path(output_dir), resolve_directory(info.base_model)
    if output_dir.exists() and any(output_dir.iterdir()) and not overwrite:
        raise FileExistsError(f"{output_dir} is not empty; choose another directory or pass overwrite")
    if output_dir.resolve() == base.resolve():
        raise ValueError(f"{output_dir} is the base model itself; export to another directory")
    scheduler: Any = None if info.sigmas is None else few_step_scheduler(info.sigmas, sample_type=info.sample_type)
    transformer = build_transformer(base, weights, dtype=dtype)
    partial = output_dir.with_name(f"{output_dir.name}.incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    skipped = ["transformer", *(["scheduler"] if scheduler else []), "README.md", ".cache", ".git*"]
    shutil.copytree(base, partial, ignore=shutil.ignore_patterns(*skipped))
    cast(Any, transformer).save_pretrained(partial / "transformer")
    if scheduler is not None:
        scheduler.save_pretrained(partial / "scheduler")
        _set_scheduler_class(partial / "model_index.json", type(scheduler).__name__)
    (partial / INFO_FILE).write_text(json.dumps(asdict(info), indent=2) + "\n")
    write_model_card(partial / "README.md", info, name=output_dir.name)
    if output_dir.exists():
        shutil.rmtree(output_dir)
    partial.rename(output_dir)
    return output_dir


def build_transformer(base: Path, weights: Mapping[str, Tensor], *, dtype: torch.dtype | None) -> nn.Module:
    """The base model's transformer class, from its config, around `weights`.

    Raises:
        ValueError: listing missing, unexpected and mis-shaped keys.
    """
    class_name = json.loads((base / "model_index.json").read_text())["transformer"][1]
    kind = getattr(diffusers, class_name)
    with torch.device("meta"):
        transformer = kind.from_config(kind.load_config(base, subfolder="transformer"))
    check_weights_fit(transformer.state_dict(), weights)
    transformer.load_state_dict(dict(weights), assign=True)
    # The rotary tables are no part of a state dict and are computed anew when the directory is loaded.
    return transformer if dtype is None else transformer.to(dtype)


def _set_scheduler_class(index_file: Path, class_name: str) -> None:
    index = json.loads(index_file.read_text())
    index["scheduler"] = ["diffusers", class_name]
    index_file.write_text(json.dumps(index, indent=2) + "\n")
