import pytest
import torch
from tiny_models import TEXT_LENGTH

from fv_distill.methods import FineTuneMethod, FineTuneOptions
from fv_distill.models import WanModel
from fv_distill.rng import SampleRng


@pytest.fixture
def student(tiny_wan):
    return WanModel.from_pretrained(str(tiny_wan), trainable=True, text_length=TEXT_LENGTH)


def loss_of(student, batch, **options):
    method = FineTuneMethod({"student": student}, FineTuneOptions(**options))
    (term,) = method.losses("student", batch, SampleRng(0, 1, batch["sample_index"]))
    return term.loss


@pytest.mark.parametrize("shifted", [True, False])
def test_loss_equals_the_written_out_equation(student, batch, shifted):
    rng = SampleRng(0, 1, [0, 1])
    x0 = student.normalize_latents(batch["vae_latent"])
    noise, u = rng.normal("noise", x0.shape[1:]), rng.uniform("sigma")
    sigma = 3 * u / (1 + 2 * u) if shifted else u
    s = sigma.view(-1, 1, 1, 1, 1)
    velocity = student.transformer((1 - s) * x0 + s * noise, 1000 * sigma, batch["text_embedding"], return_dict=False)[
        0
    ]
    expected = (velocity - (noise - x0)).square().mean()
    assert loss_of(student, batch, apply_flow_shift=shifted).item() == pytest.approx(expected.item(), rel=1e-5)


def test_densities_change_the_loss(student, batch):
    losses = {loss_of(student, batch, sigma_density=density).item() for density in ("uniform", "logit_normal", "mode")}
    assert len(losses) == 3


def test_overfits_one_batch(student, batch):
    """Flow matching has converged when the loss of fixed draws is a small part of what it was."""
    optimizer = torch.optim.AdamW(student.transformer.parameters(), lr=5e-3)
    first = loss_of(student, batch).item()
    for _ in range(120):
        loss = loss_of(student, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * first
