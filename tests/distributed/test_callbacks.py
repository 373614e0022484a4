"""Callbacks on two processes with sharded weights (FSDP2): one launch, looked at from several sides."""

import json
import os
import subprocess
import sys

import callback_runs
import pytest
import yaml
from tiny_runs import assert_same_tensors, checkpoint, dmd2_config, metadata, metric_lines, train, write_config

from fv_distill.export import load_role_weights

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
MINE = """\
from fv_distill.callbacks import Callback


class Count(Callback):
    def __init__(self):
        self.steps = 0

    def on_training_step_end(self, trainer, metrics):
        self.steps += 1

    def state_dict(self):
        return {"steps": self.steps}
"""


@pytest.fixture(scope="module")
def folder(tiny_wan, tiny_rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("callbacks")
    (folder / "my_callbacks.py").write_text(MINE)
    (folder / "prompts.txt").write_text("a handwritten one\na handwritten two\nthree\n")
    config = dmd2_config(tiny_wan, tiny_rows, folder / "none")
    config["callbacks"] |= {
        "mine": {"_target_": "my_callbacks.Count"},
        "nan_guard": {"every_steps": 1},
        "profiler": {"start_step": 3, "num_steps": 1, "ranks": [1]},
        "throughput": {"every_steps": 1, "peak_tflops": 1.0},
        "validation": {"dataset_file": str(folder / "prompts.txt"), "every_steps": 2},
    }
    path = write_config(config, folder / "run.yaml", {"training.loop.max_train_steps": 3})
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *(callback_runs.__file__, str(path), str(folder)),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **FSDP2},
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    return folder


def test_training_is_bit_for_bit_the_same_with_and_without(folder):
    """Validation after the second of three steps and at the end among them."""
    assert metric_lines(folder / "with") == metric_lines(folder / "without")
    for step in (2, 3):
        for name in ("student", "critic", "ema"):
            weights = [load_role_weights(checkpoint(folder / run, step), name) for run in ("with", "without")]
            assert_same_tensors(*weights)
    clips = list((folder / "with" / "validation" / "step-00000002").glob("*_2-steps.*"))
    assert len([clip for clip in clips if clip.suffix in (".mp4", ".gif")]) == 3


def test_a_callback_beside_the_config_is_found_on_every_process(folder):
    assert metadata(checkpoint(folder / "with", 3))["callbacks"]["mine"] == {"steps": 3}


def test_only_the_chosen_process_is_profiled(folder):
    names = sorted(path.name for path in (folder / "with" / "profile").iterdir())
    assert names == ["rank-1_steps-3-3.json", "rank-1_steps-3-3_ops.txt"]


def test_calls_of_sharded_networks_are_counted(folder):
    """As on one process with as many samples, whose calls are the same: a process multiplies whole matrices."""
    alone = yaml.safe_load((folder / "run.yaml").read_text())
    alone["callbacks"] = {"throughput": alone["callbacks"]["throughput"]}
    train(alone, {"training.output_dir": str(folder / "alone")})
    counts = []
    for run in ("with", "alone"):
        lines = [json.loads(line) for line in (folder / run / "throughput.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [2, 3]
        counts.append([line["throughput/tflops_per_device"] * line["throughput/step_seconds_mean"] for line in lines])
    assert counts[0] == pytest.approx(counts[1], rel=1e-5) and min(counts[0]) > 1e-6


def test_a_bad_loss_is_traced_to_its_process(folder):
    report = json.loads((folder / "bad" / "nan_guard" / "step-00000002_student.json").read_text())
    (batch,) = report["batches"]
    assert (batch["process"], batch["sample_index"], batch["loss"]) == (1, [2, 3], "nan")
    bias = report["gradients"]["proj_out.bias"]
    assert bias["of"] == 16 and bias["nan"] == 16, "the shards' counts add up to the whole"
    assert len(metric_lines(folder / "bad")) == 3
    assert not (folder / "with" / "nan_guard").exists()
