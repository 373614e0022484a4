from pathlib import Path

import pytest

from fv_distill.estimate import Layout, read_layout

CONFIGS = Path(__file__).resolve().parents[2] / "configs/accelerate"


@pytest.mark.parametrize(
    "name, expected",
    [
        ("cpu", Layout(1, "single", 1, "no", True, "cpu")),
        ("cpu_2proc", Layout(2, "replicated", 1, "no", True, "cuda")),
        ("gpu_1", Layout(1, "single", 1, "bf16")),
        ("fsdp2_8gpu", Layout(8, "sharded", 8, "bf16")),
        ("hsdp_multinode", Layout(16, "sharded", 8, "bf16")),
    ],
)
def test_the_configs_of_accelerate(name, expected):
    assert read_layout(CONFIGS / f"{name}.yaml") == expected


def test_another_number_of_processes():
    assert read_layout(CONFIGS / "fsdp2_8gpu.yaml", 64).num_shards == 64
    assert read_layout(CONFIGS / "hsdp_multinode.yaml", 64) == Layout(64, "sharded", 8, "bf16")
    assert read_layout(CONFIGS / "fsdp2_8gpu.yaml", 1) == Layout(1, "single", 1, "bf16")
    with pytest.raises(ValueError, match="num_processes=12 is no multiple of the 8"):
        read_layout(CONFIGS / "hsdp_multinode.yaml", 12)
    with pytest.raises(ValueError, match="distributed_type is NO; set MULTI_GPU"):
        read_layout(CONFIGS / "gpu_1.yaml", 8)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1, 2]", "is no config of `accelerate launch`"),
        ("num_processes: 8\ndistributed_type: FSDP\nfsdp_config: {fsdp_version: 1}", "fsdp_version=1; only 2"),
        ("num_processes: 1\nmixed_precision: fp16", "mixed_precision='fp16'"),
    ],
)
def test_what_the_trainer_would_refuse(text, message, tmp_path):
    path = tmp_path / "accelerate.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_layout(path)
    with pytest.raises(ValueError, match="does not exist"):
        read_layout(tmp_path / "none.yaml")
