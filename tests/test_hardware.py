import pytest
import torch

from fv_distill.hardware import peak_flops


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_known_names(name, tera):
    assert peak_flops(name, torch.bfloat16) == peak_flops(name, "float16") == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "A1000",
        "",
    ],
)
def test_what_is_another_card_has_no_figure(name):
    assert peak_flops(name, torch.bfloat16) is None


def test_float32_is_slower_unless_it_is_tf32():
    name = "NVIDIA H100 80GB HBM3"
    assert peak_flops(name, torch.float32) == 67e12 and peak_flops(name, "tfloat32") == 494.5e12
    assert peak_flops(name, torch.int8) is None
