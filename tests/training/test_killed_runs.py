"""A run that is killed (-9) twenty times, at random, inside saves too, ends as the run that nobody touched."""

import json
import random
import signal
import time
from pathlib import Path

import killed_run
import pytest
from killed_run import KINDS
from tiny_runs import assert_same_state, checkpoint, dmd2_config, metric_lines, write_config

from fv_distill.training import complete_checkpoints

NUM_KILLS = 20
STEPS = 6


@pytest.fixture(scope="module")
def config(tiny_wan, tiny_rows, tmp_path_factory):
    """Six steps of DMD2 with an average and a falling rate; a save every second one, of which two are kept."""
    config = dmd2_config(tiny_wan, tiny_rows, tmp_path_factory.mktemp("killed") / "whole")
    config["training"]["optimizer"] |= {"lr_scheduler": "cosine"}
    config["training"]["loop"]["max_train_steps"] = STEPS
    config["training"]["checkpoint"] = {"every_steps": 2, "keep_last": 2}
    return config


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The run that nobody touches, in a process like those of the others."""
    path = write_config(config, tmp_path_factory.mktemp("whole") / "run.yaml")
    assert wait(killed_run.start(path, {}, None, 0)) == 0
    return Path(config["training"]["output_dir"])


def wait(process):
    process.join(1800)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def assert_as_uninterrupted(output_dir, whole):
    assert metric_lines(output_dir) == metric_lines(whole)
    found = complete_checkpoints(output_dir)
    assert sorted((output_dir / "checkpoints").iterdir()) == found == [checkpoint(output_dir, s) for s in (4, 6)]
    for step in (4, 6):
        assert_same_state(checkpoint(output_dir, step), checkpoint(whole, step), num_networks=3, num_optimizers=2)


@pytest.mark.slow
@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_a_run_that_is_killed_again_and_again(config, whole, tmp_path, async_save):
    path = write_config(config, tmp_path / "run.yaml", {"training.checkpoint.async_save": async_save})
    # The server imports everything once; the time that a run takes is without that.
    assert wait(killed_run.start(target=int)) == 0
    began = time.monotonic()
    process = killed_run.start(path, {"training.output_dir": str(tmp_path / "0")}, None, 0, tmp_path / "counts.json")
    assert wait(process) == 0
    duration = time.monotonic() - began
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert_as_uninterrupted(tmp_path / "0", whole)

    draw = random.Random(int(async_save))
    kills, inside_saves, number, status = [], 0, 1, None
    while len(kills) < NUM_KILLS or status != 0:
        output_dir = tmp_path / str(number)
        found = complete_checkpoints(output_dir)
        how = {"training.checkpoint.resume_from_checkpoint": "latest"} if found else {"training.overwrite": True}
        # The last of them may finish. A third of the kills come from outside, at any moment.
        kind = draw.choice([*KINDS, *["time"] * 4]) if len(kills) < NUM_KILLS else None
        event = (kind, draw.randint(1, counts[kind])) if kind in KINDS else (None, 0)
        process = killed_run.start(path, {"training.output_dir": str(output_dir), **how}, *event)
        if kind == "time":
            time.sleep(draw.uniform(0, duration))
            process.kill()
        status = wait(process)
        assert status in (0, -signal.SIGKILL)
        if status == 0:
            assert_as_uninterrupted(output_dir, whole)
            number += 1
        else:
            kills.append(kind)
            inside_saves += any((output_dir / "checkpoints").glob("*.incomplete"))
    assert len(set(kills)) > 4 and inside_saves > 3, kills
