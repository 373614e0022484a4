"""DMD2's three roles on random networks of any size, for the benchmarks that train them."""

import copy
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from fv_distill.models import WanModel

TEACHER = Path(__file__).resolve().parents[1] / "examples/digits/teacher"
"""Gives the text encoder and the VAE's statistics."""

TEXT_DIM = 32
TEXT_LENGTH = 8


def make_models(width: int, layers: int) -> dict[str, WanModel]:
    torch.manual_seed(0)
    network = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=width // 4,
        num_layers=layers,
        ffn_dim=4 * width,
        freq_dim=64,
        text_dim=TEXT_DIM,
        rope_max_seq_len=64,
    )
    return {
        role: WanModel(
            copy.deepcopy(network), directory=TEACHER, flow_shift=3.0, trainable=trained, text_length=TEXT_LENGTH
        )
        for role, trained in {"student": True, "teacher": False, "critic": True}.items()
    }
