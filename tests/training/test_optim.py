import math

import pytest
import torch
from torch import nn

from fv_distill.training.optim import SCHEDULERS, LearningRate, build_optimizer


def rates(count=6, **options):
    rate = LearningRate(base=2.0, **options)
    return [rate.at(update) for update in range(count)]


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("constant", [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
        ("linear", [2.0, 1.5, 1.0, 0.5, 0.0, 0.0]),
        ("cosine", [2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5), 0.0, 0.0]),
        ("polynomial", [2.0, 2 * 0.75**3, 2 * 0.5**3, 2 * 0.25**3, 0.0, 0.0]),
    ],
)
def test_decay_over_four_updates(scheduler, expected):
    assert rates(scheduler=scheduler, total=4, power=3.0) == pytest.approx(expected, abs=1e-12)


def test_linear_is_the_first_power():
    assert rates(scheduler="polynomial", total=5, power=1.0) == pytest.approx(rates(scheduler="linear", total=5))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_warm_up_rises_to_the_base_and_then_decays_over_what_is_left(scheduler):
    warmed = rates(count=8, scheduler=scheduler, warmup=3, total=7)
    assert warmed[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert warmed[3:] == pytest.approx(rates(count=5, scheduler=scheduler, total=4))


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "polynomial"])
def test_decay_ends_at_the_minimum_and_stays_there(scheduler):
    decayed = rates(count=7, scheduler=scheduler, total=4, min_ratio=0.1)
    assert decayed[0] == 2.0 and decayed[4:] == pytest.approx([0.2, 0.2, 0.2])
    without = rates(count=7, scheduler=scheduler, total=4)
    assert decayed == pytest.approx([0.2 + 0.9 * rate for rate in without])


def test_warm_up_longer_than_the_run():
    assert rates(count=3, scheduler="linear", warmup=5, total=3) == pytest.approx([2 / 6, 4 / 6, 1.0])


def test_unknown_scheduler_lists_the_known_ones():
    with pytest.raises(ValueError, match="'cosin' is not one of constant, linear, cosine, polynomial"):
        LearningRate(base=1.0, scheduler="cosin")


def options(**changes):
    schedule = {"lr_scheduler": "linear", "lr_warmup_steps": 3, "lr_min_ratio": 0.1, "lr_power": 1.0}
    return {"target": "torch.optim.AdamW", "learning_rate": 0.25, **schedule, **changes}


def test_adamw_gets_its_options():
    network = nn.Linear(2, 1)
    optimizer = build_optimizer(network.parameters(), options(betas=(0.0, 0.5), weight_decay=0.125, eps=1e-3))
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert [group[key] for key in ("lr", "betas", "weight_decay", "eps")] == [0.25, (0.0, 0.5), 0.125, 1e-3]
    assert group["params"] == list(network.parameters())


def test_frozen_parameters_stay_out():
    network = nn.Linear(2, 1)
    network.bias.requires_grad_(False)
    assert build_optimizer(network.parameters(), options()).param_groups[0]["params"] == [network.weight]


def test_any_optimizer_by_its_path():
    parameter = nn.Parameter(torch.tensor([4.0]))
    optimizer = build_optimizer([parameter], options(target="torch.optim.SGD", momentum=0.5))
    for expected in (3.75, 3.375):  # 4 - 0.25, then - 0.25 (1 + 0.5)
        parameter.grad = torch.tensor([1.0])
        optimizer.step()
        assert parameter.item() == expected


def test_a_key_the_class_lacks_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"(?s)momentun.*momentum"):
        build_optimizer([nn.Parameter(torch.zeros(1))], options(target="torch.optim.SGD", momentun=0.5))


def test_a_class_that_is_not_there():
    with pytest.raises(ImportError, match="AdamX"):
        build_optimizer([nn.Parameter(torch.zeros(1))], options(target="torch.optim.AdamX"))
