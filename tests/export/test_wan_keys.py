"""The renaming against an independent network of the original layout, against diffusers' own converter, and itself."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from original_wan import OriginalWan

from fv_distill.export import convert_state_dict, convert_state_dict_to_original

IMAGE_DIM = 20
IMAGE_TOKENS = 5
# What diffusers' attention takes for text when image tokens stand before it.
TEXT_TOKENS = 512

TINY = {
    "t2v-2.1": {},
    "i2v-2.1": {"in_channels": 12, "image_dim": IMAGE_DIM},
    "flf2v-2.1": {"in_channels": 12, "image_dim": IMAGE_DIM, "pos_embed_seq_len": 2 * IMAGE_TOKENS},
    "i2v-a14b-2.2": {"in_channels": 12},
    "ti2v-5b-2.2": {"in_channels": 6, "out_channels": 6},
}
LARGE = {"ffn_dim": 13824, "num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128}
# The published configs, with the number of tensors of the published files.
PUBLISHED = {
    "t2v-1.3b": ({**LARGE, "ffn_dim": 8960, "num_layers": 30, "num_attention_heads": 12}, 825),
    "t2v-14b": (LARGE, 1095),
    "i2v-14b": ({**LARGE, "in_channels": 36, "image_dim": 1280}, 1303),
    "flf2v-14b": ({**LARGE, "in_channels": 36, "image_dim": 1280, "pos_embed_seq_len": 514}, 1304),
    "i2v-a14b": ({**LARGE, "in_channels": 36}, 1095),
    "ti2v-5b": (
        {**LARGE, "ffn_dim": 14336, "num_layers": 30, "num_attention_heads": 24, "in_channels": 48, "out_channels": 48},
        825,
    ),
}


def networks(**changes) -> tuple[OriginalWan, WanTransformer3DModel]:
    """The same network in both layouts, each with its own weights; a tiny one unless `changes` say otherwise."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": 2,
        "rope_max_seq_len": 32,
        **changes,
    }
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    own = WanTransformer3DModel(added_kv_proj_dim=dim if "image_dim" in config else None, **config)
    original = OriginalWan(
        dim=dim,
        heads=config["num_attention_heads"],
        in_dim=config["in_channels"],
        out_dim=config["out_channels"],
        image_dim=config.get("image_dim"),
        image_positions=config.get("pos_embed_seq_len"),
        **{key: config[key] for key in ("ffn_dim", "num_layers", "text_dim", "freq_dim")},
    )
    return original, own


def random_weights(network: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Every tensor different, norms and biases included, so that a swap shows."""
    generator = torch.Generator().manual_seed(seed)
    return {key: 0.3 * torch.randn(value.shape, generator=generator) for key, value in network.state_dict().items()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    assert [key for key, value in expected.items() if not torch.equal(actual[key], value)] == []


@pytest.mark.parametrize("name", TINY)
def test_both_directions_are_exact(name):
    original_network, own_network = networks(**TINY[name])
    original, own = random_weights(original_network, 0), random_weights(own_network, 1)
    converted = convert_state_dict(original)
    assert {key: value.shape for key, value in converted.items()} == {key: value.shape for key, value in own.items()}
    assert_same(convert_state_dict_to_original(converted), original)
    assert_same(convert_state_dict(convert_state_dict_to_original(own)), own)


@pytest.mark.parametrize("name", TINY)
def test_the_function_is_the_original_networks(name):
    original_network, own_network = networks(**TINY[name])
    original_network.load_state_dict(random_weights(original_network, 0))
    own_network.load_state_dict(convert_state_dict(original_network.state_dict()))
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, own_network.config.in_channels, 3, 4, 6, generator=generator)
    text = torch.randn(2, TEXT_TOKENS, 16, generator=generator)
    timestep = torch.tensor([731.0, 20.0])
    image, images = None, {}
    if own_network.config.image_dim is not None:
        pairs = 2 if own_network.config.pos_embed_seq_len else 1
        image = torch.randn(2, pairs * IMAGE_TOKENS, IMAGE_DIM, generator=generator)
        # First and last frame come as two items of the batch.
        images = {"encoder_hidden_states_image": image.view(2 * pairs, IMAGE_TOKENS, IMAGE_DIM)}
    with torch.no_grad():
        expected = original_network(x, timestep, text, image)
        (actual,) = own_network(x, timestep, text, return_dict=False, **images)
    assert expected.abs().mean() > 0.1
    # Two orders of summation differ by up to 1e-5 here, two tensors that changed places by about 1.
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", [name for name in TINY if "flf2v" not in name])  # diffusers' doesn't know emb_pos
def test_diffusers_own_converter_agrees(name):
    original = random_weights(networks(**TINY[name])[0], 0)
    assert_same(convert_state_dict(original), convert_wan_transformer_to_diffusers(dict(original)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config, num_tensors = PUBLISHED[name]
    with torch.device("meta"):
        original, own = networks(**{"in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256, **config})
    converted = convert_state_dict(original.state_dict())
    assert len(converted) == num_tensors
    expected = {key: value.shape for key, value in own.state_dict().items()}
    assert {key: value.shape for key, value in converted.items()} == expected
    assert convert_state_dict_to_original(converted).keys() == original.state_dict().keys()


def test_the_affine_norm_changes_its_number():
    """The trap: of a block's norms only that before cross-attention has weights; it is norm3 there and norm2 here."""
    weight = torch.ones(2)
    assert list(convert_state_dict({"blocks.7.norm3.weight": weight})) == ["blocks.7.norm2.weight"]
    assert list(convert_state_dict_to_original({"blocks.7.norm2.weight": weight})) == ["blocks.7.norm3.weight"]


def test_tensors_are_handed_on():
    original = random_weights(networks()[0], 0)
    converted = convert_state_dict(original)
    assert {id(value) for value in converted.values()} == {id(value) for value in original.values()}


def test_unknown_keys_are_listed():
    weights = {
        "blocks.0.self_attn.q.weight": torch.ones(1),
        "blocks.0.self_attn.q.lora_A.weight": torch.ones(1),
        "blocks.x.self_attn.q.weight": torch.ones(1),
        "blocks.0.modulation.weight": torch.ones(1),
        "vae.weight": torch.ones(1),
    }
    with pytest.raises(ValueError) as caught:
        convert_state_dict(weights)
    assert str(caught.value) == (
        "not a key of the original Wan layout: blocks.0.self_attn.q.lora_A.weight, blocks.x.self_attn.q.weight, "
        "blocks.0.modulation.weight, vae.weight"
    )


def test_the_wrong_direction_is_recognised():
    original_network, own_network = networks()
    with pytest.raises(ValueError, match=r"original Wan layout: .* and \d+ more; they are the other layout's names"):
        convert_state_dict(own_network.state_dict())
    with pytest.raises(ValueError, match=r"diffusers Wan layout: .* and \d+ more; they are the other layout's names"):
        convert_state_dict_to_original(original_network.state_dict())
