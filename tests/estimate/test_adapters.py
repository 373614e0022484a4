"""Estimates of adapters: a shared base is counted once, and the shipped configs fit where they say."""

from pathlib import Path

import pytest

from fv_distill.config import load_run_config
from fv_distill.estimate import Layout
from fv_distill.estimate.estimate import Device
from fv_distill.training.estimating import estimate_run

CONFIGS = Path(__file__).resolve().parents[2] / "examples/configs/dmd2"
GIB = 2**30


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gib"), [("wan2.1_1.3b_lora_shared", 24), ("wan2.1_14b_lora_shared", 80)])
def test_the_shipped_configs_fit_one_gpu(name, gib):
    config = load_run_config(CONFIGS / f"{name}.yaml")
    estimate = estimate_run(config, Layout(mixed_precision="bf16", device_type="cuda"), Device("GPU", None, None, 0.4))
    # A tenth of it is left to the driver and to fragmentation, as the command says.
    assert estimate.peak.total < 0.9 * gib * GIB
    student, critic, teacher = (
        next(r for r in estimate.roles if r.role == n) for n in ("student", "critic", "teacher")
    )
    assert student.parameters == critic.parameters < 0.05 * teacher.parameters
    assert teacher.total_bytes == pytest.approx(2 * teacher.parameters, rel=0.01), "bfloat16, once"
