"""The trainer's loop, through whole runs of a few steps."""

import json
import math
import re

import pytest
import torch
import yaml
from tiny_runs import (
    assert_same_tensors,
    checkpoint,
    dmd2_config,
    finetune_config,
    largest_difference,
    metadata,
    metric_lines,
    metrics,
    train,
    write_config,
)

from fv_distill.export import load_role_weights
from fv_distill.methods import DMD2Method, FineTuneMethod
from fv_distill.methods.base import LossTerm
from fv_distill.training import NonFiniteLossError, run_training_from_config


@pytest.fixture
def finetune(tiny_wan, tiny_rows, tmp_path):
    return finetune_config(tiny_wan, tiny_rows, tmp_path / "run")


@pytest.fixture
def dmd2(tiny_wan, tiny_rows, tmp_path):
    return dmd2_config(tiny_wan, tiny_rows, tmp_path / "run")


def student_after(output_dir, step):
    return load_role_weights(checkpoint(output_dir, step), "student")


# What happens before the first


def test_text_encoders_wait_until_the_networks_are_prepared(dmd2, monkeypatch):
    """Before that, a large network is whole on the device, or there is no room beside it."""
    from fv_distill.training import trainer

    order = []
    prepare, encode = trainer.prepare_roles, DMD2Method.encode_prompts
    monkeypatch.setattr(trainer, "prepare_roles", lambda *a, **k: order.append("prepare") or prepare(*a, **k))
    monkeypatch.setattr(DMD2Method, "encode_prompts", lambda self: order.append("encode") or encode(self))
    train(dmd2, {"training.loop.max_train_steps": 1})
    assert order == ["prepare", "encode"]


# What a step computes


def test_finetune_equals_a_loop_written_out(finetune, tiny_wan, monkeypatch):
    """Two steps of plain SGD from the gradients of the method's own losses."""
    from fv_distill.models import WanModel
    from fv_distill.rng import SampleRng

    sgd = {"_target_": "torch.optim.SGD", "learning_rate": 0.1, "betas": None, "eps": None, "weight_decay": 0.0}
    finetune["training"]["optimizer"] = sgd
    seen = []
    original = FineTuneMethod.losses
    monkeypatch.setattr(
        FineTuneMethod, "losses", lambda self, role, b, rng: seen.append(b) or original(self, role, b, rng)
    )
    output_dir = train(finetune, {"training.loop.max_train_steps": 2})
    monkeypatch.undo()

    model = WanModel.from_pretrained(str(tiny_wan), trainable=True, text_length=8)
    method = FineTuneMethod({"student": model})
    losses = []
    for step, rows in enumerate(seen, start=1):
        (term,) = method.losses("student", rows, SampleRng(7, step, rows["sample_index"]))
        term.loss.backward()
        losses.append(term.loss.item())
        with torch.no_grad():
            for parameter in model.transformer.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    # The optimizer rounds once where the loop rounds twice.
    assert [line["loss/student"] for line in metrics(output_dir)] == pytest.approx(losses, rel=1e-6)
    assert largest_difference(student_after(output_dir, 2), model.transformer.state_dict()) < 1e-7


@pytest.mark.parametrize("kind", ["finetune", "dmd2"])
def test_a_batch_may_be_split_into_micro_batches(request, tmp_path, kind):
    config = request.getfixturevalue(kind)
    splits = []
    for size, count in ((4, 1), (2, 2), (1, 4)):
        changes = {
            "training.output_dir": str(tmp_path / f"{size}x{count}"),
            "training.data.train_batch_size": size,
            "training.loop.gradient_accumulation_steps": count,
            # Adam divides by the gradient's size and would blow rounding up where it is nearly zero.
            "training.optimizer": {
                "_target_": "torch.optim.SGD", "learning_rate": 0.1, "betas": None, "eps": None, "weight_decay": 0.0
            },
        }  # fmt: skip
        splits.append(train(config, changes | ({"method.fake_score_learning_rate": None} if kind == "dmd2" else {})))
    for split in splits[1:]:
        for one, other in zip(metrics(splits[0]), metrics(split), strict=True):
            assert one == pytest.approx(other, rel=1e-4)
        for name in metadata(checkpoint(split, 4))["models"]:
            weights = [load_role_weights(checkpoint(path, 4), name) for path in (splits[0], split)]
            assert largest_difference(*weights) < 1e-6
    moved = largest_difference(student_after(splits[0], 2), student_after(splits[0], 4))
    assert moved > 1e-4, "weights that don't move agree however a batch is split"


def test_each_roles_rate_follows_its_own_updates(dmd2):
    dmd2["training"]["optimizer"] |= {"learning_rate": 0.004, "lr_scheduler": "linear"}
    dmd2["method"]["fake_score_lr_scheduler"] = "constant"
    dmd2["training"]["loop"]["max_train_steps"] = 8
    lines = metrics(train(dmd2))
    assert [line.get("lr/student") for line in lines[1::2]] == pytest.approx([0.004, 0.003, 0.002, 0.001])
    assert all("lr/student" not in line and "loss/student" not in line for line in lines[::2])
    assert [line["lr/critic"] for line in lines] == [2e-3] * 8


def test_the_rate_reaches_the_optimizer(finetune):
    """A warm-up from one millionth leaves the weights nearly where they were."""
    finetune["training"]["loop"]["max_train_steps"] = 1
    finetune["training"]["checkpoint"]["every_steps"] = 1
    output_dir = train(finetune, {"training.optimizer.lr_warmup_steps": 999_999})
    assert metrics(output_dir)[0]["lr/student"] == pytest.approx(1e-9)
    start = load_start(finetune)
    assert 0 < largest_difference(student_after(output_dir, 1), start) < 1e-7


def load_start(config):
    from fv_distill.models import WanModel

    return WanModel.from_pretrained(config["models"]["student"]["init_from"], text_length=8).transformer.state_dict()


def test_caption_dropout_trains_on_the_empty_prompt(finetune, tmp_path):
    losses = {}
    for share in (0.0, 0.5, 1.0):
        changes = {"training.output_dir": str(tmp_path / str(share)), "training.data.caption_dropout": share}
        losses[share] = [line["loss/student"] for line in metrics(train(finetune, changes))]
    assert losses[0.0][0] != losses[1.0][0]
    assert len({tuple(values) for values in losses.values()}) == 3


# Losses that aren't finite


def break_losses(monkeypatch, kind, role, steps, *, log=True):
    """Make a role's loss NaN, gradients and all, in some steps."""
    original = kind.losses

    def losses(self, which, batch, rng):
        for term in original(self, which, batch, rng):
            bad = which == role and rng.step in steps
            loss = term.loss * math.nan if bad else term.loss
            yield LossTerm(loss, {name: loss.detach() for name in term.metrics} if log else {})

    monkeypatch.setattr(kind, "losses", losses)


@pytest.mark.parametrize("log", [True, False])
def test_a_step_with_a_nan_is_skipped_and_the_run_goes_on(finetune, monkeypatch, capsys, log):
    finetune["training"]["checkpoint"]["every_steps"] = 1
    finetune["callbacks"] = {"ema": {"decay": 0.5}}
    break_losses(monkeypatch, FineTuneMethod, "student", {2, 3}, log=log)
    output_dir = train(finetune)
    assert "step 2: loss/student=nan; this update was skipped" in capsys.readouterr().out
    assert [math.isnan(line["loss/student"]) for line in metrics(output_dir)] == [False, True, True, False]
    assert_same_tensors(
        load_role_weights(checkpoint(output_dir, 2), "ema"), load_role_weights(checkpoint(output_dir, 3), "ema")
    )
    assert_same_tensors(student_after(output_dir, 2), student_after(output_dir, 3))
    assert all(value.isfinite().all() for value in student_after(output_dir, 4).values())
    assert largest_difference(student_after(output_dir, 3), student_after(output_dir, 4)) > 1e-4
    assert metadata(checkpoint(output_dir, 4))["callbacks"]["ema"] == {"num_updates": 2}


def test_only_the_bad_roles_update_is_skipped(dmd2, monkeypatch):
    dmd2["training"]["checkpoint"]["every_steps"] = 1
    break_losses(monkeypatch, DMD2Method, "student", {2})
    output_dir = train(dmd2, {"training.loop.max_train_steps": 2})
    assert_same_tensors(student_after(output_dir, 2), load_start(dmd2))
    critics = [load_role_weights(checkpoint(output_dir, step), "critic") for step in (1, 2)]
    assert largest_difference(*critics) > 1e-4


@pytest.mark.parametrize("callbacks", [{}, {"grad_clip": {}}], ids=["bare", "grad_clip"])
def test_gradients_that_are_not_finite_are_noticed_where_the_loss_is(finetune, monkeypatch, capsys, callbacks):
    finetune["training"]["checkpoint"] = {"every_steps": 1, "keep_last": 4}
    finetune["callbacks"] = callbacks
    original = FineTuneMethod.losses

    def losses(self, which, batch, rng):
        for term in original(self, which, batch, rng):
            if rng.step == 2:
                term.loss.register_hook(lambda grad: grad * math.inf)
            yield term

    monkeypatch.setattr(FineTuneMethod, "losses", losses)
    output_dir = train(finetune)
    assert re.search(r"step 2: grad_norm/student=(nan|inf); this update was skipped", capsys.readouterr().out)
    assert all(math.isfinite(line["loss/student"]) for line in metrics(output_dir))
    assert_same_tensors(student_after(output_dir, 1), student_after(output_dir, 2))
    assert largest_difference(student_after(output_dir, 2), student_after(output_dir, 3)) > 1e-4


def test_it_stops_after_so_many_and_names_the_last_good_checkpoint(finetune, tmp_path, monkeypatch):
    finetune["training"]["loop"] = {"max_train_steps": 9, "max_nonfinite_steps": 2}
    # Steps 4 and 6 are single ones: only a row of them counts.
    break_losses(monkeypatch, FineTuneMethod, "student", {4, 6, 7})
    with pytest.raises(NonFiniteLossError) as caught:
        train(finetune)
    message = str(caught.value)
    assert message.startswith("loss/student not finite for 2 steps in a row, up to step 7")
    assert f"the last good checkpoint is {checkpoint(tmp_path / 'run', 6)}" in message
    assert "training.optimizer.learning_rate" in message and "training.loop.max_nonfinite_steps" in message
    assert all(value.isfinite().all() for value in student_after(tmp_path / "run", 6).values())


def test_it_says_so_when_there_is_no_checkpoint(finetune, monkeypatch):
    finetune["training"]["loop"]["max_nonfinite_steps"] = 1
    break_losses(monkeypatch, FineTuneMethod, "student", {1})
    with pytest.raises(NonFiniteLossError, match="up to step 1; the last good checkpoint is none"):
        train(finetune)


# The output directory


def test_another_runs_directory_is_refused(finetune):
    output_dir = train(finetune, {"training.loop.max_train_steps": 1})
    before = metric_lines(output_dir)
    with pytest.raises(FileExistsError, match="holds another run .*checkpoints.*--overwrite"):
        train(finetune)
    assert metric_lines(output_dir) == before
    assert not checkpoint(output_dir, 4).exists()


def test_overwrite_removes_the_run_and_nothing_else(finetune):
    output_dir = train(finetune)
    (output_dir / "notes.txt").write_text("mine")
    (output_dir / "exported").mkdir()
    train(finetune, {"training.overwrite": True, "training.loop.max_train_steps": 1})
    assert len(metric_lines(output_dir)) == 1
    assert [path.name for path in (output_dir / "checkpoints").iterdir()] == ["step-00000001"]
    assert (output_dir / "notes.txt").read_text() == "mine" and (output_dir / "exported").is_dir()


def test_a_directory_with_other_things_in_it_is_used(finetune, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert len(metric_lines(train(finetune))) == 4


def test_the_resolved_config_makes_the_same_run(dmd2, tmp_path):
    output_dir = train(dmd2, {"training.loop.max_train_steps": 2})
    again = run_training_from_config(
        output_dir / "resolved_config.yaml", overrides={"training.output_dir": str(tmp_path / "again")}
    )
    assert metric_lines(again) == metric_lines(output_dir)


def test_a_dry_run_writes_nothing_and_says_what_it_would_do(dmd2, tmp_path, capsys):
    path = write_config(dmd2, tmp_path / "run.yaml")
    before = sorted(tmp_path.rglob("*"))
    run_training_from_config(path, dry_run=True, overrides={"training.seed": 1234})
    assert sorted(tmp_path.rglob("*")) == before
    out = capsys.readouterr().out
    assert "seed: 1234" in out and "dmd_normalizer: per_sample" in out
    assert "6 rows, global batch 2, 4 steps; dry run: nothing was trained" in out
    assert "teacher: " in out and "frozen" in out


def test_a_dry_run_in_another_runs_directory_is_allowed(finetune):
    output_dir = train(finetune, {"training.loop.max_train_steps": 1})
    path = write_config(finetune, output_dir.with_name("dry.yaml"))
    before = metric_lines(output_dir)
    run_training_from_config(path, dry_run=True)
    assert metric_lines(output_dir) == before


def test_tensorboard_gets_scalars_and_the_config(dmd2):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    dmd2["training"]["tracker"] = {"trackers": ["tensorboard"], "log_every_steps": 2}
    output_dir = train(dmd2)
    events = EventAccumulator(str(output_dir / "logs" / "fv_distill"))
    events.Reload()
    lines = metrics(output_dir)
    for name in ("loss/student", "loss/critic", "lr/critic", "grad_norm/student"):
        logged = {event.step: event.value for event in events.Scalars(name)}
        assert logged == {step: pytest.approx(lines[step - 1][name], rel=1e-6) for step in (2, 4)}
    (text,) = events.Tensors("config/text_summary")
    written = text.tensor_proto.string_val[0].decode()
    assert yaml.safe_load(written.removeprefix("```yaml\n").removesuffix("```")) == dmd2


def test_an_export_follows_the_run(dmd2, tmp_path):
    output_dir = train(dmd2, {"pipeline.export_dir": str(tmp_path / "student")})
    from safetensors.torch import load_file

    exported = load_file(tmp_path / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert_same_tensors(exported, load_role_weights(checkpoint(output_dir, 4), "ema"))
    assert json.loads((tmp_path / "student" / "fv_distill.json").read_text())["sigmas"] == [1.0, 0.75]


# What would fail only after training


def test_a_student_that_no_scheduler_samples_is_refused_where_it_is_to_be_exported(dmd2, tmp_path, capsys):
    uneven = {"method.dmd_denoising_steps": [1000, 900, 500, 100], "method.warp_denoising_step": False}
    with pytest.raises(ValueError, match="no setting of FlowMatchEulerDiscreteScheduler"):
        train(dmd2, uneven | {"pipeline.export_dir": str(tmp_path / "student")})
    assert not (tmp_path / "run" / "checkpoints").exists()
    train(dmd2, uneven | {"training.loop.max_train_steps": 1})
    assert "can be trained but not exported" in capsys.readouterr().out
