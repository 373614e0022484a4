"""Losses by noise level: where on the way from noise to video a network is still bad.

A loss averaged over all noise levels hides that; its curve is mostly the noise of the levels that were drawn.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fv_distill.methods.base import SigmaErrors

SIGMA_LOSSES_FILE = "sigma_losses.jsonl"
NUM_BINS = 10
"""Bin i holds the sigmas in [i / 10, (i + 1) / 10); 1 itself is in the last."""


class SigmaSums:
    """Sums and counts per bin of one update, on the device; adding to them never waits for it.

    Args:
        device: of the errors.
    """

    def __init__(self, device: torch.device) -> None:
        self._bins = torch.arange(NUM_BINS, device=device)
        self._sums: dict[str, Tensor] = {}

    @property
    def names(self) -> list[str]:
        """Whose errors were added, in order."""
        return list(self._sums)

    @torch.no_grad()
    def add(self, by_sigma: Mapping[str, SigmaErrors]) -> None:
        """Add the finite errors of a loss term; a step that is skipped must not spoil the mean of many."""
        for name, errors in by_sigma.items():
            sigma, error = errors.sigma.detach().flatten(), errors.error.detach().float().flatten()
            index = (sigma * NUM_BINS).long().clamp(0, NUM_BINS - 1)
            # A product with a mask and not scatter_add, whose order of summation differs from run to run on a GPU.
            mask = (index[:, None] == self._bins) & error.isfinite()[:, None]
            sums = torch.where(mask, error[:, None], 0.0).sum(dim=0)
            packed = torch.cat([sums, mask.sum(dim=0).float()])
            self._sums[name] = self._sums[name] + packed if name in self._sums else packed

    def packed(self) -> list[Tensor]:
        """For each name its sums and then its counts, fp32 `[2 * NUM_BINS]`."""
        return list(self._sums.values())


class SigmaLossWindow:
    """Means per bin over windows of so many steps, one line of `sigma_losses.jsonl` each.

    Every process holds the same sums, in the order of the steps, and checkpoints carry those of the open window:
    so the file of a resumed run is the uninterrupted one's, wherever it was cut off.

    Args:
        every_steps: length of a window; it ends at multiples of it. 0 collects nothing.
    """

    def __init__(self, every_steps: int) -> None:
        self.every_steps = every_steps
        self._sums: dict[str, list[float]] = {}

    def add(self, name: str, packed: list[float]) -> None:
        """Add an update's sums and counts, which are totals over processes."""
        before = self._sums.get(name, [0.0] * len(packed))
        self._sums[name] = [one + other for one, other in zip(before, packed, strict=True)]

    def close_if_due(self, step: int) -> dict[str, Any] | None:
        """The line of the window that ends with `step`, if one does, and something was added to it."""
        if not self.every_steps or step % self.every_steps:
            return None
        line = self.line(step)
        self._sums = {}
        return line

    def line(self, step: int) -> dict[str, Any] | None:
        """What the open window holds: for each name the mean of each bin, None where it is empty, and the counts."""
        if not self._sums:
            return None
        line: dict[str, Any] = {"step": step}
        for name, packed in self._sums.items():
            sums, counts = packed[:NUM_BINS], packed[NUM_BINS:]
            means = [total / count if count else None for total, count in zip(sums, counts, strict=True)]
            line[name] = {"loss": means, "count": [int(count) for count in counts]}
        return line

    def state_dict(self) -> dict[str, list[float]]:
        """The open window, as JSON values."""
        return self._sums

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Go on with a window; JSON keeps every bit of a number."""
        self._sums = {name: list(packed) for name, packed in state.items()}
