"""What is in a checkpoint: safetensors and JSON alone, any optimizer's state, and networks of callbacks."""

import json
import pickletools
import zipfile

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import (
    assert_same_state,
    assert_same_tensors,
    checkpoint,
    dmd2_config,
    finetune_config,
    groups,
    metadata,
    metric_lines,
    train,
)

from fv_distill.export import load_role_weights

LATEST = {"training.checkpoint.resume_from_checkpoint": "latest"}
ADAMW = {"_target_": "torch.optim.AdamW", "learning_rate": 1e-3}
WITHOUT_ADAM = {"betas": None, "eps": None, "learning_rate": 0.01}

SHADOW = """
from fv_distill.callbacks import Callback

class Shadow(Callback):
    def on_train_start(self, trainer):
        weights = trainer.models["student"].transformer.state_dict()
        self.shadow = {name: value.clone() for name, value in weights.items()}

    def on_training_step_end(self, trainer, metrics):
        for value in self.shadow.values():
            value.add_(trainer.step)

    def tensors(self):
        return {"shadow": self.shadow}
"""


def is_pickle(path):
    """Whether a file is a pickle of any protocol, or an archive as `torch.save` makes them."""
    if zipfile.is_zipfile(path):
        return True
    try:
        list(pickletools.genops(path.read_bytes()))
    except ValueError:
        return False
    return True


def test_the_pickle_detector_can_fire(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "new.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert is_pickle(tmp_path / "new.pt")
    assert (tmp_path / "old.pt").read_bytes()[0] == 0x80, "a pickle's first byte"


def test_no_file_is_a_pickle(tiny_wan, tiny_rows, tmp_path):
    output_dir = train(dmd2_config(tiny_wan, tiny_rows, tmp_path / "run"))
    files = sorted(checkpoint(output_dir, 4).iterdir())
    names = ("critic", "critic.optimizer", "ema", "student", "student.optimizer")
    assert [path.name for path in files] == sorted(
        ["metadata.json", "tensors.json", *[f"{name}-00000.safetensors" for name in names]]
    )
    for path in files:
        assert not is_pickle(path) and path.read_bytes()[0] != 0x80
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert_same_tensors(
                load_file(path), groups(checkpoint(output_dir, 4))[path.name.removesuffix("-00000.safetensors")]
            )


OPTIMIZERS = {
    "momentum": {"_target_": "torch.optim.SGD", "momentum": 0.9, "nesterov": True, **WITHOUT_ADAM},
    "fused": {**ADAMW, "fused": True},
    "amsgrad": {**ADAMW, "amsgrad": True},
    "adafactor": {"_target_": "torch.optim.Adafactor", "learning_rate": 0.01, "betas": None, "eps": None},
    "muon-like": {"_target_": "my_optimizers.OrthogonalMomentum", **WITHOUT_ADAM},
    "rows": {"_target_": "my_optimizers.Rows", **WITHOUT_ADAM},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_resumes_exactly(tiny_wan, tiny_rows, tmp_path, name):
    config = finetune_config(tiny_wan, tiny_rows, tmp_path / "whole")
    config["training"]["optimizer"] = OPTIMIZERS[name]
    whole = train(config)
    part = {"training.output_dir": str(tmp_path / "parts")}
    train(config, part | {"training.loop.max_train_steps": 2})
    parts = train(config, part | LATEST)
    assert metric_lines(parts) == metric_lines(whole)
    assert_same_state(checkpoint(parts, 4), checkpoint(whole, 4), num_networks=1, num_optimizers=1)
    state = groups(checkpoint(whole, 4))["student.optimizer"]
    assert any(
        not torch.equal(value, groups(checkpoint(whole, 2))["student.optimizer"][key]) for key, value in state.items()
    )
    if name == "muon-like":
        facts = metadata(checkpoint(parts, 4))["optimizers"]["student"]
        assert [group["calls"] for group in facts["groups"]] == [4, 4]
        assert {value["count"] for value in facts["values"].values()} == {4}
        assert {value.dtype for value in state.values()} == {torch.bfloat16}


def test_an_optimizer_that_has_not_stepped_yet(tiny_wan, tiny_rows, tmp_path):
    """The student's first update is at step 2: a checkpoint of step 1 has no state of it, and makes none."""
    config = dmd2_config(tiny_wan, tiny_rows, tmp_path / "whole")
    config["training"]["checkpoint"] = {"every_steps": 1, "keep_last": 4}
    whole = train(config)
    assert "student.optimizer" not in groups(checkpoint(whole, 1)) and "critic.optimizer" in groups(
        checkpoint(whole, 1)
    )
    change = {"training.output_dir": str(tmp_path / "rest")}
    rest = train(config, change | {"training.checkpoint.resume_from_checkpoint": str(checkpoint(whole, 1))})
    assert metric_lines(rest) == metric_lines(whole)[1:]
    assert_same_state(checkpoint(rest, 4), checkpoint(whole, 4), num_networks=3, num_optimizers=2)


def test_options_that_the_config_changes_are_the_new_ones(tiny_wan, tiny_rows, tmp_path):
    config = finetune_config(tiny_wan, tiny_rows, tmp_path / "run")
    config["training"]["optimizer"] = {**ADAMW, "weight_decay": 0.01}
    output_dir = train(config, {"training.loop.max_train_steps": 2})
    train(config, LATEST | {"training.optimizer.weight_decay": 0.5, "training.optimizer.betas": [0.5, 0.99]})
    (group,) = metadata(checkpoint(output_dir, 4))["optimizers"]["student"]["groups"]
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.5, [0.5, 0.99], 1e-8)


def test_a_state_that_can_not_be_saved_is_noticed_at_the_first_update(tiny_wan, tiny_rows, tmp_path):
    config = finetune_config(tiny_wan, tiny_rows, tmp_path / "run")
    config["training"]["optimizer"] = {"_target_": "my_optimizers.History", **WITHOUT_ADAM}
    with pytest.raises(ValueError, match=r"my_optimizers\.History keeps something that a checkpoint can't hold"):
        train(config, {"training.checkpoint.every_steps": 0})
    assert len(metric_lines(tmp_path / "run")) == 1


def test_a_callbacks_network_travels(tiny_wan, tiny_rows, tmp_path, monkeypatch):
    (tmp_path / "my_shadow.py").write_text(SHADOW)
    monkeypatch.syspath_prepend(tmp_path)
    config = finetune_config(tiny_wan, tiny_rows, tmp_path / "run")
    config["callbacks"] = {"shadow": {"_target_": "my_shadow.Shadow"}}
    output_dir = train(config, {"training.loop.max_train_steps": 2})
    train(config, LATEST)
    start = load_file(tiny_wan / "transformer/diffusion_pytorch_model.safetensors")
    shadow = load_role_weights(checkpoint(output_dir, 4), "shadow")
    for name, value in start.items():
        torch.testing.assert_close(shadow[name], value + 1 + 2 + 3 + 4, msg=name)
    config["callbacks"]["twin"] = config["callbacks"]["shadow"]
    with pytest.raises(ValueError, match="twin: another callback has tensors named 'shadow' too"):
        train(config, LATEST | {"training.loop.max_train_steps": 5})
