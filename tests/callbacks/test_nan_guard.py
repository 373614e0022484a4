import json
import math

import pytest
from tiny_runs import checkpoint, dmd2_config, finetune_config, metric_lines, metrics, train

from fv_distill.callbacks import NaNGuardCallback
from fv_distill.methods import DMD2Method, FineTuneMethod
from fv_distill.methods.base import LossTerm
from fv_distill.training import NonFiniteLossError

POISON = """\
import torch
from fv_distill.callbacks import Callback


class Poison(Callback):
    def on_after_optimizer_step(self, trainer, role):
        if trainer.step == 2:
            network = trainer.models[role].transformer
            with torch.no_grad():
                network.proj_out.bias[:3] = torch.tensor([float("nan"), float("inf"), 0.0])
"""


@pytest.fixture
def config(tiny_wan, tiny_rows, tmp_path):
    return finetune_config(tiny_wan, tiny_rows, tmp_path / "run")


def break_losses(monkeypatch, kind, role, steps, *, micro_batch=0):
    """Make the loss of one micro-batch of some steps NaN."""
    original = kind.losses

    def losses(self, which, batch, rng):
        for term in original(self, which, batch, rng):
            bad = which == role and rng.step in steps and batch["sample_index"][0] // 2 == micro_batch
            yield LossTerm(term.loss * math.nan if bad else term.loss, term.metrics)

    monkeypatch.setattr(kind, "losses", losses)


def report_of(output_dir, step, role):
    return json.loads((output_dir / "nan_guard" / f"step-{step:08d}_{role}.json").read_text())


def test_a_skipped_update_is_explained_and_the_run_goes_on(config, monkeypatch, capsys):
    config["callbacks"] = {"nan_guard": {}}
    break_losses(monkeypatch, FineTuneMethod, "student", {2}, micro_batch=1)
    output_dir = train(config, {"training.loop.gradient_accumulation_steps": 2})
    report = report_of(output_dir, 2, "student")
    assert (report["step"], report["role"], report["update"]) == (2, "student", 2)
    assert report["metrics"]["grad_norm/student"] == "nan"
    (batch,) = report["batches"]
    assert (batch["process"], batch["loss"], batch["sample_index"]) == (0, "nan", [2, 3])
    assert [f"row {identity}" in place for identity, place in zip(batch["ids"], batch["rows"], strict=True)] == [
        True
    ] * 2
    assert batch["captions"] == ["a digit"] * 2
    assert report["gradients"]["proj_out.bias"] == {"nan": 16, "inf": 0, "of": 16}
    assert report["parameters"] == {}
    out = " ".join(capsys.readouterr().out.split())
    assert "step 2, student: " in out and "samples 2, 3 of the global batch" in out and "gradients not finite in" in out
    assert "this update was skipped" in out, "the trainer's own message stays"
    assert len(metrics(output_dir)) == 4 and len(list((output_dir / "nan_guard").iterdir())) == 1


def test_the_role_is_named(tiny_wan, tiny_rows, tmp_path, monkeypatch):
    config = dmd2_config(tiny_wan, tiny_rows, tmp_path / "run")
    config["callbacks"]["nan_guard"] = {"check": ["losses"]}
    break_losses(monkeypatch, DMD2Method, "critic", {1})
    report = report_of(train(config, {"training.loop.max_train_steps": 1}), 1, "critic")
    assert report["role"] == "critic" and {"gradients", "parameters"} & set(report) == set()
    assert report["batches"][0]["sample_index"] == [0, 1]


def test_gradients_alone(config, monkeypatch):
    """Every sample may be the one where every loss is finite."""
    config["callbacks"] = {"nan_guard": {}}
    original = FineTuneMethod.losses

    def losses(self, which, batch, rng):
        for term in original(self, which, batch, rng):
            if rng.step == 2:
                term.loss.register_hook(lambda grad: grad * math.inf)
            yield term

    monkeypatch.setattr(FineTuneMethod, "losses", losses)
    report = report_of(train(config), 2, "student")
    assert report["gradients"] and math.isfinite(report["batches"][0]["loss"])
    assert report["batches"][0]["sample_index"] == [0, 1]


def test_stop_ends_the_run_at_the_first(config, tmp_path, monkeypatch):
    config["callbacks"] = {"nan_guard": {"action": "stop"}}
    break_losses(monkeypatch, FineTuneMethod, "student", {3})
    with pytest.raises(NonFiniteLossError) as caught:
        train(config)
    message = str(caught.value)
    assert message.startswith("callbacks.nan_guard: step 3, student: grad_norm/student=nan; gradients not finite in ")
    assert str(tmp_path / "run" / "nan_guard" / "step-00000003_student.json") in message
    assert f"the last good checkpoint is {checkpoint(tmp_path / 'run', 2)}" in message
    assert len(metric_lines(tmp_path / "run")) == 2


def test_bad_weights_stop_the_run_before_they_are_saved(config, tmp_path):
    (tmp_path / "poison.py").write_text(POISON)
    config["callbacks"] = {"poison": {"_target_": "poison.Poison"}, "nan_guard": {"every_steps": 50}}
    with pytest.raises(
        NonFiniteLossError, match=r"step 2, student: parameters not finite in proj_out\.bias; see .*none"
    ):
        train(config)
    report = report_of(tmp_path / "run", 2, "student")
    assert report["parameters"] == {"proj_out.bias": {"nan": 1, "inf": 1, "of": 16}}
    assert not checkpoint(tmp_path / "run", 2).exists()


def test_bad_weights_are_looked_for_every_so_often(config, tmp_path):
    (tmp_path / "poison.py").write_text(POISON)
    config["callbacks"] = {"poison": {"_target_": "poison.Poison"}, "nan_guard": {"every_steps": 2}}
    config["training"]["checkpoint"]["every_steps"] = 0
    with pytest.raises(NonFiniteLossError, match="step 2, student: parameters not finite"):
        train(config)


def test_bad_weights_are_found_where_they_make_a_loss_bad(config, tmp_path):
    (tmp_path / "poison.py").write_text(POISON)
    config["callbacks"] = {"poison": {"_target_": "poison.Poison"}, "nan_guard": {"every_steps": 50}}
    config["training"]["checkpoint"]["every_steps"] = 0
    with pytest.raises(NonFiniteLossError, match=r"step 3, student: .*parameters not finite in proj_out\.bias"):
        train(config)
    config["callbacks"]["nan_guard"] = {"every_steps": 2, "check": ["gradients"]}
    with pytest.raises(NonFiniteLossError, match="not finite for 3 steps in a row"):
        train(config, {"training.output_dir": str(tmp_path / "unchecked"), "training.loop.max_train_steps": 9})


def test_reports_are_limited(config, monkeypatch):
    config["callbacks"] = {"nan_guard": {"max_reports": 1}}
    break_losses(monkeypatch, FineTuneMethod, "student", {2, 3})
    output_dir = train(config)
    assert [path.name for path in (output_dir / "nan_guard").iterdir()] == ["step-00000002_student.json"]


def test_a_good_run_is_not_touched(config, tmp_path):
    plain = train(config)
    config["callbacks"] = {"nan_guard": {"every_steps": 1}}
    guarded = train(config, {"training.output_dir": str(tmp_path / "guarded")})
    assert metric_lines(guarded) == metric_lines(plain) and not (guarded / "nan_guard").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"check": ["loss"]}, r"check=\['loss'\] must be a list of some of losses, gradients, parameters"),
        ({"check": "losses"}, "check='losses'"),
        ({"check": []}, "check="),
        ({"action": "halt"}, "action='halt' must be skip or stop"),
        ({"every_steps": 0}, "every_steps=0"),
        ({"max_reports": 0}, "max_reports=0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=rf"callbacks\.nan_guard\.{message}"):
        NaNGuardCallback(**options)
