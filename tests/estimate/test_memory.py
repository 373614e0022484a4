"""The predicted peak against that of a real training step of the real trainer."""

import pytest
from measured_memory import measured_peak
from tiny_runs import dmd2_config, finetune_config, self_forcing_config, write_config

from fv_distill.config import load_run_config
from fv_distill.estimate.estimate import Device
from fv_distill.estimate.layout import Layout
from fv_distill.training.estimating import estimate_run

CPU = Device("CPU", None, None, 0.4)

CASES = {
    "finetune": (finetune_config, {}),
    "finetune, checkpointing": (finetune_config, {"training.model.gradient_checkpointing": True}),
    "finetune, accumulation": (
        finetune_config,
        {"training.loop.gradient_accumulation_steps": 2, "training.data.train_batch_size": 1},
    ),
    "dmd2, average": (dmd2_config, {}),
    "self-forcing, replay": (self_forcing_config, {"models.student.chunk_size": 2}),
    "self-forcing, bf16": (
        self_forcing_config,
        {"models.student.chunk_size": 2, "training.distributed.mixed_precision": "bf16"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_within_15_percent(name, wide_wan, wide_rows, tmp_path):
    make_config, overrides = CASES[name]
    config = make_config(wide_wan, wide_rows, tmp_path / "run")
    path = write_config(config, tmp_path / "run.yaml", {"training.checkpoint.every_steps": 0, **overrides})
    estimate = estimate_run(load_run_config(path), Layout(device_type="cpu"), CPU)
    predicted = max(phase.total for phase in estimate.phases if phase.name != "prompts")
    measured = measured_peak(path, steps=4)
    print(name, predicted / 1e6, measured / 1e6, predicted / measured)
    assert predicted == pytest.approx(measured, rel=0.15)
