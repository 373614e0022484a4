import pytest
import torch

from fv_distill.models import KVCache

SIZES = {"num_layers": 2, "batch_size": 2, "num_heads": 3, "head_dim": 4, "tokens_per_frame": 5}
TOKENS = SIZES["tokens_per_frame"]


def make_cache(capacity=6, **options):
    return KVCache(**SIZES, capacity_frames=capacity, **options)


def tokens(frames, *, offset=0.0):
    """Keys and values whose every number tells its frame."""
    values = torch.tensor([float(frame) for frame in frames for _ in range(TOKENS)]) + offset
    key = values[None, :, None, None].expand(2, -1, 3, 4).clone()
    return key, key + 100


def fill(cache, stop, *, chunk=2, start=0, offset=0.0):
    for first in range(start, stop, chunk):
        for layer in range(2):
            cache.write(layer, first, *tokens(range(first, first + chunk), offset=offset))


def frames_read(cache, start_frame, layer=1):
    """The frames that a chunk sees, in the order of the cache; checks that keys and values belong together."""
    key, value = cache.read(layer, start_frame)
    assert torch.equal(key + 100, value) and key.shape[0] == 2 and key.shape[2:] == (3, 4)
    read = key[0, :, 0, 0].reshape(-1, TOKENS)
    assert (read == read[:, :1]).all() and (key == key[:1, :, :1, :1]).all()
    return read[:, 0].tolist()


@torch.no_grad()
@pytest.mark.parametrize(
    ("window", "sinks", "start", "expected"),
    [
        (None, 0, 0, []),
        (None, 0, 4, [0, 1, 2, 3]),
        (2, 0, 4, [2, 3]),
        (2, 1, 4, [0, 2, 3]),
        (3, 2, 4, [0, 1, 2, 3]),
        (0, 0, 4, []),
        (0, 1, 4, [0]),
        (None, 3, 2, [0, 1]),
    ],
)
def test_a_chunk_reads_the_sinks_and_the_window_before_it(window, sinks, start, expected):
    cache = make_cache(local_window=window, sink_frames=sinks)
    fill(cache, 6)
    assert cache.num_frames == 6
    assert frames_read(cache, start) == expected


@torch.no_grad()
@pytest.mark.parametrize("sinks", [0, 1, 3])
def test_a_rolling_cache_reads_what_a_full_one_does(sinks):
    rolling = make_cache(sinks + 3 + 2, local_window=3, sink_frames=sinks)
    full = make_cache(40, local_window=3, sink_frames=sinks)
    for start in range(0, 40, 2):
        # A chunk is read again at every denoising step, and after it was stored.
        for _ in range(2):
            assert sorted(frames_read(rolling, start)) == frames_read(full, start)
            fill(rolling, start + 2, start=start)
            fill(full, start + 2, start=start)
        assert rolling.num_frames == full.num_frames == start + 2
    assert rolling.memory_bytes() < full.memory_bytes() / 4
    with pytest.raises(ValueError, match=r"sees back to frame \d+, but the cache has dropped what was before frame 3"):
        rolling.read(0, 20)


@torch.no_grad()
def test_writing_a_chunk_again_replaces_it_and_forgets_what_came_after():
    cache = make_cache()
    fill(cache, 6)
    fill(cache, 4, start=2, offset=0.5)
    assert cache.num_frames == 4
    assert frames_read(cache, 4) == [0, 1, 2.5, 3.5]
    with pytest.raises(ValueError, match="no complete history: the cache ends at frame 4"):
        cache.read(0, 6)


@torch.no_grad()
def test_a_rolling_cache_starts_over_from_frame_0():
    cache = make_cache(5, local_window=2, sink_frames=1)
    fill(cache, 12)
    fill(cache, 6, offset=0.5)
    assert frames_read(cache, 4) == [0.5, 2.5, 3.5]


@torch.no_grad()
def test_frames_can_not_be_left_out():
    cache = make_cache()
    fill(cache, 2)
    with pytest.raises(ValueError, match="starts at frame 4 can't be stored: the cache ends at frame 2"):
        cache.write(0, 4, *tokens(range(4, 6)))


@torch.no_grad()
def test_a_chunk_must_fit_beside_the_sinks():
    with pytest.raises(ValueError, match="capacity_frames=2 must exceed sink_frames=2"):
        make_cache(2, sink_frames=2)
    cache = make_cache(4, sink_frames=2)
    fill(cache, 4, chunk=4)
    assert frames_read(cache, 4) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="chunk of 4 frames does not fit beside 2 sinks; .* at least 6, not 4"):
        cache.write(0, 4, *tokens(range(4, 8)))


def test_layers_are_separate():
    cache = make_cache()
    cache.write(0, 0, *tokens(range(2)))
    assert frames_read(cache, 2, layer=0) == [0, 1]
    assert cache.num_frames == 0
    with pytest.raises(ValueError, match="ends at frame 0"):
        cache.read(1, 2)


def test_gradients_may_not_read_a_cache_that_has_dropped_frames():
    cache = make_cache(4, local_window=2)
    fill(cache, 4)
    assert frames_read(cache, 4) == [2, 3]
    fill(cache, 6, start=4)
    with pytest.raises(ValueError, match="gradients are on and the cache has dropped frames"):
        cache.read(0, 6)
    with torch.no_grad():
        assert sorted(frames_read(cache, 6)) == [4, 5]


def test_a_graph_holds_copies_and_stored_entries_hold_no_graph():
    cache = make_cache()
    key, value = (part.requires_grad_() for part in tokens(range(2)))
    cache.write(0, 0, key * 1.0, value * 1.0)
    own = torch.ones(2, TOKENS, 3, 4, requires_grad=True)
    keys, values = cache.history(0, 2).extend(own, own)
    loss = (keys * values).sum()
    cache.write(0, 0, key * 7, value * 7)
    loss.backward()
    assert key.grad is None and torch.equal(own.grad, torch.full_like(own, 2.0))


def test_a_recomputation_accepts_later_chunks_and_refuses_another_history():
    own = torch.ones(2, TOKENS, 3, 4)
    for replace in (lambda cache: fill(cache, 2), KVCache.reset):
        cache = make_cache()
        fill(cache, 4)
        history = cache.history(0, 2)
        before = history.extend(own, own)[0]
        fill(cache, 6, start=2, offset=0.5)
        assert torch.equal(history.extend(own, own)[0], before)
        replace(cache)
        with pytest.raises(RuntimeError, match="history of the chunk at frame 2 was replaced"):
            history.extend(own, own)


@torch.no_grad()
def test_other_text_drops_what_was_kept():
    cache = make_cache()
    text = torch.zeros(2, 7, 8)
    entry = torch.ones(2, 7, 3, 4)
    cache.use_text(text)
    cache.keep_text(0, entry, entry)
    cache.use_text(text)
    assert cache.text(0) is not None and cache.text(1) is None
    with torch.enable_grad():
        assert cache.text(0) is None, "gradients have to reach the text's projections"
    text += 1
    cache.use_text(text)
    assert cache.text(0) is None
    cache.keep_text(0, entry, entry)
    cache.use_text(text.clone())
    assert cache.text(0) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_stated_is_memory_allocated(dtype):
    cache = make_cache(3, dtype=dtype)
    assert cache.memory_bytes() == KVCache.required_bytes(**SIZES, capacity_frames=3, dtype=dtype)
    assert cache.memory_bytes() == cache._entries.untyped_storage().nbytes()
    entry = torch.ones(2, 7, 3, 4, dtype=dtype)
    for layer in range(2):
        cache.keep_text(layer, entry, entry.clone())
    stated = KVCache.required_bytes(**SIZES, capacity_frames=3, dtype=dtype, text_length=7)
    assert cache.memory_bytes() == stated > KVCache.required_bytes(**SIZES, capacity_frames=3, dtype=dtype)
    cache.reset()
    assert cache.num_frames == 0
    assert cache.memory_bytes() == KVCache.required_bytes(**SIZES, capacity_frames=3, dtype=dtype)


def test_the_cache_of_wan_1_3b():
    """30 blocks, 12 heads of 128, 21 latent frames of 1560 tokens (480 x 832), two bytes a number: 2 x 3.0 GB."""
    sizes = {"num_layers": 30, "batch_size": 1, "num_heads": 12, "head_dim": 128, "tokens_per_frame": 1560}
    assert KVCache.required_bytes(**sizes, capacity_frames=21, dtype=torch.bfloat16) == 6_038_323_200
