"""The causal Wan against the bidirectional one, and streaming against one masked forward pass."""

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from tiny_models import LATENT_CHANNELS, TEXT_DIM, TEXT_LENGTH

from fv_distill.models import CausalWanModel, Conditioning, WanModel
from fv_distill.models.transformers import CausalWanTransformer3DModel
from fv_distill.models.transformers.rotary import axis_table

NUM_FRAMES = 6
SHAPE = (LATENT_CHANNELS, NUM_FRAMES, 4, 4)
TOLERANCE = {"atol": 1e-5, "rtol": 0}
# chunk_size, local_window, sink_frames
LAYOUTS = [(1, None, 0), (2, None, 0), (6, None, 0), (1, 2, 1), (2, 2, 1), (2, 1, 0), (2, 0, 0), (3, 1, 2)]


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def bidirectional(tiny_wan):
    return WanModel.from_pretrained(str(tiny_wan), text_length=TEXT_LENGTH)


@pytest.fixture(scope="module")
def load(tiny_wan):
    def load(chunk_size, local_window=None, sink_frames=0, **options):
        sizes = {"chunk_size": chunk_size, "local_window": local_window, "sink_frames": sink_frames}
        return CausalWanModel.from_pretrained(str(tiny_wan), text_length=TEXT_LENGTH, **sizes, **options)

    return load


@pytest.fixture
def conditioning():
    return Conditioning(draw(1, 2, TEXT_LENGTH, TEXT_DIM), None)


@pytest.fixture
def x_t():
    return draw(2, 2, *SHAPE)


@pytest.fixture
def clean():
    return draw(3, 2, *SHAPE)


def stream(model, x_t, sigma, conditioning, clean, cache, history_sigma=None):
    """Each noisy chunk over the cache of the clean ones before it."""
    zero, size = torch.zeros(x_t.shape[0]), model.chunk_size
    velocities = []
    for start in range(0, x_t.shape[2], size):
        chunk = slice(start, start + size)
        where = {"cache": cache, "start_frame": start}
        velocities.append(model.predict_velocity_streaming(x_t[:, :, chunk], sigma, conditioning, **where))
        level = zero if history_sigma is None else history_sigma
        model.predict_velocity_streaming(clean[:, :, chunk], level, conditioning, **where, store_kv=True)
    assert cache.num_frames == x_t.shape[2]
    return torch.cat(velocities, dim=2)


@torch.no_grad()
@pytest.mark.parametrize(
    "sigma", [torch.tensor([0.3, 0.8]), torch.linspace(0, 1, 2 * NUM_FRAMES).view(2, -1)], ids=["scalar", "per-frame"]
)
def test_one_chunk_over_the_clip_equals_the_bidirectional_network(bidirectional, load, conditioning, x_t, clean, sigma):
    expected = bidirectional.predict_velocity(x_t, sigma, conditioning)
    one_chunk, two_chunks = load(NUM_FRAMES), load(NUM_FRAMES // 2)
    torch.testing.assert_close(one_chunk.predict_velocity(x_t, sigma, conditioning), expected, **TOLERANCE)
    taught = one_chunk.predict_velocity(x_t, sigma, conditioning, clean_history=clean)
    torch.testing.assert_close(taught, expected, **TOLERANCE)
    assert (two_chunks.predict_velocity(x_t, sigma, conditioning) - expected).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_streaming_equals_one_masked_forward_with_clean_history(load, conditioning, x_t, clean, layout):
    model, sigma = load(*layout), torch.tensor([0.3, 0.8])
    expected = model.predict_velocity(x_t, sigma, conditioning, clean_history=clean)
    streamed = stream(model, x_t, sigma, conditioning, clean, model.new_cache(2, SHAPE))
    torch.testing.assert_close(streamed, expected, **TOLERANCE)
    if layout[0] < NUM_FRAMES and layout[1:] != (0, 0):
        other = model.predict_velocity(x_t, sigma, conditioning, clean_history=clean + 1)
        assert (other - expected).abs().max() > 1e-2, "a history that doesn't matter proves nothing"


@torch.no_grad()
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout[1] is not None])
def test_a_rolling_cache_equals_recomputation(load, conditioning, layout):
    """Over three times the frames that it has room for: against the full cache, and against the masked forward pass."""
    model, sigma = load(*layout), torch.tensor([0.3, 0.8])
    shape = (LATENT_CHANNELS, 18, 4, 4)
    x_t, clean = draw(2, 2, *shape), draw(3, 2, *shape)
    rolling, full = model.new_cache(2, shape, rolling=True), model.new_cache(2, shape)
    assert rolling.capacity_frames == sum(layout) <= 6 < full.capacity_frames
    streamed = stream(model, x_t, sigma, conditioning, clean, rolling)
    torch.testing.assert_close(streamed, stream(model, x_t, sigma, conditioning, clean, full), **TOLERANCE)
    expected = model.predict_velocity(x_t, sigma, conditioning, clean_history=clean)
    torch.testing.assert_close(streamed, expected, **TOLERANCE)
    unlimited = load(layout[0]).predict_velocity(x_t, sigma, conditioning, clean_history=clean)
    assert (unlimited - expected).abs().max() > 1e-3, "a window that doesn't matter proves nothing"


@torch.no_grad()
def test_history_may_be_noisy(load, conditioning, x_t, clean):
    model, sigma, level = load(2), torch.tensor([0.3, 0.8]), torch.tensor([0.1, 0.2])
    per_frame = level[:, None].expand(-1, NUM_FRAMES)
    expected = stream(model, x_t, sigma, conditioning, clean, model.new_cache(2, SHAPE), history_sigma=level)
    for history_sigma in (level, per_frame):
        velocity = model.predict_velocity(x_t, sigma, conditioning, clean_history=clean, history_sigma=history_sigma)
        torch.testing.assert_close(velocity, expected, **TOLERANCE)
    quiet = model.predict_velocity(x_t, sigma, conditioning, clean_history=clean)
    assert (quiet - expected).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("sigma_shape", ["scalar", "per-frame"])
def test_the_time_embedding_is_diffusers_bit_for_bit(load, sigma_shape):
    """In bf16, where an embedding computed in that type would be far off."""
    sigma = torch.tensor([0.3171, 0.8139])
    if sigma_shape == "per-frame":
        sigma = torch.linspace(0.01, 0.99, 2 * NUM_FRAMES).view(2, -1)
    model = load(2, dtype="bfloat16")
    embedder = model.transformer.condition_embedder
    stock = WanTransformer3DModel.from_pretrained(model.directory, subfolder="transformer", dtype=torch.bfloat16)
    outputs = []
    embedder.register_forward_hook(lambda _, args, out: outputs.append(out))
    stock.condition_embedder.register_forward_hook(lambda _, args, out: outputs.append(out))
    text = draw(1, 2, TEXT_LENGTH, TEXT_DIM).bfloat16()
    model.predict_velocity(draw(2, 2, *SHAPE), sigma, Conditioning(text, None))
    # One token per frame at this size, so that diffusers' per-token timestep is per frame too.
    timestep = 1000 * sigma
    stock(draw(2, 2, LATENT_CHANNELS, NUM_FRAMES, 2, 2).bfloat16(), timestep, text)
    for own, other in zip(*(output[:2] for output in outputs), strict=True):
        assert own.dtype == other.dtype == torch.bfloat16
        assert torch.equal(own, other)


def test_rotary_angles_equal_diffusers_and_go_on_past_its_table(load):
    rope = load(2).transformer.rope
    tables = (rope.freqs_cos, rope.freqs_sin)
    assert tables[0].shape[0] == 32
    start = 0
    for dim in (rope.t_dim, rope.h_dim, rope.w_dim):
        for table, own in zip(tables, axis_table(0, 32, dim, torch.device("cpu")), strict=True):
            torch.testing.assert_close(own, table[:, start : start + dim : 2], atol=1e-6, rtol=0)
        start += dim
    cos, sin = axis_table(40, 43, rope.t_dim, torch.device("cpu"))
    expected = torch.outer(torch.arange(40, 43).double(), 10000.0 ** (-torch.arange(0, rope.t_dim, 2) / rope.t_dim))
    torch.testing.assert_close(cos, expected.cos().float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(sin, expected.sin().float(), atol=1e-5, rtol=0)


@torch.no_grad()
def test_attention_depends_on_relative_positions_only_also_past_the_table(load, conditioning):
    """Rotary embedding's defining property: a clip that starts at frame 100 sees what one that starts at 0 sees."""
    network = load(NUM_FRAMES).transformer
    arguments = (draw(2, 2, *SHAPE), torch.tensor([300.0, 800.0]), conditioning.text)
    at_zero = network(*arguments).sample
    torch.testing.assert_close(network(*arguments, start_frame=100).sample, at_zero, **TOLERANCE)
    stretched = network.rotary_table
    network.rotary_table = lambda frames, *rest: stretched([range(0, 1)] * NUM_FRAMES, *rest)
    assert (network(*arguments).sample - at_zero).abs().max() > 1e-3, "positions that don't matter prove nothing"


def test_weights_and_config_move_both_ways(tiny_wan, tmp_path):
    stock = WanTransformer3DModel.from_pretrained(tiny_wan, subfolder="transformer")
    causal = CausalWanTransformer3DModel.from_pretrained(tiny_wan, subfolder="transformer")
    assert causal.state_dict().keys() == stock.state_dict().keys()
    assert all(torch.equal(value, stock.state_dict()[key]) for key, value in causal.state_dict().items())
    assert type(causal.blocks[0]).__name__ in causal._no_split_modules
    causal.proj_out.bias.data += 1
    causal.save_pretrained(tmp_path)
    back = WanTransformer3DModel.from_pretrained(tmp_path)
    assert type(back) is WanTransformer3DModel
    assert all(torch.equal(value, causal.state_dict()[key]) for key, value in back.state_dict().items())
    arguments = (draw(2, 2, *SHAPE), torch.tensor([300.0, 800.0]), draw(1, 2, TEXT_LENGTH, TEXT_DIM))
    with torch.no_grad():
        torch.testing.assert_close(causal(*arguments).sample, back(*arguments).sample, **TOLERANCE)


@torch.no_grad()
def test_a_stock_pipeline_runs_the_causal_network(tiny_wan, load):
    """As validation does during training: every step is the block-causal pass over the noisy clip."""
    model = load(1)
    pipeline = WanPipeline.from_pretrained(tiny_wan)
    pipeline.set_progress_bar_config(disable=True)
    noise = draw(0, 1, LATENT_CHANNELS, 3, 4, 4)
    options = {
        **{"height": 32, "width": 32, "num_frames": 9, "latents": noise, "num_inference_steps": 1},
        **{"guidance_scale": 1.0, "max_sequence_length": TEXT_LENGTH, "output_type": "latent"},
    }
    stock = pipeline("a digit", **options).frames
    pipeline.register_modules(transformer=model.transformer)
    x0 = model.predict_x0(noise, torch.ones(1), model.prompt_conditioning("a digit"))
    torch.testing.assert_close(pipeline("a digit", **options).frames, x0, **TOLERANCE)
    assert (stock - x0).abs().max() > 1e-3
