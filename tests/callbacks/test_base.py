import pytest
from tiny_runs import checkpoint, dmd2_config, finetune_config, metadata, metric_lines, metrics, train

from fv_distill.callbacks import Callback, CallbackDict, EMACallback, GradNormClipCallback
from fv_distill.config.schema import ConfigError


class Recorder(Callback):
    """Remembers its calls, and what it was made with."""

    def __init__(self, name="x", training_config=None):
        self.name, self.training_config, self.calls = name, training_config, []

    def on_train_start(self, trainer):
        self.calls.append((self.name, trainer))

    def state_dict(self):
        return {"name": self.name}

    def load_state_dict(self, state):
        self.name = state["name"]


class NoCallback:
    """Anything."""


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """Under pytest's importlib mode a test module is not found by its name."""
    import sys
    import types

    module = types.ModuleType("recorders")
    module.Recorder, module.NoCallback = Recorder, NoCallback
    monkeypatch.setitem(sys.modules, "recorders", module)


def test_built_in_names_need_no_target():
    callbacks = CallbackDict({"grad_clip": {"max_grad_norm": 0.5}, "ema": {}}, None)
    assert list(callbacks) == ["grad_clip", "ema"]
    assert isinstance(callbacks["grad_clip"], GradNormClipCallback) and callbacks["grad_clip"].max_grad_norm == 0.5
    assert isinstance(callbacks["ema"], EMACallback) and callbacks["ema"].decay == 0.9999


def test_a_target_wins_over_a_built_in_name():
    assert isinstance(CallbackDict({"ema": {"_target_": "recorders.Recorder"}}, None)["ema"], Recorder)


def test_neither_built_in_nor_a_target():
    with pytest.raises(
        ValueError,
        match=r"callbacks\.emma has no _target_.*ema, grad_clip, nan_guard, profiler, throughput, validation",
    ):
        CallbackDict({"emma": {"decay": 0.5}}, None)


def test_a_target_that_is_no_callback_names_both():
    with pytest.raises(TypeError, match=r"callbacks\.mine: recorders\.NoCallback is not a subclass of .*Callback"):
        CallbackDict({"mine": {"_target_": "recorders.NoCallback"}}, None)
    with pytest.raises(TypeError, match=r"callbacks\.mine: math\.pi is not a subclass"):
        CallbackDict({"mine": {"_target_": "math.pi"}}, None)


def test_a_target_that_is_not_there():
    with pytest.raises(ImportError, match="Recordr"):
        CallbackDict({"mine": {"_target_": "recorders.Recordr"}}, None)


def test_an_option_that_the_class_lacks():
    with pytest.raises(ConfigError, match=r"(?s)max_norm.*max_grad_norm"):
        CallbackDict({"grad_clip": {"max_norm": 1.0}}, None)


def test_the_training_config_goes_to_those_who_ask():
    config = object()
    callbacks = CallbackDict({"mine": {"_target_": "recorders.Recorder"}, "ema": {}}, config)
    assert callbacks["mine"].training_config is config


def test_hooks_are_called_in_order():
    callbacks = CallbackDict({}, None)
    calls = []
    for name in ("b", "a"):
        recorder = Recorder(name)
        recorder.calls = calls
        callbacks.add(name, recorder)
    callbacks.call("on_train_start", "the trainer")
    assert calls == [("b", "the trainer"), ("a", "the trainer")]


def test_states_go_to_their_names_and_a_new_callback_starts_fresh():
    old = CallbackDict({"a": {"_target_": "recorders.Recorder", "name": "first"}}, None)
    configs = {name: {"_target_": "recorders.Recorder", "name": "fresh"} for name in ("new", "a")}
    new = CallbackDict(configs, None)
    new.load_state_dict({**old.state_dict(), "gone": {"name": "nobody"}})
    assert new.state_dict() == {"new": {"name": "fresh"}, "a": {"name": "first"}}


def test_every_hook_does_nothing_by_default():
    trainer = object()
    callback = Callback()
    for hook in ("on_before_prepare", "on_train_start", "on_validation_begin", "on_validation_end", "on_train_end"):
        assert getattr(callback, hook)(trainer) is None
    metrics = {}
    callback.on_before_optimizer_step(trainer, "student", metrics)
    callback.on_after_optimizer_step(trainer, "student")
    callback.on_training_step_end(trainer, metrics)
    assert metrics == {} and callback.state_dict() == {}


COUNT = """\
from fv_distill.callbacks import Callback


class Count(Callback):
    def __init__(self):
        self.updates = {}

    def on_before_optimizer_step(self, trainer, role, metrics):
        self.updates[role] = self.updates.get(role, 0) + 1
        metrics[f"count/{role}"] = metrics[f"loss/{role}"] * 0 + self.updates[role]

    def state_dict(self):
        return {"updates": self.updates}

    def load_state_dict(self, state):
        self.updates = dict(state["updates"])
"""


def test_a_resumed_run_goes_on_with_the_states(tiny_wan, tiny_rows, tmp_path):
    """Of a callback beside the config, read from the checkpoint's JSON."""
    (tmp_path / "counting.py").write_text(COUNT)
    config = dmd2_config(tiny_wan, tiny_rows, tmp_path / "run")
    config["callbacks"]["count"] = {"_target_": "counting.Count"}
    whole = train(config)
    assert metadata(checkpoint(whole, 2))["callbacks"]["count"] == {"updates": {"student": 1, "critic": 2}}
    resumed = train(
        config,
        {
            "training.output_dir": str(tmp_path / "resumed"),
            "training.checkpoint.resume_from_checkpoint": str(checkpoint(whole, 2)),
        },
    )
    assert metric_lines(resumed) == metric_lines(whole)[2:] and metrics(resumed)[-1]["count/critic"] == 4
    states = [metadata(checkpoint(run, 4))["callbacks"] for run in (whole, resumed)]
    assert states[0] == states[1]


def test_a_run_is_closed_however_it_ends(tiny_wan, tiny_rows, tmp_path):
    (tmp_path / "closing.py").write_text(CLOSE)
    config = finetune_config(tiny_wan, tiny_rows, tmp_path / "run")
    config["callbacks"] = {"close": {"_target_": "closing.Close"}}
    train(config, {"training.loop.max_train_steps": 2})
    assert (tmp_path / "run" / "hooks.txt").read_text() == "begin 1\nbegin 2\nclosed at 2\n"
    with pytest.raises(ArithmeticError):
        train(config, {"training.output_dir": str(tmp_path / "failing"), "callbacks.close.fail_at": 2})
    assert (tmp_path / "failing" / "hooks.txt").read_text() == "begin 1\nbegin 2\nclosed at 2\n"


CLOSE = """\
from pathlib import Path
from fv_distill.callbacks import Callback


class Close(Callback):
    def __init__(self, fail_at=None):
        self.fail_at, self.lines = fail_at, []

    def on_training_step_begin(self, trainer):
        self.lines.append(f"begin {trainer.step}")
        assert len(trainer.micro_batches) == 1
        if trainer.step == self.fail_at:
            raise ArithmeticError

    def on_close(self, trainer):
        self.lines.append(f"closed at {trainer.step}")
        folder = Path(trainer.config.training.output_dir)
        (folder / "hooks.txt").write_text("\\n".join(self.lines) + "\\n")
"""
