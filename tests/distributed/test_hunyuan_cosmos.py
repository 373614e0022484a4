"""HunyuanVideo, HunyuanVideo 1.5, Kandinsky 5 and Cosmos on two processes: the losses of one at the full batch.

Their networks have what Wan's hasn't: blocks of several kinds, some of which a variant lacks; weights that no gradient
reaches; time that is embedded in the type of the weights.
"""

from pathlib import Path

import pytest
from encoded_rows import write_encoded_rows
from parallel_launch import CHECKPOINTING, DDP, FSDP2, GLOBAL_BATCH, SGD, Run, launch
from tiny_cosmos import make_tiny_cosmos_directory
from tiny_hunyuan import (
    IMAGE_TEXT_LENGTH,
    make_tiny_hunyuan15_directory,
    make_tiny_hunyuan_directory,
    make_tiny_hunyuan_i2v_directory,
)
from tiny_kandinsky5 import make_tiny_kandinsky5_directory
from tiny_models import TEXT_LENGTH
from tiny_runs import dmd2_config, metrics, train

from fv_distill import models

RUNNER = Path(__file__).with_name("cosmos_runs.py")
FAMILIES = {
    "hunyuan": (make_tiny_hunyuan_directory, "HunyuanVideoModel"),
    "hunyuan_i2v": (make_tiny_hunyuan_i2v_directory, "HunyuanVideoImageToVideoModel"),
    "hunyuan15": (make_tiny_hunyuan15_directory, "HunyuanVideo15Model"),
    "cosmos": (make_tiny_cosmos_directory, "CosmosModel"),
    "kandinsky5": (make_tiny_kandinsky5_directory, "Kandinsky5Model"),
}
EQUAL = {
    "hunyuan-fsdp2": Run("hunyuan", FSDP2, CHECKPOINTING),
    "hunyuan_i2v-fsdp2": Run("hunyuan_i2v", FSDP2, CHECKPOINTING),
    "hunyuan15-ddp": Run("hunyuan15", DDP),
    "cosmos-fsdp2": Run("cosmos", FSDP2, CHECKPOINTING),
}
CLOSE = {name: Run(name.split("-")[0], "fsdp2_8gpu") for name in ("hunyuan15-bf16", "kandinsky5-bf16")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def configs(folder):
    configs = {}
    for name, (make, adapter) in FAMILIES.items():
        directory = make(folder / f"{name}-model")
        text_length = IMAGE_TEXT_LENGTH if name == "hunyuan_i2v" else TEXT_LENGTH
        model = getattr(models, adapter).from_pretrained(str(directory), text_length=text_length)
        rows = write_encoded_rows(folder / f"{name}-rows", model)
        config = configs[name] = dmd2_config(directory, rows, folder / name)
        for role in config["models"].values():
            role["_target_"] = f"fv_distill.models.{adapter}"
        config["method"]["fake_score_learning_rate"] = 0.05
        config["training"]["optimizer"] = {**SGD, "learning_rate": 0.1}
        config["training"]["data"] |= {"caption_dropout": 0.3, "text_length": text_length}
        config["training"]["loop"]["max_train_steps"] = 2
        config["training"]["checkpoint"]["every_steps"] = 0
    return configs


@pytest.fixture(scope="module")
def found(configs, folder):
    return launch(2, EQUAL | CLOSE, configs, folder, runner=RUNNER)


@pytest.fixture(scope="module")
def alone(configs, folder):
    overrides = {"training.data.train_batch_size": GLOBAL_BATCH}
    return {
        name: metrics(train(config, {**overrides, "training.output_dir": str(folder / f"{name}-alone")}))
        for name, config in configs.items()
    }


@pytest.mark.parametrize("name", EQUAL | CLOSE)
def test_two_processes_train_as_one(name, found, alone, folder):
    assert "error" not in found[name], found[name]
    run = (EQUAL | CLOSE)[name]
    lines = metrics(folder / name)
    assert len(lines) == 2
    for line, expected in zip(lines, alone[run.method], strict=True):
        if name in EQUAL:
            assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)
        else:
            assert line["loss/critic"] == pytest.approx(expected["loss/critic"], rel=0.03)
    if run.mode != DDP:
        assert found[name]["roles"]["student"]["units"] > 3, "wrapped block by block"
