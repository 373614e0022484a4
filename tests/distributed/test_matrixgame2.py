"""Networks with buffers, conditions beside text and caches of several kinds: two processes against one."""

import pytest
from parallel_launch import CHECKPOINTING, DDP, FSDP2, GLOBAL_BATCH, SGD, Run, launch
from tiny_matrixgame2 import make_directory, make_rows
from tiny_runs import (
    checkpoint,
    dmd2_config,
    largest_difference,
    metrics,
    self_forcing_config,
    train,
)

from fv_distill.export import load_role_weights

RUNS = {
    "dmd2-fsdp2": Run("dmd2", FSDP2),
    "self_forcing-ddp": Run("self_forcing", DDP),
    "self_forcing-fsdp2": Run("self_forcing", FSDP2, CHECKPOINTING),
}
BF16 = "self_forcing-fsdp2-bf16"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def configs(folder):
    model, rows = make_directory(folder / "model"), make_rows(folder / "rows")
    configs = {
        "dmd2": dmd2_config(model, rows, folder / "dmd2"),
        "self_forcing": self_forcing_config(model, rows, folder / "self_forcing"),
    }
    for config in configs.values():
        for role in config["models"].values():
            role.pop("negative_prompt", None)
            role["_target_"] = f"fv_distill.models.{'Causal' if 'chunk_size' in role else ''}MatrixGame2Model"
        config["training"]["optimizer"] = dict(SGD)
        config["training"]["checkpoint"]["every_steps"] = 0
        config["training"]["loop"]["max_train_steps"] = 2
        config["method"] |= {"fake_score_learning_rate": 0.2, "cfg_uncond": {"action": "zero"}}
    configs["self_forcing"]["models"]["student"] |= {"local_window": 1, "sink_frames": 1}
    return configs


@pytest.fixture(scope="module")
def launched(configs, folder):
    """All runs, by one launch of two processes."""
    launch(2, RUNS | {BF16: Run("self_forcing", "fsdp2_8gpu", CHECKPOINTING)}, configs, folder)
    return folder


@pytest.fixture(scope="module")
def one_process(configs, folder):
    """The same runs by one process, by method."""
    size = {"training.data.train_batch_size": GLOBAL_BATCH}
    return {
        method: train(config, {**size, "training.output_dir": str(folder / f"{method}-alone")})
        for method, config in configs.items()
    }


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_make_the_run_of_one(name, launched, one_process):
    reference = one_process[RUNS[name].method]
    for line, expected in zip(metrics(launched / name), metrics(reference), strict=True):
        for key in (key for key in expected if key.startswith("loss/")):
            assert line[key] == pytest.approx(expected[key], rel=1e-4)
    for role in ("student", "critic", "ema"):
        ours, theirs = (load_role_weights(checkpoint(out, 2), role) for out in (launched / name, reference))
        assert largest_difference(ours, theirs) < 1e-5


def test_mixed_precision_is_close(launched, one_process):
    for line, expected in zip(metrics(launched / BF16), metrics(one_process["self_forcing"]), strict=True):
        for key in (key for key in expected if key.startswith("loss/")):
            assert line[key] == pytest.approx(expected[key], rel=0.1)
