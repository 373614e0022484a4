"""LongCat-Video, Kandinsky 5 and LTX-2 on two processes: the losses and weights of one at the full batch.

Their networks have what Wan's hasn't: layers that compute in float32 whatever the weights' type, frames that are given,
clips that are run one by one, and branches that are frozen inside blocks that are trained.
"""

import pytest
import torch
from parallel_launch import CHECKPOINTING, DDP, FSDP2, GLOBAL_BATCH, SGD, Run, launch
from tiny_hunyuan import POOLED_DIM
from tiny_kandinsky5 import make_tiny_kandinsky5_directory, make_tiny_kandinsky5_i2v_directory
from tiny_longcat import make_tiny_longcat_directory
from tiny_ltx2 import make_tiny_ltx2_directory
from tiny_models import TEXT_DIM, TEXT_LENGTH
from tiny_runs import checkpoint, dmd2_config, largest_difference, metrics, train

from fv_distill.data import write_rows
from fv_distill.export import load_role_weights

pytestmark = pytest.mark.slow

FAMILIES = {
    "longcat": (make_tiny_longcat_directory, {"_target_": "fv_distill.models.LongCatVideoModel"}, (4, 3, 4, 4)),
    "kandinsky5": (make_tiny_kandinsky5_directory, {"_target_": "fv_distill.models.Kandinsky5Model"}, (4, 3, 4, 4)),
    "kandinsky5_i2v": (
        make_tiny_kandinsky5_i2v_directory,
        {"_target_": "fv_distill.models.Kandinsky5Model", "condition_frames": 1},
        (4, 5, 4, 4),
    ),
    "ltx2": (
        make_tiny_ltx2_directory,
        {"_target_": "fv_distill.models.LTX2VideoModel", "flow_shift": 8.0},
        (4, 3, 2, 2),
    ),
}
EQUAL = {
    "longcat-ddp": Run("longcat", DDP),
    "longcat-fsdp2": Run("longcat", FSDP2, CHECKPOINTING),
    "kandinsky5-ddp": Run("kandinsky5", DDP),
    "kandinsky5-fsdp2": Run("kandinsky5", FSDP2, CHECKPOINTING),
    "kandinsky5_i2v-fsdp2": Run("kandinsky5_i2v", FSDP2, CHECKPOINTING),
    "ltx2-ddp": Run("ltx2", DDP),
    "ltx2-fsdp2": Run("ltx2", FSDP2, CHECKPOINTING),
}
CLOSE = {"longcat-fsdp2-bf16": Run("longcat", "fsdp2_8gpu", CHECKPOINTING)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def configs(folder):
    made = {}
    for name, (make, options, shape) in FAMILIES.items():
        rows = folder / f"{name}-rows"
        generator = torch.Generator().manual_seed(0)
        write_rows(
            rows / "rows.parquet",
            [
                {
                    "caption": "a digit",
                    "vae_latent": torch.randn(shape, generator=generator),
                    "text_embedding": torch.randn(TEXT_LENGTH - index % 3, TEXT_DIM, generator=generator),
                    "pooled_text_embedding": torch.randn(POOLED_DIM, generator=generator),
                }
                for index in range(6)
            ],
        )
        config = made[name] = dmd2_config(make(folder / f"{name}-model"), rows, folder / name)
        for role in config["models"].values():
            role |= options
        config["method"]["fake_score_learning_rate"] = 0.05
        config["training"]["optimizer"] = {**SGD, "learning_rate": 0.05}
        config["training"]["loop"]["max_train_steps"] = 2
        config["training"]["checkpoint"]["every_steps"] = 0
    made["longcat"]["models"]["student"]["condition_frames"] = 1
    return made


@pytest.fixture(scope="module")
def found(configs, folder):
    """All runs, by one launch of two processes."""
    return launch(2, EQUAL | CLOSE, configs, folder)


@pytest.fixture(scope="module")
def alone(configs, folder):
    """The same runs by one process, by family."""
    size = {"training.data.train_batch_size": GLOBAL_BATCH}
    return {
        family: train(config, {**size, "training.output_dir": str(folder / f"{family}-alone")})
        for family, config in configs.items()
    }


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_make_the_run_of_one(name, found, alone, folder):
    assert "error" not in found[name], found[name]
    reference = alone[EQUAL[name].method]
    for line, expected in zip(metrics(folder / name), metrics(reference), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for role in ("student", "critic", "ema"):
        ours, theirs = (load_role_weights(checkpoint(out, 2), role) for out in (folder / name, reference))
        assert largest_difference(ours, theirs) < 1e-5
    if name.endswith("fsdp2"):
        assert found[name]["roles"]["student"]["units"] >= 3, "sharded block by block"


def test_mixed_precision_is_close(found, alone, folder):
    (name,) = CLOSE
    assert "error" not in found[name], found[name]
    for line, expected in zip(metrics(folder / name), metrics(alone["longcat"]), strict=True):
        assert line["loss/critic"] == pytest.approx(expected["loss/critic"], rel=0.05)
