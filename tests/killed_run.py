"""A run in a process of its own that kills itself, -9, at the n-th event of a kind; see training/test_killed_runs.py.

Events are what a checkpoint is made of: files opened, tensors written into them, files put on the disk, folders made,
renamed and removed; and steps. A process that forks from one with torch in it starts in a fraction of a second.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import torch

from fv_distill.callbacks import Callback
from fv_distill.config import load_run_config
from fv_distill.training import build_trainer

# Python's audit events: https://docs.python.org/3/library/audit_events.html
AUDITED = {"open": "open", "os.mkdir": "mkdir", "os.rename": "rename", "os.remove": "remove", "os.rmdir": "rmdir"}
KINDS = (*AUDITED.values(), "tensor", "fsync", "step")

# All that takes long to import.
PRELOADED = ["fv_distill.training.run", "fv_distill.methods.dmd2", "fv_distill.models.wan", "fv_distill.callbacks.ema"]


class Events:
    """Counts events in a folder and ends the process at one of them."""

    def __init__(self, folder, kind=None, number=0):
        self.folder, self.kind, self.number = str(folder), kind, number
        self.seen = Counter()

    def note(self, kind):
        self.seen[kind] += 1
        if kind == self.kind and self.seen[kind] == self.number:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self):
        sys.addaudithook(self._audit)
        fsync, cpu = os.fsync, torch.Tensor.cpu
        os.fsync = lambda descriptor: (self.note("fsync"), fsync(descriptor))[1]
        # A file's tensors are moved to the host, if need be, one by one as they are written.
        torch.Tensor.cpu = lambda tensor: (self.note("tensor"), cpu(tensor))[1]

    def _audit(self, event, arguments):
        # A folder's contents are removed by names relative to its descriptor.
        is_relative = event in ("os.remove", "os.rmdir") and arguments[1] != -1
        if event not in AUDITED or not (is_relative or self.folder in str(arguments[0])):
            return
        # Of opened files only those to write: the flags are the third argument.
        if event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self.note(AUDITED[event])


class NoteSteps(Callback):
    def __init__(self, events):
        self.events = events

    def on_training_step_end(self, trainer, metrics):
        self.events.note("step")


def run(config, overrides, kind, number, counts=None):
    """Train; with `counts`, write there how many events of each kind there were."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        trainer = build_trainer(load_run_config(config, overrides))
        events = Events(trainer.config.training.output_dir, kind, number)
        trainer.callbacks.add("note_steps", NoteSteps(events))
        events.watch()
        trainer.train()
    if counts is not None:
        Path(counts).write_text(json.dumps(events.seen))


def start(*arguments, target=run):
    """The process of `run`."""
    context = multiprocessing.get_context("forkserver")
    # This file can't be among them: the server doesn't get pytest's path.
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=target, args=arguments)
    process.start()
    return process
