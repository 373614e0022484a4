"""A causal rollout on two processes, with sharded (FSDP2) and replicated (DDP) weights, against one process."""

import os
import subprocess
import sys

import causal_rollout
import pytest
import torch
from causal_rollout import full_gradients, make_model, roll_out

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


@pytest.mark.parametrize(
    ("environment", "sharded", "checkpointing"),
    [(FSDP2, {"", "blocks.0", "blocks.1"}, False), (FSDP2, {"", "blocks.0", "blocks.1"}, True), ({}, set(), True)],
    ids=["fsdp2", "fsdp2-checkpointing", "ddp-checkpointing"],
)
def test_two_processes_roll_out_and_differentiate_as_one_does(tiny_wan, tmp_path, environment, sharded, checkpointing):
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    words = (causal_rollout.__file__, tiny_wan, tmp_path, checkpointing)
    result = subprocess.run(
        [sys.executable, "-m", *launcher, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-4000:]
    saved = torch.load(tmp_path / "rollout.pt", weights_only=True)
    assert set(saved["sharded"]) - {"norm_out"} == sharded
    model = make_model(tiny_wan, checkpointing=checkpointing)
    torch.testing.assert_close(saved["clip"], roll_out(model), atol=1e-5, rtol=0)
    expected = full_gradients(model)
    assert saved["gradients"].keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(saved["gradients"][name], gradient, atol=1e-6, rtol=1e-4, msg=name)
        assert gradient.abs().max() > 0, name
