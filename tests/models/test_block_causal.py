import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from fv_distill.models.transformers import ChunkLayout, FrameMask, masked_attention
from fv_distill.models.transformers.block_causal import cached_mask


def rows(text):
    return torch.tensor([[mark == "x" for mark in line] for line in text.split()])


DIFFUSION_FORCING = rows("xx.... xx.... xxxx.. xxxx.. xxxxxx xxxxxx")
WINDOW_1_SINK_1 = rows("xx.... xx.... xxxx.. xxxx.. x..xxx x..xxx")
# Four clean frames, then six noisy ones: a noisy chunk sees itself and the clean chunks before it.
TEACHER_FORCING = rows(
    "xx........ xx........ xxxx...... xxxx...... ....xx.... ....xx.... xx....xx.. xx....xx.. xxxx....xx xxxx....xx"
)
TEACHER_FORCING_WINDOW_1 = rows(
    "xx........ xx........ .xxx...... .xxx...... ....xx.... ....xx.... .x....xx.. .x....xx.. ...x....xx ...x....xx"
)


@pytest.mark.parametrize(
    ("layout", "history", "expected"),
    [
        (ChunkLayout(2), 0, DIFFUSION_FORCING),
        (ChunkLayout(2, local_window=1, sink_frames=1), 0, rows("xx.... xx.... xxxx.. xxxx.. x..xxx x..xxx")),
        (ChunkLayout(2, local_window=0), 0, rows("xx.... xx.... ..xx.. ..xx.. ....xx ....xx")),
        (ChunkLayout(2), 4, TEACHER_FORCING),
        (ChunkLayout(2, local_window=1), 4, TEACHER_FORCING_WINDOW_1),
        (ChunkLayout(None), 0, torch.ones(6, 6, dtype=torch.bool)),
        (ChunkLayout(6, local_window=1), 0, torch.ones(6, 6, dtype=torch.bool)),
        (ChunkLayout(4), 0, rows("xxxx.. xxxx.. xxxx.. xxxx.. xxxxxx xxxxxx")),
    ],
)
def test_which_frame_sees_which(layout, history, expected):
    assert torch.equal(layout.frame_mask(6, history), expected)


def test_a_mask_is_made_once_and_none_where_all_is_seen():
    device = torch.device("cpu")
    assert cached_mask(ChunkLayout(2), 6, 4, 3, device) is cached_mask(ChunkLayout(2), 6, 4, 3, device)
    assert cached_mask(ChunkLayout(2), 6, 4, 3, device) is not cached_mask(ChunkLayout(2), 6, 4, 4, device)
    assert cached_mask(ChunkLayout(6), 6, 0, 3, device) is None


def test_tokens_follow_their_frame():
    mask = FrameMask(DIFFUSION_FORCING, 3)
    assert mask.dense.shape == (18, 18)
    index = torch.arange(18)
    assert torch.equal(mask.dense, DIFFUSION_FORCING[index[:, None] // 3, index // 3])


def test_masks_made_in_inference_mode_serve_training():
    with torch.inference_mode():
        mask = cached_mask(ChunkLayout(1), 3, 0, 5, torch.device("cpu"))
        query = torch.randn(1, 15, 1, 4)
        masked_attention(query, query, query, mask)
    query = torch.randn(1, 15, 1, 4, requires_grad=True)
    masked_attention(query, query, query, mask).sum().backward()
    assert query.grad is not None


@pytest.mark.parametrize("frames", [DIFFUSION_FORCING, TEACHER_FORCING, WINDOW_1_SINK_1])
@pytest.mark.parametrize("tokens_per_frame", [3, 40])
def test_flex_attention_sees_the_same(frames, tokens_per_frame):
    """Uncompiled and forward only, which is what it can do without a GPU; 40 tokens make more than one block of 128."""
    mask = FrameMask(frames, tokens_per_frame)
    query, key, value = torch.randn(3, 2, mask.num_tokens, 2, 16, generator=torch.Generator().manual_seed(0))
    expected = masked_attention(query, key, value, mask)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    actual = flex_attention(query, key, value, block_mask=mask.blocks).transpose(1, 2)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    unmasked = flex_attention(query, key, value).transpose(1, 2)
    assert (actual - unmasked).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"local_window": -1}, "local_window=-1 must be the number of earlier latent frames"),
        ({"sink_frames": -2}, "sink_frames=-2 must be a number of latent frames"),
    ],
)
def test_sizes_that_make_no_chunks_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        ChunkLayout(**options)
