"""On a GPU the bins never wait for the device, and equal those of the CPU."""

import pytest
import torch

from fv_distill.losses import errors_by_sigma
from fv_distill.methods.base import SigmaErrors
from fv_distill.training.sigma_losses import NUM_BINS, SigmaSums

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def packed_on(device, velocity, target, sigma):
    velocity, target, sigma = (tensor.to(device) for tensor in (velocity, target, sigma))
    sums = SigmaSums(torch.device(device))
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            sums.add({"critic": SigmaErrors(sigma, errors_by_sigma(velocity, target, sigma))})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sums.packed()[0]


def test_bins_are_summed_without_a_wait():
    velocity, target = torch.randn(2, 32, 4, 3, 8, 8).unbind()
    sigma = torch.rand(32, 3)
    first, again = (packed_on("cuda", velocity, target, sigma) for _ in range(2))
    assert torch.equal(first, again)
    expected = packed_on("cpu", velocity, target, sigma)
    assert torch.equal(first[NUM_BINS:].cpu(), expected[NUM_BINS:])
    assert torch.allclose(first.cpu(), expected, rtol=1e-5)
