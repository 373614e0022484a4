"""Every method in every parallel mode: the losses and weights of one process at the full batch.

Modes are chosen as users choose them, by the files of `configs/accelerate`: a run gets the environment that
`accelerate launch` makes of one. Two launches make all runs, see `parallel_runs.py`.
"""

import importlib.util
import json

import numpy as np
import pytest
from parallel_launch import CHECKPOINTING, DDP, FSDP2, GLOBAL_BATCH, HSDP, OFFLOAD, SGD, Run, launch
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import (
    approx_losses,
    causal_kd_config,
    checkpoint,
    dfsft_config,
    dmd2_config,
    finetune_config,
    kd_config,
    largest_difference,
    metadata,
    metrics,
    self_forcing_config,
    shared_base_config,
    shared_causal_base_config,
    sigma_lines,
    train,
)

from fv_distill.export import load_role_weights

METHODS = {
    "dmd2": dmd2_config,
    "self_forcing": self_forcing_config,
    # Each chunk sees the one before and the first frame; one backward pass goes through the whole rollout.
    "self_forcing_windowed": self_forcing_config,
    "kd": kd_config,
    "kd_causal": causal_kd_config,
    "finetune": finetune_config,
    "dfsft": dfsft_config,
    # Student and critic are adapters on the teacher's network.
    "dmd2_adapters": shared_base_config,
    "self_forcing_adapters": shared_causal_base_config,
}
HAS_TORCHAO = importlib.util.find_spec("torchao") is not None
if HAS_TORCHAO:
    # Adapters on quantised weights.
    METHODS["dmd2_adapters_int8"] = shared_base_config
ADAPTERS = ("dmd2_adapters", "self_forcing_adapters", "dmd2_adapters_int8")
CRITICAL = ("dmd2", "self_forcing", "self_forcing_windowed", *ADAPTERS)
ACCUMULATING = {"training.data.train_batch_size": 1, "training.loop.gradient_accumulation_steps": 2}
SHARED = {"training.distributed.context_parallel_degree": 2}
FP32 = {"training.distributed.mixed_precision": "no"}


def teacher(placement):
    return {"models.teacher.placement": placement}


EQUAL = {
    **{f"{method}-ddp": Run(method, DDP) for method in METHODS if method != "self_forcing_windowed"},
    **{f"{method}-fsdp2": Run(method, FSDP2) for method in METHODS if method != "dmd2_adapters_int8"},
    "dmd2-ddp-accumulating": Run("dmd2", DDP, ACCUMULATING),
    "dmd2-fsdp2-accumulating": Run("dmd2", FSDP2, ACCUMULATING),
    "self_forcing_windowed-ddp-checkpointing": Run("self_forcing_windowed", DDP, CHECKPOINTING),
    "self_forcing_windowed-fsdp2-checkpointing": Run("self_forcing_windowed", FSDP2, CHECKPOINTING),
    "dmd2-fsdp2-teacher-replicated": Run("dmd2", FSDP2, teacher("replicated")),
    "dmd2-fsdp2-teacher-offloaded": Run("dmd2", FSDP2, teacher("offloaded")),
    "dmd2-ddp-teacher-offloaded": Run("dmd2", DDP, teacher("offloaded")),
    "dmd2-offload": Run("dmd2", OFFLOAD, FP32),
    "finetune-ddp-shared": Run("finetune", DDP, SHARED),
    "finetune-fsdp2-shared-checkpointing": Run("finetune", FSDP2, SHARED | CHECKPOINTING),
    "dmd2-ddp-shared": Run("dmd2", DDP, SHARED),
    "dmd2-fsdp2-shared-teacher-offloaded": Run("dmd2", FSDP2, SHARED | teacher("offloaded")),
    "kd-ddp-shared": Run("kd", DDP, SHARED),
    "dmd2_adapters-ddp-accumulating": Run("dmd2_adapters", DDP, ACCUMULATING),
    "dmd2_adapters-fsdp2-checkpointing": Run("dmd2_adapters", FSDP2, CHECKPOINTING | ACCUMULATING),
    "self_forcing_adapters-fsdp2-checkpointing": Run("self_forcing_adapters", FSDP2, CHECKPOINTING),
}
CLOSE = {
    "finetune-ddp-bf16": Run("finetune", "ddp_8gpu"),
    "dmd2-fsdp2-bf16": Run("dmd2", "fsdp2_8gpu"),
    "dmd2-fsdp2-bf16-shared": Run("dmd2", "fsdp2_8gpu", SHARED),
    "self_forcing-ddp-bf16": Run("self_forcing", "ddp_8gpu"),
    "dmd2_adapters-ddp-bf16": Run("dmd2_adapters", "ddp_8gpu"),
    "dmd2_adapters-fsdp2-bf16": Run("dmd2_adapters", "fsdp2_8gpu"),
}
REFUSED = {
    "causal-shared": (
        Run("self_forcing", DDP, SHARED),
        "context_parallel_degree=2, but models.student can't do with that: CausalWanModel is causal",
    ),
    "three-of-two": (
        Run("finetune", DDP, {"training.distributed.context_parallel_degree": 3}),
        "context_parallel_degree=3 does not divide the number of processes, 2",
    ),
    "mesh-of-four": (
        Run("finetune", HSDP),
        "dp_replicate_size=2, parallelism_config_dp_shard_size=2 make a mesh of 4 processes, but 2 were launched",
    ),
    "fsdp1": (Run("finetune", FSDP2, environment={"FSDP_VERSION": "1"}), "set fsdp_version: 2"),
}
if HAS_TORCHAO:
    REFUSED["quantised-sharded"] = (
        Run("dmd2_adapters_int8", FSDP2),
        "models.teacher.quantization=int8, but this launch shards networks, which quantised weights don't take; "
        "launch without FSDP",
    )
EQUAL_ON_FOUR = {
    "dmd2-hsdp": Run("dmd2", HSDP),
    "dmd2-hsdp-shared-teacher-replicated": Run("dmd2", HSDP, SHARED | teacher("replicated")),
    "finetune-ddp-shared-by-two-pairs": Run("finetune", DDP, SHARED),
}
CLOSE_ON_FOUR = {"dmd2-hsdp-bf16": Run("dmd2", HSDP, {"training.distributed.mixed_precision": "bf16"})}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def prompts(folder):
    path = folder / "prompts.txt"
    path.write_text("a digit\nthe digit moving left\na handwritten one\n")
    return str(path)


@pytest.fixture(scope="module")
def configs(tiny_wan, tiny_rows, folder, prompts):
    """A config per method that leaves nothing out: dropout, schedule, averaging, clipping."""
    configs = {method: make(tiny_wan, tiny_rows, folder / method) for method, make in METHODS.items()}
    for method, config in configs.items():
        config["training"]["optimizer"] = {**SGD, "lr_scheduler": "linear"}
        config["training"]["data"]["caption_dropout"] = 0.3
        config["training"]["checkpoint"]["every_steps"] = 0
        if method in CRITICAL:
            config["method"] |= {"fake_score_learning_rate": 0.2, "student_sample_type": "sde"}
        if method in ADAPTERS:
            config["training"]["optimizer"]["learning_rate"] = 10.0
            config["method"]["fake_score_learning_rate"] = 4.0
    if HAS_TORCHAO:
        configs["dmd2_adapters_int8"]["models"]["teacher"]["quantization"] = "int8"
    configs["self_forcing_windowed"]["models"]["student"] |= {"local_window": 1, "sink_frames": 1}
    configs["self_forcing_windowed"]["method"]["gradient_replay"] = False
    validation = {"dataset_file": prompts, "sampling_steps": [2], "every_steps": 4}
    configs["finetune"]["callbacks"] = {"validation": validation}
    return configs


@pytest.fixture(scope="module")
def one_process(configs, folder):
    """The same runs by one process, by method; each is made when it is first asked for."""
    made = {}

    def reference(method):
        if method not in made:
            overrides = {"training.data.train_batch_size": GLOBAL_BATCH}
            made[method] = train(configs[method], {**overrides, "training.output_dir": str(folder / f"{method}-alone")})
        return made[method]

    return reference


@pytest.fixture(scope="module")
def two(configs, folder):
    return launch(2, EQUAL | CLOSE | {name: run for name, (run, _) in REFUSED.items()}, configs, folder)


@pytest.fixture(scope="module")
def four(configs, folder):
    return launch(4, EQUAL_ON_FOUR | CLOSE_ON_FOUR, configs, folder)


def networks(method):
    return ("student", "critic", "ema") if method in CRITICAL else ("student",)


def assert_same_run(output_dir, reference, method, *, loss, weight):
    """The same losses and weights up to `loss` (relative) and `weight`."""
    lines, expected = metrics(output_dir), metrics(reference)
    assert len(lines) == len(expected) == 4
    assert metadata(checkpoint(output_dir, 4))["global_batch_size"] == GLOBAL_BATCH
    for line, other in zip(lines, expected, strict=True):
        assert line == pytest.approx(other, rel=loss, abs=1e-6)
    has_sigmas = (reference / "sigma_losses.jsonl").is_file()
    for line, other in zip(*map(sigma_lines, (output_dir, reference)), strict=True) if has_sigmas else ():
        bins, expected_bins = json.loads(line), json.loads(other)
        assert bins.keys() == expected_bins.keys()
        for name in bins.keys() - {"step", "partial"}:
            assert bins[name]["count"] == expected_bins[name]["count"]
            if loss < 1e-3:
                assert bins[name]["loss"] == approx_losses(expected_bins[name]["loss"])
    for name in networks(method):
        weights = [load_role_weights(checkpoint(run, 4), name) for run in (output_dir, reference)]
        assert largest_difference(*weights) < weight, name


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_moves_every_network(method, one_process, tiny_wan):
    """Weights that don't move, or losses that are zero, would prove nothing."""
    start = load_file(tiny_wan / "transformer/diffusion_pytorch_model.safetensors")
    for name in networks(method):
        weights = load_role_weights(checkpoint(one_process(method), 4), name)
        if method in ADAPTERS:
            # The second factors start at zero.
            assert all(value.abs().max() > 1e-4 for key, value in weights.items() if "lora_B" in key)
        else:
            assert largest_difference(weights, start) > 1e-3
    assert all(line[key] for line in metrics(one_process(method)) for key in line if key.startswith("loss/"))


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_train_as_one_does(name, two, one_process, folder):
    assert_same_run(folder / name, one_process(EQUAL[name].method), EQUAL[name].method, loss=2e-6, weight=1e-6)


@pytest.mark.parametrize("name", EQUAL_ON_FOUR)
def test_four_processes_train_as_one_does(name, four, one_process, folder):
    method = EQUAL_ON_FOUR[name].method
    assert_same_run(folder / name, one_process(method), method, loss=2e-6, weight=1e-6)


@pytest.mark.parametrize("name", CLOSE)
def test_bf16_trains_nearly_as_float32_does(name, two, one_process, folder):
    assert_trains_in_bf16(two[name], folder / name, one_process, CLOSE[name])


@pytest.mark.parametrize("name", CLOSE_ON_FOUR)
def test_bf16_trains_nearly_as_float32_does_on_four(name, four, one_process, folder):
    assert_trains_in_bf16(four[name], folder / name, one_process, CLOSE_ON_FOUR[name])


def assert_trains_in_bf16(found, output_dir, one_process, run):
    assert_same_run(output_dir, one_process(run.method), run.method, loss=0.1, weight=0.02)
    assert metrics(output_dir) != metrics(one_process(run.method)), "nothing was computed in bf16"
    for role in found["gradients"]:
        assert found["roles"][role]["dtypes"] == ["torch.float32"], "master weights"
        assert found["roles"][role]["computes"] == "torch.bfloat16", "what causal students keep of earlier chunks"
        assert found["gradients"][role] == ["torch.float32"]
    if "teacher" in found["roles"]:
        # diffusers keeps norms and the time embedding in float32.
        assert "torch.bfloat16" in found["roles"]["teacher"]["dtypes"]
    sharded = found["roles"]["student"]["units"] > 0
    assert set(found["reductions"]) == ({"torch.float32"} if sharded else set())


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_act_is_refused(name, two):
    assert REFUSED[name][1] in two[name].get("error", "nothing was refused")


# Where networks were. A sharded tiny Wan is four units: two blocks, the final norm (which has no weights) and the root.
# Every unit with weights carries the policy that decides where its shards are.


def test_ddp_replicates_what_is_trained(two):
    roles = two["dmd2-ddp"]["roles"]
    assert {name: role["wrapper"] for name, role in roles.items()} == {
        "student": "DistributedDataParallel",
        "critic": "DistributedDataParallel",
        "teacher": None,
    }
    assert not any(role["units"] for role in roles.values())


@pytest.mark.parametrize("name", ["dmd2-fsdp2", "self_forcing-fsdp2"])
def test_fsdp2_shards_every_role(name, two):
    for role in two[name]["roles"].values():
        assert (role["units"], role["mesh"], role["offloaded"]) == (4, [[2]], 0)


def test_hsdp_shards_every_role_over_a_mesh_of_two_dimensions(four):
    for role in four["dmd2-hsdp"]["roles"].values():
        assert (role["units"], role["mesh"], role["offloaded"]) == (4, [[2, 2]], 0)
    assert "4 processes on cpu: HSDP, 2 copies of 2 shards" in four["printed"]


def test_the_launch_offloads_every_role(two):
    for role in two["dmd2-offload"]["roles"].values():
        assert (role["units"], role["mesh"], role["offloaded"]) == (4, [[2]], 3)
    assert "fsdp_offload_params: true saves nothing on a CPU" in two["printed"]


def test_a_placement_moves_the_teacher_alone(two):
    replicated, offloaded = (two[f"dmd2-fsdp2-teacher-{name}"]["roles"] for name in ("replicated", "offloaded"))
    assert (replicated["teacher"]["units"], replicated["teacher"]["mesh"]) == (0, [])
    assert (offloaded["teacher"]["units"], offloaded["teacher"]["offloaded"]) == (4, 3)
    for roles in (replicated, offloaded):
        for name in ("student", "critic"):
            assert (roles[name]["units"], roles[name]["offloaded"]) == (4, 0)
    assert two["dmd2-ddp-teacher-offloaded"]["roles"]["teacher"]["group_offloading"]
    assert not two["dmd2-ddp"]["roles"]["teacher"]["group_offloading"]


def test_processes_that_share_clips_make_each_validation_clip_together(two, one_process, folder):
    folders = [run / "validation/step-00000004" for run in (folder / "finetune-ddp-shared", one_process("finetune"))]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1] and len(names[0]) == 4
    (sheet,) = (name for name in names[0] if name.endswith(".png"))
    pictures = [np.asarray(Image.open(folder / sheet), dtype=int) for folder in folders]
    assert abs(pictures[0] - pictures[1]).max() <= 1 and pictures[0].std() > 1
