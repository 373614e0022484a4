import json
import re
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import finetune_config, metric_lines, train

from fv_distill.callbacks import ProfilerCallback


def trace(folder, name):
    return json.loads((folder / f"{name}.json").read_text())["traceEvents"]


def profiled(tmp_path, *, steps, rank=0, first=1, **options):
    """The folder after some steps of a product of matrices; the run ends after the last."""
    trainer = SimpleNamespace(
        step=0,
        accelerator=SimpleNamespace(process_index=rank, num_processes=2),
        config=SimpleNamespace(training=SimpleNamespace(output_dir=str(tmp_path))),
    )
    callback = ProfilerCallback(**options)
    callback.on_train_start(trainer)
    for trainer.step in range(first, steps + 1):
        callback.on_training_step_begin(trainer)
        torch.ones(trainer.step, 3) @ torch.ones(3, 7)
        callback.on_training_step_end(trainer, {})
    callback.on_close(trainer)
    return tmp_path / "profile"


def products(events):
    """Input shapes of the matrix products, in order."""
    found = sorted((event for event in events if event.get("name") == "aten::mm"), key=lambda event: event["ts"])
    return [event["args"]["Input Dims"][0][0] for event in found]


def test_the_chosen_steps_are_in_the_trace(tmp_path):
    folder = profiled(tmp_path, steps=6, start_step=3, num_steps=2, record_shapes=True)
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0_steps-3-4.json", "rank-0_steps-3-4_ops.txt"]
    assert products(trace(folder, "rank-0_steps-3-4")) == [3, 4]
    table = (folder / "rank-0_steps-3-4_ops.txt").read_text()
    assert "aten::mm" in table and "[[3, 3], [3, 7]]" in table


def test_the_first_step_without_a_warm_up(tmp_path):
    options = {"start_step": 1, "num_steps": 1, "warmup_steps": 0, "record_shapes": True}
    assert products(trace(profiled(tmp_path, steps=2, **options), "rank-0_steps-1-1")) == [1]


def test_a_warm_up_that_does_not_fit_is_shorter(tmp_path):
    options = {"start_step": 4, "num_steps": 1, "warmup_steps": 3, "record_shapes": True}
    assert products(trace(profiled(tmp_path, first=3, steps=5, **options), "rank-0_steps-4-4")) == [4]


def test_a_run_that_ends_within_them_leaves_what_there_is(tmp_path):
    options = {"start_step": 2, "num_steps": 5, "record_shapes": True}
    assert products(trace(profiled(tmp_path, steps=3, **options), "rank-0_steps-2-3")) == [2, 3]


@pytest.mark.parametrize("where", [{"first": 4}, {"rank": 1}])
def test_nothing_is_profiled_behind_the_steps_or_on_other_processes(tmp_path, where):
    assert not profiled(tmp_path, steps=6, start_step=3, num_steps=2, **where).exists()


def test_null_means_all_processes(tmp_path):
    assert profiled(tmp_path, steps=3, start_step=2, num_steps=1, rank=1, ranks=None).exists()


def test_what_is_recorded(tmp_path):
    plain = trace(profiled(tmp_path / "plain", steps=2, start_step=2, num_steps=1, top_ops=1), "rank-0_steps-2-2")
    full = profiled(
        tmp_path / "full", steps=2, start_step=2, num_steps=1,
        record_shapes=True, with_stack=True, profile_memory=True,
    )  # fmt: skip
    for name, found in (
        ("with_stack", lambda event: event.get("cat") == "python_function"),
        ("profile_memory", lambda event: event.get("name") == "[memory]"),
        ("record_shapes", lambda event: "Input Dims" in event.get("args", {})),
    ):
        assert any(map(found, trace(full, "rank-0_steps-2-2"))), name
        assert not any(map(found, plain)), name
    _, _, rows, _ = re.split(
        r"^[- ]{40,}$", (tmp_path / "plain/profile/rank-0_steps-2-2_ops.txt").read_text(), flags=re.M
    )
    assert len(rows.strip().splitlines()) == 1


def test_names_that_torch_did_not_keep_are_replaced(tmp_path):
    from fv_distill.callbacks.profiler import _replace_broken_names

    (tmp_path / "trace.json").write_bytes(b'{"name": "\x99\xc0module"}\n')
    _replace_broken_names(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["name"].endswith("module")


def test_a_run_is_not_changed(tiny_wan, tiny_rows, tmp_path):
    config = finetune_config(tiny_wan, tiny_rows, tmp_path / "plain")
    plain = train(config)
    config["callbacks"] = {"profiler": {"start_step": 3, "num_steps": 1}}
    output_dir = train(config, {"training.output_dir": str(tmp_path / "run")})
    assert metric_lines(output_dir) == metric_lines(plain)
    names = {event.get("name") for event in trace(output_dir / "profile", "rank-0_steps-3-3")}
    assert {"aten::addmm", "AddmmBackward0"} <= names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_step": 0}, "start_step=0 must be an integer of at least 1"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"top_ops": 0}, "top_ops=0"),
        ({"ranks": []}, r"ranks=\[\] profiles on no process"),
        ({"ranks": [-1]}, "ranks=-1"),
        ({"with_stack": "no"}, "with_stack='no' must be true or false"),
        ({"record_shapes": 1}, "record_shapes=1"),
        ({"profile_memory": None}, "profile_memory=None"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=rf"callbacks\.profiler\.{message}"):
        ProfilerCallback(**options)


def test_a_process_that_there_is_not(tmp_path):
    with pytest.raises(ValueError, match=r"callbacks\.profiler\.ranks=\[2\], but the run has 2 processes, 0 to 1"):
        profiled(tmp_path, steps=1, ranks=[2])
