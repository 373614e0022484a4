"""Whole runs on one GPU: what only a device other than the CPU can get wrong."""

import math

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_runs import checkpoint, dmd2_config, metric_lines, metrics, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_dmd2_trains_resumes_and_exports(tiny_wan, tiny_rows, tmp_path, precision):
    config = dmd2_config(tiny_wan, tiny_rows, tmp_path / "run")
    config["training"]["distributed"] = {"mixed_precision": precision}
    whole = train(config, {"pipeline.export_dir": str(tmp_path / "student")})
    assert all(math.isfinite(value) for line in metrics(whole) for value in line.values())

    changes = {
        "training.output_dir": str(tmp_path / "resumed"),
        "training.checkpoint.resume_from_checkpoint": str(checkpoint(whole, 2)),
    }
    rest = metrics(train(config, changes))
    assert len(metric_lines(whole)) == 4
    for line, expected in zip(rest, metrics(whole)[2:], strict=True):
        assert line == pytest.approx(expected, rel=1e-3)

    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "student").to("cuda")
    frames = pipeline("a digit", height=32, width=32, num_frames=9, num_inference_steps=2, guidance_scale=1.0).frames
    assert math.isfinite(float(abs(frames[0]).max()))


def test_a_gpu_draws_what_a_cpu_draws(tiny_wan, tiny_rows, tmp_path):
    """Noise is made on the CPU: the first critic loss agrees between devices up to the precision of their kernels."""
    config = dmd2_config(tiny_wan, tiny_rows, tmp_path / "run")
    on_gpu = metrics(train(config, {"training.loop.max_train_steps": 1}))[0]["loss/critic"]
    from fv_distill.config.load import load_run_config
    from fv_distill.data import BatchPlan, build_loader
    from fv_distill.rng import SampleRng
    from fv_distill.training import build_dataset, build_method, build_models

    path = tmp_path / "run.yaml"
    loaded = load_run_config(path)
    dataset = build_dataset(loaded)
    plan = BatchPlan(seed=7, num_rows=len(dataset), micro_batch_size=2, accumulation_steps=1, world_size=1, rank=0)
    ((batch,),) = build_loader(dataset, plan, start_step=0, num_steps=1, text_length=8, caption_dropout=0.0, seed=7)
    method = build_method(loaded, build_models(loaded))
    (term,) = method.losses("critic", batch, SampleRng(7, 1, batch["sample_index"]))
    assert on_gpu == pytest.approx(term.loss.item(), rel=1e-2)
