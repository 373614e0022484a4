"""Disks that are full, folders that can't be written, and saves that go on beside the training."""

import errno
import os
import resource
import shutil
import threading
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import assert_same_state, checkpoint, dmd2_config, finetune_config, metric_lines, train, write_config

from fv_distill.callbacks import Callback
from fv_distill.cli import main
from fv_distill.config import load_run_config
from fv_distill.training import build_trainer, checkpoint_save, checkpoint_storage, complete_checkpoints
from fv_distill.training.checkpoint_save import CheckpointSaveError
from fv_distill.training.checkpoint_storage import check_space, write_safetensors
from fv_distill.training.tracking import METRICS_FILE

LATEST = {"training.checkpoint.resume_from_checkpoint": "latest"}
BOTH = pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
FULL = r"step-00000004 could not be written: OSError: \[Errno 27\] File.*; it takes 0\.\d MB, and .* were free in"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def config(tiny_wan, tiny_rows, tmp_path):
    """Four steps with a save at each second."""
    return finetune_config(tiny_wan, tiny_rows, tmp_path / "run")


class AtStep(Callback):
    """Does something when a step ends, before its checkpoint."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_training_step_end(self, trainer, metrics):
        if trainer.step == self.step:
            self.action()


def train_with(config, tmp_path, *callbacks, **changes):
    """`train` with callbacks that a config can't name."""
    trainer = build_trainer(load_run_config(write_config(config, tmp_path / "with.yaml"), changes))
    for index, callback in enumerate(callbacks):
        trainer.callbacks.add(f"test_{index}", callback)
    try:
        trainer.train()
    finally:
        trainer.accelerator.end_training()


def wait_for_saves():
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def names(output_dir):
    return sorted(path.name for path in (output_dir / "checkpoints").iterdir())


@BOTH
def test_a_disk_that_is_too_full_is_found_before_anything_is_written(config, tmp_path, monkeypatch, async_save):
    config["training"]["checkpoint"] |= {"async_save": async_save, "keep_last": 1}
    opened = []
    write = checkpoint_storage.write_safetensors
    monkeypatch.setattr(
        checkpoint_storage, "write_safetensors", lambda path, *a: opened.append(path) or write(path, *a)
    )

    def fill():
        monkeypatch.setattr(checkpoint_storage.shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 1000, 1000))

    with pytest.raises(CheckpointSaveError) as caught:
        train_with(config, tmp_path, AtStep(3, fill))
    message = str(caught.value)
    assert f"checkpoint {checkpoint(tmp_path / 'run', 4)} could not be written" in message
    assert "it takes 17." in message and "MB and 0.0 MB are free in" in message
    assert "training.checkpoint.keep_last" in message and "training.output_dir" in message
    assert names(tmp_path / "run") == ["step-00000002"]
    assert {path.parent.name for path in opened} == {"step-00000002.incomplete"}
    monkeypatch.undo()
    train(config, LATEST)
    assert names(tmp_path / "run") == ["step-00000004"]


@BOTH
def test_a_disk_that_fills_up_while_it_is_written(config, tmp_path, async_save):
    """Files of more than 10 kB fail, as on a full disk, once the first checkpoint is there; later they don't."""
    config["training"]["checkpoint"]["async_save"] = async_save
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))

    try:
        with pytest.raises(CheckpointSaveError, match=FULL):
            train_with(config, tmp_path, AtStep(3, wait_for_saves), AtStep(4, fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path / "run") == ["step-00000002"]
    whole = train(config, {"training.output_dir": str(tmp_path / "whole")})
    resumed = train(config, LATEST)
    assert metric_lines(resumed) == metric_lines(whole)
    assert_same_state(checkpoint(resumed, 4), checkpoint(whole, 4), num_networks=1, num_optimizers=1)


@pytest.mark.parametrize("name", ["tensors.json", "metadata.json"])
def test_a_failure_with_the_last_files(config, tmp_path, monkeypatch, name):
    write = checkpoint_save.write_durably

    def fail(path, text):
        if path.name == name and path.parent.name.startswith("step-00000004"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, text)

    monkeypatch.setattr(checkpoint_save, "write_durably", fail)
    with pytest.raises(CheckpointSaveError, match="No space left on device"):
        train(config)
    assert names(tmp_path / "run") == ["step-00000002"]


def test_a_failure_in_the_background_ends_the_run_at_a_step(config, tmp_path, monkeypatch):
    """Not only at the end: the save of step 2 has failed before step 3 ends."""
    config["training"]["checkpoint"]["async_save"] = True
    config["training"]["loop"]["max_train_steps"] = 50
    config["training"]["checkpoint"]["every_steps"] = 40

    def fail(path, tensors):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint_storage, "write_safetensors", fail)
    with pytest.raises(CheckpointSaveError, match="step-00000040 could not be written: OSError: .*Input/output error"):
        train_with(config, tmp_path, AtStep(41, wait_for_saves))
    assert len(metric_lines(tmp_path / "run")) == 41


def test_the_command_ends_with_one_message(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint_storage.shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 0))
    with pytest.raises(SystemExit) as caught:
        main(["train", "--config", str(write_config(config, tmp_path / "run.yaml"))])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.startswith("error: checkpoint ") and "Traceback" not in err


# The output directory


def test_an_output_directory_that_can_not_be_written_is_found_at_the_start(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"training\.output_dir='.*/file/run' can't be written: .*Not a directory"):
        train_with(config, tmp_path, **{"training.output_dir": str(tmp_path / "file" / "run")})


def test_a_full_disk_is_found_at_the_start(config, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="can't be written: .*No space left on device; make room"):
        train(config)


def test_the_check_leaves_nothing(config):
    output_dir = train(config, {"training.loop.max_train_steps": 1})
    assert sorted(path.name for path in output_dir.iterdir()) == [
        "checkpoints",
        "metrics.jsonl",
        "resolved_config.yaml",
        "sessions.jsonl",
        "sigma_losses.jsonl",
    ]


# Saves beside the training


class Gate:
    """Holds a background save back until it is let go."""

    def __init__(self, monkeypatch):
        self.open = threading.Event()
        write = checkpoint_storage.write_safetensors

        def wait(path, tensors):
            assert self.open.wait(60)
            write(path, tensors)

        monkeypatch.setattr(checkpoint_storage, "write_safetensors", wait)


def test_training_goes_on_while_a_save_is_written(tiny_wan, tiny_rows, tmp_path, monkeypatch):
    """The save of step 2 is held back until step 3 is done, and still has the state of step 2."""
    config = dmd2_config(tiny_wan, tiny_rows, tmp_path / "run")
    whole = train(config, {"training.output_dir": str(tmp_path / "whole")})
    config["training"]["checkpoint"]["async_save"] = True
    gate, seen = Gate(monkeypatch), []

    def look():
        seen.append(complete_checkpoints(tmp_path / "run"))
        gate.open.set()

    train_with(config, tmp_path, AtStep(3, look))
    assert seen == [[]], "not one before it is written"
    assert metric_lines(tmp_path / "run") == metric_lines(whole)
    for step in (2, 4):
        assert_same_state(checkpoint(tmp_path / "run", step), checkpoint(whole, step), num_networks=3, num_optimizers=2)


def test_an_error_in_training_waits_for_the_save(config, tmp_path, monkeypatch):
    config["training"]["checkpoint"]["async_save"] = True
    gate = Gate(monkeypatch)

    def fail():
        gate.open.set()
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        train_with(config, tmp_path, AtStep(3, fail))
    assert names(tmp_path / "run") == ["step-00000002"]


# metrics.jsonl


@pytest.mark.parametrize("rest", [b'{"step": 3, "loss/student": 1.', b'{"step": 3}\n{"st', b"\0\0\0\n\xff\xfe"])
def test_what_a_kill_leaves_of_a_line_is_dropped(config, tmp_path, rest):
    output_dir = train(config, {"training.loop.max_train_steps": 2})
    whole = train(config, {"training.output_dir": str(tmp_path / "whole")})
    with (output_dir / METRICS_FILE).open("ab") as file:
        file.write(rest)
    train(config, LATEST)
    assert metric_lines(output_dir) == metric_lines(whole)


# The pieces


def test_space_is_looked_for_where_a_folder_will_be(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    check_space(tmp_path / "not" / "there", 10**6)
    with pytest.raises(OSError, match=f"are free in {tmp_path}"):
        check_space(tmp_path / "not" / "there", 2 * free)


def test_any_type_is_written_as_safetensors_read_it(tmp_path):
    tensors = {
        str(dtype): (torch.arange(12).reshape(3, 4).to(dtype) if dtype.itemsize > 1 else torch.ones(3, 4).to(dtype))
        for dtype in checkpoint_storage._DTYPES
    }
    tensors |= {"strided": torch.arange(12.0).reshape(3, 4).T, "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 2)}
    write_safetensors(tmp_path / "all.safetensors", tensors)
    loaded = load_file(tmp_path / "all.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype and loaded[name].shape == value.shape
        assert loaded[name].view(torch.uint8).equal(value.contiguous().view(torch.uint8)) if value.ndim else True
    with pytest.raises(ValueError, match=r"odd: torch.complex64 can't be stored"):
        write_safetensors(tmp_path / "odd.safetensors", {"odd": torch.zeros(1, dtype=torch.complex64)})
