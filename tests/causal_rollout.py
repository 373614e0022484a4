"""Run by two processes: a rollout over the cache with gradients; see distributed/test_causal_rollout.py."""

import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fv_distill.models import CausalWanModel, Conditioning
from fv_distill.training.sharding import make_accelerator, prepare_trainable, unwrap

SHAPE = (4, 6, 4, 4)


def make_model(directory, *, checkpointing):
    options = {"chunk_size": 2, "local_window": 2, "sink_frames": 1, "text_length": 8}
    return CausalWanModel.from_pretrained(
        str(directory), trainable=True, gradient_checkpointing=checkpointing, **options
    )


def roll_out(model):
    """Chunks made one after another, each stored before the next; one backward pass at the end. The generated clip."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, *SHAPE, generator=generator)
    text = Conditioning(torch.randn(2, 8, 16, generator=generator), None)
    cache, chunks, zero = model.new_cache(2, SHAPE), [], torch.zeros(2)
    for start in range(0, SHAPE[1], model.chunk_size):
        where = {"cache": cache, "start_frame": start}
        x_t = noise[:, :, start : start + model.chunk_size]
        with torch.no_grad():
            x0 = model.predict_x0_streaming(x_t, zero + 1, text, **where)
        x0 = model.predict_x0_streaming(model.add_noise(x0, x_t, zero + 0.5), zero + 0.5, text, **where)
        chunks.append(x0)
        with torch.no_grad():
            model.predict_velocity_streaming(x0.detach(), zero, text, **where, store_kv=True)
    clip = torch.cat(chunks, dim=2)
    clip.square().mean().backward()
    return clip.detach()


def full_gradients(model):
    """Every parameter's gradient, gathered from all processes."""
    gradients = {name: parameter.grad for name, parameter in unwrap(model.transformer).named_parameters()}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in gradients.items()}


def main(directory, output, checkpointing):
    accelerator = make_accelerator(output_dir=output)
    assert accelerator.num_processes == 2
    model = make_model(directory, checkpointing=checkpointing)
    optimizer = prepare_trainable(accelerator, model, torch.optim.SGD(model.transformer.parameters(), lr=0.0))
    sharded = [name for name, part in model.transformer.named_modules() if isinstance(part, FSDPModule)]
    clip = roll_out(model)
    gradients = full_gradients(model)
    if accelerator.is_main_process:
        torch.save({"clip": clip, "gradients": gradients, "sharded": sharded}, Path(output) / "rollout.pt")
    # One process leaving early, or a network outliving the process group, now and then hangs the other one at its end.
    accelerator.wait_for_everyone()
    del model, optimizer
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "True")
