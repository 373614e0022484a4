import copy

import pytest
import torch
from tiny_models import LATENT_CHANNELS, TEXT_DIM, TEXT_LENGTH, make_tiny_transformer

from fv_distill.models import CausalModelBase, CausalWanModel, Conditioning, KVCache, WanModel
from fv_distill.models.transformers import CausalWanTransformer3DModel
from fv_distill.schedules import flow

SHAPE = (LATENT_CHANNELS, 6, 4, 4)
SIGMA = torch.tensor([0.3, 0.8])


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conditioning():
    return Conditioning(draw(1, 2, TEXT_LENGTH, TEXT_DIM), None)


@pytest.fixture
def load(tiny_wan):
    def load(chunk_size=2, **options):
        return CausalWanModel.from_pretrained(str(tiny_wan), chunk_size=chunk_size, text_length=TEXT_LENGTH, **options)

    return load


def store(model, cache, clean, *, stop):
    """Put clean chunks into a cache, as a rollout does."""
    with torch.no_grad():
        for start in range(0, stop, model.chunk_size):
            chunk = clean[:, :, start : start + model.chunk_size]
            where = {"cache": cache, "start_frame": start, "store_kv": True}
            model.predict_velocity_streaming(chunk, torch.zeros(len(clean)), conditioning(), **where)


# Who sees whom


def frames_that_reach(output, inputs, frame):
    """Which input frames have a gradient of one output frame."""
    (gradient,) = torch.autograd.grad(output[:, :, frame].square().sum(), inputs, retain_graph=True)
    return [index for index in range(gradient.shape[2]) if gradient[:, :, index].abs().max() > 0]


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 6])
def test_no_frame_sees_a_later_chunk(load, chunk_size):
    x_t = draw(2, 2, *SHAPE).requires_grad_()
    velocity = load(chunk_size).predict_velocity(x_t, SIGMA, conditioning())
    for frame in range(6):
        end_of_chunk = (frame // chunk_size + 1) * chunk_size
        assert frames_that_reach(velocity, x_t, frame) == list(range(end_of_chunk))


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 6])
def test_with_clean_history_a_frame_sees_its_own_chunk_and_earlier_clean_ones(load, chunk_size):
    x_t, clean = draw(2, 2, *SHAPE).requires_grad_(), draw(3, 2, *SHAPE).requires_grad_()
    velocity = load(chunk_size).predict_velocity(x_t, SIGMA, conditioning(), clean_history=clean)
    for frame in range(6):
        start = frame // chunk_size * chunk_size
        assert frames_that_reach(velocity, x_t, frame) == list(range(start, start + chunk_size))
        assert frames_that_reach(velocity, clean, frame) == list(range(start))


def test_a_window_limits_one_blocks_sight(tiny_wan):
    """One block: with more, what lies before the window still arrives through the frames inside it."""
    network = CausalWanTransformer3DModel(**make_tiny_transformer(num_layers=1).config)
    model = CausalWanModel(network, directory=tiny_wan, chunk_size=1, local_window=2, sink_frames=1, flow_shift=3.0)
    x_t = draw(2, 2, *SHAPE).requires_grad_()
    velocity = model.predict_velocity(x_t, SIGMA, conditioning())
    assert frames_that_reach(velocity, x_t, 5) == [0, 3, 4, 5]
    assert frames_that_reach(velocity, x_t, 2) == [0, 1, 2]


# Gradients over the cache


def detach_history_in(network, num_tokens):
    """Make the first tokens' keys and values constants, which is what a cache holds."""

    def detach(_module, _arguments, output):
        return torch.cat([output[:, :num_tokens].detach(), output[:, num_tokens:]], dim=1)

    for block in network.blocks:
        block.attn1.norm_k.register_forward_hook(detach)
        block.attn1.to_v.register_forward_hook(detach)


def gradients(network):
    collected = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    network.zero_grad()
    return collected


def cached_rollout(model, x_t, clean, weight):
    """All chunks' losses over one cache that is written as it goes; backward at the very end."""
    cache, losses = model.new_cache(2, SHAPE), []
    for start in range(0, x_t.shape[2], model.chunk_size):
        chunk = slice(start, start + model.chunk_size)
        where = {"cache": cache, "start_frame": start}
        # A denoising step before the one with gradients, as few-step rollouts make.
        with torch.no_grad():
            model.predict_velocity_streaming(x_t[:, :, chunk] + 1, torch.ones(2), conditioning(), **where)
        velocity = model.predict_velocity_streaming(x_t[:, :, chunk], SIGMA, conditioning(), **where)
        losses.append((weight[:, :, chunk] * velocity).sum())
        with torch.no_grad():
            zero = torch.zeros(2)
            model.predict_velocity_streaming(clean[:, :, chunk], zero, conditioning(), **where, store_kv=True)
    return sum(losses)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("window", [{}, {"local_window": 2, "sink_frames": 1}])
def test_a_cached_rollouts_gradients_equal_the_uncached_ones(load, checkpointing, window):
    """To every parameter and to the noisy latents.

    The uncached pass is one masked forward with clean history, whose keys and values, the only things through which
    the history reaches a noisy chunk, are made constants by hooks. Without them its gradients differ: they then also
    go through the history's pass, which streaming runs without a graph.
    """
    x_t, clean, weight = draw(2, 2, *SHAPE), draw(3, 2, *SHAPE), draw(4, 2, *SHAPE)
    model = load(trainable=True, gradient_checkpointing=checkpointing, **window)
    assert model.transformer.is_gradient_checkpointing is checkpointing
    x_cached, x_masked = (x_t.clone().requires_grad_() for _ in range(2))
    cached_rollout(model, x_cached, clean, weight).backward()
    cached = gradients(model.transformer)

    def masked():
        velocity = model.predict_velocity(x_masked, SIGMA, conditioning(), clean_history=clean)
        (weight * velocity).sum().backward()
        return gradients(model.transformer)

    through_history = masked()
    x_masked.grad = None
    detach_history_in(model.transformer, num_tokens=4 * 4)
    expected = masked()
    torch.testing.assert_close(x_cached.grad, x_masked.grad, atol=1e-5, rtol=1e-4)
    scale = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(cached[name], value, atol=1e-6 * float(scale), rtol=1e-4, msg=name)
        assert value.abs().max() > 0, name
    assert (through_history["blocks.0.attn1.to_k.weight"] - expected["blocks.0.attn1.to_k.weight"]).abs().max() > 1e-2


def test_checkpointing_refuses_a_history_that_was_replaced(load):
    """Otherwise the recomputation would read another history, and the gradients would be wrong without a word."""
    x_t, clean = draw(2, 2, *SHAPE), draw(3, 2, *SHAPE)
    for checkpointing in (False, True):
        model = load(trainable=True, gradient_checkpointing=checkpointing)
        cache = model.new_cache(2, SHAPE)
        store(model, cache, clean, stop=2)
        velocity = model.predict_velocity_streaming(x_t[:, :, 2:4], SIGMA, conditioning(), cache=cache, start_frame=2)
        store(model, cache, clean + 1, stop=2)
        if checkpointing:
            with pytest.raises(RuntimeError, match="history of the chunk at frame 2 was replaced"):
                velocity.sum().backward()
        else:
            velocity.sum().backward()


def test_storing_writes_once_under_checkpointing(load):
    """The chunk that is stored may also be the one with gradients; its recomputation must not touch the cache."""
    clean = draw(3, 2, *SHAPE)
    model = load(trainable=True, gradient_checkpointing=True)
    cache = model.new_cache(2, SHAPE)
    x0 = model.predict_x0_streaming(clean[:, :, :2], SIGMA, conditioning(), cache=cache, start_frame=0, store_kv=True)
    writes, entries = copy.deepcopy(cache._writes), cache._entries.clone()
    x0.sum().backward()
    assert cache._writes == writes and torch.equal(cache._entries, entries)
    assert not cache._entries.requires_grad and cache.num_frames == 2


def test_text_is_projected_once_without_gradients_and_always_with_them(load):
    model = load(trainable=True)
    calls = []
    model.transformer.blocks[0].attn2.to_k.register_forward_hook(lambda *_: calls.append(1))
    cache, x_t, condition = model.new_cache(2, SHAPE), draw(2, 2, *SHAPE)[:, :, :2], conditioning()
    where = {"cache": cache, "start_frame": 0}
    with torch.no_grad():
        first = model.predict_velocity_streaming(x_t, SIGMA, condition, **where)
        second = model.predict_velocity_streaming(x_t, SIGMA, condition, **where)
        assert len(calls) == 1 and torch.equal(first, second)
    velocity = model.predict_velocity_streaming(x_t, SIGMA, condition, **where)
    assert len(calls) == 2
    torch.testing.assert_close(velocity, first, atol=1e-6, rtol=0)
    velocity.sum().backward()
    assert model.transformer.blocks[0].attn2.to_k.weight.grad.abs().max() > 0
    other = Conditioning(condition.text + 1, None)
    with torch.no_grad():
        changed = model.predict_velocity_streaming(x_t, SIGMA, other, **where)
        expected = model.predict_velocity_streaming(x_t, SIGMA, other, cache=model.new_cache(2, SHAPE), start_frame=0)
    assert torch.equal(changed, expected) and (changed - first).abs().max() > 1e-3


# Cost


@torch.no_grad()
def test_modulation_is_per_frame_never_per_token(load):
    model, shapes = load(), []
    model.transformer.blocks[0].register_forward_pre_hook(lambda _, arguments: shapes.append(arguments[2].shape))
    x_t, clean = draw(2, 2, *SHAPE), draw(3, 2, *SHAPE)
    model.predict_velocity(x_t, SIGMA, conditioning())
    model.predict_velocity(x_t, torch.rand(2, 6), conditioning())
    model.predict_velocity(x_t, SIGMA, conditioning(), clean_history=clean)
    assert shapes == [(2, 1, 6, 24), (2, 6, 6, 24), (2, 4 + 6, 6, 24)]


@torch.no_grad()
@pytest.mark.parametrize("rolling", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_stated_is_memory_allocated(load, rolling, dtype):
    model = load(local_window=1, sink_frames=1, dtype=dtype)
    sizes = model.cache_sizes(2, SHAPE, rolling=rolling)
    cache = model.new_cache(2, SHAPE, rolling=rolling)
    assert sizes["capacity_frames"] == (4 if rolling else 6)
    assert cache.memory_bytes() == KVCache.required_bytes(**sizes, dtype=model.dtype)
    assert cache.memory_bytes() == cache._entries.untyped_storage().nbytes()
    store(model, cache, draw(3, 2, *SHAPE), stop=2)
    with_text = KVCache.required_bytes(**sizes, dtype=model.dtype, text_length=TEXT_LENGTH)
    assert cache.memory_bytes() == with_text
    assert sum(part.untyped_storage().nbytes() for pair in cache._text.values() for part in pair) == (
        with_text - cache._entries.untyped_storage().nbytes()
    )


# The adapter


def test_it_is_a_wan_with_three_more_settings(load, batch):
    model = load(3, local_window=6, sink_frames=1)
    assert isinstance(model, CausalModelBase) and isinstance(model, WanModel)
    assert (model.chunk_size, model.local_window, model.sink_frames) == (3, 6, 1)
    assert model.prepare_batch(batch).latents.shape == (2, 4, 3, 4, 4)
    assert model.prompt_conditioning("a digit").text.shape == (1, TEXT_LENGTH, TEXT_DIM)
    assert copy.deepcopy(model.transformer).layout == model.layout, "an EMA copy keeps the chunks"


def test_x0_follows_from_the_velocity(load):
    model, x_t, clean = load(), draw(2, 2, *SHAPE), draw(3, 2, *SHAPE)
    sigma = torch.rand(2, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        options = {"clean_history": clean, "history_sigma": SIGMA}
        velocity = model.predict_velocity(x_t, sigma, conditioning(), **options)
        x0 = model.predict_x0(x_t, sigma, conditioning(), **options)
        assert torch.equal(x0, flow.velocity_to_x0(x_t, velocity, sigma))
        where = {"cache": model.new_cache(2, SHAPE), "start_frame": 0}
        velocity = model.predict_velocity_streaming(x_t[:, :, :2], SIGMA, conditioning(), **where)
        assert where["cache"].num_frames == 0, "a denoising step stores nothing unless told to"
        x0 = model.predict_x0_streaming(x_t[:, :, :2], SIGMA, conditioning(), **where, store_kv=True)
        assert torch.equal(x0, flow.velocity_to_x0(x_t[:, :, :2], velocity, SIGMA))
        assert where["cache"].num_frames == 2


@torch.no_grad()
def test_half_precision_streams_and_returns_fp32(load):
    model, clean = load(dtype="bfloat16"), draw(3, 2, *SHAPE)
    cache = model.new_cache(2, SHAPE)
    assert cache._entries.dtype == torch.bfloat16
    store(model, cache, clean, stop=2)
    chunk = clean[:, :, 2:4]
    velocity = model.predict_velocity_streaming(chunk, SIGMA, conditioning(), cache=cache, start_frame=2)
    expected = load().predict_velocity(clean, SIGMA, conditioning(), clean_history=clean)[:, :, 2:4]
    assert velocity.dtype == torch.float32
    torch.testing.assert_close(velocity, expected, atol=0.1, rtol=0)


@torch.no_grad()
def test_autocast_runs_every_path(load):
    model, clean = load(), draw(3, 2, *SHAPE)
    model.compute_on(torch.device("cpu"), torch.bfloat16)
    cache, wide_cache = model.new_cache(2, SHAPE), model.new_cache(2, SHAPE, dtype=torch.float32)
    assert cache.entries.dtype == torch.bfloat16
    exact = model.predict_velocity(clean, SIGMA, conditioning(), clean_history=clean)
    with torch.autocast("cpu", torch.bfloat16):
        masked = model.predict_velocity(clean, SIGMA, conditioning(), clean_history=clean)
        store(model, cache, clean, stop=2)
        store(model, wide_cache, clean, stop=2)
        chunk = {"x_t": clean[:, :, 2:4], "sigma": SIGMA, "conditioning": conditioning(), "start_frame": 2}
        streamed = model.predict_velocity_streaming(**chunk, cache=cache)
        # Autocast's keys and values are bfloat16 already: storing them as such loses nothing.
        assert torch.equal(model.predict_velocity_streaming(**chunk, cache=wide_cache), streamed)
    assert masked.dtype == streamed.dtype == torch.float32
    torch.testing.assert_close(masked, exact, atol=0.1, rtol=0)
    torch.testing.assert_close(streamed, exact[:, :, 2:4], atol=0.1, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"local_window": -1}, "local_window=-1"),
        ({"sink_frames": -1}, "sink_frames=-1"),
    ],
)
def test_settings_that_make_no_chunks_are_refused(load, options, message):
    with pytest.raises(ValueError, match=message):
        load(**options)


def test_calls_that_do_not_fit_are_explained(load):
    model, x_t = load(2), draw(2, 2, *SHAPE)
    with pytest.raises(ValueError, match="5 latent frames do not divide into chunks of chunk_size=2"):
        model.check_latent_shape((4, 5, 4, 4))
    with pytest.raises(ValueError, match="H=5 does not divide"):
        model.check_latent_shape((4, 6, 5, 4))
    with pytest.raises(ValueError, match="local_window is null"):
        model.new_cache(2, SHAPE, rolling=True)
    with pytest.raises(ValueError, match="clean_history has shape"):
        model.predict_velocity(x_t, SIGMA, conditioning(), clean_history=x_t[:, :, :4])
    with pytest.raises(ValueError, match="give both or neither"):
        model.predict_velocity(x_t, SIGMA, conditioning(), history_sigma=SIGMA)
    where = {"cache": model.new_cache(2, SHAPE), "start_frame": 2}
    with pytest.raises(ValueError, match="no complete history"):
        model.predict_velocity_streaming(x_t[:, :, :2], SIGMA, conditioning(), **where)
    with pytest.raises(ValueError, match="3 latent frames; streaming takes one chunk of chunk_size=2"):
        model.predict_velocity_streaming(x_t[:, :, :3], SIGMA, conditioning(), **where)
    with pytest.raises(ValueError, match="start_frame=3 is not the beginning of a chunk"):
        model.predict_velocity_streaming(x_t[:, :, :2], SIGMA, conditioning(), cache=where["cache"], start_frame=3)


def test_networks_that_do_not_fit_are_explained(tiny_wan):
    with pytest.raises(ValueError, match="needs a CausalWanTransformer3DModel, not a WanTransformer3DModel"):
        CausalWanModel(make_tiny_transformer(), directory=tiny_wan, flow_shift=3.0)
    config = dict(make_tiny_transformer().config)
    with pytest.raises(ValueError, match=r"patch_size=\(2, 2, 2\) patches time"):
        CausalWanTransformer3DModel(**{**config, "patch_size": (2, 2, 2)})
    network = CausalWanTransformer3DModel(**config)
    with pytest.raises(ValueError, match=r"timestep has shape \(2, 24\).*\[B, 6\]"):
        network(draw(2, 2, *SHAPE), torch.rand(2, 24), conditioning().text)
    with pytest.raises(ValueError, match="attention_kwargs"):
        network(draw(2, 2, *SHAPE), SIGMA, conditioning().text, attention_kwargs={"scale": 0.5})
