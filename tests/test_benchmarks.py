"""Every benchmark runs and prints one JSON line with sane numbers; how fast things are is nobody's test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def run_benchmark(tmp_path, name: str, *options: str) -> dict:
    """The last line of a benchmark's output, which has to be its only JSON."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1 and done.stdout.strip().endswith(lines[0])
    result = json.loads(lines[0])
    assert result["benchmark"] == name
    assert result["ratio"] > 0 and result["target_ratio"] > 0
    return result


@pytest.mark.slow
def test_forward_passes(tmp_path):
    result = run_benchmark(tmp_path, "forward_passes", "--cycles", "10")
    assert result["ratio"] == 1.0
    reused, fresh = result["reuse_rollout"], result["fresh_rollout"]
    assert reused["critic"] == fresh["critic"] == 6
    assert reused["teacher"] == fresh["teacher"] == 2
    assert reused["expected"] == 5 * 2.5 + 6 + 2
    assert reused["total"] == reused["minimum"]
    assert 5 * 1 <= reused["student"] <= 5 * 4
    # The student's step needs one more rollout when the critic makes its own.
    assert reused["student"] < fresh["student"] and fresh["ratio"] == 1.0


@pytest.mark.slow
def test_step_overhead(tmp_path):
    small = ["--width", "16", "--layers", "1", "--latent-frames", "1", "--latent-size", "4", "--batch-size", "1"]
    result = run_benchmark(tmp_path, "step_overhead", "--steps", "5", "--warm-up", "1", *small)
    assert result["tokens"] == 4 and result["threads"] == 1
    assert 0 < result["hand_step_ms"] < 10_000 and 0 < result["trainer_step_ms"] < 10_000
    assert result["ema"] is True
    assert {"ratio_critic_steps", "ratio_student_steps", "ratio_of_sums", "load_average"} <= set(result)


@pytest.mark.slow
def test_dataloading(tmp_path):
    options = ["--total-mb", "40", "--repeats", "1", "--text-tokens", "8", "--folder", str(tmp_path)]
    result = run_benchmark(tmp_path, "dataloading", *options)
    assert result["rows"] >= 4
    assert result["mb_per_s"] > 0 and result["raw_mb_per_s"] > 0


@pytest.mark.slow
def test_checkpoint(tmp_path):
    small = ["--width", "16", "--layers", "1", "--repeats", "2", "--folder", str(tmp_path)]
    result = run_benchmark(tmp_path, "checkpoint", *small)
    assert result["ratio_load"] > 0 and set(result["mb_per_s"]) == {"save", "raw_write", "load", "raw_read"}
    # Weights of three networks and two states of each of two optimizers, in float32; and names.
    assert 28 < 1e6 * result["mb"] / result["parameters"] < 60
    assert {"sync", "async", "async_call"} == set(result["cost_s"])


@pytest.mark.slow
def test_self_forcing_memory(tmp_path):
    small = ["--width", "64", "--layers", "2", "--latent-size", "8"]
    result = run_benchmark(tmp_path, "self_forcing_memory", *small)
    assert result["ratio"] == pytest.approx(1.0, abs=0.01), "with a window, replay's memory doesn't grow with the clip"
    assert result["plain_mb"][-1] > 3 * result["plain_mb"][0]
    assert result["plain_over_replay"] == sorted(result["plain_over_replay"]) and result["plain_over_replay"][0] > 1.5


@pytest.mark.slow
def test_streaming(tmp_path):
    small = ["--width", "64", "--layers", "1", "--latent-size", "4", "--chunks", "12"]
    result = run_benchmark(tmp_path, "streaming", *small)
    assert result["calls_ratio"] == 1.0 and result["calls"]["critic"] == 5 + 1 and result["calls"]["teacher"] == 1
    assert result["modulation_ratio"] == 30 * 52
    assert result["modulation_mb"]["per_frame"] == pytest.approx(21 * 6 * 1536 * 4 / 1e6, rel=0.01)


@pytest.mark.slow
def test_fsdp_memory(tmp_path):
    result = run_benchmark(tmp_path, "fsdp_memory", "--processes", "1", "2", "--layers", "1", "--latent-size", "4")
    one, two = result["mb_per_process"]
    whole = 4 * result["parameters"] / 1e6
    # Four networks, the gradients and two Adam states of two of them.
    assert one == pytest.approx((4 + 2 + 4) * whole, rel=0.01)
    assert two == pytest.approx(one / 2, rel=0.1) and result["ratio"] == pytest.approx(2 * two / one, abs=1e-3)
    assert 1 <= result["ratio"] <= result["target_ratio"]
    # Nothing beside the shards is a network's size.
    assert result["live_mb"][1] < result["live_mb"][0] - 3.5 * whole


@pytest.mark.slow
def test_overhead(tmp_path):
    small = ["--width", "16", "--layers", "1", "--latent-frames", "1", "--latent-size", "4", "--batch-size", "1"]
    result = run_benchmark(tmp_path, "overhead", "--steps", "7", "--warm-up", "1", *small)
    assert result["tokens"] == 4 and result["threads"] == 1 and result["steps"] == 6
    assert 0 < result["without_ms"] < 10_000 and 0 < result["with_ms"] < 10_000
    assert result["ratio_of_cpu_time"] > 0 and result["ratio_of_cpu_sums"] > 0


@pytest.mark.slow
def test_shared_base(tmp_path):
    # Wide enough for weights to count beside what a step allocates in passing.
    small = ["--layers", "4", "--heads", "4", "--ffn-dim", "4096", "--rank", "4", "--latent-frames", "1"]
    result = run_benchmark(tmp_path, "shared_base", *small, "--latent-size", "4", "--steps", "1")
    assert set(result["peak_gb"]) == {"finetune", "shared", "three"}
    assert result["ratio_to_three_networks"] < 0.8


@pytest.mark.slow
def test_preprocess(tmp_path):
    small = ["--clips", "2", "--source", "64x96", "--resolution", "32x48", "--num-frames", "5", "--vae-width", "4"]
    result = run_benchmark(tmp_path, "preprocess", *small, "--repeats", "1", "--folder", str(tmp_path))
    assert result["clips"] == 2 and result["workers"] == 2 and result["threads"] == 1
    assert len(result["peak_mb"]) == 2 and 0.5 < result["memory_ratio"] < 2
