"""Run by several processes: many short runs, one after another, each in a parallel mode of its own.

A launch costs ten seconds and a run one, so `test_parallel_modes.py` gives a list of runs to one launch.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor

from fv_distill.callbacks import Callback
from fv_distill.config.load import load_run_config
from fv_distill.training.run import build_trainer
from fv_distill.training.sharding import unwrap

# How FSDP2 adds gradients up; the name of the first differs between versions of torch.
REDUCTIONS = [name for name in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(torch.distributed, name)]


def trained_parameters(model):
    named = unwrap(model.transformer).named_parameters()
    return [parameter for name, parameter in named if model.is_trained(name)]


class Probe(Callback):
    """Notes of what each role's network is made of, and in which types it is trained."""

    def __init__(self):
        self.roles = {}
        self.gradients = {}

    def on_train_start(self, trainer):
        self.roles = {name: self._describe(model) for name, model in trainer.models.items()}

    def on_before_optimizer_step(self, trainer, role, metrics):
        parameters = trained_parameters(trainer.roles[role].model)
        self.gradients[role] = sorted(
            {str(parameter.grad.dtype) for parameter in parameters if parameter.grad is not None}
        )

    def _describe(self, model):
        network = unwrap(model.transformer)
        parameters = trained_parameters(model) if model.trainable else list(network.parameters())
        units = [part for part in network.modules() if isinstance(part, FSDPModule)]
        policies = [unit._get_fsdp_state()._fsdp_param_group for unit in units]
        meshes = {tuple(p.device_mesh.shape) for p in parameters if isinstance(p, DTensor)}
        return {
            "wrapper": type(model.transformer).__name__ if network is not model.transformer else None,
            "dtypes": sorted({str(parameter.dtype) for parameter in parameters}),
            "computes": str(model.compute_dtype),
            "units": len(units),
            "mesh": sorted(meshes),
            "group_offloading": _is_group_offload_enabled(network),
            "offloaded": sum(isinstance(group.offload_policy, CPUOffloadPolicy) for group in policies if group),
        }


class Reductions:
    """Counts the types in which gradients are reduced by FSDP2 while used as a context."""

    def __enter__(self):
        self.types = Counter()
        self._original = {name: getattr(torch.distributed, name) for name in REDUCTIONS}
        for name, original in self._original.items():
            setattr(torch.distributed, name, self._noting(original))
        return self

    def __exit__(self, *_):
        for name, original in self._original.items():
            setattr(torch.distributed, name, original)

    def _noting(self, original):
        def noting(*args, **kwargs):
            self.types[str(kwargs["input"].dtype)] += 1
            return original(*args, **kwargs)

        return noting


def run(spec):
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._reset_state()
    os.environ.update(spec["environment"])
    probe = Probe()
    try:
        trainer = build_trainer(load_run_config(spec["config"], spec["overrides"]))
        trainer.callbacks.add("probe", probe)
        with Reductions() as reductions:
            trainer.train()
        facts = {"roles": probe.roles, "gradients": probe.gradients, "reductions": reductions.types}
        trainer.accelerator.free_memory()
    except ValueError as error:
        facts = {"error": str(error)}
    finally:
        for name in spec["environment"]:
            del os.environ[name]
    return facts


def main(specs, output):
    facts = {}
    for spec in json.loads(Path(specs).read_text()):
        facts[spec["name"]] = run(spec)
    if int(os.environ["RANK"]) == 0:
        Path(output).write_text(json.dumps(facts))
    # One process leaving early now and then hangs the other one at its end.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
