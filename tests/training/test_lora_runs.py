"""Runs that train adapters: what is trained, saved, resumed, averaged and exported."""

import pytest
import torch
from diffusers import DiffusionPipeline, WanTransformer3DModel
from safetensors.torch import load_file
from tiny_runs import (
    assert_same_state,
    assert_same_tensors,
    checkpoint,
    finetune_config,
    largest_difference,
    metadata,
    metric_lines,
    shared_base_config,
    shared_causal_base_config,
    train,
)

from fv_distill import cli
from fv_distill.config.schema import RunConfig
from fv_distill.export import load_role_weights
from fv_distill.generation import VideoStreamer
from fv_distill.training import build_models, run_training_from_config

LATEST = {"training.checkpoint.resume_from_checkpoint": "latest"}
LORA = {"enable": True, "rank": 3, "target_modules": "all"}


@pytest.fixture(scope="module")
def shared(tiny_wan, tiny_rows, tmp_path_factory):
    """A DMD2 run of four steps on a shared base, without a break."""
    config = shared_base_config(tiny_wan, tiny_rows, tmp_path_factory.mktemp("shared") / "run")
    config["training"]["optimizer"] |= {"lr_scheduler": "cosine", "learning_rate": 0.05}
    config["training"]["model"] = {"gradient_checkpointing": True}
    return config, train(config)


def test_one_network_is_loaded(tiny_wan, tiny_rows, tmp_path):
    models = build_models(RunConfig.model_validate(shared_base_config(tiny_wan, tiny_rows, tmp_path / "run")))
    assert len({id(model.transformer) for model in models.values()}) == 1
    trained = {role: {n for n, p in model.transformer.named_parameters() if model.is_trained(n)}
               for role, model in models.items()}  # fmt: skip
    assert not trained["teacher"] and trained["student"] and not trained["student"] & trained["critic"]
    assert models["student"].negative_prompt == "bad" and models["critic"].negative_prompt == ""


def test_checkpoints_hold_adapters_only(shared):
    _, output_dir = shared
    saved = checkpoint(output_dir, 4)
    assert metadata(saved)["models"] == ["student", "critic", "ema"]
    assert metadata(saved)["lora"]["critic"] == {
        "rank": 3, "alpha": 3, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"], "rslora": False, "dora": False,
    }  # fmt: skip
    for name in ("student", "critic", "ema"):
        weights = {step: load_role_weights(checkpoint(output_dir, step), name) for step in (2, 4)}
        assert len(weights[4]) == 2 * 2 * 4 * 2 and all(".lora_" in key for key in weights[4])
        assert "blocks.1.attn2.to_out.0.lora_B.weight" in weights[4]
        assert largest_difference(weights[2], weights[4]) > 1e-4


def test_a_resumed_run_is_the_uninterrupted_one(shared, tmp_path):
    config, whole = shared
    train(config, {"training.output_dir": str(tmp_path / "cut"), "training.loop.max_train_steps": 4})
    resumed = {"training.checkpoint.resume_from_checkpoint": str(checkpoint(whole, 2))}
    run = train(config, resumed | {"training.output_dir": str(tmp_path / "resumed")})
    assert metric_lines(run) == metric_lines(whole)[2:]
    assert_same_state(checkpoint(run, 4), checkpoint(whole, 4), num_networks=3, num_optimizers=2)


def test_an_adapter_of_another_rank_is_not_resumed(shared, tmp_path):
    config, whole = shared
    changes = {"training.checkpoint.resume_from_checkpoint": str(checkpoint(whole, 2)), "models.student.lora.rank": 4}
    with pytest.raises(ValueError, match="holds another network as student"):
        train(config, changes | {"training.output_dir": str(tmp_path / "other")})


def test_every_export_is_the_averaged_student(shared, tiny_wan, tmp_path):
    """The trained network, put together from the checkpoint by hand, against each format through stock diffusers."""
    _, output_dir = shared
    saved = checkpoint(output_dir, 4)
    expected = WanTransformer3DModel.from_pretrained(tiny_wan, subfolder="transformer")
    ema = load_role_weights(saved, "ema")
    for key in [key for key in ema if key.endswith("lora_A.weight")]:
        module = key.removesuffix(".lora_A.weight")
        expected.get_submodule(module).weight.data += ema[f"{module}.lora_B.weight"] @ ema[key]
    for name, words in {"lora": [], "merged": ["--merge"], "comfy.safetensors": ["--format", "comfyui"],
                        "original.safetensors": ["--format", "original"]}.items():  # fmt: skip
        cli.main(["export", "--checkpoint", str(saved), "--output-dir", str(tmp_path / name), *words])

    def pipeline(lora=None):
        loaded = DiffusionPipeline.from_pretrained(tmp_path / "merged" if lora is None else tiny_wan)
        if lora is not None:
            loaded.load_lora_weights(tmp_path / lora)
        return loaded.transformer

    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 3, 4, 4, generator=generator), torch.randn(2, 6, 16, generator=generator)
    with torch.no_grad():
        wanted, *found = (
            network(x, torch.tensor([900.0, 125.0]), text, return_dict=False)[0]
            for network in (expected, pipeline("lora"), pipeline("comfy.safetensors"), pipeline())
        )
    for output in found:
        torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)
    bare = DiffusionPipeline.from_pretrained(tiny_wan).transformer
    assert largest_difference(bare.state_dict(), expected.state_dict()) > 1e-4
    original = load_file(tmp_path / "original.safetensors")
    torch.testing.assert_close(original["blocks.0.self_attn.q.weight"], expected.blocks[0].attn1.to_q.weight.data)


def test_the_snippet_of_a_lora_card_runs(shared, tiny_wan, tmp_path, monkeypatch):
    _, output_dir = shared
    directory = tmp_path / "lora"
    cli.main(["export", "--checkpoint", str(checkpoint(output_dir, 4)), "--output-dir", str(directory)])
    # The card names no more of a local base model than its directory, which lies beside the adapter then.
    (tmp_path / tiny_wan.name).symlink_to(tiny_wan)
    monkeypatch.chdir(tmp_path)
    snippet = (directory / "README.md").read_text().split("```python")[1].split("```")[0]
    assert "load_lora_weights" in snippet
    scope = {}
    exec(snippet, scope)
    assert len(scope["result"].frames[0]) == 9 and (tmp_path / "sample.gif").is_file()


def test_one_role_with_an_adapter_of_its_own_network(tiny_wan, tiny_rows, tmp_path):
    config = finetune_config(tiny_wan, tiny_rows, tmp_path / "run")
    config["models"]["student"]["lora"] = LORA
    output_dir = train(config, {"pipeline.export_dir": str(tmp_path / "lora")})
    assert all(".lora_" in key for key in load_role_weights(checkpoint(output_dir, 4), "student"))
    pipeline = DiffusionPipeline.from_pretrained(tiny_wan)
    pipeline.load_lora_weights(tmp_path / "lora")


def test_a_causal_student_on_a_bidirectional_base(tiny_wan, tiny_rows, tmp_path):
    config = shared_causal_base_config(tiny_wan, tiny_rows, tmp_path / "run")
    train(config, {"pipeline.export_dir": str(tmp_path / "student"), "training.loop.max_train_steps": 2})
    frames = VideoStreamer.from_pretrained(tmp_path / "student").generate("a digit")
    assert frames.shape == (9, 32, 32, 3)


def test_a_format_of_adapters_needs_one(tiny_wan, tiny_rows, tmp_path, capsys):
    output_dir = train(finetune_config(tiny_wan, tiny_rows, tmp_path / "run"), {"training.loop.max_train_steps": 1})
    words = ["--checkpoint", str(checkpoint(output_dir, 1)), "--output-dir", str(tmp_path / "out"), "--format", "lora"]
    with pytest.raises(SystemExit):
        cli.main(["export", *words])
    assert "was trained whole and is no LoRA; use diffusers" in capsys.readouterr().err


def test_targets_that_match_nothing_name_their_key(tiny_wan, tiny_rows, tmp_path):
    config = finetune_config(tiny_wan, tiny_rows, tmp_path / "run")
    config["models"]["student"]["lora"] = {**LORA, "target_modules": ["to_x"]}
    with pytest.raises(ValueError, match=r"models\.student\.lora\.target_modules: to_x matches no linear layer"):
        train(config)


def test_trained_parameters_are_printed(shared, tmp_path, capsys):
    config, _ = shared
    path = tmp_path / "dry.yaml"
    from tiny_runs import write_config

    run_training_from_config(write_config(config, path), dry_run=True)
    printed = capsys.readouterr().out
    assert "student: LoRA of rank 3 on teacher, 0.00 M of 0.02 M parameters" in printed.replace("\n", " ")


def test_averages_differ_from_the_latest(shared):
    _, output_dir = shared
    student, ema = (load_role_weights(checkpoint(output_dir, 4), name) for name in ("student", "ema"))
    assert student.keys() == ema.keys() and largest_difference(student, ema) > 1e-4
    with pytest.raises(AssertionError):
        assert_same_tensors(student, ema)
