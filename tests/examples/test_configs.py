"""Every config in examples/ is valid, and those of Wan fit the networks as they were published."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import LTX2VideoTransformer3DModel, WanTransformer3DModel

from fv_distill.config import load_run_config
from fv_distill.estimate.published import config_directory, published_models
from fv_distill.export import few_step_scheduler
from fv_distill.methods import OPTIONS_BY_TARGET, DMD2Options, TrajectoryOptions
from fv_distill.models import (
    CausalMatrixGame2Model,
    LongCatVideoModel,
    LTX2VideoModel,
    MatrixGame2Model,
    WanModel,
)
from fv_distill.schedules import few_step_sigmas

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "examples").rglob("*.yaml"))
# What other configs make.
EXPORTS = {(yaml.safe_load(path.read_text()).get("pipeline") or {}).get("export_dir") for path in CONFIGS} - {None}

# `transformer/config.json` of the two repositories on the Hub.
PUBLISHED = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
}
PARAMETERS = {"Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 1.42e9, "Wan-AI/Wan2.1-T2V-14B-Diffusers": 14.29e9}
# What `fv-distill convert-matrixgame2` makes of the published weights, by the name that the configs give it.
MATRIX_GAME = "models/matrix-game-2"
# Of other families: the shift that their schedulers are published with.
OTHER_FAMILIES = {
    "meituan-longcat/LongCat-Video": 12.0,
    "Lightricks/LTX-2": 16.2,
}
VAE_CONFIG = {
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
}


def make_meta_transformer(name: str) -> WanTransformer3DModel:
    with torch.device("meta"):
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            attention_head_dim=128,
            in_channels=16,
            out_channels=16,
            text_dim=4096,
            freq_dim=256,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            **PUBLISHED[name],
        )


@pytest.fixture(scope="module", params=sorted(PUBLISHED))
def published(request, tmp_path_factory) -> tuple[str, WanModel]:
    """The adapter over a published network without weights."""
    directory = tmp_path_factory.mktemp("published")
    (directory / "vae").mkdir()
    (directory / "vae/config.json").write_text(json.dumps(VAE_CONFIG))
    return request.param, WanModel(make_meta_transformer(request.param), directory=directory, flow_shift=3.0)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_config_is_valid(path):
    config = load_run_config(path)
    assert not config.allow_unknown_keys
    assert path.parent.name in config.training.output_dir
    options = OPTIONS_BY_TARGET[config.method.target].model_validate(config.method.options)
    for role, model in config.models.items():
        local = model.init_from.startswith("examples/")
        known = _is_known(model.init_from) or model.init_from in {*EXPORTS, *OTHER_FAMILIES}
        assert (ROOT / model.init_from / "model_index.json").is_file() if local else known, role
    data_path = config.training.data.data_path
    assert isinstance(data_path, str)
    assert data_path.startswith("data/") or list((ROOT / data_path).glob("*.parquet"))
    sigmas = None
    if isinstance(options, DMD2Options):
        student = config.models["student"]
        shift = student.flow_shift or OTHER_FAMILIES.get(student.init_from, 3.0)
        sigmas = few_step_sigmas(options.dmd_denoising_steps, flow_shift=shift, warp=options.warp_denoising_step)
    elif isinstance(options, TrajectoryOptions):
        sigmas = options.sigmas[:-1]
    if sigmas is not None:
        scheduler = few_step_scheduler(sigmas, sample_type=options.student_sample_type)
        scheduler.set_timesteps(len(sigmas))
        assert scheduler.sigmas.tolist() == pytest.approx([*sigmas, 0.0], abs=1e-5)


def _is_known(init_from: str) -> bool:
    """On the Hub, or what a file's head says is to be downloaded from there."""
    names = published_models()
    return init_from in names or init_from in {f"models/{name.split('/')[1]}" for name in names}


def test_every_kind_of_config_is_there():
    names = {f"{path.parent.name}/{path.stem}" for path in CONFIGS}
    methods = ("dmd2", "finetune", "kd", "kd_causal", "dfsft", "self_forcing")
    assert names >= {f"{method}/{model}" for method in methods for model in ("digits", "wan2.1_1.3b")}
    assert names >= {f"{method}/wan2.1_14b" for method in ("dmd2", "finetune")}


def test_published_networks_have_the_published_size(published):
    name, model = published
    count = sum(parameter.numel() for parameter in model.transformer.parameters())
    assert count == pytest.approx(PARAMETERS[name], rel=0.01)


def test_configs_of_a_published_network_fit_it(published):
    name, model = published
    paths = [path for path in CONFIGS if name in path.read_text()]
    assert paths
    for path in paths:
        shape = load_run_config(path).training.data.latent_shape or (16, 21, 60, 104)
        model.check_latent_shape(shape, num_frames=81)
        assert tuple(size * factor for size, factor in zip(shape[2:], (8, 8), strict=True)) == (480, 832)
    with pytest.raises(ValueError, match="channels"):
        model.check_latent_shape((4, 21, 60, 104))


def test_matrix_games_configs_fit_its_network():
    with config_directory(MATRIX_GAME) as directory, torch.device("meta"):
        models = [kind.from_pretrained(str(directory)) for kind in (MatrixGame2Model, CausalMatrixGame2Model)]
        assert [model.flow_shift for model in models] == [5.0, 5.0]
        paths = [path for path in CONFIGS if "matrixgame2" in path.stem]
        assert {path.parent.name for path in paths} == {"dmd2", "finetune", "self_forcing"}
        for path in paths:
            config = load_run_config(path)
            assert config.models["student"].flow_shift == 5.0
            shape = config.training.data.latent_shape or (16, 15, 44, 80)
            for model in models:
                model.check_latent_shape(shape, num_frames=57)
                needed = {"first_frame_latent": shape, "clip_feature": (257, 1280)}
                model.check_conditions({**needed, "mouse_cond": (57, 2), "keyboard_cond": (57, 4)}, shape)


def test_longcats_configs_fit_its_network():
    with config_directory("meituan-longcat/LongCat-Video") as directory, torch.device("meta"):
        model = LongCatVideoModel.from_pretrained(str(directory))
    assert model.flow_shift == OTHER_FAMILIES["meituan-longcat/LongCat-Video"]
    paths = [path for path in CONFIGS if "longcat" in path.stem]
    assert {path.parent.name for path in paths} == {"dmd2", "finetune"}
    for path in paths:
        shape = load_run_config(path).training.data.latent_shape or (16, 24, 60, 104)
        model.check_latent_shape(shape, num_frames=93)
        model.check_text((5, 4096))


def test_ltxs_configs_fit_its_network(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_text(json.dumps({"latent_channels": 128}))
    with torch.device("meta"):
        # diffusers' defaults are the published network's.
        network = LTX2VideoTransformer3DModel()
    model = LTX2VideoModel(network, directory=tmp_path, flow_shift=16.2)
    parameters = list(network.parameters())
    # 14B for the picture, 5B for the sound, as is published.
    assert sum(value.numel() for value in parameters) == pytest.approx(19e9, rel=0.05)
    paths = [path for path in CONFIGS if "ltx2" in path.stem]
    assert {path.parent.name for path in paths} == {"dmd2", "finetune"}
    for path in paths:
        config = load_run_config(path)
        shape = config.training.data.latent_shape or (128, 16, 16, 24)
        model.check_latent_shape(shape, num_frames=121)
        tokens = math.prod(shape[1:])
        shift = math.exp(0.95 + (tokens - 1024) * (2.05 - 0.95) / (4096 - 1024))
        role = next(role for role in config.models.values() if role.flow_shift is not None)
        assert role.flow_shift == pytest.approx(shift, rel=1e-2)
    model.check_text((5, 3840))


@pytest.mark.parametrize("path", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    if config.fsdp_config:
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_activation_checkpointing"] is False
        assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False
        assert config.fsdp_config.get("fsdp_offload_params", False) == ("offload" in path.stem)


@pytest.mark.parametrize("name", ["hsdp_multinode", "cpu_4proc_hsdp"])
def test_the_sizes_of_the_two_level_mesh_reach_accelerate(monkeypatch, name):
    """The launcher hands a config's keys on by name, so a misspelt one would be lost without a word."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import ParallelismConfig
    from accelerate.utils.launch import prepare_extend_env_parallelism_config

    path = ROOT / f"configs/accelerate/{name}.yaml"
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(path), "script.py"]))
    assert args.use_fsdp and args.use_parallelism_config and args.fsdp_version == 2
    environment = prepare_extend_env_parallelism_config(args, {})
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    mesh = ParallelismConfig()
    assert (mesh.dp_replicate_size, mesh.dp_shard_size) == (2, 8 if name == "hsdp_multinode" else 2)
    assert mesh.total_size == yaml.safe_load(path.read_text())["num_processes"]
