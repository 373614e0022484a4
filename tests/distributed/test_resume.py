"""A checkpoint of one process, of replicated (DDP) or of sharded (FSDP2) weights resumes as any of the others."""

import json
import os
import subprocess
import sys

import pytest
import resume_jobs
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file
from tiny_runs import (
    assert_same_state,
    assert_same_tensors,
    causal_kd_config,
    checkpoint,
    dfsft_config,
    dmd2_config,
    finetune_config,
    groups,
    kd_config,
    largest_difference,
    metadata,
    metric_lines,
    metrics,
    self_forcing_config,
    shared_base_config,
    train,
    write_config,
)

from fv_distill.export import load_role_weights

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
MODES = {"ddp": {}, "fsdp2": FSDP2}
# Momentum is linear in the gradient; Adam divides by its size and blows rounding up where that is nearly zero.
OPTIMIZERS = {
    "sgd": {
        "_target_": "torch.optim.SGD", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.0,
        "betas": None, "eps": None,
    },
    "adam": {"_target_": "torch.optim.AdamW", "learning_rate": 1e-3, "lr_scheduler": "cosine"},
}  # fmt: skip
STATES = {"sgd": {"momentum_buffer"}, "adam": {"step", "exp_avg", "exp_avg_sq"}}
# Those that `runs` doesn't train anyway.
METHODS = {
    "finetune": finetune_config,
    "dfsft": dfsft_config,
    "kd": kd_config,
    "kd_causal": causal_kd_config,
    "self_forcing": self_forcing_config,
    "adapters": shared_base_config,
}
PAIRS = [(saved, resumed) for saved in ("one", *MODES) for resumed in ("one", *MODES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


def overrides_of(folder, optimizer, *, batch_size, name, resume_from=None):
    changes = {
        "training.output_dir": str(folder / name),
        "training.data.train_batch_size": batch_size,
        "training.optimizer": OPTIMIZERS[optimizer],
    }
    if resume_from is not None:
        changes["training.checkpoint.resume_from_checkpoint"] = str(checkpoint(folder / resume_from, 2))
    return changes


@pytest.fixture(scope="module")
def runs(tiny_wan, tiny_rows, folder):
    """Runs named `<optimizer>-<mode>`, and resumed ones named `<optimizer>-<mode it was saved in>-<mode>`."""
    config = dmd2_config(tiny_wan, tiny_rows, folder / "none")
    config["method"]["fake_score_learning_rate"] = None
    path = write_config(config, folder / "run.yaml")
    for optimizer in OPTIMIZERS:
        train(config, overrides_of(folder, optimizer, batch_size=4, name=f"{optimizer}-one"))
    jobs = [
        job(folder, path, optimizer, mode, name=f"{optimizer}-{mode}") for optimizer in OPTIMIZERS for mode in MODES
    ]
    for optimizer in OPTIMIZERS:
        for saved, mode in PAIRS:
            if mode != "one":
                name = f"{optimizer}-{saved}-{mode}"
                jobs.append(job(folder, path, optimizer, mode, name=name, resume_from=f"{optimizer}-{saved}"))
    jobs.append(job(folder, path, "adam", "fsdp2", name="async") | {"async": True})
    jobs += [job(folder, path, "adam", mode, name=f"full-{mode}") | {"full_on": 1} for mode in MODES]
    jobs.append(job(folder, path, "adam", "ddp", name="full-async") | {"full_on": 1, "async": True})
    for method, make in METHODS.items():
        own = write_config(make(tiny_wan, tiny_rows, folder / method), folder / f"{method}.yaml")
        jobs.append(job(folder, own, "adam", "fsdp2", name=f"{method}-whole"))
        jobs.append(job(folder, own, "adam", "fsdp2", name=f"{method}-resumed", resume_from=f"{method}-whole"))
    for described in jobs:
        described["overrides"]["training.checkpoint.async_save"] = described.pop("async", False)
    launch(folder, jobs)
    for optimizer in OPTIMIZERS:
        for saved in ("one", *MODES):
            name = f"{optimizer}-{saved}-one"
            train(config, overrides_of(folder, optimizer, batch_size=4, name=name, resume_from=f"{optimizer}-{saved}"))
    return folder


def job(folder, path, optimizer, mode, *, name, resume_from=None):
    return {
        "config": str(path),
        "environment": MODES[mode],
        "overrides": overrides_of(folder, optimizer, batch_size=2, name=name, resume_from=resume_from),
        "loaded": None if resume_from is None else str(folder / f"{name}-loaded"),
    }


def launch(folder, jobs):
    (folder / "jobs.json").write_text(json.dumps(jobs))
    words = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", resume_jobs.__file__)
    done = subprocess.run(
        [sys.executable, "-m", *words, str(folder / "jobs.json")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]


@pytest.mark.parametrize("mode", MODES)
def test_each_process_writes_its_part_once(runs, mode):
    saved = checkpoint(runs / f"adam-{mode}", 2)
    sizes = {path.name: path.stat().st_size for path in saved.glob("*.safetensors")}
    names = [f"{group}-0000{rank}.safetensors" for group in groups(saved) for rank in (0, 1)]
    assert sorted(sizes) == sorted(names) and len(names) == 2 * 5
    tensors = [tensor for group in groups(saved).values() for tensor in group.values()]
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    # Beside the tensors a file has a header of names.
    assert num_bytes < sum(sizes.values()) < 1.5 * num_bytes
    for rank in (0, 1):
        assert sum(size for name, size in sizes.items() if f"-0000{rank}" in name) < 0.7 * sum(sizes.values())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer_states_have_the_networks_names(runs, optimizer):
    for mode in ("one", *MODES):
        saved = groups(checkpoint(runs / f"{optimizer}-{mode}", 2))
        for role in ("student", "critic"):
            expected = {f"{name}/{key}" for name in saved[role] for key in STATES[optimizer]}
            assert set(saved[f"{role}.optimizer"]) == expected


@pytest.mark.parametrize(("saved", "resumed"), [pair for pair in PAIRS if pair[1] != "one"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_tensor_is_loaded_exactly(runs, optimizer, saved, resumed):
    before = groups(checkpoint(runs / f"{optimizer}-{saved}", 2))
    after = groups(runs / f"{optimizer}-{saved}-{resumed}-loaded")
    assert before.keys() == after.keys() and len(before) == 5
    for group in before:
        assert_same_tensors(before[group], after[group])


@pytest.mark.parametrize(("saved", "resumed"), PAIRS)
def test_the_run_goes_on(runs, saved, resumed):
    """Bit for bit where it was saved, else up to the rounding of sums."""
    name = f"{saved}-{resumed}"
    if saved == resumed:
        for optimizer in OPTIMIZERS:
            whole, rest = runs / f"{optimizer}-{saved}", runs / f"{optimizer}-{name}"
            assert metric_lines(rest) == metric_lines(whole)[2:]
            assert_same_state(checkpoint(rest, 4), checkpoint(whole, 4), num_networks=3, num_optimizers=2)
    whole, rest = runs / f"sgd-{saved}", runs / f"sgd-{name}"
    for line, expected in zip(metrics(rest), metrics(whole)[2:], strict=True):
        assert line == pytest.approx(expected, rel=1e-5)
    ours, theirs, earlier = (groups(checkpoint(*at)) for at in ((rest, 4), (whole, 4), (whole, 2)))
    for group in ours:
        assert largest_difference(ours[group], theirs[group]) < 1e-5
        assert largest_difference(theirs[group], earlier[group]) > 1e-3, "what doesn't move proves nothing"
    assert metadata(checkpoint(rest, 4))["updates"] == {"student": 2, "critic": 4}
    assert metadata(checkpoint(rest, 4))["callbacks"]["ema"] == {"num_updates": 2}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_to_the_bit_where_it_is_sharded(runs, method):
    whole, resumed = (runs / f"{method}-{name}" for name in ("whole", "resumed"))
    assert len(metric_lines(whole)) == 4 and metric_lines(resumed) == metric_lines(whole)[2:]
    assert metadata(checkpoint(whole, 4))["sharded"]
    for name, tensors in groups(checkpoint(whole, 4)).items():
        assert_same_tensors(groups(checkpoint(resumed, 4))[name], tensors)


def test_saving_beside_the_training_saves_the_same(runs):
    assert metric_lines(runs / "async") == metric_lines(runs / "adam-fsdp2")
    for step in (2, 4):
        pair = (checkpoint(runs / name, step) for name in ("async", "adam-fsdp2"))
        assert_same_state(*pair, num_networks=3, num_optimizers=2)


@pytest.mark.parametrize("name", ["full-ddp", "full-fsdp2", "full-async"])
def test_all_processes_stop_where_one_can_not_write(runs, name):
    messages = [(runs / name / f"failed-{rank}.txt").read_text() for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert messages[0].startswith("4 checkpoint") and "process 1: OSError" in messages[0]
    assert "process 0" not in messages[0] and "training.checkpoint.keep_last" in messages[0]
    # The earlier one is whole, and of the failed one nothing is left.
    assert [path.name for path in (runs / name / "checkpoints").iterdir()] == ["step-00000002"]
    pair = (checkpoint(runs / run, 2) for run in (name, f"adam-{name.removeprefix('full-').replace('async', 'ddp')}"))
    assert_same_state(*pair, num_networks=3, num_optimizers=2)


def test_a_sharded_checkpoint_becomes_a_stock_pipeline(runs, tmp_path):
    saved = checkpoint(runs / "adam-fsdp2", 4)
    words = ["export", "--checkpoint", saved, "--output-dir", tmp_path / "student"]
    subprocess.run([sys.executable, "-m", "fv_distill", *map(str, words)], check=True, capture_output=True)
    exported = load_file(tmp_path / "student/transformer/diffusion_pytorch_model.safetensors")
    assert_same_tensors(exported, load_role_weights(saved, "ema"))
    pipeline = WanPipeline.from_pretrained(tmp_path / "student")
    call = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 8}
    frames = pipeline("a digit", num_inference_steps=2, guidance_scale=1.0, output_type="pt", **call).frames
    assert frames.shape == (1, 9, 3, 32, 32) and torch.isfinite(frames).all()
