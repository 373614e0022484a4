"""Classes in the user's own module beside the config."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import finetune_config, write_config

from fv_distill.config import ConfigError, load_run_config, parse_run_config, resolve_target
from fv_distill.config.local_modules import search_beside

ROOT = Path(__file__).resolve().parents[2]
MINE = """\
from fv_distill.callbacks import Callback
from my_numbers import START


class Mine(Callback):
    \"\"\"Counts.\"\"\"

    def __init__(self, every_steps: int = 2, name="{name}"):
        self.every_steps, self.name, self.start = every_steps, name, START

    def on_training_step_end(self, trainer, metrics):
        print(f"{{self.name}} saw step {{trainer.step}} on {{trainer.accelerator.process_index}}")
"""
CALLBACK = "  mine: {_target_: my_callbacks.Mine, every_steps: 3}\n"


@pytest.fixture(autouse=True)
def _forget_folders():
    before = list(sys.meta_path)
    _forget_modules()
    yield
    search_beside(None)
    assert sys.meta_path == before
    _forget_modules()


def _forget_modules():
    """Other tests have modules of these names too, and a process imports a name once."""
    for name in ("my_callbacks", "my_numbers"):
        sys.modules.pop(name, None)


def write_modules(folder: Path, name: str = "mine") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "my_callbacks.py").write_text(MINE.format(name=name))
    (folder / "my_numbers.py").write_text("START = 5\n")
    return folder


@pytest.fixture
def with_callback(run_file):
    write_modules(run_file.parent)
    run_file.write_text(run_file.read_text() + CALLBACK)
    return run_file


def test_a_module_beside_the_config_is_found_and_so_are_those_that_it_imports(with_callback):
    config = load_run_config(with_callback)
    assert config.source_folder == with_callback.parent
    mine = resolve_target(config.callbacks["mine"].target)
    assert mine().start == 5 and mine.__module__ == "my_callbacks"
    assert str(with_callback.parent) not in sys.path


def test_its_keys_are_checked_against_its_signature(with_callback):
    with pytest.raises(ConfigError, match=r"unknown key callbacks\.mine\.every_step; did you mean every_steps\?"):
        load_run_config(with_callback, {"callbacks.mine.every_step": 3})


def test_a_package_beside_the_config_is_found(run_file):
    write_modules(run_file.parent)
    package = run_file.parent / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (run_file.parent / "my_callbacks.py").rename(package / "hooks.py")
    run_file.write_text(run_file.read_text() + "  mine: {_target_: my_package.hooks.Mine}\n")
    load_run_config(run_file)
    assert resolve_target("my_package.hooks.Mine").__module__ == "my_package.hooks"


def test_a_missing_module_says_where_was_looked(run_file):
    run_file.write_text(run_file.read_text() + CALLBACK)
    with pytest.raises(ImportError) as caught:
        load_run_config(run_file)
    message = str(caught.value)
    assert message.startswith("callbacks.mine: _target_ 'my_callbacks.Mine': there is no package 'my_callbacks'")
    assert (
        f"the config's folder {run_file.parent} holds neither my_callbacks.py nor my_callbacks/__init__.py" in message
    )
    assert "not installed, not on PYTHONPATH" in message


def test_a_missing_class_suggests_the_nearest(with_callback):
    with pytest.raises(ImportError, match=r"my_callbacks has no 'Mien'; did you mean Mine\?"):
        load_run_config(with_callback, {"callbacks.mine._target_": "my_callbacks.Mien"})


@pytest.mark.parametrize(
    ("text", "message"),
    [("import nowhere_at_all\n", "No module named 'nowhere_at_all'"), ("def (:\n", "invalid syntax.*line 1")],
)
def test_a_module_that_cannot_be_imported(with_callback, text, message):
    with_callback.with_name("my_callbacks.py").write_text(text)
    with pytest.raises(ImportError, match=f"importing my_callbacks failed: .*{message}"):
        load_run_config(with_callback)


def test_an_installed_module_wins_over_a_file_beside_the_config(run_file):
    run_file.with_name("colorsys.py").write_text("class Mine: ...\n")
    run_file.with_name("numbers.py").write_text("class Number: ...\n")
    load_run_config(run_file)
    with pytest.raises(
        ImportError, match=r"colorsys has no 'Mine'.*colorsys\.py, beside the config, is not used.*rename"
    ):
        resolve_target("colorsys.Mine")
    with pytest.warns(UserWarning, match=r"numbers\.py, beside the config, is not used: 'numbers' is also installed"):
        assert resolve_target("numbers.Number") is __import__("numbers").Number


def test_an_installed_module_wins_once_the_folder_is_in_force(with_callback, monkeypatch):
    with_callback.with_name("colorsys.py").write_text("")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    load_run_config(with_callback)
    assert resolve_target("my_callbacks.Mine")
    assert hasattr(importlib.import_module("colorsys"), "rgb_to_hsv")


def test_the_same_file_by_another_way_is_no_clash(with_callback, monkeypatch, recwarn):
    monkeypatch.syspath_prepend(str(with_callback.parent))
    try:
        load_run_config(with_callback)
        resolve_target("my_callbacks.Mine")
        assert not recwarn.list
    finally:
        del sys.modules["my_callbacks"], sys.modules["my_numbers"]


def test_a_folder_without_code_is_no_module(with_callback):
    """Trackers leave a `wandb` folder; who asks whether such a package is there must not get it."""
    (with_callback.parent / "folder_of_results").mkdir()
    load_run_config(with_callback)
    with pytest.raises(ImportError):
        importlib.import_module("folder_of_results")


def test_nothing_is_offered_before_a_target_asks(run_file):
    write_modules(run_file.parent)
    load_run_config(run_file)
    with pytest.raises(ImportError):
        importlib.import_module("my_callbacks")


def test_two_configs_have_their_own_modules_of_one_name(run_file, tmp_path):
    names, configs = ("first", "second"), []
    for name in names:
        path = write_modules(tmp_path / name, name) / "run.yaml"
        path.write_text(run_file.read_text() + CALLBACK)
        configs.append(load_run_config(path))
    for name, config in zip(names, configs, strict=True):
        search_beside(config.source_folder)
        assert resolve_target("my_callbacks.Mine")().name == name


def test_help_with_a_config_lists_its_callbacks_options(with_callback, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_run_config("text", argv=["--help", "--config", str(with_callback)])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "options of callbacks.mine (my_callbacks.Mine): Counts." in out
    assert "  callbacks.mine.every_steps  (int, default 2)\n  callbacks.mine.name  (default 'mine')" in out
    assert "  callbacks.ema.decay  (float, default 0.9999)" in out


def test_help_works_with_a_bad_config(with_callback, capsys):
    with_callback.with_name("my_callbacks.py").unlink()
    with pytest.raises(SystemExit) as caught:
        parse_run_config("text", argv=["--help", f"--config={with_callback}"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert f"the callbacks of {with_callback} can't be listed: callbacks.mine: _target_ 'my_callbacks.Mine'" in out
    assert "training.optimizer.learning_rate" in out


def run(folder: Path, *words: str) -> str:
    """A process in another directory, without PYTHONPATH to the config's."""
    done = subprocess.run(
        [sys.executable, "-m", *words, "--config", "configs/run.yaml"],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def folder(tiny_wan, tiny_rows, tmp_path):
    config = finetune_config(tiny_wan, tiny_rows, tmp_path / "run")
    config["callbacks"] = {"mine": {"_target_": "my_callbacks.Mine"}}
    write_config(config, write_modules(tmp_path / "configs") / "run.yaml")
    return tmp_path


def test_the_command_finds_it(folder):
    assert "callbacks.mine.every_steps  (int, default 2)" in run(folder, "fv_distill", "train", "--help")


def test_a_script_finds_it_through_accelerates_launcher(folder):
    launcher = ("accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1")
    script = str(ROOT / "examples/train_finetune.py")
    assert "mine saw step 1 on 0" in run(folder, *launcher, script, "--training.loop.max_train_steps", "1")
