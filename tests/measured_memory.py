"""The peak of a real run's memory: what is alive when a step begins, and what torch's allocator saw after that.

Shares nothing with the estimate. What is alive is found by the garbage collector, what comes and goes is reported by
the allocator to torch's profiler.
"""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from fv_distill.callbacks.base import Callback
from fv_distill.config import load_run_config
from fv_distill.training.run import build_trainer


class WatchLastStep(Callback):
    """Profiles the memory of one step, a late one in which optimizers have their states."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.alive = 0
        self.profiler: Any = None

    def on_training_step_end(self, trainer: Any, metrics: dict[str, float]) -> None:
        if trainer.step == self.step - 1:
            self.alive = bytes_alive()
            self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profiler.__enter__()
        elif trainer.step == self.step:
            self.profiler.__exit__(None, None, None)

    @property
    def most_allocated(self) -> int:
        """The most bytes that the allocator had given out since the step began, and not yet got back.

        What gloo's threads free the profiler doesn't see; that an address is given out again tells of it.
        """
        events = sorted(self._allocations())
        assert len(events) > 100, "the profiler saw no memory"
        held: dict[int, int] = {}
        now = most = 0
        for _, address, size in events:
            now += size - held.pop(address, 0) if size > 0 else (-held.pop(address) if address in held else size)
            if size > 0:
                held[address] = size
            most = max(most, now)
        return most

    def _allocations(self) -> Iterator[tuple[int, int, int]]:
        """Time, address and bytes of each; less than none for what is given back."""
        nodes = list(self.profiler.profiler.kineto_results.experimental_event_tree())
        while nodes:
            node = nodes.pop()
            nodes += node.children
            if node.tag == _EventType.Allocation:
                yield node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size


def measured_peak(config_file: Path, *, steps: int) -> int:
    """Train a config for `steps` steps; the last one's peak in bytes, without what was there before."""
    before = bytes_alive()
    trainer = build_trainer(load_run_config(config_file))
    watch = WatchLastStep(steps)
    trainer.callbacks.add("watch", watch)
    trainer.train()
    return watch.alive - before + watch.most_allocated


def bytes_alive() -> int:
    """Of all tensors in host memory that the garbage collector knows, each storage once.

    A sharded tensor is a wrapper around a plain one, which is counted.
    """
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)
    storages = [found.untyped_storage() for found in gc.get_objects() if type(found) in kinds]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.device.type == "cpu"}.values())


def main() -> None:
    """In a process of its own, or under `torchrun`: measure the first process."""
    torch.set_num_threads(1)
    config_file, steps, output = sys.argv[1:]
    peak = measured_peak(Path(config_file), steps=int(steps))
    if os.environ.get("RANK", "0") == "0":
        Path(output).write_text(str(peak))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
