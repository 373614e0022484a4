"""Optimizers whose states are of other kinds than Adam's."""

import torch
from torch.optim import Optimizer


class OrthogonalMomentum(Optimizer):
    """Muon's kind: matrices step along an orthogonalised momentum, the rest by its sign; two groups, and counters."""

    def __init__(self, params, lr, weight_decay=0.0):
        params = list(params)
        groups = [{"params": [p for p in params if p.ndim == 2]}, {"params": [p for p in params if p.ndim != 2]}]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "calls": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["calls"] += 1
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state |= {"momentum": torch.zeros_like(parameter, dtype=torch.bfloat16), "count": 0, "decay": 0.5}
                state["count"] += 1
                momentum = state["momentum"].mul_(state["decay"]).add_(parameter.grad.bfloat16())
                direction = momentum.float()
                if parameter.ndim == 2:
                    direction = direction / (direction.norm() + 1e-6)
                    direction = 1.5 * direction - 0.5 * direction @ direction.T @ direction
                parameter.sub_(
                    direction.sign() if parameter.ndim != 2 else direction, alpha=group["lr"] / state["count"]
                )


class Rows(Optimizer):
    """One number per row of a matrix."""

    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                size = parameter.grad.float().reshape(len(parameter), -1).norm(dim=1)
                total = self.state[parameter].setdefault("rows", torch.zeros_like(size))
                total += size
                shape = (-1, *[1] * (parameter.ndim - 1))
                parameter.sub_(parameter.grad / (total.reshape(shape) + 1e-6), alpha=group["lr"])


class History(Rows):
    """A state that is no number."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["history"] = [parameter.detach().clone()]
