"""Masked attention on CUDA, where `flex_attention` is compiled and has a backward pass."""

import pytest
import torch

from fv_distill.models.transformers import ChunkLayout, FrameMask, masked_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("history", [0, 4])
def test_flex_attention_trains_on_cuda_as_the_dense_mask_does(history):
    frames = ChunkLayout(2).frame_mask(6, history)
    inputs = torch.randn(3, 2, frames.shape[0] * 40, 2, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for device in ("cpu", "cuda"):
        query, key, value = (part.requires_grad_() for part in inputs.to(device).unbind())
        out = masked_attention(query, key, value, FrameMask(frames.to(device), 40))
        out.square().sum().backward()
        results.append([part.detach().cpu() for part in (out, query.grad, key.grad, value.grad)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)
