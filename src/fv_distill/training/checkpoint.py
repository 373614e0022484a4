"""Checkpoints: written beside their final name, renamed when complete, and resumed from exactly.

A checkpoint is the folder `<output_dir>/checkpoints/step-00000100`; `export/checkpoint_weights.py` says what is in it.
All random numbers and the data order follow from the step, so neither is saved.
"""

import json
import re
import shutil
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from fv_distill.config.load import dump_run_config
from fv_distill.export.checkpoint_weights import (
    CHECKPOINT_FORMAT,
    METADATA_FILE,
    StoredTensor,
    read_checkpoint_metadata,
    read_stored_tensors,
)
from fv_distill.models.causal_base import CausalModelBase

from .checkpoint_save import PendingSave, reasons, start_save
from .checkpoint_state import optimizer_facts, optimizer_tensors, restore_optimizer, role_tensors
from .checkpoint_storage import INCOMPLETE, ChunkReader, remove_leftovers

if TYPE_CHECKING:
    from .trainer import Trainer

# A copy that a user made beside ours has another name and is left alone.
_NAME = re.compile(r"step-\d+")
AUTO = "auto"
PACKAGES = ("torch", "accelerate", "diffusers", "transformers", "peft", "fv_distill")


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = Path(output_dir) / "checkpoints"
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and _is_complete(path)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _is_complete(path: Path) -> bool:
    # The metadata is written last, but only the renaming tells that all processes were done.
    return path.suffix != INCOMPLETE and (path / METADATA_FILE).is_file()


def find_checkpoint(resume_from: str, output_dir: str | Path) -> Path:
    """The checkpoint that `latest` or a path names.

    Raises:
        FileNotFoundError: if there is none, or it is incomplete.
    """
    if resume_from == "latest":
        found = complete_checkpoints(output_dir)
        if not found:
            raise FileNotFoundError(
                f"resume_from_checkpoint: latest, but {Path(output_dir) / 'checkpoints'} holds none"
            )
        return found[-1]
    path = Path(resume_from)
    if not _is_complete(path):
        reason = "its name says so" if path.suffix == INCOMPLETE else "it has no metadata.json"
        raise FileNotFoundError(f"resume_from_checkpoint: {path} is no complete checkpoint ({reason})")
    return path


def checkpoint_to_resume(resume_from: str | None, output_dir: str | Path) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` names, or None for a start from the beginning.

    Raises:
        FileNotFoundError: as `find_checkpoint` does; `auto` without a checkpoint is a start.
    """
    if resume_from == AUTO:
        resume_from = "latest" if complete_checkpoints(output_dir) else None
    return None if resume_from is None else find_checkpoint(resume_from, output_dir)


class CheckpointManager:
    """Saves every N steps and at the end, keeps the last K, and resumes.

    With `async_save` a save goes on beside the training. It becomes a checkpoint, on all processes alike, at the first
    step end, or the next save, at which every process has written its part.

    Args:
        trainer: the run, whose `step`, roles and callbacks are saved.
    """

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer = trainer
        self.options = trainer.config.training.checkpoint
        self.folder = Path(trainer.config.training.output_dir) / "checkpoints"
        self._pending: PendingSave | None = None
        self._checked: set[str] = set()

    def save_if_due(self) -> None:
        """Save at every `every_steps`-th step and at the last; complete an earlier save that is written by now."""
        self._check_optimizers()
        if self._pending is not None and self._pending.is_written():
            self.finish()
        step, every = self.trainer.step, self.options.every_steps
        if step == self.trainer.config.training.loop.max_train_steps or (every and step % every == 0):
            self.save()

    def save_unless_saved(self) -> Path:
        """The complete checkpoint of the present step, which may have just been due."""
        self.finish()
        if self._path() != self.latest():
            self.save()
            self.finish()
        return self._path()

    def save(self) -> Path:
        """Write a checkpoint of the present step and drop those beyond `keep_last`.

        Returns:
            Its folder, which is there on return unless `async_save` is on.

        Raises:
            CheckpointSaveError: on every process, if this save or an earlier one failed on any; older ones are intact.
        """
        self.finish()
        trainer = self.trainer
        if trainer.accelerator.is_main_process:
            # A checkpoint must not be more durable than the lines up to it, which a resumed run doesn't write again.
            trainer.log.sync()
        self._pending = start_save(
            trainer.accelerator,
            self._path(),
            self._tensors(),
            metadata=json.dumps(self._metadata(), indent=2),
            in_background=self.options.async_save,
        )
        if not self.options.async_save:
            self.finish()
        return self._path()

    def finish(self) -> None:
        """Wait for a save that is under way, if any, and complete it.

        Raises:
            CheckpointSaveError: on every process, if it failed on any; older checkpoints are intact.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.complete()
            if self.trainer.accelerator.is_main_process:
                self._rotate()
            self.trainer.accelerator.wait_for_everyone()

    def abandon(self) -> None:
        """What can be done about a save under way when the run ends with an error: one process can complete it.

        Several can't, as the others may not have failed, or not in the same step.
        """
        if self._pending is not None and self.trainer.accelerator.num_processes == 1:
            self.finish()

    def resume_if_asked(self) -> None:
        """Load `resume_from_checkpoint` into networks, optimizers, callbacks and counters.

        Raises:
            ValueError: if the checkpoint doesn't fit this run, or is damaged.
        """
        trainer = self.trainer
        path = None
        if trainer.accelerator.is_main_process:
            path = checkpoint_to_resume(self.options.resume_from_checkpoint, trainer.config.training.output_dir)
        # On a shared file system the machines may list different checkpoints for a while.
        (path,) = broadcast_object_list([path])
        if path is None:
            return
        metadata = read_checkpoint_metadata(path)
        self._check_compatible(path, metadata)
        if trainer.accelerator.is_main_process:
            # The run may have been killed between its last save and this.
            remove_leftovers(self.folder)
            self._rotate()
        self._load(path, metadata)
        trainer.step = metadata["step"]
        for name, role in trainer.roles.items():
            role.updates = metadata["updates"][name]
        trainer.callbacks.load_state_dict(metadata["callbacks"])
        # Checkpoints of earlier versions have no open window.
        trainer.log.sigma_losses.load_state_dict(metadata.get("sigma_losses", {}))
        trainer.accelerator.print(f"resumed from {path} at step {trainer.step}")

    def latest(self) -> Path | None:
        """The newest complete checkpoint of this run."""
        found = complete_checkpoints(self.folder.parent)
        return found[-1] if found else None

    def _path(self) -> Path:
        return self.folder / f"step-{self.trainer.step:08d}"

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of the trained roles, and what callbacks keep beside them."""
        models = {name: role.model for name, role in self.trainer.roles.items()}
        roles = {name: role_tensors(model.transformer, model.adapter) for name, model in models.items()}
        return roles | self.trainer.callbacks.tensors()

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """All groups of a checkpoint; the tensors are the run's own."""
        groups = self._weights()
        for name, role in self.trainer.roles.items():
            groups[_optimizer_group(name)] = optimizer_tensors(role.model.transformer, role.optimizer)
        return groups

    def _load(self, path: Path, metadata: dict[str, Any]) -> None:
        stored = read_stored_tensors(path)
        groups = self._weights()
        for name, tensors in groups.items():
            _check_same_tensors(path, name, tensors, stored[name])
        for name, role in self.trainer.roles.items():
            group = _optimizer_group(name)
            try:
                groups[group] = restore_optimizer(
                    role.model.transformer, role.optimizer, metadata["optimizers"][name], stored.get(group, {})
                )
            except ValueError as error:
                raise ValueError(f"{path} doesn't fit this run's {name}: {error}") from error
        try:
            ChunkReader(path, stored).load_into(groups)
        except torch.distributed.checkpoint.CheckpointException as error:
            raise ValueError(f"{path} can't be read: {reasons(error)}") from error

    def _check_optimizers(self) -> None:
        """Find out after an optimizer's first step, and not at the first save, whether its state can be saved."""
        for name, role in self.trainer.roles.items():
            if name not in self._checked and role.updates > 0:
                optimizer_tensors(role.model.transformer, role.optimizer)
                optimizer_facts(role.model.transformer, role.optimizer)
                self._checked.add(name)

    def _check_compatible(self, path: Path, metadata: dict[str, Any]) -> None:
        if sorted(metadata["models"]) != sorted(self._weights()):
            raise ValueError(
                f"{path} holds the networks {', '.join(metadata['models'])}, this run has "
                f"{', '.join(self._weights())}; use the same method and callbacks to resume"
            )
        for name, role in self.trainer.roles.items():
            stored = metadata.get("networks", {}).get(name, {}).get("component", role.model.component)
            if stored != role.model.component:
                raise ValueError(
                    f"{path} holds a {stored} as {name}, this run has a {role.model.component}; set "
                    f"models.{name}.expert to what it was"
                )
        if metadata["global_batch_size"] != self.trainer.plan.global_batch_size:
            raise ValueError(
                f"{path} was trained with a global batch of {metadata['global_batch_size']}, this run has "
                f"{self.trainer.plan.global_batch_size} (train_batch_size x gradient_accumulation_steps x processes); "
                "the data order would not continue"
            )

    def _metadata(self) -> dict[str, Any]:
        trainer = self.trainer
        sigmas = trainer.method.few_step_sigmas
        few_step = None
        if sigmas is not None:
            few_step = {"sigmas": list(sigmas), "sample_type": trainer.method.sample_type, "guidance_scale": 1.0}
        student = trainer.models.get("student")
        return {
            "format": CHECKPOINT_FORMAT,
            "step": trainer.step,
            "updates": {name: role.updates for name, role in trainer.roles.items()},
            "global_batch_size": trainer.plan.global_batch_size,
            "world_size": trainer.accelerator.num_processes,
            "sharded": trainer.accelerator.is_fsdp2,
            "models": list(self._weights()),
            "optimizers": {
                name: optimizer_facts(role.model.transformer, role.optimizer) for name, role in trainer.roles.items()
            },
            "lora": {name: asdict(lora) for name, role in trainer.roles.items() if (lora := role.model.lora)},
            "few_step": few_step,
            # A few-step student is sampled without guidance, whatever that is called.
            "sampling": {} if student is None else student.sampling_arguments(None if few_step is None else 1.0),
            "causal": self._streaming(),
            "networks": {
                name: {"component": role.model.component, "pipeline_config": role.model.pipeline_config}
                for name, role in trainer.roles.items()
            },
            "latent_shape": list(trainer.latent_shape),
            "conditions": {} if student is None else student.condition_shapes(trainer.latent_shape),
            "callbacks": trainer.callbacks.state_dict(),
            "sigma_losses": trainer.log.sigma_losses.state_dict(),
            "versions": package_versions(),
            "config": trainer.config.model_dump(mode="json", by_alias=True),
            "resolved_config": dump_run_config(trainer.config),
        }

    def _streaming(self) -> dict[str, Any] | None:
        student = self.trainer.models.get("student")
        if not isinstance(student, CausalModelBase):
            return None
        adapter = f"{type(student).__module__}.{type(student).__qualname__}"
        return {"adapter": adapter, **student.streaming, "context_noise": self.trainer.method.context_noise}

    def _rotate(self) -> None:
        found = complete_checkpoints(self.folder.parent)
        for path in found[: max(0, len(found) - self.options.keep_last)]:
            try:
                # Under its own name it would be taken for complete until its metadata is gone.
                shutil.rmtree(path.rename(path.with_suffix(INCOMPLETE)))
            except OSError as error:
                self.trainer.log.warn(f"checkpoint {path} can't be removed: {error}")


def package_versions() -> dict[str, str]:
    """The versions of the libraries that a checkpoint depends on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _optimizer_group(role: str) -> str:
    return f"{role}.optimizer"


def _check_same_tensors(path: Path, name: str, here: dict[str, Tensor], stored: dict[str, StoredTensor]) -> None:
    """A tensor that is loaded into another type would be rounded, and one that isn't loaded would stay as it began."""
    ours = {key: (tuple(value.shape), value.dtype) for key, value in here.items()}
    theirs = {key: (entry.shape, entry.dtype) for key, entry in stored.items()}
    different = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if different:
        key = different[0]
        described = [f"{w[1]} {list(w[0])}" if (w := side.get(key)) else "nothing" for side in (theirs, ours)]
        raise ValueError(
            f"{path} holds another network as {name}: {len(different)} of its tensors differ in name, shape or type, "
            f"for instance {key}: {described[0]} there, {described[1]} here; keep models.{name} to resume"
        )
