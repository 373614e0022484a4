import pytest

from fv_distill.config import describe_keys, parse_run_config
from fv_distill.config.describe import all_keys
from fv_distill.config.schema import RunConfig
from fv_distill.methods import OPTIONS_BY_TARGET

DMD2 = "fv_distill.methods.DMD2Method"


def parse(run_file, *words, **kwargs):
    return parse_run_config("text", argv=["--config", str(run_file), *words], **kwargs)


def failure(capsys, run_file, *words, **kwargs) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(run_file, *words, **kwargs)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_flags_and_dotted_overrides_mix(run_file):
    config, command_line = parse(
        run_file,
        *("--training.optimizer.learning_rate", "1e-5", "--dry-run", "--method.real_score_guidance_scale=-0"),
        *("--output-dir", "null: [odd", "--overwrite", "--training.seed", "4"),
        method_target=DMD2,
    )
    training = config.training
    assert (training.optimizer.learning_rate, training.seed) == (1e-5, 4)
    assert (training.output_dir, training.overwrite) == ("null: [odd", True)
    assert command_line.dry_run and not command_line.debug


@pytest.mark.parametrize("where", ["latest", "outputs/run/checkpoints/step-00000001"])
def test_resume_sets_its_key(run_file, where):
    config, _ = parse(run_file, "--resume-from-checkpoint", where)
    assert config.training.checkpoint.resume_from_checkpoint == where


def test_user_errors_are_one_message_and_status_2(run_file, capsys):
    message = failure(capsys, run_file, "--training.sed", "1")
    assert message.startswith("error: unknown key training.sed; did you mean seed?")
    assert "Traceback" not in message


def test_a_flag_with_underscores_finds_its_key(run_file, capsys):
    assert "training.checkpoint.resume_from_checkpoint" in failure(
        capsys, run_file, "--resume_from_checkpoint", "latest"
    )


def test_debug_lets_the_error_through(run_file):
    with pytest.raises(ValueError, match=r"training\.sed"):
        parse(run_file, "--debug", "--training.sed=1")


def test_a_script_refuses_the_config_of_another_method(run_file, capsys):
    assert "this script trains fv_distill.methods.FineTuneMethod" in failure(
        capsys, run_file, method_target="fv_distill.methods.FineTuneMethod"
    )
    parse(run_file, "--method._target_=fv_distill.methods.dmd2.DMD2Method", method_target=DMD2)


def test_config_is_required(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_run_config("text", argv=[])
    assert caught.value.code == 2
    assert "--config" in capsys.readouterr().err


def test_help_lists_every_key_with_type_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_run_config("what it does", argv=["--help"], method_target=DMD2)
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert "what it does" in text
    assert [key for key in all_keys(RunConfig) if f"  {key}  (" not in text] == []
    assert [key for key in all_keys(OPTIONS_BY_TARGET[DMD2], "method") if f"  {key}  (" not in text] == []
    assert "method.sigma_density" not in text
    assert "training.optimizer.learning_rate  (float, default 1e-05)" in text
    assert "training.data.data_path  (str or mapping of str to int, required)" in text


def test_help_of_the_general_command_lists_the_options_of_all_methods():
    text = describe_keys()
    for kind in OPTIONS_BY_TARGET.values():
        assert [key for key in all_keys(kind, "method") if f"  {key}  (" not in text] == []


def test_every_key_is_described():
    lines = describe_keys().splitlines()
    keys = [number for number, line in enumerate(lines) if line.startswith("  ") and line[2] != " "]
    assert len(keys) > 60
    assert [lines[number] for number in keys if not lines[number + 1].startswith("      ")] == []
