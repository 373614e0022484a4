"""Stateless random numbers: every draw is a pure function of the seed, a stream name, the step and the sample.

Nothing here has a state to save, so a resumed run draws what an uninterrupted one would have drawn, and a sample sees
the same noise however its global batch is split over processes and micro-batches.
"""

import hashlib
from collections.abc import Sequence

import torch


def derive_seed(*parts: int | str) -> int:
    """Hash `parts` to a 63-bit seed that is the same on every machine and Python version."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator_for(*parts: int | str) -> torch.Generator:
    """A fresh CPU generator for the draw that `parts` name."""
    return torch.Generator().manual_seed(derive_seed(*parts))


class SampleRng:
    """Draws for the samples of one micro-batch in one step.

    Args:
        seed: the run's seed.
        step: the optimisation step, counted from 1.
        sample_indices: each sample's index in the *global* batch of this step.
        device: where the draws are put. They are made on the CPU, so a run is the same on every kind of device.
    """

    def __init__(self, seed: int, step: int, sample_indices: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.seed = seed
        self.step = step
        self.sample_indices = tuple(sample_indices)
        self.device = torch.device(device)

    def normal(self, stream: str, shape: Sequence[int]) -> torch.Tensor:
        """Standard normal draws, fp32 `[B, *shape]`."""
        draws = [torch.randn(tuple(shape), generator=generator) for generator in self._per_sample(stream)]
        return torch.stack(draws).to(self.device)

    def uniform(self, stream: str, shape: Sequence[int] = ()) -> torch.Tensor:
        """Uniform draws in [0, 1), fp32 `[B, *shape]`."""
        draws = [torch.rand(tuple(shape), generator=generator) for generator in self._per_sample(stream)]
        return torch.stack(draws).to(self.device)

    def shared_uniform(self, stream: str) -> float:
        """One uniform draw in [0, 1) that every sample, micro-batch and process of the step shares."""
        return float(torch.rand((), generator=generator_for(self.seed, stream, self.step, "shared")))

    def shared_integer(self, stream: str, high: int) -> int:
        """One integer in [0, high) that every sample, micro-batch and process of the step shares."""
        generator = generator_for(self.seed, stream, self.step, "shared")
        return int(torch.randint(high, (), generator=generator))

    def _per_sample(self, stream: str) -> list[torch.Generator]:
        return [generator_for(self.seed, stream, self.step, index) for index in self.sample_indices]
