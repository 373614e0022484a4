"""A run that is told to stop finishes its step, saves, ends well, and goes on exactly where it was."""

import os
import signal
import subprocess
import sys

import pytest
from tiny_runs import assert_same_state, checkpoint, dmd2_config, metric_lines, train, write_config

from fv_distill.training import complete_checkpoints

LATEST = {"training.checkpoint.resume_from_checkpoint": "latest"}

# Signals its own process, or with `group` all that belong to the launch, in the middle of a step.
INTERRUPT = """
import os, signal
from fv_distill.callbacks import Callback

class Interrupt(Callback):
    def __init__(self, at, number, rank=0, group=False):
        self.at, self.number, self.rank, self.group = at, number, rank, group

    def on_before_optimizer_step(self, trainer, role, metrics):
        if trainer.step == self.at and role == "critic" and trainer.accelerator.process_index == self.rank:
            os.killpg(os.getpgid(0), self.number) if self.group else os.kill(os.getpid(), self.number)
"""


@pytest.fixture
def config(tiny_wan, tiny_rows, tmp_path, monkeypatch):
    (tmp_path / "my_interrupt.py").write_text(INTERRUPT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return dmd2_config(tiny_wan, tiny_rows, tmp_path / "whole")


def interrupted(tmp_path, at, number, **options):
    changes = {
        "training.output_dir": str(tmp_path / "stopped"),
        "callbacks.interrupt._target_": "my_interrupt.Interrupt",
    }
    options = {"at": at, "number": int(number), **options}
    return changes | {f"callbacks.interrupt.{key}": value for key, value in options.items()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_and_resumes_exactly(config, tmp_path, capsys, number):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    whole = train(config)
    changes = interrupted(tmp_path, 3, number)
    export = {"pipeline.export_dir": str(tmp_path / "student")}
    stopped = train(config, changes | export)
    assert [path.name for path in complete_checkpoints(stopped)] == ["step-00000002", "step-00000003"]
    printed = "".join(capsys.readouterr().out.split())
    assert f"{number.name}:stoppedafterstep3" in printed and "--resume-from-checkpointlatest" in printed
    assert not (tmp_path / "student").exists()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    train(config, changes | export | LATEST | {"callbacks.interrupt.at": 0})
    assert metric_lines(stopped) == metric_lines(whole)
    assert_same_state(checkpoint(stopped, 4), checkpoint(whole, 4), num_networks=3, num_optimizers=2)
    assert (tmp_path / "student/fv_distill.json").is_file()


def test_a_signal_in_the_last_step_changes_nothing(config, tmp_path):
    stopped = train(
        config, interrupted(tmp_path, 4, signal.SIGTERM) | {"pipeline.export_dir": str(tmp_path / "student")}
    )
    assert (tmp_path / "student/fv_distill.json").is_file()
    assert complete_checkpoints(stopped)[-1].name == "step-00000004"


def test_a_second_signal_ends_at_once(config, tmp_path):
    """The first one has put the usual handlers back."""
    # A process that a shell starts in the background ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _interrupt_twice(config, tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt_twice(config, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(
            config,
            interrupted(tmp_path, 1, signal.SIGINT)
            | {
                "callbacks.again._target_": "my_interrupt.Interrupt",
                "callbacks.again.at": 1,
                "callbacks.again.number": int(signal.SIGINT),
            },
        )


def test_a_second_sigterm_is_the_first_one_again(config, tmp_path):
    """SLURM may send one to the processes and one to the launcher, which passes it on."""
    again = interrupted(tmp_path, 1, signal.SIGTERM)
    again = {key.replace("interrupt", "again", 1): value for key, value in again.items()}
    stopped = train(
        config,
        interrupted(tmp_path, 1, signal.SIGTERM) | again | {"callbacks.again._target_": "my_interrupt.Interrupt"},
    )
    assert [path.name for path in complete_checkpoints(stopped)] == ["step-00000001"]


def test_loader_processes_outlive_a_signal_to_the_whole_group(config, tmp_path):
    changes = interrupted(tmp_path, 2, signal.SIGTERM, group=True) | {"training.data.num_workers": 1}
    path = write_config(config, tmp_path / "run.yaml", changes)
    done = subprocess.run(
        [sys.executable, "-m", "fv_distill", "train", "--config", str(path)],
        capture_output=True,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in complete_checkpoints(tmp_path / "stopped")] == ["step-00000002"]


def test_one_process_of_two_is_enough(config, tmp_path):
    changes = interrupted(tmp_path, 3, signal.SIGTERM, rank=1) | {"training.data.train_batch_size": 1}
    path = write_config(config, tmp_path / "run.yaml", changes)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "fv_distill", "train", "--config", str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in complete_checkpoints(tmp_path / "stopped")] == ["step-00000002", "step-00000003"]
