"""`resume_from_checkpoint: auto` goes on with its own run, starts it where there is nothing yet, and takes no other."""

import shutil

import pytest
import yaml
from tiny_runs import assert_same_state, checkpoint, finetune_config, metric_lines, train

from fv_distill.config import ConfigError, load_run_config
from fv_distill.training import complete_checkpoints

KEY = "training.checkpoint.resume_from_checkpoint"
AUTO = {KEY: "auto"}


@pytest.fixture
def config(tiny_wan, tiny_rows, tmp_path):
    return finetune_config(tiny_wan, tiny_rows, tmp_path / "run")


@pytest.fixture
def begun(config):
    """A run that ended after a step, before its first checkpoint."""
    output_dir = train(config, AUTO | {"training.loop.max_train_steps": 1})
    written = (output_dir / "resolved_config.yaml").read_text()
    (output_dir / "resolved_config.yaml").write_text(written.replace("max_train_steps: 1", "max_train_steps: 4"))
    checkpoint(output_dir, 1).rename(checkpoint(output_dir, 1).with_suffix(".incomplete"))
    return output_dir


def test_auto_is_a_start_then_a_resume_then_nothing(config, tmp_path, capsys):
    whole = train(config, {"training.output_dir": str(tmp_path / "whole")})
    output_dir = train(config, AUTO)
    assert "resumed" not in capsys.readouterr().out
    shutil.rmtree(checkpoint(output_dir, 4))
    for _ in range(2):
        train(config, AUTO)
        assert metric_lines(output_dir) == metric_lines(whole)
        assert_same_state(checkpoint(output_dir, 4), checkpoint(whole, 4), num_networks=1, num_optimizers=1)
    printed = "".join(capsys.readouterr().out.split())
    assert "atstep2" in printed and "atstep4" in printed


def test_a_run_without_a_checkpoint_is_begun_again(config, begun, tmp_path):
    mine = begun / "checkpoints/step-00000001-kept"
    mine.mkdir()
    whole = train(config, {"training.output_dir": str(tmp_path / "whole")})
    assert train(config, AUTO) == begun
    assert metric_lines(begun) == metric_lines(whole)
    assert [path.name for path in complete_checkpoints(begun)] == ["step-00000002", "step-00000004"]
    assert mine.is_dir(), "nothing is removed"


def test_another_run_without_a_checkpoint_is_refused(config, begun):
    before = metric_lines(begun)
    with pytest.raises(
        FileExistsError, match=r"holds a run with training\.seed=7 \(now 8\); replace it by --overwrite"
    ):
        train(config, AUTO | {"training.seed": 8})
    assert metric_lines(begun) == before


def test_another_run_with_a_checkpoint_is_refused(config):
    train(config)
    changes = {"training.optimizer.learning_rate": 0.5, "callbacks.ema.decay": 0.9}
    with pytest.raises(FileExistsError) as caught:
        train(config, AUTO | changes)
    message = str(caught.value)
    assert "training.optimizer.learning_rate=0.001 (now 0.5)" in message
    assert "callbacks.ema='no such key' (now {'_target_': None, 'decay': 0.9})" in message
    assert "continue it with the new values by --resume-from-checkpoint latest" in message


def test_a_directory_that_does_not_tell_whose_it_is_is_refused(config, begun):
    (begun / "resolved_config.yaml").write_text("models: [")
    with pytest.raises(FileExistsError, match="resolved_config.yaml that can't be read: .*no valid YAML"):
        train(config, AUTO)
    (begun / "resolved_config.yaml").unlink()
    with pytest.raises(FileExistsError, match=r"holds metrics\.jsonl, .*checkpoints and no resolved_config\.yaml"):
        train(config, AUTO)


def test_a_run_that_was_moved_is_the_same(config, begun, tmp_path):
    begun.rename(tmp_path / "elsewhere")
    train(config, AUTO | {"training.output_dir": str(tmp_path / "elsewhere")})
    assert complete_checkpoints(tmp_path / "elsewhere")[-1].name == "step-00000004"


def test_auto_and_overwrite_are_refused(config, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match="overwrite removes a run and resume_from_checkpoint=auto goes on with it"):
        load_run_config(tmp_path / "run.yaml", AUTO | {"training.overwrite": True})
