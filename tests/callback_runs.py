"""Run by two processes: the same training with and without callbacks, and one with a bad loss on one process.

See distributed/test_callbacks.py.
"""

import math
import sys

from fv_distill.config import load_run_config
from fv_distill.methods import DMD2Method
from fv_distill.methods.base import LossTerm
from fv_distill.training import build_trainer


def run(path, output_dir, *, callbacks):
    """Train a config with all of its callbacks, or with its average and clipping only."""
    config = load_run_config(path, {"training.output_dir": output_dir})
    if not callbacks:
        config.callbacks = {name: config.callbacks[name] for name in ("ema", "grad_clip")}
    trainer = build_trainer(config)
    assert trainer.accelerator.num_processes == 2 and trainer.accelerator.is_fsdp2
    trainer.train()
    trainer.accelerator.wait_for_everyone()
    return trainer


def break_second_process(step):
    """Make the student's loss NaN for the half of the batch that the second process has."""
    original = DMD2Method.losses

    def losses(self, which, batch, rng):
        for term in original(self, which, batch, rng):
            bad = which == "student" and rng.step == step and batch["sample_index"][0] > 0
            yield LossTerm(term.loss * math.nan if bad else term.loss, term.metrics)

    DMD2Method.losses = losses


def main(path, folder):
    trainers = [run(path, f"{folder}/with", callbacks=True), run(path, f"{folder}/without", callbacks=False)]
    break_second_process(2)
    trainers.append(run(path, f"{folder}/bad", callbacks=True))
    accelerator = trainers[-1].accelerator
    del trainers
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
