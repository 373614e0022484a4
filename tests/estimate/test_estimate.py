"""The command, its numbers and its messages."""

import json
from pathlib import Path

import pytest
from tiny_runs import finetune_config, kd_config, write_config

from fv_distill import cli
from fv_distill.config import load_run_config
from fv_distill.data import ParquetDataset, write_rows
from fv_distill.estimate import Layout
from fv_distill.estimate.advice import advice, fits
from fv_distill.estimate.estimate import Device
from fv_distill.methods import FineTuneMethod, TrainingMethod
from fv_distill.training import run_training_from_config
from fv_distill.training.estimating import estimate_run, latent_shape

ROOT = Path(__file__).resolve().parents[2]
FINETUNE = ROOT / "examples/configs/finetune/wan2.1_1.3b.yaml"
SHAPE = ("--training.data.latent_shape", "[16, 21, 60, 104]")
GIB = 2**30
H100 = Device("H100", 989.5e12, 80 * GIB, 0.4)


def estimate(capsys, *words: str) -> dict:
    cli.main(["estimate", "--json", *words])
    return json.loads(capsys.readouterr().out)


def test_wan_on_eight_gpus(capsys):
    launch = ("--accelerate-config", str(ROOT / "configs/accelerate/fsdp2_8gpu.yaml"))
    found = estimate(capsys, "--config", str(FINETUNE), *launch, *SHAPE, "--mfu", "0.5")
    assert found["roles"]["student"]["parameters"] == pytest.approx(1.42e9, rel=0.01)
    assert found["roles"]["student"]["rank_bytes"] == pytest.approx(4 * 1.42e9 / 8, rel=0.01)
    parts = found["memory"]["phases"]["student optimizer step"]
    assert parts["optimizer states"] == pytest.approx(2 * parts["weights"], rel=0.01)
    assert parts["gradients"] == parts["weights"]
    # UMT5-XXL's encoder, 5.68 billion parameters in the student's float32.
    assert found["memory"]["phases"]["prompts"]["text encoder"] == pytest.approx(4 * 5.68e9, rel=0.01)
    assert found["memory"]["fits"] is True
    config = load_run_config(FINETUNE)
    assert found["global_batch_size"] == config.training.loop.gradient_accumulation_steps * 8
    assert found["seconds_per_step"] == pytest.approx(found["flops_per_step"] / (989.5e12 * 0.5))
    assert found["seconds"] == found["seconds_per_step"] * config.training.loop.max_train_steps


def test_overrides_and_devices_act(capsys):
    words = ("--config", str(FINETUNE), *SHAPE, "--training.loop.gradient_accumulation_steps", "1")
    one = estimate(capsys, *words, "--peak-tflops", "100", "--device-memory", "24")
    two = estimate(capsys, *words, "--training.data.train_batch_size", "2", "--device", "abacus")
    assert two["flops_per_step"] == pytest.approx(2 * one["flops_per_step"], rel=1e-3)
    assert one["seconds_per_step"] == pytest.approx(one["flops_per_step"] / 40e12)
    assert (two["seconds_per_step"], one["memory"]["fits"], two["memory"]["fits"]) == (None, False, True)
    assert any("shard every network over at least" in line for line in one["advice"])


@pytest.mark.parametrize(
    "words, message",
    [
        (("--models.student.init_from", "nobody/nothing"), "models.student: init_from='nobody/nothing' is no local"),
        ((), "the clips' shape is not known"),
        ((*SHAPE, "--num-processes", "8"), "--num-processes needs --accelerate-config"),
        ((*SHAPE, "--mfu", "40"), "--mfu=40 must be above 0 and at most 1"),
        (("--training.data.latent_shape", "[4, 21, 60, 104]"), "have 4 channels"),
    ],
)
def test_what_a_user_can_mend_is_one_message(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["estimate", "--config", str(FINETUNE), *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_directory_needs_its_config_files_only(wide_wan, wide_rows, tmp_path):
    folder = tmp_path / "configs-only"
    for file in wide_wan.rglob("*.json"):
        target = folder / file.relative_to(wide_wan)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(file.read_text())
    found = [
        estimate_run(
            load_run_config(write_config(finetune_config(model, wide_rows, tmp_path), tmp_path / "run.yaml")),
            Layout(),
            H100,
        )
        for model in (wide_wan, folder)
    ]
    assert found[0] == found[1]


def test_advice_names_what_saves_most(wide_wan, wide_rows, tmp_path):
    """Recomputation, and then it fits."""
    path = write_config(finetune_config(wide_wan, wide_rows, tmp_path), tmp_path / "run.yaml")
    tight = Device("small", None, 180_000_000, 0.4)
    layout = Layout(2, "sharded", 2)
    found = estimate_run(load_run_config(path), layout, tight)
    assert fits(found) is False
    assert "gradient_checkpointing: true" in advice(found)[0]
    found = estimate_run(load_run_config(path, {"training.model.gradient_checkpointing": True}), layout, tight)
    assert fits(found) is True and advice(found) == []


def test_processes_that_are_advised_are_enough_and_the_fewest(wide_wan, wide_rows, tmp_path):
    path = write_config(finetune_config(wide_wan, wide_rows, tmp_path), tmp_path / "run.yaml")
    config = load_run_config(path, {"training.model.gradient_checkpointing": True})

    def on(num_processes: int):
        layout = Layout(num_processes, "sharded", num_processes)
        return estimate_run(config, layout, Device("small", None, 70_000_000, 0.4))

    (line,) = advice(on(2))
    needed = int(line.split("at least ")[1].split()[0])
    assert needed > 2
    assert fits(on(needed)) and not fits(on(needed - 1))


def test_paths_of_the_teacher(wide_wan, wide_rows, tmp_path):
    config = load_run_config(write_config(kd_config(wide_wan, wide_rows, tmp_path / "run"), tmp_path / "run.yaml"))
    paths = estimate_run(config, Layout(), H100).paths
    assert (paths.per_row, paths.calls_per_path) == (2, 4 * 2)
    assert paths.path_bytes == 4 * (3 * 4 * 6 * 16 * 16 + 8 * 16)


def test_a_dry_run_ends_with_the_estimate(tiny_wan, tiny_rows, tmp_path, capsys, monkeypatch):
    path = write_config(finetune_config(tiny_wan, tiny_rows, tmp_path / "run"), tmp_path / "run.yaml")
    run_training_from_config(path, dry_run=True)
    text = capsys.readouterr().out
    assert "student update" in text and "peak " in text and text.endswith("nothing was trained\n")
    monkeypatch.setattr(FineTuneMethod, "network_calls", TrainingMethod.network_calls)
    run_training_from_config(path, dry_run=True)
    assert "no estimate: FineTuneMethod does not say which networks it calls" in capsys.readouterr().out


def test_of_clips_of_several_shapes_the_largest_counts(tiny_wan, tiny_rows, tmp_path):
    rows = [
        dict(row) for row in map(ParquetDataset(str(tiny_rows), cache_dir=str(tmp_path / "cache")).__getitem__, (0, 1))
    ]
    tensors = [{key: row[key] for key in ("caption", "text_embedding", "vae_latent")} for row in rows]
    tensors[0]["vae_latent"] = tensors[0]["vae_latent"][..., :2]
    write_rows(tmp_path / "rows/rows.parquet", tensors)
    config = finetune_config(tiny_wan, tmp_path / "rows", tmp_path / "run")
    path = write_config(config, tmp_path / "run.yaml")
    assert latent_shape(load_run_config(path)) == tuple(rows[1]["vae_latent"].shape)
