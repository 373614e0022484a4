"""Frames come out in their order and time, upright and at the size asked for, or with a reason why not."""

import random
import shutil
import time
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from made_clips import make_frames, numbers_of, real_clips, write_clip
from PIL import Image

from fv_distill.preprocess.decode import BadClipError, ClipFormat, decode_clip, plan_windows

SIZE = (32, 48)
FORMAT = ClipFormat(num_frames=5, fps=None, sizes=[SIZE])


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv", ".gif"])
def test_frames_come_as_they_are(tmp_path, suffix):
    frames = make_frames(9)
    clip = decode_clip(write_clip(tmp_path / f"a{suffix}", frames), replace(FORMAT, num_frames=9))
    assert clip.frames.dtype == np.uint8 and clip.frames.shape == frames.shape
    assert clip.fps == pytest.approx(8, rel=0.05)
    assert numbers_of(clip.frames) == list(range(9)) and clip.frame_numbers.tolist() == list(range(9))
    # 3 bits of red and green and 2 of blue in a gif; yuv otherwise.
    tolerance = 40 if suffix == ".gif" else 4
    inner = np.abs(clip.frames.astype(int) - frames)[:, 4:12, 4:20]
    assert inner.max() <= tolerance


def test_a_video_in_memory(tmp_path):
    data = write_clip(tmp_path / "a.mp4", make_frames(6)).read_bytes()
    assert numbers_of(decode_clip(data, FORMAT).frames) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (4, [0, 2, 4, 6, 8]),
        (16, [0, 0, 1, 1, 2]),
        (8, [0, 1, 2, 3, 4]),
        # Shown at 0, .2, .4, .6, .8 s are the frames that began at 0, .125, .375, .5, .75 s.
        (5, [0, 1, 3, 4, 6]),
    ],
)
def test_resampling_takes_the_frame_on_show(tmp_path, fps, expected):
    clip = decode_clip(write_clip(tmp_path / "a.mp4", make_frames(12)), replace(FORMAT, fps=fps))
    assert numbers_of(clip.frames) == expected and clip.frame_numbers.tolist() == expected
    assert clip.fps == fps


@pytest.mark.parametrize("suffix", [".webm", ".mkv"])
@pytest.mark.parametrize("fps", [16, 24, Fraction(30000, 1001)])
def test_rounded_times_lose_no_frame(tmp_path, suffix, fps):
    """Matroska counts milliseconds; 1/16 s isn't a whole number of them."""
    path = write_clip(tmp_path / f"a{suffix}", make_frames(25), fps=float(fps))
    clip = decode_clip(path, replace(FORMAT, num_frames=25, fps=float(fps)))
    assert numbers_of(clip.frames) == list(range(25))


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_variable_rate(tmp_path, suffix):
    times = [0.0, 0.1, 0.5, 0.6, 1.4, 1.5, 2.0]
    path = write_clip(tmp_path / f"a{suffix}", make_frames(7), times=times)
    clip = decode_clip(path, replace(FORMAT, num_frames=9, fps=5))
    # At 0, .2, .4, .6, ... 1.6 s.
    assert numbers_of(clip.frames) == [0, 1, 1, 3, 3, 3, 3, 4, 5]


def test_the_last_frame_lasts(tmp_path):
    path = write_clip(tmp_path / "a.mp4", make_frames(8))
    # One second at 8 frames: at 16 frames a second there are 16, and no more.
    assert numbers_of(decode_clip(path, replace(FORMAT, num_frames=16, fps=16)).frames)[-2:] == [7, 7]
    with pytest.raises(BadClipError, match="too short: 16 of 17 frames"):
        decode_clip(path, replace(FORMAT, num_frames=17, fps=16))
    with pytest.raises(BadClipError, match="too short: 8 of 9 frames"):
        decode_clip(path, replace(FORMAT, num_frames=9))


@pytest.mark.parametrize(("turn", "white"), [(0, (0, 0)), (90, (0, 1)), (180, (1, 1)), (270, (1, 0))])
def test_rotated_clips_are_upright(tmp_path, turn, white):
    """Turned clockwise, the white quarter wanders from the upper left to the upper right, and so on."""
    path = write_clip(tmp_path / "a.mp4", make_frames(5, 32, 48), turn=turn)
    clip = decode_clip(path, replace(FORMAT, sizes=[(32, 48), (48, 32)]))
    height, width = clip.frames.shape[1:3]
    assert (height, width) == ((48, 32) if turn in (90, 270) else (32, 48))
    quarters = clip.frames[0].reshape(2, height // 2, 2, width // 2, 3).mean((1, 3, 4))
    assert np.unravel_index(quarters.argmax(), (2, 2)) == white and quarters.max() > 230


def test_odd_sizes(tmp_path):
    path = write_clip(tmp_path / "a.mkv", make_frames(5, 33, 47))
    clip = decode_clip(path, FORMAT)
    assert clip.frames.shape == (5, *SIZE, 3) and numbers_of(clip.frames) == list(range(5))


def test_center_crop_keeps_the_middle(tmp_path):
    frames = make_frames(5, 32, 96)
    frames[:, :, :24] = frames[:, :, 72:] = 0
    clip = decode_clip(write_clip(tmp_path / "a.mkv", frames), FORMAT)
    assert clip.frames.shape == (5, 32, 48, 3)
    assert np.abs(clip.frames[:, :, 4:44].astype(int) - frames[:, :, 28:68]).max() <= 4


def test_letterbox_keeps_all_between_black_bars(tmp_path):
    clip = decode_clip(write_clip(tmp_path / "a.mkv", make_frames(5, 32, 96)), replace(FORMAT, crop="letterbox"))
    assert clip.frames.shape == (5, 32, 48, 3)
    assert not clip.frames[:, :8].any() and not clip.frames[:, 24:].any()
    assert clip.frames[0, 9:15, 1:20].min() > 230 and abs(int(clip.frames[0, 20, 40, 0]) - 20) <= 4


def test_pixels_that_are_not_square(tmp_path):
    """Stored 32 x 24, shown 32 x 48: nothing is to be cut off."""
    path = write_clip(tmp_path / "a.mp4", make_frames(5, 32, 24), pixel_aspect=Fraction(2))
    clip = decode_clip(path, replace(FORMAT, sizes=[(32, 48), (48, 32)]))
    assert clip.frames.shape == (5, 32, 48, 3)
    assert clip.frames[0, 2:14, 2:20].min() > 220 and clip.frames[0, 2:14, 30:].max() < 60


def test_a_shape_too_far_from_all_sizes(tmp_path):
    with pytest.raises(BadClipError, match="odd shape: 640 x 16 is too far from 48 x 32"):
        decode_clip(write_clip(tmp_path / "a.mkv", make_frames(5, 16, 640)), FORMAT)


def test_pictures_in_their_natural_order(tmp_path):
    for number, frame in enumerate(make_frames(12)):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    paths = tuple(sorted(tmp_path.glob("*.png"), key=lambda path: int(path.stem)))
    clip = decode_clip(paths, replace(FORMAT, num_frames=12, fps=7))
    assert numbers_of(clip.frames) == list(range(12)) and clip.fps == 7
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:60])
    with pytest.raises(BadClipError, match=r"corrupt: 3.png"):
        decode_clip(paths, replace(FORMAT, num_frames=12))
    with pytest.raises(BadClipError, match="too short: 12 of 13"):
        decode_clip(paths, replace(FORMAT, num_frames=13))


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
@pytest.mark.parametrize("fps", [None, 4])
def test_windows_lie_apart_and_hold_what_a_whole_decoding_has(tmp_path, suffix, fps):
    """Six seconds, so that the later windows are sought."""
    path = write_clip(tmp_path / f"a{suffix}", make_frames(26), times=[number / 4 for number in range(26)], fps=4)
    wanted = replace(FORMAT, num_frames=5, fps=fps, clips_per_video=4)
    windows = plan_windows(path, wanted)
    numbers = [numbers_of(decode_clip(path, wanted, window).frames) for window in windows]
    assert [found[0] for found in numbers] == [0, 7, 14, 21]
    assert all(found == list(range(found[0], found[0] + 5)) for found in numbers)
    counted = [decode_clip(path, replace(wanted, count_frames=True), window).frame_numbers for window in windows]
    assert [found.tolist() for found in counted] == numbers


def test_a_short_video_has_fewer_windows(tmp_path):
    path = write_clip(tmp_path / "a.mp4", make_frames(14))
    starts = [window.start for window in plan_windows(path, replace(FORMAT, clips_per_video=4))]
    assert starts == [0, pytest.approx(9 / 8)]
    with pytest.raises(BadClipError, match="too short: 14 of 15 frames"):
        plan_windows(path, replace(FORMAT, num_frames=15, clips_per_video=4))


def test_real_clips():
    """Phone, film and animation; the means tell that the pictures are there and not black."""
    found = {path.stem: decode_clip(path, replace(FORMAT, num_frames=17, fps=8)) for path in real_clips()}
    assert set(found) == {"bigbuckbunny", "bikes", "carphone_distorted", "carphone_pristine"}
    assert all(clip.frames.shape == (17, *SIZE, 3) and 40 < clip.frames.mean() < 200 for clip in found.values())
    # The one is a damaged copy of the other: like it, but not equal.
    pristine, distorted = (found[f"carphone_{name}"].frames.astype(float) for name in ("pristine", "distorted"))
    assert 0.5 < np.abs(pristine - distorted).mean() < 15
    # Every third or fourth frame of thirty a second.
    assert set(np.diff(found["carphone_pristine"].frame_numbers)) == {3, 4}


def test_decoding_ends_in_time(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", make_frames(9))
    now = iter(range(0, 1000, 100))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    with pytest.raises(BadClipError, match="too slow: decoding took more than 250 s"):
        decode_clip(path, replace(FORMAT, num_frames=9, timeout=250))


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Cut off somewhere, or with bytes replaced, removed, repeated or set to zero at random places."""
    kind = draw.choice(["cut", "bytes", "header", "removed", "repeated", "zeros"])
    start = draw.randrange(len(data))
    end = min(len(data), start + draw.randrange(1, 4000))
    if kind == "cut":
        return data[:start]
    if kind == "removed":
        return data[:start] + data[end:]
    if kind == "repeated":
        return data[:end] + data[start:]
    if kind == "zeros":
        return data[:start] + bytes(end - start) + data[end:]
    changed = bytearray(data)
    reach = len(data) if kind == "bytes" else min(len(data), 1200)
    for _ in range(draw.randrange(1, 60)):
        changed[draw.randrange(reach)] = draw.randrange(256)
    return bytes(changed)


def test_two_hundred_mutated_files(tmp_path):
    """No crash, no hang, no exception but the one that tells the reason; and damage is found, not trained on."""
    originals = [write_clip(tmp_path / f"a{suffix}", make_frames(9)) for suffix in (".mp4", ".webm", ".mkv", ".gif")]
    originals.append(shutil.copy(real_clips()[2], tmp_path / "real.mp4"))
    wanted = replace(FORMAT, num_frames=9, fps=8, timeout=20, clips_per_video=2)
    draw, reasons, good = random.Random(0), [], 0
    for number in range(200):
        original = originals[number % len(originals)]
        path = tmp_path / f"mutated{original.suffix}"
        path.write_bytes(mutated(original.read_bytes(), draw))
        try:
            windows = plan_windows(path, wanted) if number % 2 else [None]
            clip = decode_clip(path, wanted, windows[-1])
            assert clip.frames.shape == (9, *SIZE, 3)
            good += 1
        except BadClipError as error:
            reasons.append(error.reason)
    assert good + len(reasons) == 200
    assert {"corrupt", "too short"} <= set(reasons) <= {"corrupt", "too short", "odd shape", "too slow"}
    assert len(reasons) > 50
