"""Losses by noise level: sums per bin, windows, and the file of a run."""

import json
import math
from collections import defaultdict

import pytest
import torch
from tiny_runs import approx_losses, dfsft_config, dmd2_config, finetune_config, sigma_lines, train

from fv_distill.losses import errors_by_sigma, flow_matching_loss
from fv_distill.methods import DiffusionForcingSFTMethod, FineTuneMethod
from fv_distill.methods.base import SigmaErrors
from fv_distill.training.sigma_losses import NUM_BINS, SigmaLossWindow, SigmaSums
from fv_distill.training.tracking import _keep_until

CPU = torch.device("cpu")


def by_hand(terms):
    """Mean and count of each bin, one number after the other."""
    found = defaultdict(list)
    for errors in terms:
        for sigma, error in zip(errors.sigma.flatten().tolist(), errors.error.flatten().tolist(), strict=True):
            found[min(NUM_BINS - 1, math.floor(sigma * NUM_BINS))].append(error)
    means = [sum(found[index]) / len(found[index]) if found[index] else None for index in range(NUM_BINS)]
    return means, [len(found[index]) for index in range(NUM_BINS)]


def window_of(*terms):
    sums, window = SigmaSums(CPU), SigmaLossWindow(1)
    for errors in terms:
        sums.add({"critic": errors})
    for name, packed in zip(sums.names, sums.packed(), strict=True):
        window.add(name, packed.tolist())
    return window.close_if_due(1)["critic"]


def test_errors_are_those_of_the_loss():
    velocity, target = torch.randn(2, 2, 3, 2, 4, 5).unbind()
    per_sample = errors_by_sigma(velocity, target, torch.rand(2))
    assert per_sample.tolist() == pytest.approx([(velocity[i] - target[i]).square().mean().item() for i in (0, 1)])
    per_frame = errors_by_sigma(velocity, target, torch.rand(2, 2))
    assert per_frame.shape == (2, 2)
    assert per_frame[1, 0].item() == pytest.approx((velocity[1, :, 0] - target[1, :, 0]).square().mean().item())
    assert per_sample.mean().item() == pytest.approx(flow_matching_loss(velocity, target).item())
    with pytest.raises(ValueError, match=r"sigma has shape \(3,\)"):
        errors_by_sigma(velocity, target, torch.rand(3))


@pytest.mark.parametrize("shape", [(64,), (8, 7)])
def test_bins_are_those_made_by_hand(shape):
    terms = [SigmaErrors(torch.rand(shape), torch.randn(shape).square()) for _ in range(3)]
    means, counts = by_hand(terms)
    line = window_of(*terms)
    assert line["count"] == counts
    assert line["loss"] == approx_losses(means)


def test_ends_empty_bins_and_values_that_are_not_finite():
    sigma = torch.tensor([0.0, 1.0, 0.55, 0.55, 0.95])
    line = window_of(SigmaErrors(sigma, torch.tensor([1.0, 2.0, math.nan, 3.0, math.inf])))
    assert line["count"] == [1, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    assert line["loss"] == [1.0, None, None, None, None, 3.0, None, None, None, 2.0]


@pytest.mark.parametrize("cut", range(1, 7))
def test_a_window_goes_on_to_the_bit(cut):
    updates = torch.rand(7, 2 * NUM_BINS).tolist()

    def lines(window, numbered):
        found = []
        for step, packed in numbered:
            window.add("critic", packed)
            found.append(window.close_if_due(step))
        return [line for line in found if line]

    numbered = list(enumerate(updates, start=1))
    whole = lines(SigmaLossWindow(3), numbered)
    first, second = SigmaLossWindow(3), SigmaLossWindow(3)
    start = lines(first, numbered[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert start + lines(second, numbered[cut:]) == whole and len(whole) == 2


@pytest.mark.parametrize(
    ("make", "kind"), [(finetune_config, FineTuneMethod), (dfsft_config, DiffusionForcingSFTMethod)]
)
def test_the_file_of_a_run(tiny_wan, tiny_rows, tmp_path, monkeypatch, make, kind):
    """Two micro-batches a step; the last window is closed before its time."""
    terms = defaultdict(list)
    original = kind.losses

    def losses(self, role, batch, rng):
        for term in original(self, role, batch, rng):
            terms[rng.step].append(term.by_sigma["student"])
            yield term

    monkeypatch.setattr(kind, "losses", losses)
    config = make(tiny_wan, tiny_rows, tmp_path / "run")
    config["training"]["loop"]["gradient_accumulation_steps"] = 2
    first, last = map(json.loads, sigma_lines(train(config)))
    assert (first["step"], last["step"], last["partial"]) == (3, 4, True) and "partial" not in first
    for line, steps in ((first, (1, 2, 3)), (last, (4,))):
        means, counts = by_hand([errors for step in steps for errors in terms[step]])
        assert line["student"]["count"] == counts and sum(counts) >= 4 * len(steps)
        assert line["student"]["loss"] == approx_losses(means)


def test_zero_leaves_the_file_out_and_changes_no_metric(tiny_wan, tiny_rows, tmp_path):
    config = dmd2_config(tiny_wan, tiny_rows, tmp_path / "run")
    runs = [
        train(
            config,
            {"training.output_dir": str(tmp_path / str(every)), "training.tracker.sigma_losses_every_steps": every}
            | {"training.loop.max_train_steps": 2},
        )
        for every in (0, 2)
    ]
    assert not (runs[0] / "sigma_losses.jsonl").exists()
    assert [set(json.loads(line)) for line in sigma_lines(runs[1])] == [{"step", "critic"}]
    assert (runs[0] / "metrics.jsonl").read_text() == (runs[1] / "metrics.jsonl").read_text()


def test_what_a_resumed_run_keeps_of_a_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1}\n', "\0\0\0\n", '{"step": 2}\n', '{"step": 2, "partial": true}\n', '{"step": 3}\n', '{"ste']
    path.write_text("".join(lines))
    _keep_until(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    path.write_text('{"step": 1}\n{"step": 2}')
    _keep_until(path, 2)
    assert path.read_text() == '{"step": 1}\n', "a line that was cut off could be part of a longer number"
