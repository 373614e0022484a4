"""The cache of teacher paths: what is in it, who makes it, and that nothing is lost or mixed up."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import kd_config, metrics, train, write_config

from fv_distill.config.load import load_run_config
from fv_distill.data import ParquetDataset
from fv_distill.models import Conditioning, WanModel
from fv_distill.rng import generator_for
from fv_distill.rollouts import ode_trajectory, trajectory_sigmas
from fv_distill.training import (
    build_dataset,
    build_model,
    build_trajectory_dataset,
    run_make_trajectories,
    run_training_from_config,
)
from fv_distill.training.trajectories import TrajectoryCache


@pytest.fixture
def config(tiny_wan, tiny_rows, tmp_path):
    return kd_config(tiny_wan, tiny_rows, tmp_path / "run")


@pytest.fixture
def load(config, tmp_path):
    """The loaded config, with dotted changes."""
    return lambda **changes: load_run_config(write_config(config, tmp_path / "run.yaml"), changes or None)


def files(directory):
    return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir())}


def paths_directory(config):
    return Path(config["method"]["teacher_path_cache"])


def test_a_path_is_the_teacher_s_own(load, tiny_wan, tiny_rows):
    """Row 7 is the second path of the data's row 1: own noise, its row's text, guidance with the negative prompt."""
    directory = run_make_trajectories(load())
    rows = ParquetDataset(directory)
    assert len(rows) == 12 and json.loads((directory / "trajectories.json").read_text())["rows"] == 6
    source = ParquetDataset(tiny_rows)
    row, origin = rows[7], source[1]
    assert row["caption"] == origin["caption"] and torch.equal(row["text_embedding"], origin["text_embedding"])
    assert row["trajectory_timesteps"].tolist() == [1000, 500, 0]

    teacher = WanModel.from_pretrained(str(tiny_wan), text_length=8, negative_prompt="bad")
    noise = torch.randn(1, 4, 3, 4, 4, generator=generator_for(7, "trajectory", 7))
    text = torch.zeros(1, 8, origin["text_embedding"].shape[1])
    text[0, : len(origin["text_embedding"])] = origin["text_embedding"]
    levels = trajectory_sigmas((1.0, 0.5, 0.0), num_steps=4, flow_shift=teacher.flow_shift)
    expected = ode_trajectory(
        teacher, noise, Conditioning(text, None), levels,
        keep=(1.0, 0.5, 0.0), unconditional=teacher.negative_conditioning(), guidance_scale=3.0,
    )  # fmt: skip
    torch.testing.assert_close(row["trajectory_latents"], expected[0], atol=1e-5, rtol=1e-4)


def test_ranks_share_the_work(load):
    """Whatever the number of processes, the same files."""
    alone = files(run_make_trajectories(load()))
    config = load(**{"method.teacher_path_cache": str(Path(load().method.options["teacher_path_cache"]) / "shared")})
    made = []
    for rank, world in ((0, 2), (1, 2), (0, 1)):
        accelerator = SimpleNamespace(
            process_index=rank, num_processes=world, is_main_process=rank == 0, wait_for_everyone=lambda: None,
            device=torch.device("cpu"),
        )  # fmt: skip
        cache = TrajectoryCache(config, build_dataset(config))
        wanted = cache.missing
        cache.make(accelerator, build_model(config, "teacher"))
        made.append(sorted(set(wanted) - set(cache.missing)))
    # In turn here, not at once: the second rank finds two files missing and takes every other one of those.
    assert made == [[0, 2], [3], [1]]
    shared = files(cache.directory)
    assert {name: data for name, data in shared.items() if name != "trajectories.json"} == {
        name: data for name, data in alone.items() if name != "trajectories.json"
    }


def test_a_killed_run_goes_on_and_ends_with_the_same_files(config, tmp_path):
    cut = tmp_path / "cut"
    path = write_config(config, tmp_path / "cut.yaml", {"method.teacher_path_cache": str(cut)})
    command = [sys.executable, "-m", "fv_distill", "make-trajectories", "--config", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = [*command, "--method.teacher_path_cache", str(paths_directory(config))]
    subprocess.run(whole, env=environment, check=True, stdout=subprocess.DEVNULL)
    expected = files(paths_directory(config))
    for wanted in (1, 3):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while len(list(cut.glob("paths-*.parquet"))) < wanted and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in cut.glob("paths-*.parquet")}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    made = files(cut)
    assert {n: d for n, d in made.items() if n in expected and n.endswith("parquet")} == {
        n: d for n, d in expected.items() if n.endswith("parquet")
    }
    assert all((cut / name).stat().st_mtime_ns == time for name, time in kept.items()), "what was there is not redone"


def test_all_states_may_be_kept(load):
    directory = run_make_trajectories(load(**{"method.store_all_states": True}))
    row = ParquetDataset(directory)[0]
    assert row["trajectory_latents"].shape == (5, 4, 3, 4, 4)
    levels = trajectory_sigmas((1.0, 0.5, 0.0), num_steps=4, flow_shift=3.0)
    torch.testing.assert_close(row["trajectory_timesteps"], 1000 * torch.tensor(levels))


def test_text_only_rows_take_the_latent_shape_of_the_config(load, tmp_path):
    from fv_distill.data import write_rows

    rows = [{"caption": "a digit", "text_embedding": torch.randn(3, 16)} for _ in range(2)]
    write_rows(tmp_path / "text" / "a.parquet", rows)
    changes = {"training.data.data_path": str(tmp_path / "text"), "training.data.latent_shape": [4, 2, 6, 4]}
    assert ParquetDataset(run_make_trajectories(load(**changes)))[3]["trajectory_latents"].shape == (3, 4, 2, 6, 4)


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("method.teacher_guidance_scale", 5.0, r"method.teacher_guidance_scale=3.0, but the config has 5.0"),
        ("method.teacher_inference_steps", 5, r"method.teacher_inference_steps=4, but the config has 5"),
        ("method.t_list", [999, 600, 0], r"method.t_list=\[999.0, 500.0, 0.0\], but the config has \[999.0, 600.0"),
        ("models.teacher.negative_prompt", "ugly", r"models.teacher.negative_prompt='bad', but the config has 'ugly'"),
        ("training.seed", 8, r"training.seed=7, but the config has 8"),
    ],
)
def test_paths_of_something_else_are_refused(load, key, value, shown):
    run_make_trajectories(load())
    with pytest.raises(ValueError, match=rf"method.teacher_path_cache: .* were made with {shown}"):
        run_make_trajectories(load(**{key: value}))


def test_a_teacher_with_other_weights_is_refused(load, tmp_path, tiny_wan):
    import shutil

    from tiny_models import make_tiny_transformer

    copy = tmp_path / "teacher"
    shutil.copytree(tiny_wan, copy)
    run_make_trajectories(load(**{"models.teacher.init_from": str(copy)}))
    make_tiny_transformer(99).save_pretrained(copy / "transformer")
    with pytest.raises(ValueError, match="fingerprint"):
        run_make_trajectories(load(**{"models.teacher.init_from": str(copy)}))


def test_what_does_not_change_the_paths_may_change(load):
    before = files(run_make_trajectories(load()))
    changes = {"method.trajectory_batch_size": 1, "method.kd_loss": "mse", "training.loop.max_train_steps": 1}
    assert files(run_make_trajectories(load(**changes))) == before


def test_training_makes_them_once_and_then_needs_no_teacher(config, tmp_path, capsys):
    output_dir = train(config)
    assert "teacher paths: 4 of 4 files" in capsys.readouterr().out
    made = files(paths_directory(config))
    del config["models"]["teacher"]
    again = train(config, {"training.output_dir": str(tmp_path / "again")})
    assert "teacher paths" not in capsys.readouterr().out and files(paths_directory(config)) == made
    assert metrics(again) == metrics(output_dir)


def test_rows_that_hold_paths_need_no_cache(config, tmp_path):
    output_dir = train(config)
    del config["models"]["teacher"]
    config["training"]["data"]["data_path"] = config["method"].pop("teacher_path_cache")
    assert metrics(train(config, {"training.output_dir": str(tmp_path / "rows")})) == metrics(output_dir)
    config["training"]["output_dir"] = str(tmp_path / "script")
    loaded = load_run_config(write_config(config, tmp_path / "script.yaml"))
    assert len(build_trajectory_dataset(loaded, SimpleNamespace())) == 12


def test_without_a_teacher_there_must_be_paths(config):
    del config["models"]["teacher"]
    with pytest.raises(ValueError, match=r"lacks 4 of 4 files; set models.teacher"):
        train(config)


def test_a_dry_run_makes_none(config, tmp_path, capsys):
    run_training_from_config(write_config(config, tmp_path / "run.yaml"), dry_run=True)
    assert "12 teacher paths would be made" in capsys.readouterr().out
    assert not paths_directory(config).exists()


def test_a_directory_of_other_rows_is_left_alone(config, tiny_rows):
    config["method"]["teacher_path_cache"] = str(tiny_rows)
    with pytest.raises(ValueError, match="parquet files but no trajectories.json"):
        train(config)


def test_the_teacher_is_gone_when_training_starts(config, monkeypatch):
    import gc
    import weakref

    from fv_distill.training import run

    kept = []
    original = run.build_model
    monkeypatch.setattr(
        run, "build_model", lambda c, role: kept.append((role, weakref.ref(m := original(c, role)))) or m
    )
    trainer = run.build_trainer(load_run_config(write_config(config, Path(config["training"]["output_dir"] + ".yaml"))))
    gc.collect()
    (teacher,) = [reference for role, reference in kept if role == "teacher"]
    assert teacher() is None and list(trainer.models) == ["student"]
    trainer.accelerator.end_training()


def test_make_trajectories_needs_a_directory(load):
    with pytest.raises(ValueError, match="method.teacher_path_cache is null"):
        run_make_trajectories(load(**{"method.teacher_path_cache": None}))
