"""Frozen networks in fewer bits: what they compute, what they take, what is refused, and runs on them."""

import copy
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_tiny_transformer
from tiny_runs import assert_same_state, checkpoint, dmd2_config, metrics, shared_base_config, train, write_config

from fv_distill.config import load_run_config
from fv_distill.export import convert
from fv_distill.models.quantization import quantize_network, stored_bytes
from fv_distill.training.building import build_models

pytest.importorskip("torchao", reason="pip install -e '.[quantization]'")

# Bytes of a weight without the scales, and the relative error of the velocity that the tiny network may have.
KINDS = {"int8": (1.0, 0.01), "float8": (1.0, 0.04), "nf4": (0.5, 0.15)}


def velocity(network):
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, network.config.in_channels, 3, 4, 4, generator=generator)
    text = torch.randn(2, 8, network.config.text_dim, generator=generator)
    sigma = torch.tensor([0.3, 0.7])
    return network(hidden_states=x_t, timestep=1000 * sigma, encoder_hidden_states=text, return_dict=False)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_computes_nearly_the_same_with_fewer_bytes(kind):
    network = make_tiny_transformer(width=32).requires_grad_(False).eval()
    whole = velocity(network)
    linear = [layer for layer in network.blocks.modules() if isinstance(layer, torch.nn.Linear)]
    numbers = sum(layer.weight.numel() for layer in linear)
    outside = {name: value.clone() for name, value in network.state_dict().items() if not name.startswith("blocks.")}
    assert quantize_network(network, kind) == len(linear)
    bytes_per_weight, tolerance = KINDS[kind]
    error = (velocity(network) - whole).norm() / whole.norm()
    assert 0 < error < tolerance
    # Scales of these small layers are a good part.
    assert bytes_per_weight * numbers < sum(stored_bytes(layer.weight) for layer in linear) < 1.4 * numbers
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(network.state_dict()[name], value) for name, value in outside.items())


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_it_gets_the_gradients_of_the_expanded_weights(kind):
    from fv_distill.lora import LoraSpec, inject_lora

    def gradients(network):
        inject_lora(network, "student", LoraSpec(2, 2, ("to_q", "ffn.net.2")), seed=3)
        velocity(network).square().mean().backward()
        return {name: value.grad for name, value in network.named_parameters() if value.grad is not None}

    quantised = make_tiny_transformer(width=32).requires_grad_(False)
    quantize_network(quantised, kind)
    expanded = make_tiny_transformer(width=32).requires_grad_(False)
    for name, layer in expanded.blocks.named_modules():
        if isinstance(layer, torch.nn.Linear):
            weight = quantised.blocks.get_submodule(name).weight
            size = layer.in_features
            # What a layer makes of the unit vectors are its weights.
            layer.weight.data = torch.nn.functional.linear(torch.eye(size), weight).T.contiguous()
    ours, theirs = gradients(quantised), gradients(expanded)
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 2 * 3
    # The second factors start at zero, and so do the first ones' gradients.
    assert max(value.abs().max() for value in ours.values()) > 1e-4
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.fixture
def config(tiny_wan, tiny_rows, tmp_path):
    config = shared_base_config(tiny_wan, tiny_rows, tmp_path / "run")
    config["models"]["teacher"]["quantization"] = "int8"
    return config


def test_student_and_critic_train_on_it_resume_and_are_exported_on_the_whole_weights(config, tiny_wan, tmp_path):
    whole = train(config)
    plain = copy.deepcopy(config)
    del plain["models"]["teacher"]["quantization"]
    losses = [[line["loss/critic"] for line in metrics(run)] for run in (
        whole, train(plain, {"training.output_dir": str(tmp_path / "plain")})
    )]  # fmt: skip
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)

    output_dir = str(tmp_path / "resumed")
    train(config, {"training.output_dir": output_dir, "training.loop.max_train_steps": 2})
    resumed = train(config, {"training.output_dir": output_dir, "training.checkpoint.resume_from_checkpoint": "latest"})
    assert_same_state(checkpoint(resumed, 4), checkpoint(whole, 4), num_networks=3, num_optimizers=2)

    merged = convert(checkpoint(whole, 4), tmp_path / "merged", export_format="merged")
    weights = load_file(merged / "transformer/diffusion_pytorch_model.safetensors")
    base = load_file(tiny_wan / "transformer/diffusion_pytorch_model.safetensors")
    moved = {name for name in base if not torch.equal(weights[name], base[name])}
    assert moved and all(name.split(".")[-2] in ("to_q", "to_k", "to_v", "0") for name in moved), "the adapter's alone"


def test_a_frozen_teacher_may_be_quantised(tiny_wan, tiny_rows, tmp_path):
    config = dmd2_config(tiny_wan, tiny_rows, tmp_path / "run")
    config["models"]["teacher"]["quantization"] = "float8"
    assert len(metrics(train(config))) == 4


@pytest.mark.parametrize(
    ("role", "changes", "message"),
    [
        ("teacher", {"quantization": "int5"}, "'int8', 'float8' or 'nf4'"),
        ("teacher", {"quantization": "int8", "placement": "offloaded"}, "placement=offloaded"),
        ("student", {"quantization": "int8"}, "belongs to the role whose network this is: models.teacher"),
    ],
)
def test_combinations_that_cannot_work_are_refused(config, tmp_path, role, changes, message):
    config["models"][role] |= changes
    with pytest.raises(ValueError, match=message):
        load_run_config(write_config(config, tmp_path / "run.yaml"))


def test_weights_that_are_trained_are_not_quantised(tiny_wan, tiny_rows, tmp_path):
    config = dmd2_config(tiny_wan, tiny_rows, tmp_path / "run")
    config["models"]["student"]["quantization"] = "int8"
    with pytest.raises(ValueError, match=r"train a LoRA \(lora.enable: true\)"):
        load_run_config(write_config(config, tmp_path / "run.yaml"))


def test_a_missing_package_is_named(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(
        ValueError, match=r"models.teacher.quantization: int8 needs torchao.*fv_distill\[quantization\]"
    ):
        build_models(load_run_config(write_config(config, tmp_path / "run.yaml")))


@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_pass_keeps_the_quantised_weight_alone(kind):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(64, 64)])

    network = Network().requires_grad_(False)
    quantize_network(network, kind)
    layer, kept = network.blocks[0], []
    x = torch.randn(2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
    assert sum(map(stored_bytes, kept)) == stored_bytes(layer.weight) < 64 * 64 * 1.2
    with torch.autocast("cpu", torch.bfloat16):
        cast = layer(x)
        cast.sum().backward()
    assert cast.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    torch.testing.assert_close(cast.float(), y, atol=0.05, rtol=0.05)
