"""The moving digits: what a caption fixes, what it leaves open, and how clips become latents."""

import builtins

import pytest
import torch

from fv_distill.data import digits

MANY = 3000


def sampled(split="train", count=MANY, seed=0):
    return digits.sample_clips(split, count, torch.Generator().manual_seed(seed))


def box(clips):
    """Top left corner of the 8 x 8 square that holds the ink, `[N, F, 2]`, up to the digit's own margin."""
    ink = clips[:, 0] > -1
    top = ink.any(-1).float().argmax(-1)
    left = ink.any(-2).float().argmax(-1)
    return torch.stack([top, left], dim=-1)


def test_same_generator_same_clips():
    first, second, other = sampled(count=20), sampled(count=20), sampled(count=20, seed=1)
    assert torch.equal(first.clips, second.clips)
    assert torch.equal(first.captions, second.captions)
    assert not torch.equal(first.clips, other.clips)


def test_shapes_and_range():
    batch = sampled(count=50)
    assert batch.clips.shape == (50, 1, digits.NUM_FRAMES, digits.CANVAS, digits.CANVAS)
    assert batch.clips.dtype == torch.float32
    assert batch.clips.min() == -1 and batch.clips.max() == 1
    assert batch.captions.min() >= 0 and batch.captions.max() < len(digits.CAPTIONS)


def test_the_caption_names_the_direction_of_every_step():
    batch = sampled()
    moved = box(batch.clips).diff(dim=1)
    expected = {"left": (1, -2), "right": (1, 2), "up": (0, -2), "down": (0, 2)}
    for index, caption in enumerate(digits.CAPTIONS):
        axis, speed = expected[caption.split()[-1]]
        assert (moved[batch.captions == index][:, :, axis] == speed).all(), caption


def test_the_caption_leaves_the_way_across_open():
    batch = sampled()
    corners = box(batch.clips)
    left = batch.captions % len(digits.DIRECTIONS) == 0
    drifts = corners[left].diff(dim=1)[..., 0]
    assert set(drifts.unique().tolist()) == {-2, 0, 2}
    bounced = (drifts.amin(1) < 0) & (drifts.amax(1) > 0)
    assert 0.2 < bounced.float().mean() < 0.8


def test_only_the_captioned_axis_is_crossed_from_wall_to_wall():
    batch = sampled()
    travelled = box(batch.clips)[:, -1] - box(batch.clips)[:, 0]
    horizontal = batch.captions % len(digits.DIRECTIONS) < 2
    assert (torch.where(horizontal, travelled[:, 1], travelled[:, 0]).abs() == 8).all()
    assert (torch.where(horizontal, travelled[:, 0], travelled[:, 1]).abs() <= 4).all()


def test_ink_never_leaves_the_canvas():
    images, _ = digits.digit_images("train")
    ink = (sampled().clips[:, 0] > -1).flatten(2).sum(-1)
    assert (ink == ink[:, :1]).all(), "a digit keeps all its pixels in every frame"
    assert ink.max() <= (images > 0).flatten(1).sum(1).max()


def test_splits_share_no_image():
    train, train_digits = digits.digit_images("train")
    held_out, held_out_digits = digits.digit_images("held_out")
    assert len(train) + len(held_out) == 1797
    assert set(train_digits.tolist()) == set(held_out_digits.tolist()) == set(range(10))
    seen = {image.numpy().tobytes() for image in train}
    assert not any(image.numpy().tobytes() in seen for image in held_out)


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="split='test' is neither train nor held_out"):
        digits.digit_images("test")


def test_missing_scikit_learn_says_what_to_install(monkeypatch):
    real_import = builtins.__import__

    def without_sklearn(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(ImportError, match="pip install"):
        digits.digit_images("train")


def test_latents_round_trip():
    clips = torch.randn(3, 1, digits.NUM_FRAMES, digits.CANVAS, digits.CANVAS)
    latents = digits.to_latents(clips)
    assert latents.shape == (3, 16, 5, 4, 4)
    assert torch.equal(digits.from_latents(latents), clips)


def test_one_pixel_is_one_latent_value():
    clip = torch.zeros(1, 1, digits.NUM_FRAMES, digits.CANVAS, digits.CANVAS)
    clip[0, 0, 2, 4 * 3 + 1, 4 * 1 + 2] = 1.0
    latents = digits.to_latents(clip)
    # AutoencoderKLWan's channel order: the column within the patch is the slower index.
    assert latents[0, 2 * digits.PATCH + 1, 2, 3, 1] == 1
    assert latents.sum() == 1


def test_captions_fit_the_text_length():
    assert len(set(digits.CAPTIONS)) == 40
    assert max(len(caption.split()) for caption in digits.CAPTIONS) + 1 <= digits.TEXT_LENGTH
