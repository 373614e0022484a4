"""Whole runs that push: one process trains them all, against a Hub on loopback."""

import json
import re
from pathlib import Path

import pytest
import yaml
from hub_client import assert_same_files, hub_environment, run_python
from hub_server import WRITE_TOKEN, HubServer
from tiny_runs import dmd2_config, metric_lines, metrics, train, write_config

from fv_distill.callbacks import hub as callbacks_hub
from fv_distill.config import ConfigError, load_run_config
from fv_distill.export.hub import HubError
from fv_distill.training.checkpoint import complete_checkpoints

RUNS = Path(__file__).with_name("push_runs.py")
LAST = "last-checkpoint/"


def pushing(config, name, folder, **pipeline):
    """A run of four steps, saved after the second, that pushes to a repository of its own name."""
    config = json.loads(json.dumps(config))
    config["training"]["output_dir"] = str(folder / "runs" / name)
    config["training"]["tracker"] = {"trackers": ["tensorboard"]}
    config["callbacks"]["wait"] = {"_target_": "push_runs.WaitForPush"}
    export = {"export_dir": str(folder / "exports" / name), "hub_model_id": f"me/{name}"}
    config["pipeline"] = {"push_to_hub": True, **export, **pipeline}
    return config


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a digit\nthe digit one\n")
    return path


@pytest.fixture(scope="module")
def done(tiny_wan, tiny_rows, prompts, tmp_path_factory):
    """The Hub after all runs, their folder, and what each printed."""
    folder = tmp_path_factory.mktemp("push")
    config = dmd2_config(tiny_wan, tiny_rows, folder)
    runs = {
        "end": pushing(config, "end", folder),
        "every": pushing(config, "every", folder, hub_strategy="every_save", hub_private=True),
        "stopped": pushing(config, "stopped", folder, hub_strategy="checkpoint"),
        "outage": pushing(config, "outage", folder, hub_strategy="every_save"),
        "gone": pushing(config, "gone", folder),
    }
    runs["end"]["callbacks"]["validation"] = {"dataset_file": str(prompts), "every_steps": 2}
    runs["stopped"]["callbacks"]["stop"] = {"_target_": "push_runs.Stop"}
    # Rotated away while it is being pushed.
    runs["every"]["training"]["checkpoint"] = {"every_steps": 1, "keep_last": 1}
    (folder / "runs").mkdir()
    paths = [write_config(run, folder / f"{name}.yaml") for name, run in runs.items()]
    with HubServer() as hub:
        # The first look, before training, finds the Hub in order; later attempts come in pairs.
        hub.fail("me/outage/auth-check", skip=1, times=2, status=503)
        hub.fail("me/gone/auth-check", skip=1, times=100, status=503)
        environment = hub_environment(hub, folder / "home")
        environment["PYTHONPATH"] += f":{RUNS.parent}"
        out = run_python((RUNS, *paths), environment).stdout
        printed = {part.splitlines()[0]: part for part in out.split("== ")[1:]}
        yield hub, folder, printed


def test_end_pushes_once(done):
    hub, folder, printed = done
    assert hub.repositories["me/end"].commits == ["step-00000004 of 4"]
    assert_same_files(folder / "exports/end", hub.repositories["me/end"].files)
    assert f"pushed to {hub.endpoint}/me/end" in printed["end"]


def test_every_save_pushes_each_checkpoint_though_they_are_rotated_away(done):
    hub, folder, printed = done
    repository = hub.repositories["me/every"]
    assert repository.private
    assert repository.commits == [f"step-0000000{step} of 4" for step in (1, 2, 3, 4)]
    assert_same_files(folder / "exports/every", repository.files)
    assert not any(name.startswith(LAST) for name in repository.files)
    assert "warning" not in printed["every"]
    assert [path.name for path in (folder / "runs/every/checkpoints").iterdir()] == ["step-00000004"]


def test_a_stopped_run_is_resumed_elsewhere_from_the_last_checkpoint(done, tmp_path):
    hub, folder, printed = done
    repository = hub.repositories["me/stopped"]
    assert "SIGTERM" in printed["stopped"]
    assert repository.commits == [
        *("step-00000002 of 4", "Checkpoint step-00000002"),
        *("step-00000003 of 4", "Checkpoint step-00000003"),
    ]
    checkpoint = complete_checkpoints(folder / "runs/stopped")[-1]
    files = {name.removeprefix(LAST): data for name, data in repository.files.items() if name.startswith(LAST)}
    assert_same_files(checkpoint, files)
    for name, data in files.items():
        (tmp_path / LAST / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / LAST / name).write_bytes(data)
    config = yaml.safe_load((folder / "end.yaml").read_text())
    config["callbacks"] = {name: config["callbacks"][name] for name in ("ema", "grad_clip")}
    config["pipeline"] = {}
    config["training"]["checkpoint"]["resume_from_checkpoint"] = str(tmp_path / LAST)
    config["training"]["output_dir"] = str(tmp_path / "resumed")
    assert metrics(train(config)) == metrics(folder / "runs/end")[3:]


def test_an_outage_is_a_warning_and_the_next_push_makes_up_for_it(done):
    hub, folder, printed = done
    assert "step-00000002 was not pushed: the Hub doesn't work at the moment (503" in printed["outage"]
    assert hub.repositories["me/outage"].commits == ["step-00000004 of 4"]
    assert metric_lines(folder / "runs/outage") == metric_lines(folder / "runs/end")


def test_an_outage_at_the_end_says_how_to_push_later(done):
    hub, folder, printed = done
    export = folder / "exports/gone"
    assert "HubError: the Hub doesn't work at the moment" in printed["gone"]
    assert f"fv-distill push {export} me/gone" in printed["gone"]
    assert hub.repositories["me/gone"].commits == []
    assert (export / "model_index.json").is_file() and (export / "fv_distill.json").is_file()


def test_the_token_and_private_folders_stay_at_home(done, tiny_wan):
    hub, folder, _ = done
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in written)
    assert [path for path in written if WRITE_TOKEN.encode() in path.read_bytes()] == []
    assert [request.path for request in hub.requests if WRITE_TOKEN.encode() in request.body] == []
    private = [str(place).encode() for place in (folder, tiny_wan.parent)]
    for repository in hub.repositories.values():
        public = {name: data for name, data in repository.files.items() if not name.startswith(LAST)}
        assert [name for name, data in public.items() if any(place in data for place in private)] == []


def test_the_pushed_cards_snippet_runs_anywhere_and_the_card_shows_the_run(done, tmp_path):
    hub, _, _ = done
    files = hub.repositories["me/end"].files
    card = files["README.md"].decode()
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    run_python(("-c", snippet), hub_environment(hub, tmp_path / "home", token=None), cwd=tmp_path)
    assert (tmp_path / "sample.gif").stat().st_size > 0
    shown = re.findall(r"(?:\]\(|src=\")(assets/[^)\"]*)", card)
    assert "assets/losses.png" in shown and "assets/contact_sheet_2-steps.png" in shown
    assert sum(name.startswith("assets/00") for name in shown) == 2
    assert sorted(shown) == sorted(name for name in files if name.startswith("assets/"))


def test_without_the_hub_a_run_trains_and_exports(tiny_wan, tiny_rows, tmp_path, capsys):
    """In this process HF_HUB_OFFLINE is set, as on machines without a network."""
    config = dmd2_config(tiny_wan, tiny_rows, tmp_path / "run")
    config["training"]["loop"]["max_train_steps"] = 1
    config["pipeline"] = {"push_to_hub": True, "hub_model_id": "me/x", "export_dir": str(tmp_path / "student")}
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE.*fv-distill push .*student me/x"):
        train(config)
    assert "Training starts all the same" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "student/model_index.json").is_file()


def test_a_login_that_will_not_do_is_told_before_anything_is_loaded(tiny_rows, tmp_path, monkeypatch):
    def refuse(repo_id, *, private):
        raise HubError(f"this login may not write to {repo_id}", is_temporary=False)

    monkeypatch.setattr(callbacks_hub, "open_repository", refuse)
    config = dmd2_config(Path("no/model/is/there/yet"), tiny_rows, tmp_path / "run")
    config["pipeline"] = {"push_to_hub": True, "hub_model_id": "me/x", "export_dir": str(tmp_path / "student")}
    with pytest.raises(ValueError, match="pipeline.push_to_hub: this login may not write to me/x"):
        train(config)


def test_what_the_export_may_not_replace_is_told_before_training(tiny_wan, tiny_rows, tmp_path):
    config = dmd2_config(tiny_wan, tiny_rows, tmp_path / "run")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="something else than an export"):
        train(config, {"pipeline.export_dir": str(tmp_path / "precious")})
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["student", "me/my student", "me/a/b", "/student", "me/"])
def test_a_repository_has_an_owner_and_a_name(tiny_wan, tiny_rows, tmp_path, name):
    config = dmd2_config(tiny_wan, tiny_rows, tmp_path / "run")
    path = write_config(config, tmp_path / "run.yaml", {"pipeline.hub_model_id": name})
    with pytest.raises(ConfigError, match=r"pipeline\.hub_model_id=.*owner/name"):
        load_run_config(path)
