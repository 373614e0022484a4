import subprocess
import sys
import types
from pathlib import Path

import pytest

from fv_distill import __version__, cli


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fv_distill", *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "words", [(), ("nonsense",), ("train",), ("export", "--checkpoint", "x"), ("convert-wan",), ("demo", "--sed", "1")]
)
def test_wrong_usage_is_status_2(words):
    result = run(*words)
    assert result.returncode == 2
    assert "usage: fv-distill" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_user_error_is_one_message_and_debug_shows_the_traceback(tmp_path):
    words = ("train", "--config", str(tmp_path / "none.yaml"))
    result = run(*words)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: the config {tmp_path}/none.yaml does not exist\n")
    assert "Traceback" not in result.stderr
    assert "Traceback" in run(*words, "--debug").stderr


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"fv_distill {__version__}\n"


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert [name for name in cli.COMMANDS if name not in text] == []


def test_train_hands_on_the_config(monkeypatch, tmp_path):
    from fv_distill.training import run as training_run

    path = tmp_path / "run.yaml"
    path.write_text(
        "models: {student: {init_from: x, trainable: true}}\nmethod: {_target_: fv_distill.methods.FineTuneMethod}\n"
        "training: {output_dir: out, data: {data_path: rows}, loop: {max_train_steps: 1}}\n"
    )
    seen = []
    monkeypatch.setattr(training_run, "run_training", lambda config, *, dry_run: seen.append((config, dry_run)))
    cli.main(["train", "--config", str(path), "--dry-run", "--training.seed", "5"])
    [(config, dry_run)] = seen
    assert config.training.seed == 5
    assert dry_run


@pytest.mark.parametrize(("flags", "ema"), [([], True), (["--ema"], True), (["--no-ema"], False)])
def test_export_hands_on_its_arguments(monkeypatch, tmp_path, flags, ema):
    seen = []
    module = types.SimpleNamespace(convert=lambda *args, **kwargs: seen.append((args, kwargs)))
    monkeypatch.setitem(sys.modules, "fv_distill.export.convert", module)
    cli.main(["export", "--checkpoint", "a", "--output-dir", str(tmp_path / "b"), "--role", "critic", *flags])
    expected = {"config": None, "role": "critic", "ema": ema, "overwrite": False, "dtype": None, "export_format": None}
    assert seen == [((Path("a"), tmp_path / "b"), expected)]


def test_merge_is_a_format(monkeypatch, tmp_path):
    seen = []
    module = types.SimpleNamespace(convert=lambda *args, **kwargs: seen.append(kwargs["export_format"]))
    monkeypatch.setitem(sys.modules, "fv_distill.export.convert", module)
    for flags in (["--merge"], ["--format", "comfyui"]):
        cli.main(["export", "--checkpoint", "a", "--output-dir", str(tmp_path / "b"), *flags])
    assert seen == ["merged", "comfyui"]


def test_demo_runs_the_script_of_the_checkout(monkeypatch, tmp_path):
    script = tmp_path / "demo.py"
    script.write_text(f"import sys\nopen({str(tmp_path / 'seen')!r}, 'w').write(' '.join(sys.argv[1:]))\nsys.exit(3)\n")
    monkeypatch.setattr(cli, "demo_script", lambda: script)
    with pytest.raises(SystemExit) as caught:
        cli.main(["demo", "--seed", "2", "--fast", "--output-dir", "here"])
    assert caught.value.code == 3
    assert (tmp_path / "seen").read_text() == "--seed 2 --output-dir here --fast"


def test_demo_without_a_checkout_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli.fv_distill, "__file__", str(tmp_path / "site-packages/fv_distill/__init__.py"))
    with pytest.raises(SystemExit) as caught:
        cli.main(["demo"])
    assert caught.value.code == 2
    assert "clone the repository" in capsys.readouterr().err
