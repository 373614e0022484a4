"""Matrix-Game 2's network against the published names, stock Wan, and its action module written out."""

import math
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from published_matrixgame2 import CONFIGS, published_shapes
from tiny_matrixgame2 import ACTION_CONFIG, CHANNELS, KEYS, conditions, make_network
from torch.nn.functional import gelu, layer_norm, silu

from fv_distill.export.matrixgame2_keys import convert_state_dict_to_published, network_config, to_own_key
from fv_distill.models.action_cache import ActionKVCache
from fv_distill.models.transformers import ChunkLayout, MatrixGame2Transformer3DModel

FRAMES = 6
SIZE = (4, 4)
PLACES = 4


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(frames: int = FRAMES, **changes: Any) -> dict[str, Any]:
    found = conditions(2, latent_frames=frames)
    return {
        "hidden_states": draw(1, 2, 2 * CHANNELS + 4, frames, *SIZE),
        "timestep": torch.tensor([300.0, 700.0]),
        "encoder_hidden_states_image": found["clip_feature"],
        "mouse_cond": found["mouse_cond"],
        "keyboard_cond": found["keyboard_cond"],
        **changes,
    }


def new_cache(network: MatrixGame2Transformer3DModel, *, capacity: int = FRAMES, **options: Any) -> ActionKVCache:
    return ActionKVCache(
        num_layers=len(network.blocks),
        batch_size=2,
        num_heads=2,
        head_dim=12,
        tokens_per_frame=PLACES,
        capacity_frames=capacity,
        action_layers=network.actions.blocks,
        mouse=network.actions.enable_mouse,
        keyboard=network.actions.enable_keyboard,
        action_heads=2,
        action_head_dim=8,
        **options,
    )


@torch.no_grad()
def stream(network: MatrixGame2Transformer3DModel, chunk: int, cache: ActionKVCache, **changes: Any) -> torch.Tensor:
    """Each chunk at its timestep over the clean chunks before it."""
    call = inputs(**changes)
    latents, timestep = call.pop("hidden_states"), call.pop("timestep")
    image = call["encoder_hidden_states_image"]
    out = []
    for start in range(0, latents.shape[2], chunk):
        if image is not None:
            cache.use_text(image)
        part = {"hidden_states": latents[:, :, start : start + chunk], "cache": cache, "start_frame": start, **call}
        out.append(network(timestep=timestep, **part).sample)
        network(timestep=torch.zeros(2), store_kv=True, **part)
    return torch.cat(out, dim=2)


@torch.no_grad()
def masked(network: MatrixGame2Transformer3DModel, layout: ChunkLayout, **changes: Any) -> torch.Tensor:
    """The same in one pass, with the clean clip as history."""
    call = inputs(**changes)
    latents, timestep = call.pop("hidden_states"), call.pop("timestep")
    history = latents.shape[2] - (layout.chunk_size or latents.shape[2])
    levels = torch.cat([torch.zeros(2, history), timestep[:, None].expand(-1, latents.shape[2])], dim=1)
    frames = torch.cat([latents[:, :, :history], latents], dim=2)
    return network(frames, levels, layout=layout, num_history_frames=history, **call).sample


@pytest.mark.parametrize("variant", CONFIGS)
def test_names_and_shapes_are_the_published_ones(variant):
    with torch.device("meta"):
        network = MatrixGame2Transformer3DModel.from_config(network_config(CONFIGS[variant]))
    own = convert_state_dict_to_published(network.state_dict())
    published = published_shapes(CONFIGS[variant])
    assert {name.removeprefix("model."): tuple(value.shape) for name, value in own.items()} == published
    assert {to_own_key(name) for name in published} == set(network.state_dict())


def test_the_published_size():
    # "Matrix-Game-2.0 (1.8B)" is the model card's figure.
    total = sum(math.prod(shape) for shape in published_shapes(CONFIGS["base_model"]).values())
    assert total == pytest.approx(1.8e9, rel=0.02)


@torch.no_grad()
def test_without_actions_it_is_wan_reading_the_image_for_text():
    network = make_network()
    wan = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=2 * CHANNELS + 4,
        out_channels=CHANNELS,
        text_dim=8,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )
    own = {k: v for k, v in network.state_dict().items() if "action_model" not in k and "image_embedder" not in k}
    missing, unexpected = wan.load_state_dict(own, strict=False)
    assert not unexpected and all("text_embedder" in name for name in missing)
    wan.condition_embedder.text_embedder = network.condition_embedder.image_embedder
    call = inputs(mouse_cond=None, keyboard_cond=None)
    image = call.pop("encoder_hidden_states_image")
    expected = wan(**{k: v for k, v in call.items() if v is not None}, encoder_hidden_states=image).sample
    actual = network(**inputs(mouse_cond=None, keyboard_cond=None)).sample
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert (network(**inputs()).sample - expected).abs().max() > 1e-3


def write_out_actions(module: Any, hidden: torch.Tensor, mouse: torch.Tensor, keyboard: torch.Tensor) -> torch.Tensor:
    """The published module, one sample, frame and place at a time; every frame sees every other."""
    heads, size = ACTION_CONFIG["heads_num"], 8
    window = 4 * ACTION_CONFIG["windows_size"]

    def before(actions: torch.Tensor, frame: int) -> torch.Tensor:
        padded = torch.cat([actions[:1].expand(window, -1), actions])
        return padded[4 * frame : 4 * frame + window]

    def turned(vector: torch.Tensor, frame: int) -> torch.Tensor:
        vector = vector / (vector.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        out = vector.clone()
        for pair in range(2):
            angle = torch.tensor(frame / 256 ** (2 * pair / 4))
            even, odd = vector[:, 2 * pair], vector[:, 2 * pair + 1]
            out[:, 2 * pair] = even * angle.cos() - odd * angle.sin()
            out[:, 2 * pair + 1] = even * angle.sin() + odd * angle.cos()
        return out

    def attended(query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
        scores = torch.stack([(query * key).sum(-1) / size**0.5 for key in keys]).softmax(0)
        return sum(score[:, None] * value for score, value in zip(scores, values, strict=True)).flatten()

    def linear(name: str, vector: torch.Tensor) -> torch.Tensor:
        layer = module.get_submodule(name)
        return layer.weight @ vector + (0 if layer.bias is None else layer.bias)

    batch, frames, places, _ = hidden.shape
    result = hidden.clone()
    for b in range(batch):
        for place in range(places):
            parts = []
            for frame in range(frames):
                joined = torch.cat([hidden[b, frame, place], before(mouse[b], frame).flatten()])
                inner = linear("mouse_mlp.2", gelu(linear("mouse_mlp.0", joined), approximate="tanh"))
                norm = module.mouse_mlp[3]
                inner = layer_norm(inner, inner.shape, norm.weight, norm.bias)
                parts.append(linear("t_qkv", inner).view(3, heads, size))
            keys = [turned(part[1], frame) for frame, part in enumerate(parts)]
            for frame, part in enumerate(parts):
                out = attended(turned(part[0], frame), keys, [part[2] for part in parts])
                result[b, frame, place] += linear("proj_mouse", out)
        parts = []
        for frame in range(frames):
            embedded = [
                linear("keyboard_embed.2", silu(linear("keyboard_embed.0", state)))
                for state in before(keyboard[b], frame)
            ]
            parts.append(linear("keyboard_attn_kv", torch.cat(embedded)).view(2, heads, size))
        keys = [turned(part[0], frame) for frame, part in enumerate(parts)]
        for frame in range(frames):
            for place in range(places):
                query = linear("mouse_attn_q", result[b, frame, place]).view(heads, size)
                out = attended(turned(query, frame), keys, [part[1] for part in parts])
                result[b, frame, place] += linear("proj_keyboard", out)
    return result


@torch.no_grad()
def test_the_action_module_written_out():
    network = make_network()
    module, frames = network.blocks[0].action_model, 4
    found = conditions(2, latent_frames=frames)
    hidden = draw(7, 2, frames, PLACES, 24)
    actions = network._windows(found["mouse_cond"], found["keyboard_cond"], [range(frames)], torch.device("cpu"))
    actual, _, _ = module(hidden, actions, None, None)
    expected = write_out_actions(module, hidden, found["mouse_cond"], found["keyboard_cond"])
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert (expected - hidden).abs().max() > 0.1


@pytest.mark.parametrize("window", [None, 2, 4])
@pytest.mark.parametrize("sinks", [0, 1])
def test_streaming_equals_one_masked_pass_over_clean_history(window, sinks):
    network = make_network()
    expected = masked(network, ChunkLayout(2, window, sinks))
    actual = stream(network, 2, new_cache(network, local_window=window, sink_frames=sinks))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert (expected - masked(network, ChunkLayout(3, window, sinks))).abs().max() > 1e-3


def test_a_rolling_cache_streams_the_same():
    network = make_network()
    options = {"local_window": 2, "sink_frames": 1}
    whole = stream(network, 2, new_cache(network, **options))
    rolling = new_cache(network, capacity=5, **options)
    torch.testing.assert_close(stream(network, 2, rolling), whole, atol=1e-6, rtol=0)
    assert rolling.mouse is not None and rolling.mouse.capacity_frames == 5


def test_one_chunk_is_the_whole_clip():
    network = make_network()
    with torch.no_grad():
        whole = network(**inputs()).sample
        one = network(**inputs(), layout=ChunkLayout(FRAMES)).sample
    torch.testing.assert_close(one, whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(stream(network, FRAMES, new_cache(network)), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dropped", ["mouse_cond", "keyboard_cond", "encoder_hidden_states_image"])
def test_what_is_dropped_is_left_out_in_streaming_too(dropped):
    network = make_network()
    changes = {dropped: None}
    expected = masked(network, ChunkLayout(2), **changes)
    torch.testing.assert_close(stream(network, 2, new_cache(network), **changes), expected, atol=1e-5, rtol=0)
    assert (expected - masked(network, ChunkLayout(2))).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["hidden_states", "mouse_cond", "keyboard_cond"])
def test_no_frame_sees_later_chunks_or_actions(name):
    network, chunk = make_network(), 2
    call = inputs()
    call[name] = call[name].clone().requires_grad_(True)
    for start in range(0, FRAMES, chunk):
        output = network(**call, layout=ChunkLayout(chunk)).sample
        (gradient,) = torch.autograd.grad(output[:, :, start : start + chunk].square().sum(), call[name])
        along = gradient.abs().sum(
            dim=tuple(d for d in range(gradient.ndim) if d != (2 if name == "hidden_states" else 1))
        )
        # The last latent frame of the chunk ends with video frame 4 * last, whose own action shows in the next one.
        last = start + chunk - 1
        end = last + 1 if name == "hidden_states" else 4 * last
        assert (along[end:] == 0).all()
        assert along[end - 1] > 0
        assert along[0] > 0 or start > 0


def test_save_and_load_round_trip(tmp_path):
    network = make_network(enable_mouse=False)
    # Published files hold weights of norms that nothing multiplies with.
    network.blocks[0].action_model.key_attn_q_norm.weight.fill_(3.0)
    network.save_pretrained(tmp_path)
    loaded = MatrixGame2Transformer3DModel.from_pretrained(tmp_path)
    assert loaded.actions == network.actions and not loaded.actions.enable_mouse
    assert loaded.state_dict().keys() == network.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs()).sample, network(**inputs()).sample, atol=0, rtol=0)
    assert loaded.blocks[0].action_model.key_attn_q_norm.weight.unique().item() == 3.0


def test_an_unused_norm_weight_changes_nothing():
    network = make_network()
    with torch.no_grad():
        before = network(**inputs()).sample
        network.blocks[0].action_model.img_attn_k_norm.weight.fill_(3.0)
        torch.testing.assert_close(network(**inputs()).sample, before, atol=0, rtol=0)


def test_every_parameter_gets_a_gradient_and_checkpointing_gives_the_same():
    network = make_network()
    network(**inputs()).sample.square().sum().backward()
    plain = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    assert [name for name, gradient in plain.items() if not gradient.abs().sum()] == []
    network.zero_grad()
    network.enable_gradient_checkpointing()
    network(**inputs()).sample.square().sum().backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], atol=1e-5, rtol=1e-5)


def test_a_checkpointed_chunk_over_the_cache_has_the_gradient_of_the_plain_one():
    network = make_network()
    gradients = []
    for checkpointed in (False, True):
        cache = new_cache(network)
        stream(network, 2, cache)
        if checkpointed:
            network.enable_gradient_checkpointing()
        call = inputs()
        call["hidden_states"] = call["hidden_states"][:, :, 2:4]
        network.zero_grad()
        network(**call, cache=cache, start_frame=2).sample.square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in network.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-5)


def test_new_action_modules_can_start_without_effect():
    network = make_network()
    network.start_actions_without_effect()
    with torch.no_grad():
        without = network(**inputs(mouse_cond=None, keyboard_cond=None)).sample
        torch.testing.assert_close(network(**inputs()).sample, without, atol=0, rtol=0)


def test_bfloat16_keeps_norms_and_modulation_in_float32(tmp_path):
    make_network().save_pretrained(tmp_path)
    network = MatrixGame2Transformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert network.blocks[0].scale_shift_table.dtype == torch.float32
    assert network.blocks[0].action_model.t_qkv.weight.dtype == torch.bfloat16
    call = {k: v if k == "timestep" else v.to(torch.bfloat16) for k, v in inputs().items()}
    with torch.no_grad():
        output = network(**call).sample
        expected = make_network()(**inputs()).sample
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ({"keys": 4}, "unknown keys keys"),
        ({"blocks": [5]}, r"blocks names \[5\], but num_layers=2"),
        ({"img_hidden_size": 32}, "img_hidden_size=32 must be"),
        ({"keyboard_hidden_dim": 24}, "keyboard_hidden_dim=24 must be heads_num=2 times"),
    ],
)
def test_configs_that_do_not_fit(action, message):
    with pytest.raises(ValueError, match=message):
        make_network(**action)


def test_actions_of_too_few_frames():
    needed = 4 * (FRAMES - 1)
    for name, width in (("mouse_cond", 2), ("keyboard_cond", KEYS)):
        with torch.no_grad():
            make_network()(**inputs(**{name: draw(3, 2, needed, width)}))
        with pytest.raises(ValueError, match=f"{name} has actions of {needed - 1} video frames"):
            make_network()(**inputs(**{name: draw(3, 2, needed - 1, width)}))


def test_a_timestep_of_another_length():
    with pytest.raises(ValueError, match=r"timestep has shape \(2, 5\)"):
        make_network()(**inputs(timestep=torch.zeros(2, 5)))
