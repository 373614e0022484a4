import pytest
import torch
from tiny_runs import self_forcing_config, write_config

from fv_distill.config import load_run_config
from fv_distill.estimate import Layout, flops
from fv_distill.estimate.flops import CallCosts, ClipShape
from fv_distill.estimate.published import config_directory
from fv_distill.methods import NetworkCall
from fv_distill.models import CausalWanModel, WanModel
from fv_distill.training.building import build_models

PUBLISHED = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
CLIP = ClipShape(1, (16, 21, 60, 104), (512, 4096))
TOKENS, WIDTH, FFN, BLOCKS = 21 * 30 * 52, 1536, 8960, 30


def published(kind=WanModel, **options):
    with config_directory(PUBLISHED) as directory, torch.device("meta"):
        return kind.from_pretrained(str(directory), **options)


def test_a_forward_pass_is_what_the_formulas_say():
    """Products and attention of Wan's blocks, written out; the embedders and the read-out are below one percent."""
    linear = TOKENS * (4 * WIDTH**2 + 2 * WIDTH**2 + 2 * WIDTH * FFN) + 512 * 2 * WIDTH**2
    attention = 2 * TOKENS * WIDTH * (TOKENS + 512)
    costs = CallCosts({"student": published(trainable=True)}, CLIP, Layout())
    forward = costs(NetworkCall("student"))
    assert forward.flops == forward.executed_flops
    assert forward.flops == pytest.approx(2 * BLOCKS * (linear + attention), rel=0.01)
    # Backward: two products for each one; flash attention's makes the scores again, 5 for 2.
    both = costs(NetworkCall("student", grad=True))
    assert both.flops == pytest.approx(2 * BLOCKS * (3 * linear + 3.5 * attention), rel=0.01)
    assert both.executed_flops == both.flops


def test_recomputation_is_one_more_forward_pass_and_not_in_mfu():
    model = published(trainable=True, gradient_checkpointing=True)
    costs = CallCosts({"student": model}, CLIP, Layout())
    forward, both = costs(NetworkCall("student")), costs(NetworkCall("student", grad=True))
    assert both.executed_flops - both.flops == pytest.approx(forward.flops, rel=0.01)
    assert model.transformer.is_gradient_checkpointing


def test_a_mask_saves_a_gpu_what_nobody_sees():
    """Of seven chunks 28 of 49 pairs are visible; a CPU multiplies all."""
    call = NetworkCall("student")
    causal = published(CausalWanModel, chunk_size=3)
    on_gpu, on_cpu = (
        CallCosts({"student": causal}, CLIP, Layout(device_type=kind))(call).flops for kind in ("cuda", "cpu")
    )
    assert on_cpu - on_gpu == pytest.approx(4 * BLOCKS * TOKENS**2 * WIDTH * (1 - 28 / 49), rel=1e-4)


def test_teacher_forcing_runs_the_history_too():
    causal = published(CausalWanModel, chunk_size=3)
    costs = CallCosts({"student": causal}, CLIP, Layout())
    plain, forced = (costs(NetworkCall("student", span=span)).flops for span in ("clip", "clip_after_history"))
    assert 1.6 < forced / plain < 2.1


@pytest.fixture
def eight_blocks(wide_wan, wide_rows, tmp_path):
    config = self_forcing_config(wide_wan, wide_rows, tmp_path / "run")
    path = write_config(
        config, tmp_path / "run.yaml", {"models.student.chunk_size": 2, "models.student.local_window": 2}
    )
    with torch.device("meta"):
        return build_models(load_run_config(path))


CALLS = [
    NetworkCall("critic", grad=True),
    NetworkCall("student"),
    NetworkCall("student", span="chunk", start_frame=0),
    NetworkCall("student", grad=True, span="chunk", start_frame=2),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_few_blocks_tell_what_all_take(call, eight_blocks, monkeypatch):
    shape = ClipShape(2, (4, 6, 16, 16), (8, 16))
    extrapolated = CallCosts(eight_blocks, shape, Layout())(call)
    monkeypatch.setattr(flops, "can_be_cut", lambda networks: False)
    costs = CallCosts(eight_blocks, shape, Layout())
    assert extrapolated == costs(call)
    assert extrapolated == costs._at(eight_blocks[call.role], call, call.start_frame)
