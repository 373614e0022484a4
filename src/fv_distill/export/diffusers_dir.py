"""A student as a complete diffusers directory, which stock diffusers loads without this library."""

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fv_distill.models.pipeline_index import component_class, indexed, network_folder
from fv_distill.models.pretrained import check_weights_fit, resolve_directory

from .guider import switch_guider_off
from .model_card import write_model_card
from .run_record import RECORD_FILES, RunFiles, copy_run_assets
from .scheduler import few_step_scheduler_for
from .student_info import INFO_FILE, StudentInfo, write_info


def export_diffusers_directory(
    output_dir: str | Path,
    weights: Mapping[str, Tensor],
    info: StudentInfo,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    run: RunFiles | None = None,
) -> Path:
    """Write the base model's directory with the student's network and a scheduler that visits its sigmas.

    Of a directory with two experts the other one is copied.

    The directory is written beside its final name and renamed when complete.

    Args:
        output_dir: the directory to make.
        weights: the transformer's, in the base transformer's key names.
        info: where it comes from and how it is sampled; `num_inference_steps` is `len(info.sigmas)`, guidance 1.
        dtype: of the written transformer; None keeps the weights' own.
        overwrite: replace an existing directory.
        run: what the training run left behind, for the card.

    Raises:
        FileExistsError: if the directory isn't empty, and `overwrite` is off or it is no diffusers directory.
        ValueError: if the weights don't fit the base transformer, no stock scheduler visits the sigmas (which a causal
            student, that streams without one, is spared), or the output and the base directory lie in each other.
    """
    output_dir, base = Path(output_dir), resolve_directory(info.base_model)
    check_output(output_dir, base, overwrite=overwrite)
    scheduler: Any = None
    if info.sigmas is not None and info.causal is None:
        scheduler = few_step_scheduler_for(base, info.sigmas, sample_type=info.sample_type)
    transformer = build_transformer(base, weights, dtype=dtype, component=info.component)
    skipped = [] if scheduler is None else ["scheduler"]
    with pipeline_directory(output_dir, base, transformer, component=info.component, skipped=skipped) as partial:
        entries = dict(info.pipeline_config)
        if scheduler is not None:
            scheduler.save_pretrained(partial / "scheduler")
            switch_guider_off(partial)
            entries["scheduler"] = ["diffusers", type(scheduler).__name__]
        if entries:
            _set_index_entries(partial / "model_index.json", entries)
        write_info(partial, info)
        if run is not None:
            copy_run_assets(run, partial, step=info.step)
        write_model_card(partial / "README.md", info, name=info.hub_model_id or output_dir.name, base=base)
    return output_dir


@contextmanager
def pipeline_directory(
    output_dir: Path,
    base: Path,
    transformer: nn.Module,
    *,
    component: str = "transformer",
    skipped: Collection[str] = (),
) -> Iterator[Path]:
    """The base model's directory with another transformer, under a name of its own until the block has ended well.

    Args:
        output_dir: the final name; see `check_output`.
        base: the directory to copy, less its card, its record (`fv_distill.json`, assets, evaluation) and what belongs
            to git and the Hub's cache.
        transformer: written as `component`.
        component: the pipeline's name for it.
        skipped: further names of the base directory that are not copied.
    """
    # What an earlier export tells of itself is no news of this one.
    names = [component, *skipped, INFO_FILE, "README.md", *RECORD_FILES, ".cache", ".git*"]
    with replaced_directory(output_dir) as partial, indexed(base) as directory:
        shutil.copytree(directory, partial, ignore=shutil.ignore_patterns(*names), dirs_exist_ok=True)
        cast(Any, transformer).save_pretrained(partial / component)
        yield partial


@contextmanager
def replaced_directory(output_dir: Path) -> Iterator[Path]:
    """An empty directory to write into, which gets its final name, and replaces what has it, if the block ends well."""
    partial = output_dir.with_name(f"{output_dir.name}.incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
    except BaseException:
        # A full disk is the likely reason, and half a directory of some 60 GB no use on it.
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _replace(output_dir, partial)


def check_output(
    output_dir: Path, base: Path, *, overwrite: bool, ours: Collection[str] = ("model_index.json",)
) -> None:
    """Refuse to write where something would be lost; a directory with one of the files `ours` is an earlier export.

    Raises:
        FileExistsError: if the directory isn't empty, and `overwrite` is off or it is no diffusers directory.
        ValueError: if the output and the base directory lie in each other.
    """
    own, other = output_dir.resolve(), base.resolve()
    if own == other or own in other.parents or other in own.parents:
        raise ValueError(
            f"the output directory {output_dir} and the base model {base} are the same or lie in each other; "
            "export to another directory"
        )
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"{output_dir} is not empty; choose another directory or replace it with --overwrite (overwrite=True)"
        )
    if not any((output_dir / name).is_file() for name in ours):
        # A mistyped path must not cost somebody a directory of other things.
        raise FileExistsError(f"{output_dir} holds something else than an export, which is not overwritten; remove it")


def _replace(output_dir: Path, partial: Path) -> None:
    """Put the complete directory under its name; the old one goes last, so that one of the two is always whole."""
    if not output_dir.exists():
        partial.rename(output_dir)
        return
    old = output_dir.with_name(f"{output_dir.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    output_dir.rename(old)
    partial.rename(output_dir)
    shutil.rmtree(old)


def empty_transformer(base: Path, *, component: str = "transformer") -> nn.Module:
    """The base model's transformer class, from its config, on the meta device."""
    kind = component_class(base, component)
    with torch.device("meta"):
        return kind.from_config(kind.load_config(base, subfolder=network_folder(base, component)))


def build_transformer(
    base: Path, weights: Mapping[str, Tensor], *, dtype: torch.dtype | None, component: str = "transformer"
) -> nn.Module:
    """The base model's transformer class, from its config, around `weights`.

    Raises:
        ValueError: listing missing, unexpected and mis-shaped keys.
    """
    transformer = empty_transformer(base, component=component)
    check_weights_fit(transformer.state_dict(), weights)
    # The rotary tables are no part of a state dict and are computed anew when the directory is loaded.
    transformer.load_state_dict(cast_weights(transformer, weights, dtype), assign=True)
    return transformer


def cast_weights(transformer: nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """`weights` in `dtype`, except in the modules that diffusers keeps in float32 when it loads a network in half."""
    if dtype is None:
        return dict(weights)
    keep_float32 = set(cast(Any, transformer)._keep_in_fp32_modules or ())
    kept = {key for key in weights if not keep_float32.isdisjoint(key.split("."))}
    return {key: value.to(torch.float32 if key in kept else dtype) for key, value in weights.items()}


def _set_index_entries(index_file: Path, entries: Mapping[str, Any]) -> None:
    index = json.loads(index_file.read_text())
    index_file.write_text(json.dumps({**index, **entries}, indent=2) + "\n")
