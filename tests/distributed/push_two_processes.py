"""One of two processes: waiting for the main one, failing together, and a run that pushes.

torchrun --nproc_per_node 2 push_two_processes.py CONFIG
"""

import sys
import threading

from accelerate import Accelerator

from fv_distill.training import main_process, run_training_from_config
from fv_distill.training.main_process import on_main_process, raise_everywhere

main_process._INTERVAL = 0.05


def main() -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    check_waiting(accelerator)
    check_failing(accelerator)
    run_training_from_config(sys.argv[1])


def check_waiting(accelerator: Accelerator) -> None:
    """The work ends only when all processes have met three times meanwhile, which no single barrier would allow."""
    met, gather, meetings = threading.Event(), accelerator.gather, []

    def count(tensor):
        result = gather(tensor)
        meetings.append(result)
        if len(meetings) == 3:
            met.set()
        return result

    def work():
        assert met.wait(120)

    accelerator.gather = count
    on_main_process(accelerator, work, name="work")
    accelerator.gather = gather
    assert len(meetings) >= 3


def check_failing(accelerator: Accelerator) -> None:
    def fail():
        raise ValueError("it did not work")

    def outcome(call, *words, **names):
        try:
            call(accelerator, *words, **names)
        except ValueError as error:
            return str(error)
        return None

    assert outcome(raise_everywhere, fail) == "it did not work"
    expected = "it did not work" if accelerator.is_main_process else None
    assert outcome(on_main_process, fail, name="work") == expected
    assert outcome(raise_everywhere, lambda: None) is None


if __name__ == "__main__":
    main()
