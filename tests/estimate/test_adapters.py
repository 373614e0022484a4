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
@pytest.mark.parametrize(
    ("name", "gib"),
    [("wan2.1_1.3b_lora_shared", 24), ("wan2.1_14b_lora_shared", 80), ("longcat_video_lora_shared", 80)],
)
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


@pytest.mark.parametrize(("placement", "share"), [("auto", 1 / 8), ("replicated", 1.0), ("offloaded", 2 / 30)])
def test_where_a_teacher_is_decides_what_a_process_holds_of_it(placement, share):
    config = load_run_config(CONFIGS / "wan2.1_1.3b.yaml", {"models.teacher.placement": placement})
    layout = Layout(8, "sharded", 8, "bf16", device_type="cuda")
    teacher = next(
        role for role in estimate_run(config, layout, Device("GPU", None, None, 0.4)).roles if role.role == "teacher"
    )
    assert teacher.rank_bytes == pytest.approx(share * teacher.total_bytes, rel=0.1)


def test_what_is_not_estimated_is_said():
    degree = {"training.distributed.context_parallel_degree": 2}
    config = load_run_config(CONFIGS / "wan2.1_1.3b.yaml", degree)
    with pytest.raises(ValueError, match=r"context_parallel_degree: .* not part of the estimate"):
        estimate_run(config, Layout(2, "replicated"), Device("GPU", None, None, 0.4))
