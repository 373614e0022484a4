"""A report of where values that are not finite came from."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor

from fv_distill.training.sharding import local_parameters
from fv_distill.training.trainer import NonFiniteLossError

from .base import Callback
from .options import require_integer

if TYPE_CHECKING:
    from fv_distill.training.trainer import Trainer

GUARD_FOLDER = "nan_guard"
CHECKS = ("losses", "gradients", "parameters")
# Names in a message; the report has all.
_SHOWN = 3


class NaNGuardCallback(Callback):
    """Say which values are not finite: of which role, parameters and samples; then go on, or stop at once.

    The trainer itself skips an update whose loss or gradient norm is not finite, on all processes, and stops after
    `training.loop.max_nonfinite_steps` such steps in a row. This callback is called when it does, before the gradients
    are gone, and writes a report to `nan_guard/` in the run's directory. Weights that are not finite can't recover:
    they stop the run, whatever the action, before they get into a checkpoint.

    Args:
        check: what to look at: losses, gradients, parameters.
        every_steps: how often the weights are looked at, besides before each checkpoint; losses and gradients are at
            every step, at no cost.
        action: skip leaves a bad update to the trainer, which goes on; stop ends the run at the first one.
        max_reports: files written in one run; later findings are in the log only.

    Raises:
        ValueError: for an unknown check or action, or a number that isn't positive.
    """

    def __init__(
        self,
        check: Sequence[str] = CHECKS,
        every_steps: int = 50,
        action: Literal["skip", "stop"] = "skip",
        max_reports: int = 20,
    ) -> None:
        unknown = [name for name in check if name not in CHECKS]
        if unknown or not check or isinstance(check, str):
            raise ValueError(f"callbacks.nan_guard.check={check!r} must be a list of some of {', '.join(CHECKS)}")
        if action not in ("skip", "stop"):
            raise ValueError(f"callbacks.nan_guard.action={action!r} must be skip or stop")
        self.check = frozenset(check)
        self.every_steps = require_integer("callbacks.nan_guard.every_steps", every_steps, at_least=1)
        self.action = action
        self.max_reports = require_integer("callbacks.nan_guard.max_reports", max_reports, at_least=1)
        self._num_reports = 0

    def on_nonfinite_update(self, trainer: "Trainer", role: str, metrics: Mapping[str, float]) -> None:
        """Report an update that the trainer skips.

        Raises:
            NonFiniteLossError: if the action is stop, or weights are not finite.
        """
        if self.check == {"parameters"}:
            return
        finding: dict[str, Any] = {"metrics": dict(metrics)}
        if "losses" in self.check:
            finding["batches"] = _batches(trainer)
        if "gradients" in self.check:
            trained = local_parameters(trainer.models[role])
            gradients = ((name, parameter.grad) for name, parameter in trained.items())
            finding["gradients"] = _bad_values((name, grad) for name, grad in gradients if grad is not None)
        if "parameters" in self.check:
            finding["parameters"] = _bad_parameters(trainer, role)
        report = self._report(trainer, role, finding)
        if report.get("parameters") or self.action == "stop":
            self._stop(trainer, report)

    def on_training_step_end(self, trainer: "Trainer", metrics: Mapping[str, float]) -> None:
        """Look at the weights when it is due, and before each checkpoint.

        Raises:
            NonFiniteLossError: if some are not finite.
        """
        if "parameters" not in self.check or not self._is_due(trainer):
            return
        for role in trainer.roles:
            bad = torch.zeros((), device=trainer.accelerator.device)
            for parameter in _local_parameters(trainer, role).values():
                bad += ~parameter.isfinite().all()
            # Shards differ, and every process has to come to the same end.
            if trainer.accelerator.reduce(bad, reduction="sum").item():
                self._stop(trainer, self._report(trainer, role, {"parameters": _bad_parameters(trainer, role)}))

    def _is_due(self, trainer: "Trainer") -> bool:
        training = trainer.config.training
        intervals = [count for count in (self.every_steps, training.checkpoint.every_steps) if count]
        is_last = trainer.step == training.loop.max_train_steps
        return is_last or any(trainer.step % count == 0 for count in intervals)

    def _report(self, trainer: "Trainer", role: str, finding: Mapping[str, Any]) -> dict[str, Any]:
        """Bring the processes' findings together, write them and warn; the report."""
        everyone = gather_object([finding])
        report: dict[str, Any] = {"step": trainer.step, "role": role, "update": trainer.roles[role].updates}
        if "metrics" in finding:
            report["metrics"] = {name: _number(value) for name, value in finding["metrics"].items()}
        if "batches" in finding:
            batches = [{"process": rank, **batch} for rank, one in enumerate(everyone) for batch in one["batches"]]
            # Where every loss is finite the gradients' overflow may be any sample's.
            bad = [batch for batch in batches if isinstance(batch["loss"], str)]
            report["batches"] = bad or batches
        for name in ("gradients", "parameters"):
            if name in finding:
                report[name] = _merged([one[name] for one in everyone])
        self._num_reports += 1
        if self._num_reports <= self.max_reports:
            path = Path(trainer.config.training.output_dir) / GUARD_FOLDER / f"step-{trainer.step:08d}_{role}.json"
            if trainer.accelerator.is_main_process:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            report["file"] = str(path)
        trainer.log.warn(_summary(report))
        return report

    def _stop(self, trainer: "Trainer", report: Mapping[str, Any]) -> None:
        raise NonFiniteLossError(
            f"callbacks.nan_guard: {_summary(report)}; the last good checkpoint is "
            f"{trainer.checkpoints.latest() or 'none'}"
        )


def _batches(trainer: "Trainer") -> list[dict[str, Any]]:
    """Loss, samples and rows of this process's micro-batches."""
    rows = trainer.plan.micro_batches(trainer.step - 1)
    losses = torch.stack(trainer.micro_losses).tolist()
    return [
        {
            "loss": _number(loss),
            "sample_index": list(batch["sample_index"]),
            "rows": [trainer.dataset.describe(row) for row, _ in pairs],
            "ids": [trainer.dataset.read(row, check_values=False).scalars.get("id") for row, _ in pairs],
            "captions": list(batch["caption"]),
        }
        for loss, batch, pairs in zip(losses, trainer.micro_batches, rows, strict=True)
    ]


def _local_parameters(trainer: "Trainer", role: str) -> dict[str, torch.Tensor]:
    """A role's trained weights by name, this process's shards of them."""
    trained = local_parameters(trainer.models[role])
    return {name: _local(parameter.detach()) for name, parameter in trained.items()}


def _bad_parameters(trainer: "Trainer", role: str) -> dict[str, dict[str, int]]:
    return _bad_values(_local_parameters(trainer, role).items())


def _bad_values(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, dict[str, int]]:
    """How many values of each tensor are NaN and infinite, for those with any."""
    counts = {}
    for name, tensor in tensors:
        values = _local(tensor)
        nan, inf = values.isnan().sum().item(), values.isinf().sum().item()
        if nan or inf:
            counts[name] = {"nan": int(nan), "inf": int(inf), "of": values.numel()}
    return counts


def _merged(parts: Sequence[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """Counts added up over processes."""
    total: dict[str, dict[str, int]] = {}
    for part in parts:
        for name, counts in part.items():
            mine = total.setdefault(name, dict.fromkeys(counts, 0))
            for key, count in counts.items():
                mine[key] += count
    return total


def _summary(report: Mapping[str, Any]) -> str:
    """One line of the report."""
    texts = []
    bad = {name: value for name, value in report.get("metrics", {}).items() if isinstance(value, str)}
    if bad:
        texts.append(", ".join(f"{name}={value}" for name, value in bad.items()))
    for kind in ("gradients", "parameters"):
        names = list(report.get(kind, {}))
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            texts.append(f"{kind} not finite in {', '.join(names[:_SHOWN])}{more}")
    if report.get("batches"):
        samples = [index for batch in report["batches"] for index in batch["sample_index"]]
        texts.append(f"samples {', '.join(map(str, samples))} of the global batch")
    where = f"; see {report['file']}" if "file" in report else ""
    return f"step {report['step']}, {report['role']}: {'; '.join(texts)}{where}"


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _number(value: float) -> float | str:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else str(value)
