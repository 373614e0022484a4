import io

import av
import numpy as np
import pytest
from PIL import Image

from fv_distill.callbacks import video_files
from fv_distill.callbacks.video_files import contact_sheet, encode_gif, enlarge, preview, write_video


def clip(num_frames=5, height=96, width=128):
    """A bright square that moves to the right by 8 pixels a frame."""
    frames = np.full((num_frames, height, width, 3), 30, np.uint8)
    for index, frame in enumerate(frames):
        frame[32:64, 8 * index : 8 * index + 32] = (220, 60, 40)
    return frames


def read_mp4(path):
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), float(rate)


def test_mp4_plays_back_what_was_written(tmp_path):
    write_video(tmp_path / "clip.mp4", clip(), fps=12.5)
    frames, rate = read_mp4(tmp_path / "clip.mp4")
    assert frames.shape == (5, 96, 128, 3) and rate == 12.5
    assert np.abs(frames.astype(int) - clip()).mean() < 4
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_odd_sides_are_cut_and_tiny_clips_enlarged(tmp_path):
    write_video(tmp_path / "odd.mp4", clip(height=97, width=129), fps=8)
    assert read_mp4(tmp_path / "odd.mp4")[0].shape == (5, 96, 128, 3)
    assert enlarge(np.zeros((2, 16, 24, 3), np.uint8)).shape == (2, 64, 96, 3)


def test_gif_keeps_frames_and_pace(tmp_path):
    write_video(tmp_path / "clip.gif", clip(), fps=10)
    with Image.open(tmp_path / "clip.gif") as image:
        assert image.n_frames == 5 and image.info["duration"] == 100 and image.info["loop"] == 0
        image.seek(4)
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - clip()[4]).mean() < 4


def test_without_pyav_gifs_are_offered_and_mp4_says_what_to_install(tmp_path, monkeypatch):
    assert video_files.best_suffix() == ".mp4"
    monkeypatch.setattr(video_files.importlib.util, "find_spec", lambda name: None)
    assert video_files.best_suffix() == ".gif"
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match=r"fv_distill\[video\]"):
        write_video(tmp_path / "clip.mp4", clip(), fps=8)


@pytest.mark.parametrize(("name", "frames"), [("a.mp4", clip().astype(float)), ("a.mp4", clip()[0]), ("a.avi", clip())])
def test_other_arrays_and_suffixes_are_refused(tmp_path, name, frames):
    with pytest.raises(ValueError, match="expected uint8|written as"):
        write_video(tmp_path / name, frames, fps=8)


def test_previews_keep_the_ends_and_the_shape():
    frames = clip(num_frames=21, height=200, width=400)
    small = preview(frames, max_frames=5, max_side=100)
    assert small.shape == (5, 50, 100, 3) and small.dtype == np.uint8
    assert np.array_equal(preview(frames, max_frames=5, max_side=400), frames[[0, 5, 10, 15, 20]])
    assert np.array_equal(preview(frames, max_frames=50, max_side=400), frames)


def test_the_sheet_has_a_row_per_clip_under_its_caption():
    videos = [np.full((3, 64, 64, 3), value, np.uint8) for value in (50, 100)]
    short = np.asarray(contact_sheet(videos, ["one", "two"]))
    assert short.shape[1] == 360
    rows = [np.flatnonzero((short[:, 30] == value).all(axis=1)) for value in (50, 100)]
    assert [len(row) for row in rows] == [64, 64] and rows[0][-1] < rows[1][0]
    above = short[: rows[0][0]]
    assert above.min() < 60, "the caption is drawn in black above its clip"
    frame = short[rows[0][0]]
    assert (frame == 50).all(axis=1).sum() == 3 * 64


def test_long_captions_are_wrapped_and_cut():
    video = np.zeros((2, 64, 64, 3), np.uint8)
    heights = [contact_sheet([video], [caption]).height for caption in ("word", "word " * 20, "word " * 500, "w" * 900)]
    assert heights[0] < heights[1] <= heights[2] == heights[0] + 2 * 18
    assert heights[3] == heights[0]
    assert contact_sheet([video], ["word " * 500]).width == 360


def test_gif_bytes_are_a_gif():
    assert Image.open(io.BytesIO(encode_gif(clip(), fps=8))).format == "GIF"
