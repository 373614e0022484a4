"""What trackers get, offline, and that a resumed run goes on where it was."""

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import dmd2_config, metrics, train

from fv_distill.config import ConfigError, load_run_config
from fv_distill.training import trackers

SECRET = "0123456789abcdef0123456789abcdef01234567"
CAPTIONS = ["a digit", "another digit"]


# In a process of its own, since trackio settles on its directory when it is imported.
TWO_PARTS = """
import json, shutil, sys
from pathlib import Path
from tiny_runs import checkpoint, train

config = json.loads(Path(sys.argv[1]).read_text())
train(config, {"training.loop.max_train_steps": 3})
shutil.rmtree(checkpoint(Path(config["training"]["output_dir"]), 3))
train(config, {"training.checkpoint.resume_from_checkpoint": "latest"})
"""


@pytest.fixture(scope="module")
def tracked(tiny_wan, tiny_rows, tmp_path_factory):
    """A run of three steps, of which the third is lost, and which is resumed to four: with all trackers at once."""
    folder = tmp_path_factory.mktemp("tracked")
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS))
    config = dmd2_config(tiny_wan, tiny_rows, folder / "run")
    config["training"]["tracker"] = {
        "trackers": ["tensorboard", "wandb", "trackio"],
        "project_name": "digits",
        "run_name": "first",
        "sigma_losses_every_steps": 2,
    }
    config["callbacks"]["validation"] = {"dataset_file": str(folder / "prompts.txt"), "every_steps": 2}
    (folder / "config.json").write_text(json.dumps(config))
    environment = {
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(folder / "trackio"),
        "WANDB_API_KEY": SECRET,
        "HF_TOKEN": SECRET,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    result = subprocess.run(
        [sys.executable, "-c", TWO_PARTS, str(folder / "config.json")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert SECRET not in result.stdout + result.stderr
    return SimpleNamespace(folder=folder, run=folder / "run", config=config)


def test_tensorboard_shows_each_step_once(tracked):
    folder = tracked.run / "logs" / "digits"
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    lines = metrics(tracked.run)
    logged = events.Scalars("loss/critic")
    assert [event.step for event in logged] == [1, 2, 3, 4]
    assert [event.value for event in logged] == pytest.approx([line["loss/critic"] for line in lines], rel=1e-6)
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["config"], "one row of hyperparameters"
    by_sigma = [tag for tag in events.Tags()["scalars"] if tag.startswith("loss_by_sigma/critic/0.")]
    assert by_sigma and events.Scalars(by_sigma[0])[-1].step in (2, 4)
    videos = events.Images("validation/video_2_steps")
    assert [video.step for video in videos] == [2, 4]
    assert all(video.encoded_image_string.startswith(b"GIF89a") for video in videos)
    assert [sheet.step for sheet in events.Images("validation/sheet_2_steps")] == [2, 4]
    texts = events.Tensors("config/text_summary")
    assert [text.step for text in texts] == [0, 2]
    assert yaml_of(texts[0].tensor_proto.string_val[0].decode()) == tracked.config


def yaml_of(markdown: str) -> dict:
    return yaml.safe_load(markdown.removeprefix("```yaml\n").removesuffix("```"))


def wandb_records(run: Path) -> Iterator[Any]:
    """The messages of an offline run: a LevelDB log, whose entries may be cut where a block of 32 kB ends."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = run.glob("run-*.wandb")
    data, place, message = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        message += data[place + 7 : place + 7 + length]
        place += 7 + length
        # Whole, first, middle and last part.
        if kind in (1, 4):
            yield Record.FromString(message)
            message = b""


def test_wandb_continues_one_run(tracked):
    runs = sorted((tracked.run / "logs/wandb").glob("offline-run-*"))
    assert len(runs) == 2
    ids = {record.run.run_id for run in runs for record in wandb_records(run) if record.HasField("run")}
    assert ids == {json.loads((tracked.run / "logs/tracker_runs.json").read_text())["wandb"]}
    lines = {line["step"]: line for line in metrics(tracked.run)}
    for run, steps in zip(runs, ([1, 2, 3], [3, 4]), strict=True):
        records = list(wandb_records(run))
        (start,) = [record.run for record in records if record.HasField("run")]
        assert (start.project, start.display_name) == ("digits", "first")
        config = dict_of([update for record in records for update in record.config.update])
        assert config["method._target_"] == "fv_distill.methods.DMD2Method"
        assert yaml.safe_load(config["yaml"])["callbacks"] == tracked.config["callbacks"]
        assert yaml.safe_load((run / "files/run_config.yaml").read_text())["models"] == tracked.config["models"]
        rows = [dict_of(record.history.item) for record in records if record.HasField("history")]
        logged = {row["_step"]: row["loss/critic"] for row in rows if "loss/critic" in row}
        assert logged == {step: lines[step]["loss/critic"] for step in steps}
        assert list(run.glob("files/media/videos/validation/*.gif"))
        assert list(run.glob("files/media/images/validation/*.png"))


def dict_of(items) -> dict:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_trackio_continues_one_run(tracked):
    with sqlite3.connect(tracked.folder / "trackio/digits.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
        configs = database.execute("select config from configs").fetchall()
    name = json.loads((tracked.run / "logs/tracker_runs.json").read_text())["trackio"]
    assert {row[0] for row in rows} == {name} and name.startswith("first-")
    logged = [(step, json.loads(values)) for _, step, values in rows]
    assert [step for step, values in logged if "loss/critic" in values] == [1, 2, 3, 3, 4]
    assert [step for step, values in logged if "validation/video_2_steps" in values] == [2, 3, 4]
    shown = [values["config"]["_value"] for _, values in logged if "config" in values]
    assert yaml_of(shown[0]) == tracked.config
    assert json.loads(configs[-1][0])["method._target_"] == "fv_distill.methods.DMD2Method"
    assert len(list((tracked.folder / "trackio/media").rglob("*.gif"))) == 3


def test_no_tracker_is_told_a_token(tracked):
    files = [path for path in tracked.folder.rglob("*") if path.is_file()]
    assert len(files) > 30
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_every_start_is_written_down(tracked):
    sessions = [json.loads(line) for line in (tracked.run / "sessions.jsonl").read_text().splitlines()]
    assert [session["step"] for session in sessions] == [0, 2]
    assert all(session["world_size"] == 1 and sum(session["devices"].values()) == 1 for session in sessions)
    assert sessions[0]["versions"]["torch"] and sessions[0]["started"].endswith("+00:00")


# What is found out before anything is loaded


@pytest.mark.parametrize("name", ["tensorbord", "all", ""])
def test_an_unknown_tracker_is_refused(name):
    with pytest.raises(ConfigError, match=r"training\.tracker\.trackers: there is no tracker .*tensorboard, wandb"):
        trackers.check_trackers(["tensorboard", name])


@pytest.mark.parametrize(
    ("name", "fix"),
    [("wandb", r"'fv_distill\[wandb\]'"), ("trackio", r"'fv_distill\[trackio\]'"), ("mlflow", "mlflow")],
)
def test_a_missing_package_is_named_with_its_fix(monkeypatch, name, fix):
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ImportError, match=rf"training\.tracker\.trackers: {name} is not installed; pip install {fix}"):
        trackers.check_trackers(["tensorboard", name])


def test_it_is_found_out_before_the_models_are_loaded(tiny_rows, tmp_path):
    config = dmd2_config(tmp_path / "no-model", tiny_rows, tmp_path / "run")
    with pytest.raises(ConfigError, match="there is no tracker 'tb'"):
        train(config, {"training.tracker.trackers": ["tb"]})
    assert not (tmp_path / "run").exists()


def test_a_registered_tracker_of_ones_own_is_taken(monkeypatch):
    class Mine(GeneralTracker):
        name = "mine"
        requires_logging_directory = False

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "mine", Mine)
    trackers.check_trackers(["mine"])


def test_a_tracker_that_does_not_start_says_what_may_help(tiny_wan, tiny_rows, tmp_path):
    def init_trackers(*_, **__):
        raise OSError("No API key configured")

    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(dmd2_config(tiny_wan, tiny_rows, tmp_path / "run")))
    config = load_run_config(path, {"training.tracker.trackers": ["wandb"]})
    accelerator = SimpleNamespace(is_main_process=True, init_trackers=init_trackers)
    with pytest.raises(ConfigError, match=r"No API key configured; wandb needs `wandb login`, or WANDB_MODE=offline"):
        trackers.start_trackers(accelerator, config, step=0)
    assert os.listdir(tmp_path / "run" / "logs") == ["tracker_runs.json"]
