import pytest
import torch

from fv_distill.data.digits import (
    CAPTIONS,
    DIRECTIONS,
    NUM_FRAMES,
    WRAP_PERIOD,
    digit_images,
    from_latents,
    sample_clips,
    to_latents,
)


@pytest.fixture(scope="module")
def batch():
    return sample_clips("train", 2000, torch.Generator().manual_seed(0))


def centre_of_mass(clips):
    """Row and column of the brightness's centre, `[N, F, 2]`."""
    light = (clips[:, 0] + 1).flatten(2)
    grid = torch.stack(torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij"), -1).view(-1, 2)
    return (light @ grid) / light.sum(-1, keepdim=True)


def test_splits_are_disjoint_and_complete():
    (train, train_digits), (held_out, held_out_digits) = digit_images("train"), digit_images("held_out")
    assert len(train) + len(held_out) == 1797
    assert set(train_digits.tolist()) == set(held_out_digits.tolist()) == set(range(10))
    with pytest.raises(ValueError, match="neither train nor held_out"):
        digit_images("test")


def test_clips_move_as_their_caption_says(batch):
    moved = centre_of_mass(batch.clips)[:, -1] - centre_of_mass(batch.clips)[:, 0]
    for index, (axis, sign) in enumerate([(1, -1), (1, 1), (0, -1), (0, 1)]):
        of_direction = moved[batch.captions % len(DIRECTIONS) == index]
        assert len(of_direction) > 300
        assert (sign * of_direction[:, axis] > 3.5).all() and (of_direction[:, 1 - axis].abs() < 1e-3).all()


def test_every_frame_holds_the_same_whole_digit(batch):
    light = (batch.clips[:, 0] + 1).flatten(2).sum(-1)
    torch.testing.assert_close(light, light[:, :1].expand(-1, NUM_FRAMES), atol=1e-3, rtol=0)
    assert batch.clips.min() == -1 and batch.clips.max() == 1


def test_a_caption_has_many_answers(batch):
    """Distinct layouts (first and last centre, digit shape aside) per caption: what makes few-step sampling hard."""
    ink = batch.clips[batch.captions % len(DIRECTIONS) == 1] > -1
    boxes = torch.stack([ink.amax((1, 2, 4)).float().argmax(1), ink[:, :, 0].amax((1, 2)).float().argmax(1)], 1)
    assert len(boxes.unique(dim=0)) >= 10


def test_wrapping_digits_come_round_and_move_as_their_caption_says():
    batch = sample_clips("train", 400, torch.Generator().manual_seed(0), motion="wrap", frames=range(9))
    clips, captions = batch.clips, batch.captions
    assert torch.equal(clips[:, :, :5], clips[:, :, WRAP_PERIOD:])
    for index, (axis, sign) in enumerate([(1, -1), (1, 1), (0, -1), (0, 1)]):
        of_direction = clips[captions % len(DIRECTIONS) == index]
        for frame in range(8):
            moved = of_direction[:, 0, frame].roll(4 * sign, dims=2 - (axis == 0))
            assert torch.equal(moved, of_direction[:, 0, frame + 1])


def test_frames_of_a_clip_can_be_drawn_alone():
    long, part = (
        sample_clips("train", 20, torch.Generator().manual_seed(0), motion="wrap", frames=frames).clips
        for frames in (range(15), range(10, 15))
    )
    assert torch.equal(long[:, :, 10:], part)


def test_motions_and_frames_that_do_not_exist_are_explained():
    generator = torch.Generator()
    with pytest.raises(ValueError, match=r"frames=\[3, 4, 5\], but .* only 5"):
        sample_clips("train", 1, generator, frames=range(3, 6))
    with pytest.raises(ValueError, match="motion='bounce' is none of wall, wrap"):
        sample_clips("train", 1, generator, motion="bounce")


def test_draws_are_deterministic():
    first, second = (sample_clips("held_out", 5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.clips, second.clips) and torch.equal(first.captions, second.captions)


def test_latents_round_trip(batch):
    latents = to_latents(batch.clips[:10])
    assert latents.shape == (10, 16, 5, 4, 4)
    assert torch.equal(from_latents(latents), batch.clips[:10])


def test_captions_are_distinct():
    assert len(set(CAPTIONS)) == 40 and CAPTIONS[13] == "a handwritten three moving right"
