"""The demo end to end in its few-second version: launch, export, stock diffusers, tables and pictures."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

ROWS = {"name", "steps", "guidance", "forward_passes", "frechet_cnn", "frechet_pixel", "prompt_accuracy", "seconds"}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, "-m", "fv_distill", "demo", "--fast", "--lora", "--seed", "3", "--output-dir", str(directory)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "student" in done.stdout
    return directory


def test_results_hold_every_row(output):
    results = json.loads((output / "results.json").read_text())
    assert results["seed"] == 3 and results["fast"]
    rows = results["rows"]
    assert len(rows) == 7 and all(set(row) == ROWS for row in rows)
    assert [row["forward_passes"] for row in rows] == [0, 8, 8, 4, 4, 4, 4]
    undistilled, student, lora = rows[4:]
    assert lora["name"] == "student, LoRA" and lora["frechet_pixel"] != undistilled["frechet_pixel"]
    # Even a few updates change the weights, so equal figures would mean that one network was measured twice.
    assert undistilled["frechet_pixel"] != student["frechet_pixel"]
    assert "| student |" in (output / "results.md").read_text()


def test_pictures_can_be_opened(output):
    with Image.open(output / "samples.png") as sheet, Image.open(output / "samples.gif") as moving:
        assert sheet.width > moving.width and moving.n_frames == 5
    with Image.open(output / "curves.png") as curves:
        assert curves.width > 500
