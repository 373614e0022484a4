"""Reading a run, whole or not."""

import json
import math

import pytest
from run_directories import make_run_directory

from fv_distill.report.run_directory import num_not_finite, read_run_directory


def test_a_run_in_progress(tmp_path):
    run = read_run_directory(make_run_directory(tmp_path / "run"))
    assert run.step == 120 and run.setting("training", "seed") == 3
    assert run.setting("training", "nothing", "here") is None
    assert run.metrics["loss/student"][0] == (2, pytest.approx(2 + math.sin(2)))
    assert num_not_finite(run.metrics) == 1
    assert [(c.name, c.complete) for c in run.checkpoints] == [
        ("step-00000060", True),
        ("step-00000120.incomplete", False),
    ]
    assert run.checkpoints[1].num_bytes == 1500
    assert run.notes == ["1 damaged line of metrics.jsonl left out."]


def test_a_repeated_step_counts_once_and_odd_values_not_at_all(tmp_path):
    lines = [{"step": 1, "a": 1}, {"step": 2, "a": 2, "b": "text", "c": True}, {"step": 2, "a": 3}, {"a": 4}, [5], 6]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    run = read_run_directory(tmp_path)
    assert run.metrics == {"a": [(1, 1.0), (2, 3.0)]}
    assert "3 damaged lines of metrics.jsonl left out." in run.notes


@pytest.mark.parametrize("text", ["models: [", "just text", "\0\0"])
def test_a_damaged_config_is_shown_as_it_is(tmp_path, text):
    (tmp_path / "resolved_config.yaml").write_text(text)
    run = read_run_directory(tmp_path)
    assert (run.config, run.config_text) == ({}, text)
    assert run.notes == ["resolved_config.yaml is damaged and shown as it is."]


def test_damaged_metadata_is_an_incomplete_checkpoint(tmp_path):
    run = make_run_directory(tmp_path / "run")
    (run / "checkpoints/step-00000060/metadata.json").write_text('{"step"')
    assert [checkpoint.complete for checkpoint in read_run_directory(run).checkpoints] == [False, False]
