"""What every method says it calls, against the calls of the real method."""

from collections import Counter

import pytest
import torch
from tiny_runs import (
    CAUSAL,
    causal_kd_config,
    dfsft_config,
    dmd2_config,
    finetune_config,
    kd_config,
    self_forcing_config,
    write_config,
)

from fv_distill.config import load_run_config
from fv_distill.estimate.flops import average_calls
from fv_distill.methods import FineTuneMethod, TrainingMethod
from fv_distill.rng import SampleRng
from fv_distill.rollouts.ode import STATES, TIMESTEPS
from fv_distill.training.building import build_models
from fv_distill.training.run import build_method

NUM_FRAMES = 3

CASES = {
    "finetune": (finetune_config, {}),
    "dfsft": (dfsft_config, {}),
    "dfsft without teacher forcing": (dfsft_config, {"method.teacher_forcing": False}),
    "kd": (kd_config, {}),
    "causal kd": (causal_kd_config, {}),
    "causal kd with teacher forcing": (causal_kd_config, {"method.teacher_forcing": True}),
    "dmd2": (dmd2_config, {}),
    "dmd2, three steps, interval 5": (
        dmd2_config,
        {"method.dmd_denoising_steps": [1000, 700, 300], "method.generator_update_interval": 5},
    ),
    "dmd2 without guidance": (dmd2_config, {"method.real_score_guidance_scale": 1.0}),
    "dmd2, fresh rollouts": (dmd2_config, {"method.reuse_rollout": False}),
    "dmd2 on data": (dmd2_config, {"method.rollout_mode": "data_latent", "method.reuse_rollout": False}),
    "dmd2, causal student": (dmd2_config, {f"models.student.{key}": value for key, value in CAUSAL.items()}),
    "self-forcing": (self_forcing_config, {}),
    "self-forcing without replay": (self_forcing_config, {"method.gradient_replay": False}),
    "self-forcing, a step per chunk": (self_forcing_config, {"method.same_step_across_blocks": False}),
    "self-forcing, last steps": (self_forcing_config, {"method.last_step_only": True, "method.reuse_rollout": False}),
    "self-forcing, late gradients": (self_forcing_config, {"method.start_gradient_frame": 1}),
    "self-forcing, late gradients without replay": (
        self_forcing_config,
        {"method.start_gradient_frame": 1, "method.gradient_replay": False},
    ),
    "self-forcing, warming the critic up": (self_forcing_config, {"method.enable_gradient_in_rollout": False}),
}


class FixedExit(SampleRng):
    """Every shared draw is the same number."""

    def __init__(self, exit_step: int, *args) -> None:
        super().__init__(*args)
        self.exit_step = exit_step

    def shared_integer(self, stream: str, high: int) -> int:
        return self.exit_step


def make_method(make_config, overrides, tiny_wan, tiny_rows, tmp_path) -> TrainingMethod:
    config = load_run_config(
        write_config(make_config(tiny_wan, tiny_rows, tmp_path / "run"), tmp_path / "run.yaml", overrides)
    )
    roles = [role for role in config.models if make_config not in (kd_config, causal_kd_config) or role == "student"]
    method = build_method(config, build_models(config, roles))
    method.encode_prompts()
    return method


def counted_calls(method: TrainingMethod, batch: dict) -> dict[tuple, float]:
    """The calls of one micro-batch in the average step, every exit step being drawn equally often."""
    calls: Counter[tuple] = Counter()

    def watch(role):
        def count(_, args, kwargs):
            span = "chunk" if kwargs.get("cache") is not None else "clip"
            span = "clip_after_history" if kwargs.get("num_history_frames") else span
            calls[role, torch.is_grad_enabled(), span, kwargs.get("start_frame", 0)] += 1

        return count

    for role, model in method.models.items():
        model.transformer.register_forward_pre_hook(watch(role), with_kwargs=True)
    exits = range(len(method.few_step_sigmas or (1,)))
    for exit_step in exits:
        for step in range(1, method.update_cycle + 1):
            for role in method.updates(step):
                for _ in method.losses(role, batch, FixedExit(exit_step, 0, step, batch["sample_index"])):
                    pass
    return {key: count / len(exits) / method.update_cycle for key, count in calls.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_method_calls_what_it_says(name, tiny_wan, tiny_rows, tmp_path, batch):
    method = make_method(*CASES[name], tiny_wan, tiny_rows, tmp_path)
    if "kd" in name:
        sigmas = torch.tensor(method.options.sigmas)
        states = torch.randn(2, len(sigmas), *batch.pop("vae_latent").shape[1:])
        batch |= {STATES: states, TIMESTEPS: 1000 * sigmas.expand(2, -1)}
    said: Counter[tuple] = Counter()
    for call in average_calls(method, NUM_FRAMES):
        said[call.role, call.grad, call.span, call.start_frame] += call.count
    counted = counted_calls(method, batch)
    assert dict(said) == pytest.approx(counted)
    assert sum(counted.values()) >= 1


def test_one_teacher_call_in_two_is_guidance(tiny_wan, tiny_rows, tmp_path):
    method = make_method(dmd2_config, {}, tiny_wan, tiny_rows, tmp_path)
    teacher = [call for call in average_calls(method, NUM_FRAMES) if call.role == "teacher"]
    assert [(call.guided, call.count) for call in teacher] == [(False, 0.5), (True, 0.5)]


def test_a_method_that_does_not_say_is_named(tiny_wan, tiny_rows, tmp_path):
    class Silent(FineTuneMethod):
        network_calls = TrainingMethod.network_calls

    method = make_method(finetune_config, {}, tiny_wan, tiny_rows, tmp_path)
    with pytest.raises(NotImplementedError, match="Silent does not say which networks it calls"):
        average_calls(Silent(method.models), NUM_FRAMES)
