"""Where networks go, and what a launch or a config can't have; the modes themselves are in distributed/."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.state import PartialState
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from tiny_runs import causal_kd_config, dmd2_config, kd_config, metric_lines, train, write_config

from fv_distill.config import ConfigError, load_run_config
from fv_distill.models import CausalWanModel, WanModel
from fv_distill.models.base import ModelBase
from fv_distill.training.context_parallel import ContextGroups
from fv_distill.training.launch_modes import check_launch
from fv_distill.training.sharding import make_accelerator, prepare_alone

MESH = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4",
    "WORLD_SIZE": "8",
}


def set_environment(monkeypatch, values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_a_mesh_that_fits_is_not_refused(monkeypatch):
    set_environment(monkeypatch, MESH)
    check_launch()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"WORLD_SIZE": "4"}, "make a mesh of 8 processes, but 4 were launched; their product has to be num_processes"),
        ({"ACCELERATE_USE_FSDP": "false"}, "nothing is sharded: set distributed_type: FSDP"),
        ({"PARALLELISM_CONFIG_CP_SIZE": "2"}, "parallelism_config_cp_size=2 in .*context_parallel_degree"),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, "parallelism_config_tp_size=2 in .*not supported; remove it"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading: true fails"),
        ({"FSDP_VERSION": "1"}, "set fsdp_version: 2"),
    ],
)
def test_a_launch_that_would_not_do_what_it_says_is_refused(monkeypatch, tmp_path, change, message):
    set_environment(monkeypatch, MESH | change)
    with pytest.raises(ValueError, match=message):
        make_accelerator(output_dir=tmp_path)
    assert not PartialState._shared_state, "refused before any process waits for another"


def test_groups_are_neighbours_with_samples_of_their_own():
    groups = [ContextGroups(2, 6, index) for index in range(6)]
    assert [group.group for group in groups] == [0, 0, 1, 1, 2, 2]
    assert [group.is_first for group in groups] == [True, False] * 3
    assert {group.num_groups for group in groups} == {3}


def test_groups_that_do_not_fill_the_processes_are_refused(tiny_wan, tiny_rows, tmp_path):
    config = dmd2_config(tiny_wan, tiny_rows, tmp_path / "run")
    with pytest.raises(ValueError, match="context_parallel_degree=2 does not divide the number of processes, 1"):
        train(config, {"training.distributed.context_parallel_degree": 2})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("degree", "shape", "message"),
    [(2, (4, 3, 4, 4), None), (4, (4, 3, 4, 4), "2 attention heads"), (2, (4, 1, 2, 6), "have 3 tokens")],
)
def test_wan_shares_heads_and_tokens_in_equal_parts(tiny_wan, degree, shape, message):
    model = WanModel.from_pretrained(str(tiny_wan))
    if message is None:
        model.check_context_parallel(degree, shape)
    else:
        with pytest.raises(ValueError, match=message):
            model.check_context_parallel(degree, shape)


def test_other_models_share_nothing_unless_they_say_so(tiny_wan):
    with pytest.raises(ValueError, match="CausalWanModel is causal"):
        CausalWanModel.from_pretrained(str(tiny_wan)).check_context_parallel(2, (4, 3, 4, 4))
    with pytest.raises(ValueError, match="WanModel can't share a clip's tokens"):
        ModelBase.check_context_parallel(WanModel.from_pretrained(str(tiny_wan)), 2, (4, 3, 4, 4))


@pytest.mark.parametrize("placement", ["replicated", "offloaded"])
def test_a_placement_is_for_frozen_roles(tiny_wan, tiny_rows, tmp_path, placement):
    path = write_config(dmd2_config(tiny_wan, tiny_rows, tmp_path / "run"), tmp_path / "run.yaml")
    assert load_run_config(path, {"models.teacher.placement": placement}).models["teacher"].placement == placement
    with pytest.raises(
        ConfigError, match=rf"models.student: placement={placement} is for frozen roles.* remove the key"
    ):
        load_run_config(path, {"models.student.placement": placement})


@pytest.mark.parametrize("make_config", [dmd2_config, kd_config, causal_kd_config])
def test_an_offloaded_teacher_says_the_same(make_config, tiny_wan, tiny_rows, tmp_path, capsys):
    whole, offloaded = (make_config(tiny_wan, tiny_rows, tmp_path / name) for name in ("whole", "offloaded"))
    offloaded["models"]["teacher"]["placement"] = "offloaded"
    lines = metric_lines(train(whole))
    capsys.readouterr()
    assert metric_lines(train(offloaded)) == lines
    assert "models.teacher.placement: offloaded saves nothing on a CPU" in capsys.readouterr().out


def test_an_offloaded_network_keeps_its_device(tiny_wan):
    """Prompts and noise have to be where the network computes, and its weights no longer tell."""
    model = WanModel.from_pretrained(str(tiny_wan))
    prepare_alone(SimpleNamespace(device=torch.device("cpu")), model, "offloaded")
    assert _is_group_offload_enabled(model.transformer)
    model.compute_on(torch.device("meta"))
    assert (model.device.type, next(model.transformer.parameters()).device.type) == ("meta", "cpu")


def test_fp16_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="mixed_precision fp16 is not supported; use bf16 or no"):
        make_accelerator(output_dir=tmp_path)
