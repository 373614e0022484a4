"""The training loop: which role steps is the method's business, everything around it is here."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator

from fv_distill.callbacks.base import CallbackDict
from fv_distill.config.schema import RunConfig
from fv_distill.data.loader import BatchPlan, build_loader
from fv_distill.data.parquet import ParquetDataset
from fv_distill.methods.base import TrainingMethod
from fv_distill.rng import SampleRng
from fv_distill.rollouts.ode import STATES

from .checkpoint import CheckpointManager
from .context_parallel import ContextGroups, enable_context_parallelism
from .interrupt import StopRequest
from .roles import Role, prepare_roles
from .sharding import gradient_norm, gradient_sync, reduce_gradients
from .sigma_losses import NUM_BINS, SigmaSums
from .tracking import RunLog


class NonFiniteLossError(ValueError):
    """The loss was not finite for too many steps in a row."""


class Trainer:
    """Trains a method's roles on a data set.

    Args:
        accelerator: from `make_accelerator`.
        method: what is minimised.
        dataset: the rows.
        config: the run's config.
        callbacks: hooks; their order is the order of the calls.

    Attributes:
        stopped_by: the signal that ended the run early, such as "SIGTERM", or None.
        micro_batches: of the present step, on the device.
        micro_losses: of the present update, one scalar per micro-batch on this process, on the device.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        method: TrainingMethod,
        dataset: ParquetDataset,
        config: RunConfig,
        callbacks: CallbackDict,
    ) -> None:
        self.accelerator = accelerator
        self.method = method
        self.models = method.models
        self.config = config
        self.callbacks = callbacks
        self.dataset = dataset
        self.step = 0
        self.stopped_by: str | None = None
        self.micro_batches: list[dict[str, Any]] = []
        self.micro_losses: list[torch.Tensor] = []
        self._nonfinite_steps = 0
        training = config.training
        self.groups = ContextGroups.of(accelerator, training.distributed.context_parallel_degree)
        self.plan = BatchPlan(
            seed=training.seed,
            num_rows=len(dataset),
            micro_batch_size=training.data.train_batch_size,
            accumulation_steps=training.loop.gradient_accumulation_steps,
            world_size=self.groups.num_groups,
            rank=self.groups.group,
            buckets=dataset.buckets,
        )
        callbacks.call("on_before_prepare", self)
        if self.groups.degree > 1:
            enable_context_parallelism(accelerator, self.groups, self.models, self.latent_shapes)
        self.roles = prepare_roles(
            accelerator,
            method,
            training.optimizer.as_kwargs(),
            max_train_steps=training.loop.max_train_steps,
            placements={name: model.placement for name, model in config.models.items()},
        )
        # Networks that are sharded have left room for a text encoder by now, and were never whole on the device.
        method.encode_prompts()
        self.checkpoints = CheckpointManager(self)
        self.log = RunLog(accelerator, config)

    def train(self) -> None:
        """Run from the first step, or the resumed one, to `training.loop.max_train_steps`.

        After a SIGTERM or SIGINT the run ends with the present step, saved.

        Raises:
            NonFiniteLossError: after `max_nonfinite_steps` steps in a row without a finite loss.
            CheckpointSaveError: if a checkpoint can't be written.
        """
        loop = self.config.training.loop
        try:
            self.callbacks.call("on_train_start", self)
            self.checkpoints.resume_if_asked()
            self.log.start(self.step, loop.max_train_steps)
            with StopRequest(self.accelerator) as stop:
                for micro_batches in self._batches():
                    self._train_step(micro_batches)
                    if self.step < loop.max_train_steps and (signal_name := stop.agreed()):
                        self._stop_early(signal_name)
                        return
                self.checkpoints.finish()
            self.callbacks.call("on_train_end", self)
        except Exception:
            self.checkpoints.abandon()
            raise
        finally:
            self.log.finish()
            self.callbacks.call("on_close", self)

    def _train_step(self, micro_batches: list[dict[str, Any]]) -> None:
        """All updates of one step, logged and, where it is time, saved."""
        self.step += 1
        self.micro_batches = micro_batches
        self.callbacks.call("on_training_step_begin", self)
        metrics: dict[str, float] = {}
        for role in self.method.updates(self.step):
            metrics |= self._update(role)
        self._stop_if_nonfinite(metrics)
        self.callbacks.call("on_training_step_end", self, metrics)
        self.log.step(self.step, metrics, num_bad_rows=sum(batch["num_bad_rows"] for batch in micro_batches))
        self.checkpoints.save_if_due()

    def _stop_early(self, signal_name: str) -> None:
        self.stopped_by = signal_name
        path = self.checkpoints.save_unless_saved()
        self.log.warn(
            f"{signal_name}: stopped after step {self.step} and saved {path}; --resume-from-checkpoint latest goes on"
        )

    def _update(self, role_name: str) -> dict[str, float]:
        """Accumulate the gradients of one role over the micro-batches and step its optimizer if all is finite."""
        role = self.roles[role_name]
        by_sigma = SigmaSums(self.accelerator.device)
        sums = self._accumulate(role, by_sigma)
        rate = role.set_learning_rate()
        norm_name = f"grad_norm/{role_name}"
        if self.config.training.loop.log_grad_norms:
            sums[norm_name] = gradient_norm(role.model)
        self.callbacks.call("on_before_optimizer_step", self, role_name, sums)
        is_norm_logged = norm_name in sums
        if not is_norm_logged:
            # A finite loss may have gradients that are not.
            sums[norm_name] = gradient_norm(role.model)
        metrics = self._mean_over_processes(sums, by_sigma)
        if not is_norm_logged:
            norm = metrics.pop(norm_name)
            if _all_finite(metrics) and not math.isfinite(norm):
                metrics[norm_name] = norm
        role.updates += 1
        if _all_finite(metrics):
            role.optimizer.step()
            self.callbacks.call("on_after_optimizer_step", self, role_name)
        else:
            self.callbacks.call("on_nonfinite_update", self, role_name, metrics)
        role.optimizer.zero_grad(set_to_none=True)
        return metrics | {f"lr/{role_name}": rate}

    def _accumulate(self, role: Role, by_sigma: SigmaSums) -> dict[str, torch.Tensor]:
        """Add up the gradients of the micro-batches' losses; returns the means of loss and metrics over them."""
        sums: dict[str, torch.Tensor] = {}
        micro_batches = self.micro_batches
        self.micro_losses = [torch.zeros((), device=self.accelerator.device) for _ in micro_batches]
        for index, batch in enumerate(micro_batches):
            rng = SampleRng(self.config.training.seed, self.step, batch["sample_index"], self.accelerator.device)
            is_last = index == len(micro_batches) - 1
            with gradient_sync(self.accelerator, role.model.transformer, enabled=is_last):
                for term in self.method.losses(role.name, batch, rng):
                    self.accelerator.backward(term.loss * self.groups.gradient_scale / len(micro_batches))
                    self.micro_losses[index] += term.loss.detach().float()
                    for name, value in term.metrics.items():
                        sums[name] = sums.get(name, 0) + value.float() / len(micro_batches)
                    if self.log.sigma_losses.every_steps:
                        by_sigma.add(term.by_sigma)
        reduce_gradients(self.accelerator, role.model)
        # A method need not log its loss, but a step with a bad one has to be noticed.
        if f"loss/{role.name}" not in sums:
            sums[f"loss/{role.name}"] = torch.stack(self.micro_losses).mean()
        return sums

    def _batches(self) -> Iterator[list[dict[str, Any]]]:
        """The micro-batches of each remaining step, on the device."""
        training = self.config.training
        loader = build_loader(
            self.dataset,
            self.plan,
            start_step=self.step,
            num_steps=training.loop.max_train_steps - self.step,
            text_length=training.data.text_length,
            caption_dropout=training.data.caption_dropout,
            seed=training.seed,
            num_workers=training.data.num_workers,
        )
        for micro_batches in loader:
            yield [self._to_device(batch) for batch in micro_batches]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """`[C, T, H, W]` of what is trained on: the first of `latent_shapes`."""
        return self._latent_shape_of(0)

    @property
    def latent_shapes(self) -> list[tuple[int, ...]]:
        """Those of every bucket: the clips', the paths', or `training.data.latent_shape`."""
        return [self._latent_shape_of(int(rows[0])) for rows in self.dataset.buckets]

    def _latent_shape_of(self, index: int) -> tuple[int, ...]:
        row = self.dataset[index]
        if "vae_latent" in row:
            return tuple(row["vae_latent"].shape)
        if STATES in row:
            return tuple(row[STATES].shape[1:])
        assert self.config.training.data.latent_shape is not None, "checked before training"
        return self.config.training.data.latent_shape

    def _to_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        moved = {
            key: value.to(self.accelerator.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()
        }
        if self.config.training.data.latent_shape is not None:
            moved["latent_shape"] = self.config.training.data.latent_shape
        return moved

    def _mean_over_processes(self, metrics: Mapping[str, torch.Tensor], by_sigma: SigmaSums) -> dict[str, float]:
        """All metrics in one reduction and one copy to the host; every process sees the same numbers.

        The sums and counts by noise level travel with them, and go to the log.
        """
        values = torch.stack(
            [value.detach().float().reshape(()).to(self.accelerator.device) for value in metrics.values()]
        )
        totals = self.accelerator.reduce(torch.cat([values, *by_sigma.packed()]), reduction="sum")
        totals[: len(values)] /= self.accelerator.num_processes
        # Processes that share a clip's tokens have counted it once each.
        totals[len(values) :] /= self.groups.degree
        numbers = totals.tolist()
        for index, name in enumerate(by_sigma.names):
            start = len(values) + index * 2 * NUM_BINS
            self.log.sigma_losses.add(name, numbers[start : start + 2 * NUM_BINS])
        return dict(zip(metrics, numbers, strict=False))

    def _stop_if_nonfinite(self, metrics: Mapping[str, float]) -> None:
        bad = {name: value for name, value in metrics.items() if not math.isfinite(value)}
        self._nonfinite_steps = self._nonfinite_steps + 1 if bad else 0
        limit = self.config.training.loop.max_nonfinite_steps
        if bad:
            self.log.warn(f"step {self.step}: {', '.join(f'{k}={v}' for k, v in bad.items())}; this update was skipped")
        if self._nonfinite_steps >= limit:
            self.checkpoints.finish()
            raise NonFiniteLossError(
                f"{', '.join(bad)} not finite for {limit} steps in a row, up to step {self.step}; "
                f"the last good checkpoint is {self.checkpoints.latest() or 'none'}. "
                "Lower training.optimizer.learning_rate or look at the data "
                "(the limit is training.loop.max_nonfinite_steps)"
            )


def _all_finite(metrics: Mapping[str, float]) -> bool:
    return all(math.isfinite(value) for value in metrics.values())
