"""Context parallelism: the processes of a group share every clip's tokens, for clips that are too long for one.

Each process takes its share of the tokens through the network and, inside self-attention, its share of the heads; two
exchanges swap them ("Ulysses", Jacobs et al. 2023). diffusers does that; groups and gradients are here.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ContextParallelConfig
from torch.distributed.device_mesh import init_device_mesh

from fv_distill.models.base import ModelBase

_KEY = "training.distributed.context_parallel_degree"


@dataclass(frozen=True)
class ContextGroups:
    """How processes are grouped: `degree` neighbours train on the same samples, with the same noise.

    Raises:
        ValueError: if the processes don't divide into such groups.
    """

    degree: int
    num_processes: int
    process_index: int

    def __post_init__(self) -> None:
        if self.num_processes % self.degree:
            raise ValueError(
                f"{_KEY}={self.degree} does not divide the number of processes, {self.num_processes}; launch a "
                "multiple of it or change the degree"
            )

    @classmethod
    def of(cls, accelerator: Accelerator, degree: int) -> "ContextGroups":
        """The groups of a launch's processes."""
        return cls(degree, accelerator.num_processes, accelerator.process_index)

    @property
    def num_groups(self) -> int:
        """The groups, each of which has samples of its own."""
        return self.num_processes // self.degree

    @property
    def group(self) -> int:
        """This process's group."""
        return self.process_index // self.degree

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for its group where all of it has the same."""
        return self.process_index % self.degree == 0

    @property
    def gradient_scale(self) -> int:
        """What a loss is multiplied with before its backward pass.

        A process's gradients are those through its own tokens, so a group's have to be added. DDP and FSDP2 take the
        mean over all processes, which is the mean over groups of a group's sum, divided by the degree.
        """
        return self.degree


def enable_context_parallelism(
    accelerator: Accelerator,
    groups: ContextGroups,
    models: Mapping[str, ModelBase],
    latent_shapes: Sequence[Sequence[int]],
) -> None:
    """Let each group share the tokens of every network's calls; before the networks are wrapped or sharded.

    Args:
        accelerator: of the run.
        groups: which processes share.
        models: every role of the method.
        latent_shapes: `[C, T, H, W]` of each bucket of clips.

    Raises:
        ValueError: naming the role that can't, and why.
    """
    for role, model in models.items():
        try:
            for latent_shape in latent_shapes:
                model.check_context_parallel(groups.degree, latent_shape)
        except ValueError as error:
            raise ValueError(f"{_KEY}={groups.degree}, but models.{role} can't do with that: {error}") from error
    # diffusers splits over "ring" and "ulysses" together; ring attention would need other kernels.
    mesh = init_device_mesh(
        accelerator.device.type, (groups.num_groups, 1, groups.degree), mesh_dim_names=("group", "ring", "ulysses")
    )
    with _one_device_on_cpu(accelerator):
        for role, model in models.items():
            network: Any = model.transformer
            try:
                network.enable_parallelism(config=ContextParallelConfig(ulysses_degree=groups.degree, mesh=mesh))
            except ValueError as error:
                raise ValueError(f"{_KEY}={groups.degree}, models.{role}.attention_backend: {error}") from error


@contextlib.contextmanager
def _one_device_on_cpu(accelerator: Accelerator) -> Iterator[None]:
    """diffusers takes the rank modulo the number of accelerators, which on a CPU are none."""
    if accelerator.device.type != "cpu":
        yield
        return
    count = torch.accelerator.device_count
    torch.accelerator.device_count = lambda: 1
    try:
        yield
    finally:
        torch.accelerator.device_count = count
