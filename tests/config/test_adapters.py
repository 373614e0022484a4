"""What the config says of adapters and shared networks, and what it refuses."""

import copy

import pytest
import yaml

from fv_distill.config import ConfigError, dump_run_config, load_run_config

LORA = {"enable": True, "rank": 4}
SHARED = {"share_base_with": "teacher", "trainable": True, "lora": LORA}


@pytest.fixture
def load(run_file, tmp_path):
    """The config with some roles replaced."""
    config = yaml.safe_load(run_file.read_text())
    config["models"]["teacher"] = {"init_from": "somewhere/teacher"}
    config["models"]["critic"] = {"init_from": "somewhere/teacher", "trainable": True}

    def load(**models):
        changed = copy.deepcopy(config)
        changed["models"] |= models
        path = tmp_path / "shared.yaml"
        path.write_text(yaml.safe_dump(changed))
        return load_run_config(path)

    return load


def test_a_role_on_a_shared_base_comes_from_where_that_comes_from(load, tmp_path):
    config = load(student=SHARED, critic=SHARED)
    assert config.models["student"].init_from == "somewhere/teacher"
    assert config.models["critic"].lora.rank == 4 and config.models["critic"].lora.target_modules == "attention"
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_run_config(config))
    assert load_run_config(path) == config


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (
            {"student": {**SHARED, "trainable": False}},
            "models.student.lora.enable is true but models.student.trainable",
        ),
        ({"student": {**SHARED, "lora": {}}}, "set models.student.lora.enable: true"),
        ({"student": {**SHARED, "share_base_with": "teecher", "init_from": "x"}}, "'teecher' is no other role"),
        ({"student": {**SHARED, "share_base_with": "student", "init_from": "x"}}, "'student' is no other role"),
        ({"student": SHARED, "teacher": {"init_from": "x", "trainable": True}}, "has to be a frozen role"),
        ({"student": {**SHARED, "init_from": "elsewhere"}}, "models.student.init_from='elsewhere' contradicts"),
        ({"student": {**SHARED, "weights": "w.safetensors"}}, "models.student.weights belongs to the shared network"),
        ({"student": {**SHARED, "dtype": "bfloat16"}}, "set models.teacher.dtype"),
        (
            {"student": {**SHARED, "lora": {**LORA, "rang": 4}}},
            "unknown key models.student.lora.rang; did you mean rank",
        ),
        ({"student": {**SHARED, "lora": {**LORA, "rank": 0}}}, "models.student.lora.rank=0"),
        (
            {"student": {"share_base_with": "nobody", "lora": LORA, "trainable": True}},
            "models.student.init_from is missing",
        ),
    ],
)
def test_contradictions_are_named(load, models, message):
    with pytest.raises(ConfigError, match=message):
        load(**models)
