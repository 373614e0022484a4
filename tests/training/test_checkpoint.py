"""Checkpoints: exact resume, rotation, and what is never resumed from."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_runs import (
    assert_same_state,
    assert_same_tensors,
    checkpoint,
    dmd2_config,
    finetune_config,
    metadata,
    metric_lines,
    sigma_lines,
    train,
)

from fv_distill.export import load_role_weights
from fv_distill.training import complete_checkpoints, find_checkpoint

LATEST = {"training.checkpoint.resume_from_checkpoint": "latest"}

# A user's own callback, which ends the run between a step and its checkpoint as a kill would.
CUT = """
from fv_distill.callbacks import Callback

class Cut(Callback):
    def __init__(self, at):
        self.at, self.seen = at, 0

    def on_training_step_end(self, trainer, metrics):
        self.seen += 1
        if trainer.step == self.at:
            raise RuntimeError("cut off")

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]
"""


@pytest.fixture(scope="module")
def whole(tiny_wan, tiny_rows, tmp_path_factory):
    """The config of a DMD2 run of four steps without a break; its falling rate tells a resumed step from a first."""
    config = dmd2_config(tiny_wan, tiny_rows, tmp_path_factory.mktemp("whole") / "run")
    config["training"]["optimizer"] |= {"lr_scheduler": "cosine", "lr_warmup_steps": 1}
    train(config)
    return config


@pytest.fixture
def finished(tiny_wan, tiny_rows, tmp_path):
    """The config of a fine-tuning run of two steps with a checkpoint at each."""
    config = finetune_config(tiny_wan, tiny_rows, tmp_path / "run")
    config["training"]["checkpoint"]["every_steps"] = 1
    train(config, {"training.loop.max_train_steps": 2})
    return config


def output_dir_of(config):
    return Path(config["training"]["output_dir"])


def test_a_run_that_was_cut_off_resumes_exactly(whole, tmp_path, monkeypatch):
    (tmp_path / "my_callbacks.py").write_text(CUT)
    monkeypatch.syspath_prepend(tmp_path)
    output_dir, reference = tmp_path / "cut", output_dir_of(whole)
    overrides = {"training.output_dir": str(output_dir), "callbacks.cut._target_": "my_callbacks.Cut"}
    with pytest.raises(RuntimeError, match="cut off"):
        train(whole, overrides | {"callbacks.cut.at": 4})
    # Step 3 was logged but not saved, so the resumed run does it again.
    assert len(metric_lines(output_dir)) == 3
    assert [path.name for path in complete_checkpoints(output_dir)] == ["step-00000002"]
    train(whole, overrides | {"callbacks.cut.at": 0} | LATEST)
    assert metric_lines(output_dir) == metric_lines(reference)
    assert sigma_lines(output_dir) == sigma_lines(reference) and len(sigma_lines(reference)) == 2
    assert_same_state(checkpoint(output_dir, 4), checkpoint(reference, 4), num_networks=3, num_optimizers=2)
    assert metadata(checkpoint(output_dir, 4))["updates"] == {"student": 2, "critic": 4}
    assert metadata(checkpoint(output_dir, 4))["callbacks"] == {
        "ema": {"num_updates": 2},
        "grad_clip": {},
        "cut": {"seen": 4},
    }


def test_checkpoints_of_different_steps_differ(whole):
    """Otherwise comparing them would prove nothing."""
    for name in ("student", "critic", "ema"):
        one, two = (load_role_weights(checkpoint(output_dir_of(whole), step), name) for step in (2, 4))
        with pytest.raises(AssertionError):
            assert_same_tensors(one, two)


def test_a_longer_run_goes_on_where_the_shorter_ended(finished, tmp_path):
    train(finished, {"training.loop.max_train_steps": 3} | LATEST)
    straight = train(finished, {"training.loop.max_train_steps": 3, "training.output_dir": str(tmp_path / "straight")})
    resumed = output_dir_of(finished)
    assert metric_lines(resumed) == metric_lines(straight)
    assert sigma_lines(resumed) == sigma_lines(straight) and len(sigma_lines(straight)) == 1
    assert_same_state(checkpoint(resumed, 3), checkpoint(straight, 3), num_networks=1, num_optimizers=1)


def test_resuming_a_finished_run_changes_nothing(finished):
    output_dir = output_dir_of(finished)

    def state():
        modified = (checkpoint(output_dir, 2) / "metadata.json").stat().st_mtime_ns
        return metric_lines(output_dir), sigma_lines(output_dir), modified

    before = state()
    train(finished, {"training.loop.max_train_steps": 2} | LATEST)
    assert state() == before


def test_the_last_ones_are_kept(tiny_wan, tiny_rows, tmp_path):
    config = finetune_config(tiny_wan, tiny_rows, tmp_path / "run")
    config["training"]["checkpoint"] = {"every_steps": 1, "keep_last": 2}
    folder = train(config) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000003", "step-00000004"]


def test_zero_saves_at_the_end_only(tiny_wan, tiny_rows, tmp_path):
    config = finetune_config(tiny_wan, tiny_rows, tmp_path / "run")
    config["training"]["checkpoint"]["every_steps"] = 0
    folder = train(config, {"training.loop.max_train_steps": 3}) / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]


def test_an_incomplete_checkpoint_is_never_resumed_from(finished):
    output_dir = output_dir_of(finished)
    partial = shutil.copytree(checkpoint(output_dir, 2), checkpoint(output_dir, 3).with_suffix(".incomplete"))
    assert find_checkpoint("latest", output_dir) == checkpoint(output_dir, 2)
    with pytest.raises(FileNotFoundError, match=r"step-00000003\.incomplete is no complete checkpoint"):
        train(finished, {"training.checkpoint.resume_from_checkpoint": str(partial)})
    # It neither counts as one of those to keep nor stands in the way of saving that step.
    train(finished, {"training.loop.max_train_steps": 3, "training.checkpoint.keep_last": 3} | LATEST)
    names = ["step-00000001", "step-00000002", "step-00000003"]
    assert sorted(path.name for path in (output_dir / "checkpoints").iterdir()) == names


def test_a_checkpoint_without_metadata_is_refused(finished):
    output_dir = output_dir_of(finished)
    (checkpoint(output_dir, 2) / "metadata.json").unlink()
    assert find_checkpoint("latest", output_dir) == checkpoint(output_dir, 1)
    with pytest.raises(FileNotFoundError, match="it has no metadata.json"):
        train(finished, {"training.checkpoint.resume_from_checkpoint": str(checkpoint(output_dir, 2))})


def test_latest_without_any_checkpoint(tiny_wan, tiny_rows, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"resume_from_checkpoint: latest, but .*run/checkpoints holds none"):
        train(finetune_config(tiny_wan, tiny_rows, tmp_path / "run"), LATEST)


def test_a_users_copy_is_left_alone(finished):
    output_dir = output_dir_of(finished)
    copy = shutil.copytree(checkpoint(output_dir, 1), checkpoint(output_dir, 1).with_name("step-00000001-good"))
    train(finished, {"training.loop.max_train_steps": 4, "training.checkpoint.keep_last": 1} | LATEST)
    assert sorted((output_dir / "checkpoints").iterdir()) == [copy, checkpoint(output_dir, 4)]


def test_a_future_that_was_abandoned_is_not_mixed_in(finished, tmp_path):
    """Going back in the same directory is refused: its later checkpoint would be exported as the newest."""
    output_dir = output_dir_of(finished)
    back = {"training.checkpoint.resume_from_checkpoint": str(checkpoint(output_dir, 1))}
    with pytest.raises(FileExistsError, match=r"its run went on to step-00000002; resume from latest"):
        train(finished, back)
    elsewhere = train(finished, back | {"training.output_dir": str(tmp_path / "elsewhere")})
    assert [json.loads(line)["step"] for line in metric_lines(elsewhere)] == [2, 3, 4]
    assert metric_lines(elsewhere)[0] == metric_lines(output_dir)[1]


def test_another_runs_checkpoint_does_not_overwrite_this_directory(finished, tmp_path):
    other = train(finished, {"training.output_dir": str(tmp_path / "other"), "training.loop.max_train_steps": 1})
    second = checkpoint(output_dir_of(finished), 2)
    branch = {"training.output_dir": str(other), "training.checkpoint.resume_from_checkpoint": str(second)}
    with pytest.raises(FileExistsError, match="other' holds another run"):
        train(finished, branch)
    assert complete_checkpoints(other) == [checkpoint(other, 1)]
    train(finished, branch | {"training.overwrite": True})
    assert complete_checkpoints(other) == [checkpoint(other, 3), checkpoint(other, 4)]


def test_overwrite_does_not_remove_what_is_resumed(finished):
    train(finished, LATEST | {"training.overwrite": True})
    assert len(metric_lines(output_dir_of(finished))) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.data.train_batch_size": 3}, "was trained with a global batch of 2, this run has 3"),
        ({"callbacks.ema.decay": 0.5}, "holds the networks student, this run has student, ema"),
        (
            {"models.student.dtype": "bfloat16"},
            "another network as student: .* of its tensors differ in name, shape or type, for instance .*: "
            r"torch.float32 \[.*\] there, torch.bfloat16 \[.*\] here; keep models.student to resume",
        ),
        (
            {"training.optimizer._target_": "torch.optim.Adam"},
            "doesn't fit this run's student: it was trained with torch.optim.adamw.AdamW, this run uses "
            "torch.optim.adam.Adam; keep training.optimizer._target_",
        ),
    ],
)
def test_a_run_that_does_not_fit_is_refused(finished, changes, message):
    with pytest.raises(ValueError, match=message):
        train(finished, LATEST | changes)


def test_an_older_format_is_refused(finished):
    path = checkpoint(output_dir_of(finished), 2) / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    with pytest.raises(ValueError, match="has format 1; this version of fv_distill reads 2"):
        train(finished, LATEST)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_checkpoint_is_refused(finished, damage):
    path = checkpoint(output_dir_of(finished), 2) / "student.optimizer-00000.safetensors"
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"student\.optimizer-00000\.safetensors: can't read .* is damaged"):
        train(finished, LATEST)


def test_the_split_of_a_batch_may_change_on_resume(finished):
    train(finished, LATEST | {"training.data.train_batch_size": 1, "training.loop.gradient_accumulation_steps": 2})
    assert metadata(checkpoint(output_dir_of(finished), 4))["step"] == 4
