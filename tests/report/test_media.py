"""What of validation gets into a page, and what is left out."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from fv_distill.report import media


@pytest.fixture
def folder(tmp_path):
    """Fifteen steps with a sheet and ten clips each; clips differ in size so that they can be told apart."""
    for step in range(100, 1600, 100):
        path = tmp_path / f"step-{step:08d}"
        path.mkdir()
        Image.new("RGB", (40, 30), (step % 256, 0, 0)).save(path / "contact_sheet_4-steps.png")
        for index in range(10):
            (path / f"{index:03d}_4-steps.gif").write_bytes(b"GIF89a" + bytes(1000))
        (path / "notes.txt").write_text("a user's own")
    (tmp_path / "step-abc").mkdir()
    return tmp_path


def test_steps_and_clips_are_bounded_and_it_says_so(folder):
    (gallery,) = media.read_galleries(folder)
    steps = [validation.step for validation in gallery.validations]
    assert len(steps) == media.MAX_STEPS and steps == sorted(steps) and (steps[0], steps[-1]) == (100, 1500)
    assert all(len(validation.clips) == media.MAX_CLIPS for validation in gallery.validations)
    assert "12 of 15 validations are shown." in gallery.note and "The first 8 of 10 clips" in gallery.note
    assert gallery.validations[0].clips[3].caption == "prompt 3"


def test_a_small_page_keeps_the_sheets_and_the_newest_clips(folder):
    (gallery,) = media.read_galleries(folder, max_bytes=10_000)
    assert all(validation.sheet for validation in gallery.validations)
    assert [bool(validation.clips) for validation in gallery.validations] == [False] * 11 + [True]
    assert "files were left out" in gallery.note
    embedded = [v.sheet for v in gallery.validations] + [c.uri for v in gallery.validations for c in v.clips]
    assert sum(len(base64.b64decode(uri.split(",")[1])) for uri in embedded) <= 10_000


def test_samplings_have_galleries_of_their_own(folder):
    (folder / "step-00000300" / "000_50-steps.mp4").write_bytes(b"x")
    few, many = media.read_galleries(folder)
    assert (few.sampling_steps, many.sampling_steps) == (4, 50)
    assert [validation.step for validation in many.validations] == [300]
    assert many.validations[0].clips[0].is_video


def test_a_large_sheet_is_made_smaller(folder):
    noise = np.random.default_rng(0).integers(0, 255, (900, 2000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "step-00001500" / "contact_sheet_4-steps.png")
    (gallery,) = media.read_galleries(folder)
    kind, data = gallery.validations[-1].sheet.split(",")
    assert kind == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as sheet:
        assert sheet.size == (1600, 720)
    assert gallery.validations[0].sheet.startswith("data:image/png;")


def test_a_sheet_that_is_being_written_is_left_out(folder):
    path = folder / "step-00000100" / "contact_sheet_4-steps.png"
    path.write_bytes(path.read_bytes()[:60])
    (gallery,) = media.read_galleries(folder)
    assert gallery.validations[0].sheet == "" and gallery.validations[0].clips
    assert "1 files were left out" in gallery.note


def test_no_validation_is_no_gallery(tmp_path):
    assert media.read_galleries(tmp_path / "none") == []
