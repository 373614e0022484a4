"""Checkpoints: written beside their final name, renamed when complete, and resumed from exactly.

A checkpoint is the folder `<output_dir>/checkpoints/step-00000100`: what accelerate's `save_state` writes, and
`metadata.json` with everything else. All random numbers and the data order follow from the step, so neither is saved.
"""

import json
import os
import re
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list

from fv_distill.config.load import dump_run_config
from fv_distill.export.checkpoint_weights import CHECKPOINT_FORMAT, read_checkpoint_metadata
from fv_distill.models.base import CausalModelBase

if TYPE_CHECKING:
    from .trainer import Trainer

INCOMPLETE = ".incomplete"
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
    return path.suffix != INCOMPLETE and (path / "metadata.json").is_file()


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

    Args:
        trainer: the run, whose `step`, roles and callbacks are saved.
    """

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer = trainer
        self.options = trainer.config.training.checkpoint
        self.folder = Path(trainer.config.training.output_dir) / "checkpoints"

    def save_if_due(self) -> None:
        """Save at every `every_steps`-th step and at the last."""
        step, every = self.trainer.step, self.options.every_steps
        if step == self.trainer.config.training.loop.max_train_steps or (every and step % every == 0):
            self.save()

    def save_unless_saved(self) -> Path:
        """The checkpoint of the present step, which may have just been due."""
        return path if (path := self._path()) == self.latest() else self.save()

    def save(self) -> Path:
        """Write a checkpoint of the present step and drop those beyond `keep_last`."""
        accelerator = self.trainer.accelerator
        final = self._path()
        partial = final.with_suffix(INCOMPLETE)
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _write_durably(partial / "metadata.json", json.dumps(self._metadata(), indent=2))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            self._rotate()
        accelerator.wait_for_everyone()
        return final

    def resume_if_asked(self) -> None:
        """Load `resume_from_checkpoint` into networks, optimizers, callbacks and counters.

        Raises:
            ValueError: if the checkpoint was written by a differently parallel run.
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
        trainer.accelerator.load_state(str(path))
        trainer.step = metadata["step"]
        for name, role in trainer.roles.items():
            role.updates = metadata["updates"][name]
        trainer.callbacks.load_state_dict(metadata["callbacks"])
        trainer.accelerator.print(f"resumed from {path} at step {trainer.step}")

    def latest(self) -> Path | None:
        """The newest complete checkpoint of this run."""
        found = complete_checkpoints(self.folder.parent)
        return found[-1] if found else None

    def _path(self) -> Path:
        return self.folder / f"step-{self.trainer.step:08d}"

    def _check_compatible(self, path: Path, metadata: dict[str, Any]) -> None:
        sharded = self.trainer.accelerator.is_fsdp2
        if metadata["sharded"] != sharded:
            here, there = ("FSDP2", "replicated weights") if sharded else ("replicated weights", "FSDP2")
            raise ValueError(f"{path} was saved with {there}, this run uses {here}; launch it the same way to resume")
        if not sharded and (metadata["world_size"] > 1) != (self.trainer.accelerator.num_processes > 1):
            raise ValueError(
                f"{path} was saved by {metadata['world_size']} processes with replicated weights, this run has "
                f"{self.trainer.accelerator.num_processes}; a run with replicated weights resumes on one process or on "
                "several, as it was saved"
            )
        if metadata["models"] != self._model_names():
            raise ValueError(
                f"{path} holds the networks {', '.join(metadata['models'])}, this run has "
                f"{', '.join(self._model_names())}; use the same method and callbacks to resume"
            )
        if metadata["global_batch_size"] != self.trainer.plan.global_batch_size:
            raise ValueError(
                f"{path} was trained with a global batch of {metadata['global_batch_size']}, this run has "
                f"{self.trainer.plan.global_batch_size} (train_batch_size x gradient_accumulation_steps x processes); "
                "the data order would not continue"
            )

    def _model_names(self) -> list[str]:
        return [*self.trainer.roles, *(["ema"] if "ema" in self.trainer.callbacks else [])]

    def _metadata(self) -> dict[str, Any]:
        trainer = self.trainer
        sigmas = trainer.method.few_step_sigmas
        few_step = None
        if sigmas is not None:
            few_step = {"sigmas": list(sigmas), "sample_type": trainer.method.sample_type, "guidance_scale": 1.0}
        return {
            "format": CHECKPOINT_FORMAT,
            "step": trainer.step,
            "updates": {name: role.updates for name, role in trainer.roles.items()},
            "global_batch_size": trainer.plan.global_batch_size,
            "world_size": trainer.accelerator.num_processes,
            "sharded": trainer.accelerator.is_fsdp2,
            "models": self._model_names(),
            "few_step": few_step,
            "causal": self._streaming(),
            "latent_shape": list(trainer.latent_shape),
            "callbacks": trainer.callbacks.state_dict(),
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
            shutil.rmtree(path)


def package_versions() -> dict[str, str]:
    """The versions of the libraries that a checkpoint depends on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
