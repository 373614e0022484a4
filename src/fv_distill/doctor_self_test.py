"""What each of the doctor's two processes does: `torchrun --nproc_per_node 2 -m fv_distill.doctor_self_test gloo`."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fv_distill.gloo import await_gloo_at_exit


def main() -> None:
    """Fail with an error that says what went wrong."""
    backend = sys.argv[1]
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    await_gloo_at_exit()
    try:
        check_sum(device)
        check_sharded_step(device)
    finally:
        dist.destroy_process_group()


def check_sum(device: torch.device) -> None:
    """Every process adds its rank and gets the sum of all."""
    value = torch.tensor([float(dist.get_rank())], device=device)
    dist.all_reduce(value)
    expected = sum(range(dist.get_world_size()))
    if value.item() != expected:
        raise RuntimeError(f"the ranks add up to {value.item():g}, not {expected}")


def check_sharded_step(device: torch.device) -> None:
    """A step of a sharded layer on two halves of a batch equals that of the whole layer on all of it."""
    torch.manual_seed(0)
    whole = nn.Linear(8, 8).to(device)
    sharded = nn.Linear(8, 8).to(device)
    sharded.load_state_dict(whole.state_dict())
    fully_shard(sharded, mesh=init_device_mesh(device.type, (dist.get_world_size(),)))
    batch = torch.randn(4, 8).to(device)
    whole(batch).square().mean().backward()
    sharded(batch.chunk(dist.get_world_size())[dist.get_rank()]).square().mean().backward()
    for one, other in zip(whole.parameters(), sharded.parameters(), strict=True):
        assert isinstance(other.grad, DTensor), "the gradient of a sharded layer is sharded"
        torch.testing.assert_close(other.grad.full_tensor(), one.grad, atol=1e-5, rtol=1e-4)


if __name__ == "__main__":
    main()
