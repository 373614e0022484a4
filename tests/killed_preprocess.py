"""A preprocessing that kills itself, -9, at the n-th event in its output directory; see test_run.py."""

import contextlib
import multiprocessing
import os
import sys
from pathlib import Path

import killed_run
from killed_run import Events

PRELOADED = [*killed_run.PRELOADED, "fv_distill.preprocess.run", "safetensors.torch", "diffusers.utils.torch_utils"]


def run(options, paths, kind, number):
    """`preprocess` with the given options; the tests' folders are put on the path first."""
    sys.path[:0] = paths
    from fv_distill.preprocess import PreprocessOptions, preprocess

    events = Events(Path(options["output"]), kind, number)
    events.watch()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        preprocess(PreprocessOptions(**options))


def exit_code(options, kind, number):
    """How it ended; -9 if it was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    paths = [path for path in sys.path if path.endswith("tests")]
    process = context.Process(target=run, args=(options, paths, kind, number))
    process.start()
    process.join(120)
    return process.exitcode
