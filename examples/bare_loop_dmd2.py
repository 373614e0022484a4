"""DMD2 in a plain accelerate loop: the losses, rollouts and adapters need no trainer.

    accelerate launch examples/bare_loop_dmd2.py --config examples/configs/dmd2/digits.yaml

It reads train_dmd2.py's config: networks, data, denoising steps, guidance, update interval, AdamW's numbers and the
clipping. Everything else is at its default here and learning rates stay constant. Given a config that asks for no more,
it has the same losses to the last bit (a test compares them). It has no checkpoints, validation or export: take it as
the place to try an idea.
"""

import json
from pathlib import Path

import torch
from accelerate import Accelerator

from fv_distill.config import parse_run_config
from fv_distill.config.schema import RunConfig
from fv_distill.console import exit_on_user_error
from fv_distill.data import BatchPlan, ParquetDataset, build_loader
from fv_distill.gloo import await_gloo_at_exit
from fv_distill.losses import dmd_loss, flow_matching_loss
from fv_distill.models import UncondPolicy, WanModel, unconditional
from fv_distill.rng import SampleRng
from fv_distill.rollouts import few_step_rollout
from fv_distill.schedules import add_noise, few_step_sigmas, score_sigma, velocity_target


def main() -> None:
    config, command_line = parse_run_config(__doc__, method_target="fv_distill.methods.DMD2Method")
    with exit_on_user_error(debug=command_line.debug):
        train(config)


def train(config: RunConfig) -> None:
    training, options = config.training, config.method.options
    accelerator = Accelerator()
    await_gloo_at_exit()

    def load(role: str) -> WanModel:
        role_config = config.models[role]
        model = WanModel.from_pretrained(
            role_config.init_from,
            trainable=role_config.trainable,
            negative_prompt=role_config.negative_prompt,
            text_length=training.data.text_length,
        )
        model.transformer.to(accelerator.device)
        return model

    student, teacher, critic = load("student"), load("teacher"), load("critic")
    negative = student.negative_conditioning()

    def optimizer_for(model: WanModel, learning_rate: float) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(
            model.transformer.parameters(),
            lr=learning_rate,
            betas=training.optimizer.betas,
            weight_decay=training.optimizer.weight_decay,
            eps=training.optimizer.eps,
        )
        model.transformer, optimizer = accelerator.prepare(model.transformer, optimizer)
        return optimizer

    student_optimizer = optimizer_for(student, training.optimizer.learning_rate)
    critic_optimizer = optimizer_for(critic, options["fake_score_learning_rate"] or training.optimizer.learning_rate)
    sigmas = few_step_sigmas(
        options["dmd_denoising_steps"], flow_shift=student.flow_shift, warp=options["warp_denoising_step"]
    )
    max_grad_norm = (config.callbacks["grad_clip"].model_extra or {})["max_grad_norm"]

    dataset = ParquetDataset(training.data.data_path)
    plan = BatchPlan(
        seed=training.seed,
        num_rows=len(dataset),
        micro_batch_size=training.data.train_batch_size,
        accumulation_steps=1,
        world_size=accelerator.num_processes,
        rank=accelerator.process_index,
        buckets=dataset.buckets,
    )
    loader = build_loader(
        dataset,
        plan,
        start_step=0,
        num_steps=training.loop.max_train_steps,
        text_length=training.data.text_length,
        caption_dropout=training.data.caption_dropout,
        seed=training.seed,
    )

    def update(model: WanModel, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> float:
        accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.transformer.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    metrics_file = Path(training.output_dir) / "metrics.jsonl"
    metrics_file.parent.mkdir(parents=True, exist_ok=True)
    metrics_file.unlink(missing_ok=True)
    for step, (batch,) in enumerate(loader, start=1):
        rng = SampleRng(training.seed, step, batch["sample_index"], accelerator.device)
        batch = {k: v.to(accelerator.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        batch["latent_shape"] = training.data.latent_shape
        prepared = student.prepare_batch(batch, latents_source="zeros")
        shape, conditioning = prepared.latents.shape[1:], prepared.conditioning
        updates_student = step % options["generator_update_interval"] == 0
        role = "student" if updates_student else "critic"

        generated = few_step_rollout(
            student,
            rng.normal(f"{role}/rollout", shape),
            conditioning,
            sigmas,
            exit_step=rng.shared_integer(f"{role}/exit", len(sigmas)),
            sample_type=options["student_sample_type"],
            fresh_noise=lambda index, rng=rng, role=role, shape=shape: rng.normal(f"{role}/rollout/{index}", shape),
            grad=updates_student,
        )
        metrics = {}
        if updates_student:
            sigma = score_sigma(rng.uniform("score/sigma"), shift=student.flow_shift)
            x_t = add_noise(generated.detach(), rng.normal("score/noise", shape), sigma)
            with torch.no_grad():
                scale = options["real_score_guidance_scale"]
                uncond = unconditional(conditioning, UncondPolicy(), negative)
                real = teacher.predict_x0_guided(x_t, sigma, conditioning, uncond, scale)
                fake = critic.predict_x0(x_t, sigma, conditioning)
            metrics["loss/student"] = update(
                student, student_optimizer, dmd_loss(generated, real_x0=real, fake_x0=fake)
            )

        generated, noise = generated.detach(), rng.normal("critic/noise", shape)
        sigma = score_sigma(rng.uniform("critic/sigma"), shift=student.flow_shift)
        velocity = critic.predict_velocity(add_noise(generated, noise, sigma), sigma, conditioning)
        loss = flow_matching_loss(velocity, velocity_target(generated, noise))
        metrics["loss/critic"] = update(critic, critic_optimizer, loss)

        with metrics_file.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
    accelerator.print(f"done: {metrics_file}")


if __name__ == "__main__":
    main()
