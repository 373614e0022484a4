"""LongCat-Video's network: the published keys and shapes, and what it computes, written out once more."""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_longcat import make_tiny_network
from tiny_models import LATENT_CHANNELS, TEXT_DIM
from torch.nn import functional as F  # noqa: N812

from fv_distill.models.pretrained import set_attention_backend
from fv_distill.models.transformers import LongCatVideoTransformer3DModel

FRAMES, ROWS, COLUMNS, HEADS, LENGTH = 3, 2, 3, 2, 7


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1, 4:] = False
    return {
        "hidden_states": torch.randn(2, LATENT_CHANNELS, FRAMES, 2 * ROWS, 2 * COLUMNS, generator=generator),
        "timestep": torch.tensor([[900.0, 400.0, 30.5], [700.0, 700.0, 1.0]]),
        "encoder_hidden_states": torch.randn(2, LENGTH, TEXT_DIM, generator=generator),
        "encoder_attention_mask": mask,
    }


@torch.no_grad()
def run(network, inputs, **changes):
    return network(**inputs | changes, return_dict=False)[0]


def test_published_checkpoint_has_these_keys_and_shapes():
    """tests/models/longcat_checkpoint.json: dit/config.json of the release, and the keys and shapes it comes to."""
    published = json.loads(Path(__file__).with_name("longcat_checkpoint.json").read_text())
    with torch.device("meta"):
        network = LongCatVideoTransformer3DModel(**published["config"])
    expected = {
        key.replace("{}", str(block)): shape
        for key, shape in published["shapes"].items()
        for block in range(published["config"]["depth"] if "{}" in key else 1)
    }
    # 1022 keys and 13.6B parameters are the numbers that were published.
    assert len(expected) == 1022
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == expected
    assert sum(math.prod(shape) for shape in expected.values()) == pytest.approx(13.6e9, rel=2e-3)


# The network again, for one clip, in complex numbers and with loops in place of shapes.


def linear(weights, name, states):
    return states @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def layer_norm(states):
    return (states - states.mean(-1, keepdim=True)) / (states.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def head_norm(weights, name, states):
    return states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"]


def turn(states, positions):
    """`[tokens, head_dim]` at (frame, row, column): pairs are complex numbers, each axis turns its own."""
    head_dim = states.shape[-1]
    space = 2 * (head_dim // 6)
    pairs = torch.view_as_complex(states.unflatten(-1, (-1, 2)).contiguous())
    angles = [
        [
            position[axis] / 10000 ** (2 * index / dim)
            for axis, dim in enumerate((head_dim - 2 * space, space, space))
            for index in range(dim // 2)
        ]
        for position in positions
    ]
    return torch.view_as_real(pairs * torch.exp(1j * torch.tensor(angles))).flatten(-2)


def attend(query, key, value):
    return torch.softmax(query @ key.T / query.shape[-1] ** 0.5, dim=-1) @ value


def embed_time(weights, timestep):
    frequencies = [10000 ** (-index / 16) for index in range(16)]
    angles = torch.tensor([timestep * frequency for frequency in frequencies])
    hidden = F.silu(linear(weights, "t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()])))
    return linear(weights, "t_embedder.mlp.2", hidden)


def self_attention(weights, name, states, positions, num_clean):
    parts = linear(weights, f"{name}.qkv", states).split(states.shape[-1], dim=-1)
    size = states.shape[-1] // HEADS
    outputs = []
    for head in range(HEADS):
        query, key, value = (part[:, head * size : (head + 1) * size] for part in parts)
        query = turn(head_norm(weights, f"{name}.q_norm", query), positions)
        key = turn(head_norm(weights, f"{name}.k_norm", key), positions)
        clean = attend(query[:num_clean], key[:num_clean], value[:num_clean])
        outputs.append(torch.cat([clean, attend(query[num_clean:], key, value)]))
    return linear(weights, f"{name}.proj", torch.cat(outputs, dim=-1))


def cross_attention(weights, name, states, text):
    query = linear(weights, f"{name}.q_linear", states)
    keys, values = linear(weights, f"{name}.kv_linear", text).split(states.shape[-1], dim=-1)
    size = states.shape[-1] // HEADS
    outputs = []
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        normed = head_norm(weights, f"{name}.q_norm", query[:, part])
        outputs.append(attend(normed, head_norm(weights, f"{name}.k_norm", keys[:, part]), values[:, part]))
    return linear(weights, f"{name}.proj", torch.cat(outputs, dim=-1))


def reference(weights, latents, timesteps, text, *, depth=2, num_clean_frames=0):
    """One clip `[C, frames, H, W]`, a timestep per frame, and the text's tokens that are seen, embedded."""
    positions = [(t, y, x) for t in range(FRAMES) for y in range(ROWS) for x in range(COLUMNS)]
    patches = [latents[:, t, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].flatten() for t, y, x in positions]
    kernel = weights["x_embedder.proj.weight"].flatten(1)
    tokens = torch.stack(patches) @ kernel.T + weights["x_embedder.proj.bias"]
    times = torch.stack([embed_time(weights, timesteps[t].item()) for t, _, _ in positions])
    clean = num_clean_frames * ROWS * COLUMNS
    for block in range(depth):
        name = f"blocks.{block}"
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = linear(
            weights, f"{name}.adaLN_modulation.1", F.silu(times)
        ).chunk(6, dim=-1)
        states = layer_norm(tokens) * (1 + scale) + shift
        tokens = tokens + gate * self_attention(weights, f"{name}.attn", states, positions, clean)
        norm = f"{name}.pre_crs_attn_norm"
        states = layer_norm(tokens[clean:]) * weights[f"{norm}.weight"] + weights[f"{norm}.bias"]
        seen = cross_attention(weights, f"{name}.cross_attn", states, text)
        tokens = torch.cat([tokens[:clean], tokens[clean:] + seen])
        states = layer_norm(tokens) * (1 + ffn_scale) + ffn_shift
        hidden = F.silu(linear(weights, f"{name}.ffn.w1", states)) * linear(weights, f"{name}.ffn.w3", states)
        tokens = tokens + ffn_gate * linear(weights, f"{name}.ffn.w2", hidden)
    shift, scale = linear(weights, "final_layer.adaLN_modulation.1", F.silu(times)).chunk(2, dim=-1)
    patches = linear(weights, "final_layer.linear", layer_norm(tokens) * (1 + scale) + shift)
    output = torch.zeros_like(latents)
    for (t, y, x), patch in zip(positions, patches, strict=True):
        # Channels come last within a patch, behind its rows and columns.
        output[:, t, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] = patch.view(2, 2, -1).permute(2, 0, 1)
    return output


def embed_text(weights, text):
    hidden = linear(weights, "y_embedder.y_proj.0", text)
    return linear(weights, "y_embedder.y_proj.2", F.gelu(hidden, approximate="tanh"))


@pytest.mark.parametrize("num_clean_frames", [0, 1, 2])
@pytest.mark.parametrize("zero_pad", [True, False])
@torch.no_grad()
def test_output_equals_the_written_out_network(inputs, zero_pad, num_clean_frames):
    network = make_tiny_network(text_tokens_zero_pad=zero_pad)
    output = run(network, inputs, num_cond_latents=num_clean_frames)
    weights, mask = network.state_dict(), inputs["encoder_attention_mask"]
    for row in range(2):
        text = embed_text(weights, inputs["encoder_hidden_states"][row])
        # As it is published, padding is seen as zeros; else it isn't seen.
        seen = text * mask[row][:, None] if zero_pad else text[mask[row]]
        expected = reference(
            weights,
            inputs["hidden_states"][row],
            inputs["timestep"][row],
            seen,
            num_clean_frames=num_clean_frames,
        )
        torch.testing.assert_close(output[row], expected, atol=2e-5, rtol=0)
    assert output.std() > 0.1


@pytest.mark.parametrize("zero_pad", [True, False])
def test_what_stands_at_padding_does_not_matter_and_a_real_token_does(inputs, zero_pad):
    network = make_tiny_network(text_tokens_zero_pad=zero_pad)
    before = run(network, inputs)
    text = inputs["encoder_hidden_states"].clone()
    text[1, 4:] = 100.0
    torch.testing.assert_close(run(network, inputs, encoder_hidden_states=text), before, atol=1e-6, rtol=0)
    text[1, 3] += 1.0
    assert (run(network, inputs, encoder_hidden_states=text) - before)[1].abs().max() > 1e-3


def test_how_much_padding_there_is_matters_to_the_published_network_only(inputs):
    longer = {
        "encoder_hidden_states": F.pad(inputs["encoder_hidden_states"], (0, 0, 0, 9)),
        "encoder_attention_mask": F.pad(inputs["encoder_attention_mask"], (0, 9)),
    }
    for zero_pad in (True, False):
        network = make_tiny_network(text_tokens_zero_pad=zero_pad)
        difference = (run(network, inputs, **longer) - run(network, inputs)).abs().max()
        assert (difference > 1e-3) == zero_pad


def test_given_frames_see_neither_noise_nor_text(inputs):
    network = make_tiny_network()
    before = run(network, inputs, num_cond_latents=1)[:, :, 0]
    changed = inputs["hidden_states"].clone()
    changed[:, :, 1:] += 1.0
    other = {"hidden_states": changed, "encoder_hidden_states": inputs["encoder_hidden_states"] + 1.0}
    torch.testing.assert_close(run(network, inputs, num_cond_latents=1, **other)[:, :, 0], before, atol=1e-6, rtol=0)
    assert (run(network, inputs, num_cond_latents=0, **other)[:, :, 0] - before).abs().max() > 1e-3


def test_one_timestep_is_that_of_all_frames(inputs):
    network, timestep = make_tiny_network(), torch.tensor([900.0, 31.0])
    spread = timestep[:, None].expand(2, FRAMES)
    torch.testing.assert_close(
        run(network, inputs, timestep=timestep), run(network, inputs, timestep=spread), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_time_and_modulation_stay_in_float32(inputs, autocast):
    """999 and 1000 are one number in bfloat16, and their sinusoids are far apart."""
    network = make_tiny_network()
    if not autocast:
        network = network.to(torch.bfloat16)
    made = {}

    def keep(name):
        return lambda module, args, output: made.update({name: output})

    network.t_embedder.register_forward_hook(keep("time"))
    network.blocks[1].adaLN_modulation.register_forward_hook(keep("modulation"))
    network.final_layer.register_forward_hook(keep("output"))
    dtype = torch.float32 if autocast else torch.bfloat16
    cast = {name: value.to(dtype) for name, value in inputs.items() if name.endswith("hidden_states")}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = run(network, {**inputs, **cast}, timestep=torch.tensor([999.0, 1000.0]))
    assert {value.dtype for value in (output, *made.values())} == {torch.float32}
    assert (made["time"][0] - made["time"][1]).abs().max() > 1e-2
    torch.testing.assert_close(
        output, run(make_tiny_network(), inputs, timestep=torch.tensor([999.0, 1000.0])), atol=0.2, rtol=0
    )


def test_gradient_checkpointing_changes_no_gradient(inputs):
    gradients = []
    for checkpointing in (False, True):
        network = make_tiny_network().train()
        calls = []
        network.blocks[0].ffn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            network.enable_gradient_checkpointing()
        assert network.is_gradient_checkpointing is checkpointing
        network(**inputs, num_cond_latents=1).sample.square().mean().backward()
        assert len(calls) == (2 if checkpointing else 1)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=0)


def test_it_is_saved_and_loaded_with_the_published_configs_keys(inputs, tmp_path):
    network = make_tiny_network(enable_flashattn2=True, bsa_params={"sparsity": 0.9375})
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["enable_flashattn2"] is True and config["bsa_params"] == {"sparsity": 0.9375}
    loaded = LongCatVideoTransformer3DModel.from_pretrained(tmp_path)
    assert torch.equal(run(loaded, inputs), run(network, inputs))


def test_the_attention_backend_is_used(inputs):
    network = make_tiny_network()
    before = run(network, inputs)
    set_attention_backend(network, "_native_math")
    torch.testing.assert_close(run(network, inputs), before, atol=1e-5, rtol=0)
    layers = [layer for block in network.blocks for layer in (block.attn, block.cross_attn)]
    assert {layer.processor._attention_backend.value for layer in layers} == {"_native_math"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"enable_bsa": True}, "block-sparse attention is not implemented"),
        ({"patch_size": (2, 2, 2)}, "patches time"),
        ({"num_heads": 5}, "does not divide into 5 heads"),
    ],
)
def test_what_it_can_not_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_tiny_network(**changes)
