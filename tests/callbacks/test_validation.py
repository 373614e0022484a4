import functools
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import TEXT_LENGTH, make_tiny_transformer

from fv_distill import training
from fv_distill.callbacks import Callback, ValidationCallback
from fv_distill.config.schema import RunConfig
from fv_distill.models import WanModel
from fv_distill.prompts import read_prompts
from fv_distill.training.context_parallel import ContextGroups

PROMPTS = ["a handwritten one moving left", "a handwritten two moving up", "three down"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return str(path)


def dmd2_config(tiny_wan, tiny_rows, output_dir, *, callbacks=None, steps=2, trackers=()):
    role = {"init_from": str(tiny_wan)}
    return RunConfig.model_validate(
        {
            "models": {"student": role | {"trainable": True}, "critic": role | {"trainable": True}, "teacher": role},
            "method": {
                "_target_": "fv_distill.methods.DMD2Method",
                "dmd_denoising_steps": [1000, 500],
                "generator_update_interval": 1,
            },
            "training": {
                "output_dir": str(output_dir),
                "data": {"data_path": str(tiny_rows), "train_batch_size": 2, "text_length": TEXT_LENGTH},
                "optimizer": {"learning_rate": 1e-2},
                "loop": {"max_train_steps": steps},
                "checkpoint": {"every_steps": 0},
                "tracker": {"trackers": list(trackers)},
            },
            "callbacks": {"ema": {"decay": 0.5}, **(callbacks or {})},
        }
    )


def trained(config):
    trainer = training.build_trainer(config)
    trainer.train()
    trainer.accelerator.end_training()
    return trainer


def fake_trainer(tiny_wan, *, rank=0, num_processes=1, sigmas=(1.0, 0.5), callbacks=None):
    """What a callback sees of a trainer, with a student of random weights."""
    student = WanModel(make_tiny_transformer(seed=7), directory=tiny_wan, flow_shift=3.0, trainable=True)
    accelerator = SimpleNamespace(
        is_main_process=rank == 0,
        device=torch.device("cpu"),
        mixed_precision="no",
        trackers=[],
    )
    section = SimpleNamespace(
        data=SimpleNamespace(text_length=TEXT_LENGTH), tracker=SimpleNamespace(trackers=[]), output_dir="unused"
    )
    return SimpleNamespace(
        accelerator=accelerator,
        groups=ContextGroups(1, num_processes, rank),
        method=SimpleNamespace(few_step_sigmas=sigmas, sample_type="sde"),
        models={"student": student},
        config=SimpleNamespace(training=section),
        latent_shape=(4, 3, 4, 4),
        callbacks={} if callbacks is None else callbacks,
    )


def clips_of(callback, trainer, steps=2):
    callback.on_train_start(trainer)
    with torch.no_grad():
        return callback._share(
            trainer, functools.partial(callback._sample, trainer, callback._build_pipeline(trainer), steps)
        )


def test_a_run_leaves_videos_a_sheet_and_tracker_entries(tiny_wan, tiny_rows, tmp_path, prompts):
    validation = {"dataset_file": prompts, "every_steps": 2, "fps": 8}
    config = dmd2_config(
        tiny_wan, tiny_rows, tmp_path / "run", callbacks={"validation": validation}, steps=3, trackers=["tensorboard"]
    )
    trained(config)
    folder = tmp_path / "run" / "validation"
    assert sorted(path.name for path in folder.iterdir()) == ["prompts.json", "step-00000002", "step-00000003"]
    assert json.loads((folder / "prompts.json").read_text()) == PROMPTS
    files = sorted(path.name for path in (folder / "step-00000002").iterdir())
    assert files == [*(f"{index:03d}_2-steps.mp4" for index in range(3)), "contact_sheet_2-steps.png"]
    with Image.open(folder / "step-00000002" / "contact_sheet_2-steps.png") as sheet:
        assert sheet.width >= 8 * 64 and sheet.height >= 3 * 64
    logs = [EventAccumulator(str(path)).Reload() for path in (tmp_path / "run" / "logs").rglob("events.*")]
    (log,) = (log for log in logs if log.Tags()["images"])
    videos = log.Images("validation/video_2_steps")
    assert [video.step for video in videos] == [2, 3]
    assert videos[0].encoded_image_string.startswith(b"GIF89a")
    assert len(log.Images("validation/sheet_2_steps")) == 2


def test_training_is_the_same_with_and_without(tiny_wan, tiny_rows, tmp_path, prompts):
    results = []
    for name, callbacks in (("with", {"validation": {"dataset_file": prompts, "every_steps": 1}}), ("without", {})):
        torch.manual_seed(4)
        trainer = trained(dmd2_config(tiny_wan, tiny_rows, tmp_path / name, callbacks=callbacks, steps=3))
        weights = {role: trainer.models[role].transformer.state_dict() for role in ("student", "critic")}
        weights["ema"] = trainer.callbacks["ema"].average
        assert trainer.models["student"].transformer.training
        results.append((weights, (tmp_path / name / "metrics.jsonl").read_text(), torch.rand(())))
    (weights, metrics, draw), (expected, expected_metrics, expected_draw) = results
    assert metrics == expected_metrics and draw == expected_draw
    for role, state in weights.items():
        assert all(torch.equal(value, expected[role][key]) for key, value in state.items())


def test_the_averaged_weights_are_shown(tiny_wan, tiny_rows, tmp_path, prompts, monkeypatch):
    seen = []
    sample = ValidationCallback._sample

    def spy(self, trainer, pipeline, steps, index):
        average = trainer.callbacks["ema"].average
        own = pipeline.transformer.state_dict()
        seen.append(all(torch.equal(own[key], value) for key, value in average.items()))
        return sample(self, trainer, pipeline, steps, index)

    monkeypatch.setattr(ValidationCallback, "_sample", spy)
    validation = {"validation": {"dataset_file": prompts, "every_steps": 2}}
    trainer = trained(dmd2_config(tiny_wan, tiny_rows, tmp_path / "run", callbacks=validation))
    assert seen == [True] * len(PROMPTS)
    average, own = trainer.callbacks["ema"].average, trainer.models["student"].transformer
    assert not torch.equal(average["proj_out.weight"], own.proj_out.weight), "the student's own weights are back"


def test_a_causal_student_is_streamed_not_sampled_by_a_pipeline(tiny_wan, tiny_rows, tmp_path, prompts, monkeypatch):
    from tiny_runs import self_forcing_config

    from fv_distill.callbacks.video_files import best_suffix

    monkeypatch.setattr(ValidationCallback, "_build_pipeline", None)
    config = self_forcing_config(tiny_wan, tiny_rows, tmp_path / "run")
    config["callbacks"]["validation"] = {"dataset_file": prompts, "every_steps": 2}
    with_validation = trained(RunConfig.model_validate(config))
    folder = tmp_path / "run" / "validation" / "step-00000002"
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"{index:03d}_2-steps{best_suffix()}" for index in range(3)), "contact_sheet_2-steps.png",
    ]  # fmt: skip
    del config["callbacks"]["validation"]
    config["training"]["output_dir"] = str(tmp_path / "without")
    without = trained(RunConfig.model_validate(config))
    weights, expected = (trainer.models["student"].transformer.state_dict() for trainer in (with_validation, without))
    assert all(torch.equal(value, expected[key]) for key, value in weights.items())


def test_a_causal_student_of_many_steps_is_streamed_with_guidance(tiny_wan, tiny_rows, tmp_path, prompts, monkeypatch):
    from tiny_runs import dfsft_config

    from fv_distill.callbacks import validation

    asked = []
    monkeypatch.setattr(
        validation, "stream_clip", lambda *_, **options: asked.append(options) or [torch.zeros(1, 4, 3, 4, 4)]
    )
    config = dfsft_config(tiny_wan, tiny_rows, tmp_path / "run")
    config["training"]["loop"]["max_train_steps"] = 1
    for scale in (None, 1.0):
        config["training"]["output_dir"] = str(tmp_path / f"run-{scale}")
        config["callbacks"] = {"validation": {"dataset_file": prompts, "sampling_steps": [3], "guidance_scale": scale}}
        trained(RunConfig.model_validate(config))
    assert [options["guidance_scale"] for options in asked] == [5.0] * 3 + [1.0] * 3
    assert asked[0]["unconditional"] is not None and asked[-1]["unconditional"] is None


def test_what_streaming_has_no_use_for_is_refused(tiny_wan, tiny_rows, tmp_path, prompts):
    from tiny_runs import self_forcing_config

    config = self_forcing_config(tiny_wan, tiny_rows, tmp_path / "run")
    config["callbacks"]["validation"] = {"dataset_file": prompts, "num_frames": 17}
    with pytest.raises(ValueError, match=r"callbacks.validation.num_frames=17.* is streamed"):
        trained(RunConfig.model_validate(config))


@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_share_the_prompts_and_call_the_network_equally_often(tiny_wan, prompts, num_processes):
    whole = clips_of(ValidationCallback(prompts), fake_trainer(tiny_wan))
    shared, calls = [], []
    for rank in range(num_processes):
        trainer = fake_trainer(tiny_wan, rank=rank, num_processes=num_processes)
        trainer.models["student"].transformer.register_forward_hook(lambda *_, rank=rank: calls.append(rank))
        shared += clips_of(ValidationCallback(prompts), trainer)
    assert len({calls.count(rank) for rank in range(num_processes)}) == 1
    shared.sort(key=lambda clip: clip[0])
    assert [index for index, _ in shared] == [index for index, _ in whole] == [0, 1, 2]
    assert all(np.array_equal(one, other) for (_, one), (_, other) in zip(shared, whole, strict=True))


def test_the_fresh_noise_is_not_the_start_again(tiny_wan, prompts, monkeypatch):
    """Both come from CPU generators; equal seeds would re-noise x0 with the noise it was made of."""
    drawn = []

    def recorded(*args, **kwargs):
        drawn.append(randn_tensor(*args, **kwargs))
        return drawn[-1]

    for module in ("pipelines.wan.pipeline_wan", "schedulers.scheduling_flow_match_euler_discrete"):
        monkeypatch.setattr(f"diffusers.{module}.randn_tensor", recorded)
    clips_of(ValidationCallback(prompts), fake_trainer(tiny_wan))
    start, fresh, _ = drawn[:3]
    assert start.shape == fresh.shape and not torch.allclose(start, fresh)


@pytest.mark.parametrize(
    ("options", "sigmas", "expected"),
    [
        ({}, (1.0, 0.5), {"steps": [1000, 500], "guidance_scale": 1.0}),
        ({"sampling_timesteps": [1000, 750, 500, 250]}, None, {"steps": [1000, 750, 500, 250], "guidance_scale": 1.0}),
        ({"guidance_scale": 3.0}, (1.0,), {"steps": [1000], "guidance_scale": 3.0}),
        ({"sampling_steps": [5]}, None, {"steps": None, "guidance_scale": None}),
    ],
)
def test_which_schedule_and_guidance_are_used(tiny_wan, prompts, options, sigmas, expected):
    callback = ValidationCallback(prompts, **options)
    trainer = fake_trainer(tiny_wan, sigmas=sigmas)
    callback.on_train_start(trainer)
    pipeline = callback._build_pipeline(trainer)
    assert callback.call.get("guidance_scale") == expected["guidance_scale"]
    training_call = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": TEXT_LENGTH}
    assert training_call.items() <= callback.call.items()
    if expected["steps"] is None:
        assert pipeline.scheduler.config.shift == 3 and not pipeline.scheduler.config.stochastic_sampling
    else:
        pipeline.scheduler.set_timesteps(len(expected["steps"]))
        assert pipeline.scheduler.timesteps.tolist() == pytest.approx(expected["steps"], abs=1e-3)


def test_own_arguments_come_before_the_trainings(tiny_wan, prompts):
    callback = ValidationCallback(prompts, num_frames=5, height=16, negative_prompt="bad")
    callback.on_train_start(fake_trainer(tiny_wan))
    expected = {"num_frames": 5, "height": 16, "width": 32, "negative_prompt": "bad"}
    assert expected.items() <= callback.call.items()


def test_global_generators_are_put_back(tiny_wan, tmp_path, prompts):
    trainer = fake_trainer(tiny_wan, callbacks=SilentCallbacks())
    trainer.step = 1
    callback = ValidationCallback(prompts, output_dir=str(tmp_path / "videos"))
    callback.on_train_start(trainer)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    callback._write = lambda *_: (random.random(), np.random.rand())
    callback.validate(trainer)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


class SilentCallbacks(dict):
    def call(self, *_):
        pass


def test_the_hooks_are_called_around_it(tiny_wan, tiny_rows, tmp_path, prompts):
    class Recorder(Callback):
        def __init__(self):
            self.calls = []

        def on_validation_begin(self, trainer):
            self.calls.append(("begin", trainer.step))

        def on_validation_end(self, trainer):
            self.calls.append(("end", trainer.step))

    config = dmd2_config(
        tiny_wan, tiny_rows, tmp_path / "run", callbacks={"validation": {"dataset_file": prompts}}, steps=1
    )
    trainer = training.build_trainer(config)
    trainer.callbacks.add("recorder", Recorder())
    trainer.train()
    assert trainer.callbacks["recorder"].calls == [("begin", 1), ("end", 1)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "one\n\n  two \n"),
        ("p.json", json.dumps(["one", {"caption": "two"}])),
        ("p.json", json.dumps({"data": [{"caption": "one", "num_frames": 5}, {"prompt": "two"}]})),
        ("p.jsonl", '{"caption": "one"}\n\n{"prompt": "two"}\n'),
    ],
)
def test_prompt_files(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read_prompts(tmp_path / name) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n", "holds no prompts"),
        ("p.json", "{}", "holds no prompts"),
        ("p.json", "[", "no valid JSON"),
        ("p.jsonl", '{"caption": "one"}\n{"text": "two"}', "row 2: expected a text"),
        ("p.csv", "one", r"must be a \.txt, \.json or \.jsonl"),
    ],
)
def test_bad_prompt_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"dataset_file='nowhere\.txt'"):
        ValidationCallback("nowhere.txt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heigth": 32}, r"unknown key callbacks\.validation\.heigth; did you mean height"),
        ({"every_step": 3}, "did you mean every_steps"),
        ({"every_steps": 0}, "every_steps=0 must be at least 1"),
        ({"sampling_steps": []}, "sampling_steps"),
        ({"pipeline_target": "diffusers.DiffusionPipeline"}, "name the concrete pipeline"),
    ],
)
def test_mistakes_are_found_before_training(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        ValidationCallback(prompts, **options)


def test_steps_that_cannot_be_sampled_are_found_at_the_start(tiny_wan, prompts):
    callback = ValidationCallback(prompts, sampling_timesteps=[1000, 900, 500, 100])
    with pytest.raises(ValueError, match="no setting of FlowMatchEulerDiscreteScheduler"):
        callback.on_train_start(fake_trainer(tiny_wan))
