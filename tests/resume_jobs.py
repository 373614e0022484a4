"""Run by two processes: whole runs one after another, as a start takes longer; see distributed/test_resume.py."""

import json
import os
import resource
import sys
import threading
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from fv_distill.callbacks import Callback
from fv_distill.config import load_run_config
from fv_distill.training import build_trainer
from fv_distill.training.checkpoint_save import CheckpointSaveError, start_save


class SaveWhatWasLoaded(Callback):
    """Writes the state before the first update of a resumed run to a checkpoint of its own."""

    def __init__(self, path):
        self.path = path

    def on_before_optimizer_step(self, trainer, role, metrics):
        if not self.path.exists():
            tensors = trainer.checkpoints._tensors()
            metadata = json.dumps({"format": 2})
            start_save(trainer.accelerator, self.path, tensors, metadata=metadata, in_background=False).complete()


class FillTheDisk(Callback):
    """From step 3 on, one process can't write files of more than a kilobyte."""

    def __init__(self, rank):
        self.rank = rank

    def on_training_step_end(self, trainer, metrics):
        if trainer.step == 3 and trainer.accelerator.process_index == self.rank:
            for thread in threading.enumerate():
                if thread.name == "checkpoint":
                    thread.join()
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def run(job):
    for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_AUTO_WRAP_POLICY", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        os.environ.pop(name, None)
    os.environ.update(job["environment"])
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    trainer = build_trainer(load_run_config(job["config"], job["overrides"]))
    assert trainer.accelerator.is_fsdp2 == bool(job["environment"])
    if job.get("loaded"):
        trainer.callbacks.add("save_what_was_loaded", SaveWhatWasLoaded(Path(job["loaded"])))
    if job.get("full_on") is None:
        trainer.train()
        return
    trainer.callbacks.add("fill_the_disk", FillTheDisk(job["full_on"]))
    try:
        trainer.train()
    except CheckpointSaveError as error:
        message = str(error)
    finally:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    path = Path(trainer.config.training.output_dir) / f"failed-{PartialState().process_index}.txt"
    path.write_text(f"{trainer.step} {message}")


if __name__ == "__main__":
    for described in json.loads(Path(sys.argv[1]).read_text()):
        run(described)
    # One process leaving early now and then hangs the other one at its end.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
