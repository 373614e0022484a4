from types import SimpleNamespace

import pytest
import torch
from tiny_runs import dmd2_config, metrics, train
from torch import nn

from fv_distill.callbacks import GradNormClipCallback


def clip(callback, gradients):
    """The gradients of two parameters after clipping, and what was logged."""
    network = nn.ParameterList([nn.Parameter(torch.zeros(len(values))) for values in gradients])
    for parameter, values in zip(network, gradients, strict=True):
        parameter.grad = torch.tensor(values)
    other = nn.Linear(1, 1)
    other.weight.grad = torch.full_like(other.weight, 100.0)
    networks = {"student": other, "critic": network}
    models = {
        role: SimpleNamespace(transformer=module, is_trained=lambda name: True) for role, module in networks.items()
    }
    logged = {}
    callback.on_before_optimizer_step(SimpleNamespace(models=models), "critic", logged)
    assert other.weight.grad.item() == 100.0, "only the role that steps is clipped"
    return torch.cat([parameter.grad for parameter in network]), logged


def test_a_large_gradient_is_scaled_as_a_whole():
    # Norm 13 over both parameters together.
    clipped, logged = clip(GradNormClipCallback(max_grad_norm=2.6), [[3.0, 4.0], [12.0]])
    torch.testing.assert_close(clipped, torch.tensor([0.6, 0.8, 2.4]), atol=1e-6, rtol=0)
    assert logged == {"grad_norm/critic": pytest.approx(13.0)}


def test_a_small_gradient_stays():
    clipped, logged = clip(GradNormClipCallback(max_grad_norm=13.5), [[3.0, 4.0], [12.0]])
    assert clipped.tolist() == [3.0, 4.0, 12.0]
    assert logged == {"grad_norm/critic": pytest.approx(13.0)}


def test_without_logging():
    clipped, logged = clip(GradNormClipCallback(max_grad_norm=1.0, log_grad_norms=False), [[5.0]])
    assert clipped.item() == pytest.approx(1.0, abs=1e-6) and logged == {}


@pytest.mark.parametrize("norm", [0.0, -1.0])
def test_a_norm_that_is_not_positive_is_refused(norm):
    with pytest.raises(ValueError, match=r"callbacks\.grad_clip\.max_grad_norm=.* must be positive"):
        GradNormClipCallback(max_grad_norm=norm)


def test_in_a_run_each_role_is_clipped_at_its_own_step(tiny_wan, tiny_rows, tmp_path):
    config = dmd2_config(tiny_wan, tiny_rows, tmp_path / "run")
    lines = metrics(train(config))
    assert ["grad_norm/student" in line for line in lines] == [False, True, False, True]
    assert all(line["grad_norm/critic"] > 0.1 for line in lines), "what is logged is the norm before clipping"
    free = metrics(
        train(config, {"training.output_dir": str(tmp_path / "free"), "callbacks.grad_clip.max_grad_norm": 1e9})
    )
    assert free[0] == lines[0], "clipping acts on the update, which shows in the next step"
    assert free[-1]["loss/critic"] != lines[-1]["loss/critic"]


def test_norms_are_logged_without_clipping_where_asked(tiny_wan, tiny_rows, tmp_path):
    """As the losses gave them, so also before a clipping that doesn't log its own."""
    config = dmd2_config(tiny_wan, tiny_rows, tmp_path / "clipped")
    clipped = metrics(train(config))
    silent = {"callbacks.grad_clip.log_grad_norms": False, "training.output_dir": str(tmp_path / "silent")}
    without = [{key: value for key, value in line.items() if "grad_norm" not in key} for line in clipped]
    assert metrics(train(config, silent)) == without
    asked = silent | {"training.loop.log_grad_norms": True, "training.output_dir": str(tmp_path / "asked")}
    assert metrics(train(config, asked)) == clipped
    del config["callbacks"]["grad_clip"]
    config["training"]["loop"]["log_grad_norms"] = True
    (line, *_) = metrics(train(config, {"training.output_dir": str(tmp_path / "none")}))
    assert line["grad_norm/critic"] == clipped[0]["grad_norm/critic"]
