"""An evaluation on a GPU: the noise is the CPU's, memory is the allocator's."""

import pytest
import torch

from fv_distill.evaluation import ClipStore, evaluate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

OPTIONS = {
    "num_frames": 9,
    "height": 32,
    "width": 32,
    "num_inference_steps": 2,
    "reference_steps": 2,
    "extra_steps": [1],
}


def test_an_evaluation_on_a_gpu_starts_from_the_cpu_s_noise(tiny_wan, tmp_path):
    for device in ("cuda", "cpu"):
        options = {**OPTIONS, "device": device, "dtype": "float32"}
        evaluation = evaluate(tiny_wan, tiny_wan, ["a digit"], output_dir=tmp_path / device, **options)
        *_, model = evaluation.rows
        assert model.same_noise and model.latent_mse < 1e-6 and model.peak_memory_bytes > 0
    kept = [tmp_path / device / "clips/student-2-steps" for device in ("cuda", "cpu")]
    names = [[clip.noise for clip in _read(path)] for path in kept]
    assert names[0] == names[1]


def _read(path):
    import json

    return ClipStore(path, json.loads((path / "settings.json").read_text()))
