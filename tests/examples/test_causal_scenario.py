"""The causal scenario in its short version: three launches, two exports, streaming, tables, pictures and resuming."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

SCENARIO = Path(__file__).parents[2] / "examples" / "scenarios" / "causal_wan"
ROWS = {"name", "steps", "guidance", "forward_passes", "frechet_cnn", "frechet_pixel", "prompt_accuracy", "seconds"}
ROWS |= {"frames_per_second", "latency_first_chunk_s"}


def run(output, *options) -> str:
    done = subprocess.run(
        [sys.executable, str(SCENARIO / "run.py"), "--fast", "--output-dir", str(output), *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    directory = tmp_path_factory.mktemp("scenario")
    printed = run(directory, "--seed", "3")
    assert printed.count("$ accelerate launch") == 3
    return directory


def test_results_hold_every_row_and_every_third(output):
    results = json.loads((output / "results.json").read_text())
    assert results["seed"] == 3 and results["fast"]
    real, teacher, kd, student = results["rows"]
    assert all(set(row) == ROWS for row in results["rows"])
    assert real["latency_first_chunk_s"] is None
    # 4 steps with guidance; 5 frames of 4 steps each and 4 passes to remember them.
    assert [row["forward_passes"] for row in (teacher, kd, student)] == [8, 24, 24]
    assert all(row["latency_first_chunk_s"] > 0 < row["frames_per_second"] for row in (teacher, kd, student))
    assert kd["frechet_pixel"] != student["frechet_pixel"]
    assert [part["first_frame"] for part in results["by_frame"]] == [0, 5, 10] * 3
    short, long = student, results["by_frame"][6]
    # Noise is drawn chunk by chunk, so that a long clip begins like a short one.
    assert long["frechet_pixel"] == short["frechet_pixel"]
    assert "frames 10-14" in (output / "results.md").read_text()


def test_pictures_show_all_frames(output):
    with Image.open(output / "samples.png") as sheet, Image.open(output / "samples.gif") as moving:
        assert sheet.width > moving.width and moving.n_frames == 15
    for name in ("curves.png", "by_frame.png"):
        with Image.open(output / name) as picture:
            assert picture.width > 500


def test_resume_skips_finished_stages_and_continues_the_interrupted_one(output):
    before = (output / "student/transformer/diffusion_pytorch_model.safetensors").read_bytes()
    (output / "student/fv_distill.json").unlink()
    printed = run(output, "--seed", "3", "--resume")
    assert "causal KD: done before" in printed
    assert "--resume-from-checkpoint latest" in printed
    assert (output / "student/transformer/diffusion_pytorch_model.safetensors").read_bytes() == before


def test_an_earlier_run_is_not_thrown_away(tmp_path):
    (tmp_path / "paths").mkdir()
    done = subprocess.run(
        [sys.executable, str(SCENARIO / "run.py"), "--output-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "(paths); continue it with --resume" in done.stderr
    assert (tmp_path / "paths").is_dir()


def test_stages_hand_over_what_they_made(monkeypatch):
    spec = importlib.util.spec_from_file_location("causal_scenario", SCENARIO / "run.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "causal_scenario", script)
    spec.loader.exec_module(script)
    words = ["run.py", "--output-dir", "out", "--data-path", "rows", "--training.data.num_workers", "2"]
    monkeypatch.setattr(sys, "argv", words)
    args, overrides = script.parse_arguments()
    paths, kd, self_forcing = script.stages(args, Path("out"), overrides)
    assert paths.options[paths.options.index("--method.teacher_path_cache") + 1] == "out/paths"
    assert kd.options[kd.options.index("--method.teacher_path_cache") + 1] == "out/paths"
    start = self_forcing.options[self_forcing.options.index("--models.student.weights") + 1]
    assert Path(start).parent == Path(kd.options[kd.options.index("--pipeline.export_dir") + 1])
    for stage in (paths, kd, self_forcing):
        assert stage.options[stage.options.index("--training.data.data_path") + 1] == str(Path("rows").resolve())
        assert stage.options[stage.options.index("--training.data.num_workers") + 1] == "2"
