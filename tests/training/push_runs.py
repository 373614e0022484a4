"""Training runs that push, for a process whose Hub is the one that its environment names.

python push_runs.py CONFIG...
"""

import os
import signal
import sys
import time
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState

from fv_distill.callbacks import Callback
from fv_distill.callbacks import hub as callbacks_hub
from fv_distill.export import hub
from fv_distill.training import run_training_from_config

# Outages last as long as the test wants them to.
hub.RETRY_WAITS = (0.01,)


make_export = callbacks_hub.convert


def convert_late(checkpoint, *args, **kwargs):
    """In a run that keeps one checkpoint, export only when the next one has taken its place."""
    original = Path(*(part for part in checkpoint.parts if part != ".pushing"))
    if "every" in original.parts and original.name != "step-00000004":
        for _ in range(6000):
            if not original.exists():
                break
            time.sleep(0.01)
    return make_export(checkpoint, *args, **kwargs)


callbacks_hub.convert = convert_late


class WaitForPush(Callback):
    """Gives the push of the last checkpoint the time that real steps take."""

    def on_training_step_end(self, trainer, metrics):
        future = trainer.callbacks["pipeline.push_to_hub"]._future
        if future is not None:
            future.exception()


class Stop(Callback):
    """What a scheduler does at a time limit."""

    def on_training_step_end(self, trainer, metrics):
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        print(f"== {path.stem}")
        try:
            run_training_from_config(path)
        except ValueError as error:
            print(f"{type(error).__name__}: {error}")
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            PartialState._reset_state()


if __name__ == "__main__":
    main()
