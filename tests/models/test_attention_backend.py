"""A role's attention backend is what its network calls, in recomputation too, and nobody else's network."""

from functools import partial

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from tiny_cosmos import make_tiny_cosmos2_directory, make_tiny_cosmos_directory
from tiny_hunyuan import make_tiny_hunyuan15_directory, make_tiny_hunyuan_directory
from tiny_kandinsky5 import make_tiny_kandinsky5_directory
from tiny_longcat import make_tiny_longcat_directory
from tiny_ltx2 import make_tiny_ltx2_directory
from tiny_models import TEXT_LENGTH, make_tiny_wan_directory

from fv_distill import models

FAMILIES = {
    "WanModel": make_tiny_wan_directory,
    "CausalWanModel": make_tiny_wan_directory,
    "CosmosModel": make_tiny_cosmos_directory,
    "CosmosModel of Predict2": make_tiny_cosmos2_directory,
    "HunyuanVideoModel": make_tiny_hunyuan_directory,
    "HunyuanVideo15Model": make_tiny_hunyuan15_directory,
    "Kandinsky5Model": make_tiny_kandinsky5_directory,
    "LongCatVideoModel": make_tiny_longcat_directory,
    "LTX2VideoModel": make_tiny_ltx2_directory,
}
MATH, DEFAULT = AttentionBackendName._NATIVE_MATH, AttentionBackendName.NATIVE


@pytest.fixture
def calls(monkeypatch):
    """How often each of two backends was called."""
    counts = {MATH: 0, DEFAULT: 0}

    def counting(name, backend, *args, **kwargs):
        counts[name] += 1
        return backend(*args, **kwargs)

    for name in counts:
        backend = _AttentionBackendRegistry._backends[name]
        monkeypatch.setitem(_AttentionBackendRegistry._backends, name, partial(counting, name, backend))
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_networks_backend_is_its_own(family, calls, tmp_path):
    directory = FAMILIES[family](tmp_path / "model")
    options = {"text_length": TEXT_LENGTH, "flow_shift": 5.0, "trainable": True, "gradient_checkpointing": True}
    if family.startswith("Causal"):
        options["chunk_size"] = 3
    kind = getattr(models, family.split()[0])
    model = kind.from_pretrained(str(directory), attention_backend=MATH.value, **options)
    x_t, sigma = torch.randn(1, 4, 3, 4, 4), torch.full((1,), 0.5)
    conditioning = model.prompt_conditioning("a digit")
    calls.update({MATH: 0, DEFAULT: 0})
    velocity = model.predict_velocity(x_t, sigma, conditioning)
    forward = calls[MATH]
    velocity.square().mean().backward()
    # Recomputed block by block; what is outside of blocks isn't.
    assert forward > 0 and calls[MATH] > forward and calls[DEFAULT] == 0
    other = kind.from_pretrained(str(directory), **options)
    calls.update({MATH: 0, DEFAULT: 0})
    other.predict_velocity(x_t, sigma, conditioning)
    assert calls[DEFAULT] == forward and calls[MATH] == 0
