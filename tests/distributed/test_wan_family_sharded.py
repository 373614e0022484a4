"""Image-to-video Wan and experts on two processes, sharded and with shared tokens: one process's losses and weights."""

import pytest
from parallel_launch import FSDP2, SGD, Run, launch
from tiny_runs import checkpoint, largest_difference, metrics, train
from wan_family_runs import IMAGE, MAKERS, dmd2_config, finetune_config, write_clips

from fv_distill.export import load_role_weights

pytestmark = pytest.mark.slow

TOKENS_SHARED = {"training.distributed.context_parallel_degree": 2, "training.data.train_batch_size": 2}
# Directory, role options, method, overrides of two processes.
RUNS = {
    "clip_features": ("wan21_i2v", IMAGE, dmd2_config, {}),
    "rollouts_over_two_experts": ("wan22_i2v", {**IMAGE, "expert": "low"}, dmd2_config, {}),
    "timesteps_of_tokens_shared": ("ti2v", IMAGE, finetune_config, TOKENS_SHARED),
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    root = tmp_path_factory.mktemp("sharded")
    directories = {name: make(root / name) for name, make in MAKERS.items()}
    rows = {name: write_clips(directory, root / f"{name}-rows") for name, directory in directories.items()}
    made = {}
    for name, (directory, model, make, _) in RUNS.items():
        config = make(directories[directory], rows[directory], root / name, **model)
        config["training"]["optimizer"] = dict(SGD)
        if name == "rollouts_over_two_experts":
            config["models"]["high_expert"] = {"init_from": str(directories[directory]), **model, "expert": "high"}
        made[name] = config
    return root, made


@pytest.fixture(scope="module")
def two_processes(configs):
    root, made = configs
    runs = {name: Run(name, FSDP2, {"training.data.train_batch_size": 1, **RUNS[name][3]}) for name in made}
    return launch(2, runs, made, root)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(configs, two_processes, name):
    root, made = configs
    assert "error" not in two_processes[name]
    assert two_processes[name]["roles"]["student"]["units"] > 1, "sharded block by block"
    alone = train(made[name], {"training.output_dir": str(root / f"{name}-alone")})
    for line, expected in zip(metrics(root / name), metrics(alone), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)
    ours, theirs = (load_role_weights(checkpoint(run, 2), "student") for run in (root / name, alone))
    assert largest_difference(ours, theirs) < 1e-4
