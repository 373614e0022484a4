"""Run by four processes: a network and its optimizer, laid out in several ways, saved and loaded in every other way.

The layouts are replicas, shards (FSDP2), and replicas of shards (HSDP) both ways round; see distributed/test_meshes.py.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from my_optimizers import Rows
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fv_distill.export.checkpoint_weights import read_stored_tensors
from fv_distill.gloo import await_gloo_at_exit
from fv_distill.training.checkpoint_state import (
    network_tensors,
    optimizer_facts,
    optimizer_tensors,
    restore_optimizer,
)
from fv_distill.training.checkpoint_storage import ChunkReader, ChunkWriter

MESHES = {"replicas": None, "shards": (4,), "2x2": (2, 2), "4x1": (4, 1), "1x4": (1, 4)}


class Network(nn.Module):
    """Rows that four processes can't share out evenly, or at all; a buffer; two types; a scalar."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(7, 6)
        self.last = nn.Linear(6, 3, dtype=torch.bfloat16)
        self.one = nn.Parameter(torch.randn(1, 5))
        self.register_buffer("counts", torch.arange(3))

    def forward(self, x):
        return self.last(torch.tanh(self.inside(x)).bfloat16()).float().sum() * (self.one**2).sum()


def make(shape, seed, *, step):
    """The network on a mesh, and an optimizer that has stepped once or, for loading, not at all."""
    torch.manual_seed(seed)
    network = Network()
    if shape is not None:
        names = ("replicate", "shard") if len(shape) == 2 else ("shard",)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        fully_shard(network.inside, mesh=mesh)
        fully_shard(network.last, mesh=mesh)
        fully_shard(network, mesh=mesh)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    if step:
        network(torch.ones(2, 7)).backward()
        optimizer.step()
    return network, optimizer


def whole(tensors):
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in tensors.items()}


def main(folder):
    for saved, shape in MESHES.items():
        network, optimizer = make(shape, 0, step=True)
        writer = ChunkWriter(folder / saved, copy=saved == "2x2")
        groups = {"net": network_tensors(network), "net.optimizer": optimizer_tensors(network, optimizer)}
        expected = {group: whole(tensors) for group, tensors in groups.items()}
        writer.plan(groups)
        if saved == "2x2":
            # It has copies: what happens to the weights now is none of its business.
            with torch.no_grad():
                [parameter.zero_() for parameter in network.parameters()]
        writer.write()
        if dist.get_rank() == 0:
            (folder / saved / "tensors.json").write_text(writer.index)
            torch.save(expected, folder / f"{saved}.pt")
        facts = optimizer_facts(network, optimizer)
        dist.barrier()
        for resumed, other in MESHES.items():
            load_and_compare(folder / saved, make(other, 1, step=False), facts, expected, f"{saved} as {resumed}")


def load_and_compare(folder, pair, facts, expected, case):
    network, optimizer = pair
    stored = read_stored_tensors(folder)
    groups = {"net": network_tensors(network)}
    groups["net.optimizer"] = restore_optimizer(network, optimizer, facts, stored["net.optimizer"])
    ChunkReader(folder, stored).load_into(groups)
    loaded = {"net": network_tensors(network), "net.optimizer": optimizer_tensors(network, optimizer)}
    for group, tensors in expected.items():
        found = whole(loaded[group])
        assert found.keys() == tensors.keys(), case
        for name, value in tensors.items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), (case, group, name)


def refuse_rows():
    """A state of one number a row can't be put together again from shards, and is refused."""
    network, _ = make((4,), 0, step=False)
    optimizer = Rows(network.parameters(), lr=0.1)
    network(torch.ones(2, 7)).backward()
    optimizer.step()
    try:
        optimizer_tensors(network, optimizer)
    except ValueError as error:
        return str(error)
    return "not refused"


if __name__ == "__main__":
    dist.init_process_group("gloo")
    await_gloo_at_exit()
    main(Path(sys.argv[1]))
    refused = refuse_rows()
    if dist.get_rank() == 0:
        (Path(sys.argv[1]) / "refused.txt").write_text(refused)
    dist.destroy_process_group()
