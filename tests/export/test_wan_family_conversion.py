"""Image-to-video, TI2V and two-expert networks in the original Wan's names, there and back."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from tiny_wan import make_ti2v_directory, make_wan21_i2v_directory, make_wan22_i2v_directory

from fv_distill.export import convert_wan_checkpoint, convert_wan_to_original


@pytest.mark.parametrize(
    ("make", "component"),
    [
        (make_wan21_i2v_directory, "transformer"),
        (make_wan22_i2v_directory, "transformer_2"),
        (make_ti2v_directory, "transformer"),
    ],
)
def test_round_trip(tmp_path, make, component):
    base, other = make(tmp_path / "base"), make(tmp_path / "other", seed=9)
    convert_wan_to_original(other, tmp_path / "original.safetensors", component=component)
    names = load_file(tmp_path / "original.safetensors")
    assert ("blocks.0.cross_attn.k_img.weight" in names) == (make is make_wan21_i2v_directory)
    converted = convert_wan_checkpoint(
        tmp_path / "original.safetensors", tmp_path / "converted", base_model=str(base), component=component
    )
    ours, theirs = (
        WanTransformer3DModel.from_pretrained(path, subfolder=component).state_dict() for path in (converted, other)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
