"""A torch profiler trace of chosen steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch.profiler import ProfilerActivity, profile, schedule, supported_activities

from .base import Callback
from .options import require_boolean, require_integer

if TYPE_CHECKING:
    from fv_distill.training.trainer import Trainer

PROFILE_FOLDER = "profile"


class ProfilerCallback(Callback):
    """Profile some steps: a trace, and a table of the costliest operations, in `profile/` of the run's directory.

    The trace opens in https://ui.perfetto.dev or chrome://tracing. A run that is resumed behind `start_step`
    profiles nothing; one that ends within the profiled steps writes those that it came to.

    Args:
        start_step: the first step of the trace.
        num_steps: how many there are in it.
        warmup_steps: steps before it in which the profiler runs already and records nothing, as its start takes time.
        ranks: the processes that profile; null means all.
        record_shapes: record inputs' shapes, and sort the table by them.
        with_stack: record Python's call stacks.
        profile_memory: record allocations.
        top_ops: rows of the table.

    Raises:
        ValueError: for a number out of range, or a rank that the run doesn't have.
    """

    def __init__(
        self,
        start_step: int = 10,
        num_steps: int = 3,
        warmup_steps: int = 1,
        ranks: Sequence[int] | None = (0,),
        record_shapes: bool = False,
        with_stack: bool = False,
        profile_memory: bool = False,
        top_ops: int = 30,
    ) -> None:
        key = "callbacks.profiler"
        self.start_step = require_integer(f"{key}.start_step", start_step, at_least=1)
        self.num_steps = require_integer(f"{key}.num_steps", num_steps, at_least=1)
        self.warmup_steps = require_integer(f"{key}.warmup_steps", warmup_steps, at_least=0)
        self.top_ops = require_integer(f"{key}.top_ops", top_ops, at_least=1)
        if ranks is not None and not ranks:
            raise ValueError(f"{key}.ranks=[] profiles on no process; name some, or null for all")
        self.ranks = None if ranks is None else [require_integer(f"{key}.ranks", rank, at_least=0) for rank in ranks]
        self.record_shapes = require_boolean(f"{key}.record_shapes", record_shapes)
        self.with_stack = require_boolean(f"{key}.with_stack", with_stack)
        self.profile_memory = require_boolean(f"{key}.profile_memory", profile_memory)
        self._profile: profile | None = None

    def on_train_start(self, trainer: "Trainer") -> None:
        """Refuse processes that don't exist."""
        count = trainer.accelerator.num_processes
        if self.ranks is not None and max(self.ranks) >= count:
            raise ValueError(
                f"callbacks.profiler.ranks={self.ranks}, but the run has {count} processes, 0 to {count - 1}"
            )

    def on_training_step_begin(self, trainer: "Trainer") -> None:
        """Start at the first step of the warm-up, or at a later one of it where the run begins there."""
        is_here = self.ranks is None or trainer.accelerator.process_index in self.ranks
        is_due = self.start_step - self.warmup_steps <= trainer.step <= self.start_step
        if self._profile is None and is_here and is_due:
            warmup = self.start_step - trainer.step
            self._profile = profile(
                schedule=schedule(wait=0, warmup=warmup, active=self.num_steps, repeat=1),
                on_trace_ready=lambda result: self._write(trainer, result),
                record_shapes=self.record_shapes,
                with_stack=self.with_stack,
                profile_memory=self.profile_memory,
            )
            self._profile.start()

    def on_training_step_end(self, trainer: "Trainer", metrics: Mapping[str, float]) -> None:
        """Count the step; the last one writes the files."""
        if self._profile is not None:
            self._profile.step()
            if trainer.step == self.start_step + self.num_steps - 1:
                self._finish()

    def on_close(self, trainer: "Trainer") -> None:
        """Write what there is if the run ends early."""
        self._finish()

    def _finish(self) -> None:
        # Set to None first: `stop` may write, and must not be called again if that fails.
        running, self._profile = self._profile, None
        if running is not None:
            running.stop()

    def _write(self, trainer: "Trainer", result: profile) -> None:
        folder = Path(trainer.config.training.output_dir) / PROFILE_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        last = min(trainer.step, self.start_step + self.num_steps - 1)
        name = f"rank-{trainer.accelerator.process_index}_steps-{self.start_step}-{last}"
        trace = folder / f"{name}.json"
        result.export_chrome_trace(str(trace))
        if self.with_stack:
            _replace_broken_names(trace)
        (folder / f"{name}_ops.txt").write_text(self._table(result), encoding="utf-8")

    def _table(self, result: profile) -> str:
        on_device = supported_activities() - {ProfilerActivity.CPU}
        try:
            averages = result.key_averages(group_by_input_shape=self.record_shapes)
        except UnicodeDecodeError as error:
            return f"no table: torch can't read the names that it recorded ({error}); without with_stack it can\n"
        order = "self_device_time_total" if on_device else "self_cpu_time_total"
        return averages.table(sort_by=order, row_limit=self.top_ops)


def _replace_broken_names(trace: Path) -> None:
    """Make a trace UTF-8 again.

    With call stacks torch keeps no copies of the names of Python code that is freed later, such as a module's body that
    was run while it was imported; these come out as arbitrary bytes (pytorch issue 121219).
    """
    clean = trace.with_suffix(".clean")
    with trace.open(encoding="utf-8", errors="replace") as source, clean.open("w", encoding="utf-8") as target:
        target.writelines(source)
    clean.replace(trace)
