from types import SimpleNamespace

import pytest
import torch
from tiny_runs import assert_same_tensors, checkpoint, dmd2_config, largest_difference, metadata, train
from torch import nn

from fv_distill.callbacks import EMACallback
from fv_distill.export import load_role_weights


def scalar(value):
    network = nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(value)
    return network


def started(callback, value):
    """The callback on a student with one weight."""
    student = SimpleNamespace(transformer=scalar(value), adapter=None)
    trainer = SimpleNamespace(models={"student": student})
    callback.on_train_start(trainer)
    return trainer, student.transformer


def averages(callback, values, start=0.0):
    trainer, network = started(callback, start)
    seen = []
    for value in values:
        network.weight.data.fill_(value)
        callback.on_after_optimizer_step(trainer, "student")
        seen.append(callback.average["weight"].item())
    return seen


def test_the_average_in_closed_form():
    # 0.75 ema + 0.25 weight, from 0.
    assert averages(EMACallback(decay=0.75), [4.0, 8.0, 0.0]) == [1.0, 2.75, 2.0625]


def test_before_its_start_it_is_a_copy():
    callback = EMACallback(decay=0.75, start_iter=2)
    assert averages(callback, [4.0, 8.0, 0.0, 16.0]) == [4.0, 8.0, 6.0, 8.5]
    assert callback.num_updates == 4


def test_decay_zero_follows():
    assert averages(EMACallback(decay=0.0), [4.0, -1.0]) == [4.0, -1.0]


def test_other_roles_do_not_tick():
    callback = EMACallback(decay=0.5)
    trainer, network = started(callback, 1.0)
    network.weight.data.fill_(3.0)
    callback.on_after_optimizer_step(trainer, "critic")
    assert callback.average["weight"].item() == 1.0 and callback.num_updates == 0


def test_the_copy_is_not_trained_and_not_tied():
    callback = EMACallback()
    _, network = started(callback, 1.0)
    assert not callback.average["weight"].requires_grad
    assert callback.average["weight"].data_ptr() != network.weight.data_ptr()


def test_the_context_swaps_and_restores_the_bits():
    callback = EMACallback(decay=0.75)
    trainer, network = started(callback, 0.1)
    network.weight.data.fill_(0.3)
    callback.on_after_optimizer_step(trainer, "student")
    own, average = network.weight.detach().clone(), callback.average["weight"].detach().clone()
    parameter = network.weight
    with pytest.raises(KeyError), callback.ema_context(network):
        assert torch.equal(network.weight, average) and not torch.equal(average, own)
        raise KeyError
    assert torch.equal(network.weight, own) and network.weight is parameter
    assert torch.equal(callback.average["weight"], average)


def test_the_context_does_nothing_before_the_start():
    callback = EMACallback(decay=0.5, start_iter=1)
    trainer, network = started(callback, 1.0)
    callback.average["weight"].fill_(9.0)
    with callback.ema_context(network):
        assert network.weight.item() == 1.0
    callback.on_after_optimizer_step(trainer, "student")
    assert not callback.started
    callback.on_after_optimizer_step(trainer, "student")
    assert callback.started


def test_the_count_travels():
    callback = EMACallback()
    averages(callback, [1.0, 2.0])
    resumed = EMACallback()
    resumed.load_state_dict(callback.state_dict())
    assert resumed.num_updates == 2


@pytest.mark.parametrize(
    ("options", "message"), [({"decay": 1.0}, "decay=1 "), ({"decay": -0.1}, "decay=-0.1"), ({"start_iter": -1}, "-1")]
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=f"callbacks.ema.*{message}"):
        EMACallback(**options)


def test_in_a_run_it_averages_the_students_updates_only(tiny_wan, tiny_rows, tmp_path):
    """With an update every second step: ema = (start + student_2) / 2, then (ema + student_4) / 2."""
    config = dmd2_config(tiny_wan, tiny_rows, tmp_path / "run")
    config["training"]["checkpoint"]["every_steps"] = 1
    output_dir = train(config, {"training.checkpoint.keep_last": 4})
    student = {step: load_role_weights(checkpoint(output_dir, step), "student") for step in range(1, 5)}
    ema = {step: load_role_weights(checkpoint(output_dir, step), "ema") for step in range(1, 5)}
    assert_same_tensors(ema[1], student[1])
    assert_same_tensors(ema[3], ema[2])
    assert metadata(checkpoint(output_dir, 3))["callbacks"]["ema"] == {"num_updates": 1}
    for step, last in ((2, student[1]), (4, ema[2])):
        expected = {name: (last[name] + student[step][name]) / 2 for name in last}
        assert largest_difference(ema[step], expected) < 1e-7
        assert largest_difference(ema[step], student[step]) > 1e-4


def test_every_step_ticks_at_the_last_update_of_each_step():
    """Where the student moves in every second step, and an update that is skipped counts too."""
    callback = EMACallback(decay=0.5, every_step=True)
    trainer, network = started(callback, 0.0)
    trainer.method = SimpleNamespace(updates=lambda step: ("student", "critic") if step % 2 == 0 else ("critic",))
    seen = []
    for step, value in ((1, 0.0), (2, 8.0), (3, 8.0), (4, 16.0)):
        trainer.step = step
        network.weight.data.fill_(value)
        if step % 2 == 0:
            callback.on_after_optimizer_step(trainer, "student")
        if step == 3:
            callback.on_nonfinite_update(trainer, "critic", {})
        else:
            callback.on_after_optimizer_step(trainer, "critic")
        seen.append(callback.average["weight"].item())
    assert seen == [0.0, 4.0, 6.0, 11.0] and callback.num_updates == 4


def test_a_skipped_update_of_the_student_does_not_tick():
    callback = EMACallback(decay=0.5)
    trainer, network = started(callback, 0.0)
    network.weight.data.fill_(8.0)
    callback.on_nonfinite_update(trainer, "student", {})
    assert callback.average["weight"].item() == 0.0 and callback.num_updates == 0


def test_every_step_in_a_run(tiny_wan, tiny_rows, tmp_path):
    config = dmd2_config(tiny_wan, tiny_rows, tmp_path / "run")
    config["callbacks"]["ema"]["every_step"] = True
    config["training"]["checkpoint"] = {"every_steps": 1, "keep_last": 3}
    output_dir = train(config, {"training.loop.max_train_steps": 3})
    student = {step: load_role_weights(checkpoint(output_dir, step), "student") for step in (1, 2, 3)}
    ema = {step: load_role_weights(checkpoint(output_dir, step), "ema") for step in (1, 2, 3)}
    assert metadata(checkpoint(output_dir, 3))["callbacks"]["ema"] == {"num_updates": 3}
    for step in (2, 3):
        expected = {name: (ema[step - 1][name] + student[step][name]) / 2 for name in student[step]}
        assert largest_difference(ema[step], expected) < 1e-7
    assert largest_difference(ema[2], ema[3]) > 1e-4


def test_every_step_is_true_or_false():
    with pytest.raises(ValueError, match=r"callbacks\.ema\.every_step='often' must be true or false"):
        EMACallback(every_step="often")
