"""Every example script, as a user starts it: two steps, saved, resumed, identical; and mistakes that end readably."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import (
    assert_same_state,
    causal_kd_config,
    checkpoint,
    dfsft_config,
    dmd2_config,
    finetune_config,
    kd_config,
    metadata,
    metric_lines,
    metrics,
    self_forcing_config,
    train,
    write_config,
)

from fv_distill.data import write_rows

EXAMPLES = Path(__file__).parents[2] / "examples"
ACCELERATE = ("accelerate.commands.launch", "--config_file", str(EXAMPLES.parent / "configs/accelerate/cpu.yaml"))


def start(*words, status=0):
    """Run Python with these arguments and return what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, check=False, env=environment
    )
    assert result.returncode == status, result.stderr[-3000:]
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("scripts")


@pytest.fixture(scope="module")
def dmd2(tiny_wan, tiny_rows, folder):
    return write_config(dmd2_config(tiny_wan, tiny_rows, folder / "dmd2"), folder / "dmd2.yaml")


@pytest.fixture(scope="module")
def dmd2_in_two_parts(dmd2, folder):
    """`train_dmd2.py` for two steps, then resumed to four."""
    script = EXAMPLES / "train_dmd2.py"
    start(script, "--config", dmd2, "--training.loop.max_train_steps", 2)
    assert len(metric_lines(folder / "dmd2")) == 2
    out, _ = start(script, "--config", dmd2, "--resume-from-checkpoint", "latest")
    assert "resumed from" in out and "step-00000002 at step 2" in out
    return folder / "dmd2"


@pytest.fixture(scope="module")
def dmd2_from_yaml_alone(dmd2, folder):
    """`fv-distill train` for four steps at once."""
    start("-m", "fv_distill", "train", "--config", dmd2, "--output-dir", folder / "yaml")
    return folder / "yaml"


def test_dmd2_resumed_equals_uninterrupted_and_the_yaml_alone(dmd2_in_two_parts, dmd2_from_yaml_alone):
    assert metric_lines(dmd2_in_two_parts) == metric_lines(dmd2_from_yaml_alone)
    assert [line["step"] for line in metrics(dmd2_in_two_parts)] == [1, 2, 3, 4]
    last = [checkpoint(run, 4) for run in (dmd2_in_two_parts, dmd2_from_yaml_alone)]
    assert_same_state(*last, num_networks=3, num_optimizers=2)
    assert metadata(last[0])["world_size"] == 1 and metadata(last[0])["sharded"] is False


def test_the_bare_loop_has_the_same_losses_to_the_last_bit(dmd2, dmd2_from_yaml_alone, folder):
    start(EXAMPLES / "bare_loop_dmd2.py", "--config", dmd2, "--output-dir", folder / "bare")
    expected = [
        {key: value for key, value in line.items() if key == "step" or key.startswith("loss/")}
        for line in metrics(dmd2_from_yaml_alone)
    ]
    assert metrics(folder / "bare") == expected
    assert ["loss/student" in line for line in expected] == [False, True, False, True]


@pytest.mark.parametrize(
    ("script", "make", "num_networks", "num_optimizers"),
    [
        ("train_kd.py", kd_config, 1, 1),
        ("train_kd.py", causal_kd_config, 1, 1),
        ("train_dfsft.py", dfsft_config, 1, 1),
        ("train_self_forcing.py", self_forcing_config, 3, 2),
    ],
    ids=["kd", "causal kd", "dfsft", "self-forcing"],
)
def test_the_causal_line_resumed_equals_uninterrupted(
    tiny_wan, tiny_rows, tmp_path, script, make, num_networks, num_optimizers
):
    """The script, ended after two steps and resumed; and four steps at once from the YAML alone."""
    config = make(tiny_wan, tiny_rows, tmp_path / "parts")
    words = (EXAMPLES / script, "--config", write_config(config, tmp_path / "run.yaml"))
    start("-m", *ACCELERATE, *words, "--training.loop.max_train_steps=2")
    start(*words, "--resume-from-checkpoint", "latest")
    whole = train(config, {"training.output_dir": str(tmp_path / "whole")})
    assert metric_lines(tmp_path / "parts") == metric_lines(whole)
    assert [line["step"] for line in metrics(whole)] == [1, 2, 3, 4]
    last = [checkpoint(run, 4) for run in (tmp_path / "parts", whole)]
    assert_same_state(*last, num_networks=num_networks, num_optimizers=num_optimizers)


def test_finetune_resumed_equals_uninterrupted(tiny_wan, tiny_rows, folder):
    config = finetune_config(tiny_wan, tiny_rows, folder / "finetune")
    path = write_config(config, folder / "finetune.yaml")
    words = (EXAMPLES / "train_finetune.py", "--config", path)
    start("-m", *ACCELERATE, *words, "--training.loop.max_train_steps=2")
    start(*words, "--resume-from-checkpoint", checkpoint(folder / "finetune", 2))
    whole = train(config, {"training.output_dir": str(folder / "whole")})
    assert metric_lines(folder / "finetune") == metric_lines(whole)
    last = [checkpoint(run, 4) for run in (folder / "finetune", whole)]
    assert_same_state(*last, num_networks=1, num_optimizers=1)


# Mistakes: in this process, as each start of Python with torch takes seconds.


@pytest.fixture
def fails(monkeypatch, capsys):
    """Run a script that ends with status 2 and return its message."""

    def run(script, *words):
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        captured = capsys.readouterr()
        assert caught.value.code == 2
        assert captured.err.startswith("error: ") and "Traceback" not in captured.err + captured.out
        return captured.err

    return run


@pytest.fixture(params=["train_dmd2.py", "train_finetune.py"])
def run(request, tiny_wan, tiny_rows, tmp_path):
    """A script and its config."""
    make = dmd2_config if request.param == "train_dmd2.py" else finetune_config
    return request.param, "--config", write_config(make(tiny_wan, tiny_rows, tmp_path / "run"), tmp_path / "run.yaml")


def test_an_unknown_key(fails, run):
    message = fails(*run, "--training.optimizr.learning_rate", "1")
    assert "unknown key training.optimizr; did you mean optimizer?" in message


def test_an_unknown_option_of_the_method(fails, run):
    assert "method.sigma_densty" in fails(*run, "--method.sigma_densty", "uniform")


def test_a_model_that_is_not_there(fails, run, tmp_path):
    message = fails(*run, "--models.student.init_from", tmp_path / "nowhere")
    assert "models.student" in message and "nowhere" in message
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_missing_role(fails, tiny_wan, tiny_rows, tmp_path):
    config = dmd2_config(tiny_wan, tiny_rows, tmp_path / "run")
    del config["models"]["critic"]
    message = fails("train_dmd2.py", "--config", write_config(config, tmp_path / "run.yaml"))
    assert "models.critic is missing from the config; it has student, teacher" in message


def test_latents_that_do_not_fit(fails, run, tmp_path):
    import torch
    from tiny_models import TEXT_DIM

    row = {
        "id": "0", "file_name": "0.mp4", "caption": "a digit", "media_type": "video", "width": 32, "height": 32,
        "num_frames": 9, "duration_sec": 1.0, "fps": 9.0,
        "vae_latent": torch.zeros(5, 3, 4, 4), "text_embedding": torch.zeros(3, TEXT_DIM),
    }  # fmt: skip
    write_rows(tmp_path / "rows" / "rows.parquet", [row])
    message = fails(*run, "--training.data.data_path", tmp_path / "rows")
    assert "5" in message and "4" in message and "channels" in message


def test_no_data(fails, run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty" in fails(*run, "--training.data.data_path", tmp_path / "empty")
    assert "nowhere" in fails(*run, "--training.data.data_path", tmp_path / "nowhere")


def test_another_methods_config(fails, run):
    other = {"train_dmd2.py": "train_finetune.py", "train_finetune.py": "train_dmd2.py"}[run[0]]
    assert "but this script trains" in fails(other, *run[1:])


def test_the_bare_loop_too_names_an_unknown_key(fails, dmd2):
    assert "training.lop" in fails("bare_loop_dmd2.py", "--config", dmd2, "--training.lop.max_train_steps", "1")


def test_the_bare_loop_too_names_a_missing_model(fails, dmd2, tmp_path):
    words = ("--config", dmd2, "--models.student.init_from", tmp_path / "nowhere")
    assert "nowhere" in fails("bare_loop_dmd2.py", *words)


def test_a_process_ends_with_status_2_and_one_message(dmd2, tmp_path):
    words = (EXAMPLES / "train_dmd2.py", "--config", dmd2, "--models.teacher.init_from", tmp_path / "nowhere")
    words = (*words, "--output-dir", tmp_path / "run")
    _, err = start(*words, status=2)
    assert err.count("error: ") == 1 and "models.teacher" in err and "Traceback" not in err


def test_debug_shows_the_traceback(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [*map(str, run), "--debug", f"--models.student.init_from={tmp_path / 'nowhere'}"])
    with pytest.raises(FileNotFoundError, match="models.student"):
        runpy.run_path(str(EXAMPLES / run[0]), run_name="__main__")
