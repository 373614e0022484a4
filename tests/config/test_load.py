import pytest

from fv_distill.config import ConfigError, dump_run_config, load_run_config


def write(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    return path


def test_values_arrive_typed(run_file):
    config = load_run_config(run_file)
    assert config.training.optimizer.learning_rate == 2e-4
    assert config.training.optimizer.betas == (0.0, 0.99)
    assert config.training.data.latent_shape == (4, 3, 4, 4)
    assert config.models["student"].trainable and not config.models["teacher"].trainable


def test_interpolation_is_resolved(run_file):
    assert load_run_config(run_file).models["critic"].init_from == "somewhere/teacher"


def test_method_options_are_checked_and_written_out(run_file):
    options = load_run_config(run_file).method.options
    assert options["generator_update_interval"] == 3
    assert options["dmd_denoising_steps"] == [1000, 750, 500, 250]


def test_the_source_is_kept_as_written(run_file):
    assert load_run_config(run_file).source_text == run_file.read_text()


def test_the_resolved_config_loads_to_itself(run_file, tmp_path):
    awkward = {
        "training.optimizer.eps": 1e-5,
        "training.tracker.run_name": "1e-5",
        "training.data.data_path": {"a/long/path" * 10: 2, "b": 1},
        "models.student.negative_prompt": "yes: no # [null] ä\nsecond line",
    }
    config = load_run_config(run_file, awkward)
    assert config.training.tracker.run_name == "1e-5"
    text = dump_run_config(config)
    again = load_run_config(write(tmp_path, text))
    assert again == config
    assert dump_run_config(again) == text
    assert load_run_config(run_file) != config


def test_a_literal_dollar_brace_survives_the_round_trip(run_file, tmp_path):
    config = load_run_config(run_file, [r"--models.student.negative_prompt=\${x}"])
    assert config.models["student"].negative_prompt == "${x}"
    assert load_run_config(write(tmp_path, dump_run_config(config))) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "--training.optimizer.learning_rat=1",
            ["unknown key training.optimizer.learning_rat", "did you mean learning_rate"],
        ),
        ("--training.learning_rate=1", ["training.learning_rate", "did you mean training.optimizer.learning_rate"]),
        ("--trainig.seed=1", ["unknown key trainig", "did you mean training"]),
        ("--training.loop.zzz=1", ["known keys here", "max_train_steps"]),
        (
            "--method.genrator_update_interval=1",
            ["unknown key method.genrator_update_interval", "generator_update_interval"],
        ),
        ("--method.cfg_uncond.txt=keep", ["method.cfg_uncond.txt", "did you mean text"]),
        ("--method.cfg_uncond.text=foo", ["method.cfg_uncond.text='foo'", "'keep'"]),
        ("--method.generator_update_interval=0", ["method.generator_update_interval=0", "greater than or equal to 1"]),
        ("--method.dmd_denoising_steps=[500, 250]", ["method.dmd_denoising_steps=[500, 250]", "1000"]),
        ("--training.seed=x", ["training.seed='x'", "integer"]),
        ("--training.data.caption_dropout=2", ["training.data.caption_dropout=2", "less than or equal to 1"]),
        ("--training.data.data_path=[1]", ["training.data.data_path=[1]", "string", "mapping"]),
        ("--training.data.data_path={rows: 0}", ["training.data.data_path"]),
        ("--models.student.init_from=null", ["models.student.init_from=None", "string"]),
        ("--callbacks.ema.decya=0.5", ["unknown key callbacks.ema.decya", "did you mean decay"]),
        (
            "--callbacks.nothing.every=1",
            ["callbacks.nothing", "_target_", "ema, grad_clip, nan_guard, profiler, throughput, validation"],
        ),
        ("--models.teacher.flow_shfit=3", ["unknown key models.teacher.flow_shfit", "did you mean flow_shift"]),
        ("--training.optimizer.lr=1", ["unknown key training.optimizer.lr", "learning_rate"]),
        ("--training.optimizer.momentum=0.9", ["unknown key training.optimizer.momentum", "amsgrad"]),
        ("--training.output_dir=${nope}", ["training.output_dir", "nope"]),
        ("--training.output_dir=???", ["training.output_dir"]),
    ],
)
def test_a_bad_value_or_key_is_named_with_what_is_allowed(run_file, override, words):
    with pytest.raises(ConfigError) as caught:
        load_run_config(run_file, [override])
    assert [word for word in words if word not in str(caught.value)] == []


def test_only_the_furthest_member_of_a_union_is_reported(run_file):
    with pytest.raises(ConfigError) as caught:
        load_run_config(run_file, {"training.data.data_path": {"more": "often"}})
    assert str(caught.value).startswith("training.data.data_path.more='often': ")
    assert "\n" not in str(caught.value)


def test_every_problem_gets_a_line(run_file):
    with pytest.raises(ConfigError) as caught:
        load_run_config(run_file, ["--training.seed=-1", "--training.lop=1"])
    assert len(str(caught.value).splitlines()) == 2


def test_a_missing_section_is_named(tmp_path):
    path = write(tmp_path, "models: {student: {init_from: x}}\nmethod: {_target_: fv_distill.methods.FineTuneMethod}\n")
    with pytest.raises(ConfigError, match="training is missing"):
        load_run_config(path)


def test_free_keys_go_to_classes_that_take_them(run_file):
    config = load_run_config(run_file, ["--training.optimizer.amsgrad", "true"])
    assert config.training.optimizer.as_kwargs()["amsgrad"] is True


def test_unknown_keys_can_be_warnings(run_file):
    overrides = ["--allow_unknown_keys=true", "--training.sed=1", "--method.foo.bar=1", "--callbacks.ema.decya=1"]
    with pytest.warns(UserWarning) as caught:
        config = load_run_config(run_file, overrides)
    messages = [str(warning.message) for warning in caught]
    for key in ("training.sed", "method.foo", "callbacks.ema.decya"):
        assert any(f"unknown key {key};" in message for message in messages)
    plain = load_run_config(run_file, ["--allow_unknown_keys=true"])
    assert config == plain


def test_wrong_values_are_errors_even_with_unknown_keys_allowed(run_file):
    with pytest.warns(UserWarning), pytest.raises(ConfigError, match=r"training\.seed=-1"):
        load_run_config(run_file, ["--allow_unknown_keys=true", "--training.sed=1", "--training.seed=-1"])


def test_a_method_by_its_full_path_is_checked_too(run_file):
    full_path = "--method._target_=fv_distill.methods.dmd2.DMD2Method"
    assert load_run_config(run_file, [full_path]).method.options["reuse_rollout"] is True
    with pytest.raises(ConfigError, match=r"unknown key method\.foo"):
        load_run_config(run_file, [full_path, "--method.foo=1"])


def test_a_target_that_is_no_method_is_refused(run_file):
    with pytest.raises(ConfigError, match=r"method\._target_='fv_distill\.models\.WanModel' is no training method"):
        load_run_config(run_file, ["--method._target_=fv_distill.models.WanModel"])


def test_a_missing_target_names_its_section(run_file):
    with pytest.raises(ImportError, match=r"callbacks\.mine: .*no package 'nowhere'"):
        load_run_config(run_file, ["--callbacks.mine={_target_: nowhere.Mine, a: 1}"])
    load_run_config(run_file, ["--callbacks.mine={_target_: nowhere.Mine, a: 1}"], check_signatures=False)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist"):
        load_run_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a directory"):
        load_run_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models:\n  a: [1, 2\nmethod: x\n", r"bad\.yaml, line \d"),
        ("a: 1\na: 2\n", "duplicate key"),
        ("- 1\n- 2\n", "holds a list"),
        ("just words", "holds a single value"),
        ("", "holds nothing"),
    ],
)
def test_a_file_that_is_no_config_says_what_it_holds(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_run_config(write(tmp_path, text))


def test_a_binary_file_is_refused(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="no text file"):
        load_run_config(path)


def test_environment_variables_are_read(run_file, monkeypatch):
    monkeypatch.setenv("RUN_FOLDER", "elsewhere")
    config = load_run_config(run_file, ["--training.output_dir", "${oc.env:RUN_FOLDER}/x"])
    assert config.training.output_dir == "elsewhere/x"


@pytest.mark.parametrize("variable", ["HF_TOKEN", "WANDB_API_KEY", "my_password"])
def test_secrets_are_refused_and_not_shown(run_file, monkeypatch, variable):
    monkeypatch.setenv(variable, "hunter2")
    with pytest.raises(ConfigError, match=variable) as caught:
        load_run_config(run_file, ["--training.tracker.run_name", f"${{oc.env:{variable},none}}"])
    assert "training.tracker.run_name" in str(caught.value)
    assert "hunter2" not in str(caught.value)
