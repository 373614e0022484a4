"""The options of every method as typed fields, free of torch so that `--help` and config checks are quick."""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _falls_from_1000(steps: tuple[float, ...]) -> tuple[float, ...]:
    from fv_distill.schedules.few_step import few_step_sigmas

    few_step_sigmas(steps, flow_shift=1.0)
    return steps


DenoisingSteps = Annotated[tuple[float, ...], AfterValidator(_falls_from_1000)]
UncondPolicy = Literal["negative_prompt", "keep", "zero", "drop"]


class MethodOptions(BaseModel):
    """What the options of all methods share: unknown names are errors and values never change after the start."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FineTuneOptions(MethodOptions):
    """Flow matching on data."""

    sigma_density: Literal["uniform", "logit_normal", "mode"] = Field(
        "uniform", description="density of the training sigma before the model's flow shift"
    )
    logit_mean: float = Field(0.0, description="mean of the logit-normal density")
    logit_std: float = Field(1.0, gt=0, description="standard deviation of the logit-normal density")
    mode_scale: float = Field(1.29, ge=-1, le=1.75, description="scale of the mode density; above 1.75 it folds back")
    apply_flow_shift: bool = Field(True, description="shift the drawn sigma with the model's flow shift")


class CfgUncondOptions(MethodOptions):
    """What the unconditional pass of guidance sees, per conditioning channel."""

    text: UncondPolicy = Field(
        "negative_prompt", description="the negative prompt's embedding, the sample's own, zeros, or no text at all"
    )
    image: Literal["keep", "zero", "drop"] | None = Field(
        None, description="image conditioning there; null keeps it and does not ask the data for it"
    )
    action: Literal["keep", "zero", "drop"] | None = Field(
        None, description="mouse and keyboard there; null keeps them and does not ask the data for them"
    )
    on_missing: Literal["error", "ignore"] = Field(
        "error", description="what to do when image or action has a policy but the data no such channel"
    )


class DMD2Options(MethodOptions):
    """Distribution matching distillation (DMD2) without the GAN term."""

    rollout_mode: Literal["simulate", "data_latent"] = Field(
        "simulate",
        description="simulate: the student samples from pure noise (backward simulation); data_latent: it denoises a "
        "noised clip of the data set",
    )
    dmd_denoising_steps: DenoisingSteps = Field(
        (1000, 750, 500, 250), description="the student's timesteps, falling from 1000"
    )
    warp_denoising_step: bool = Field(
        True, description="read the timesteps as positions in the shifted schedule: sigma = shift(timestep / 1000)"
    )
    student_sample_type: Literal["sde", "ode"] = Field(
        "sde",
        description="between two steps x0 is noised afresh (sde) or with the noise that the velocity implies (ode)",
    )
    generator_update_interval: int = Field(
        5, ge=1, description="the student is updated in every k-th step, first in step k; the critic in every step"
    )
    reuse_rollout: bool = Field(
        True, description="in a step that updates both, student and critic use one rollout instead of two"
    )
    real_score_guidance_scale: float = Field(
        3.5, ge=0, description="guidance of the teacher, uncond + scale (cond - uncond); 1 skips the unconditional pass"
    )
    fake_score_learning_rate: float | None = Field(
        None, gt=0, description="the critic's learning rate; null means training.optimizer.learning_rate"
    )
    fake_score_betas: tuple[float, float] | None = Field(
        None, description="the critic's Adam betas; null means training.optimizer.betas"
    )
    fake_score_lr_scheduler: Literal["constant", "linear", "cosine", "polynomial"] | None = Field(
        None, description="the critic's LR scheduler; null means training.optimizer.lr_scheduler"
    )
    dmd_normalizer: Literal["per_sample", "batch"] = Field(
        "per_sample", description="over what mean |x0 - real| is taken"
    )
    score_sigma: Literal["per_sample", "per_batch"] = Field(
        "per_sample", description="one score sigma for each sample, or one for the whole global batch"
    )
    score_flow_shift: float | None = Field(
        None, gt=0, description="shift of the score sigma; null means the student's flow shift"
    )
    min_score_sigma: float = Field(0.02, ge=0, lt=1, description="lower bound of the score sigma")
    max_score_sigma: float = Field(0.98, gt=0, le=1, description="upper bound of the score sigma")
    cfg_uncond: CfgUncondOptions = Field(
        default_factory=CfgUncondOptions, description="what the teacher's unconditional pass sees"
    )

    @model_validator(mode="after")
    def _score_bounds_are_ordered(self) -> "DMD2Options":
        if self.min_score_sigma >= self.max_score_sigma:
            raise ValueError(
                f"min_score_sigma={self.min_score_sigma:g} must be below max_score_sigma={self.max_score_sigma:g}"
            )
        return self


class SelfForcingOptions(DMD2Options):
    """DMD2 with a causal student that generates its own history, chunk by chunk."""

    rollout_mode: Literal["simulate"] = Field(
        "simulate", description="the student always samples from pure noise: its own history is the point"
    )
    chunk_size: int | None = Field(
        None, ge=1, description="latent frames per chunk, for configs that state it; null takes the student's"
    )
    same_step_across_blocks: bool = Field(
        True, description="one exit step for all chunks of a step, or one drawn for each chunk"
    )
    last_step_only: bool = Field(False, description="every chunk exits at the last denoising step")
    context_noise: float = Field(
        0.0, ge=0, lt=1, description="the noise level sigma at which a finished chunk becomes history"
    )
    enable_gradient_in_rollout: bool = Field(
        True, description="false trains the critic alone on the student's rollouts, to warm it up"
    )
    start_gradient_frame: int = Field(
        0, ge=0, description="latent frames before this one are generated, judged and seen, but get no gradient"
    )
    gradient_replay: bool = Field(
        True,
        description="roll out without gradients, then make each chunk's last call again with them: the same gradients "
        "with one chunk's activations at a time; false keeps all of them at once",
    )


class DiffusionForcingSFTOptions(MethodOptions):
    """Flow matching with a noise level of its own for every chunk."""

    chunk_size: int = Field(3, ge=1, description="latent frames that share a noise level")
    min_timestep_ratio: float = Field(0.0, ge=0, lt=1, description="smallest sigma before the flow shift")
    max_timestep_ratio: float = Field(1.0, gt=0, le=1, description="largest sigma before the flow shift")
    weighting: Literal["gaussian", "gaussian_index", "none"] = Field(
        "gaussian",
        description="loss weight of a frame: Self-Forcing's bell over the shifted timestep, the same bell over the "
        "timestep before the shift, or 1",
    )
    teacher_forcing: bool = Field(
        False, description="chunks see the clean chunks before them, not their noisy copies; needs a causal student"
    )
    history_noise: float = Field(
        0.0, ge=0, lt=1, description="with teacher_forcing: the history's noise level is drawn between 0 and this sigma"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "DiffusionForcingSFTOptions":
        if self.min_timestep_ratio >= self.max_timestep_ratio:
            raise ValueError(
                f"min_timestep_ratio={self.min_timestep_ratio:g} must be below max_timestep_ratio="
                f"{self.max_timestep_ratio:g}"
            )
        if self.history_noise and not self.teacher_forcing:
            raise ValueError(
                f"history_noise={self.history_noise:g} has no history to act on; set teacher_forcing: true"
            )
        return self


class TrajectoryOptions(MethodOptions):
    """Which sampling paths of the teacher are made, and where they are kept."""

    teacher_path_cache: str | None = Field(
        None, description="directory of the teacher's paths, made on first use; null trains on rows that hold paths"
    )
    t_list: tuple[float, ...] = Field(
        (999, 937, 833, 624, 0),
        description="timesteps of the states that are learned from, falling; the first, from 999 up, is pure noise and "
        "the last, 0, the target. An export needs exact ones: 1000, 937.5, 833.3333, 625, 0 instead of the default",
    )
    student_sample_steps: int | None = Field(
        None, ge=1, description="steps of the student, for configs that state them: one less than t_list has entries"
    )
    teacher_guidance_scale: float = Field(
        3.0, ge=0, description="guidance of the paths, uncond + scale (cond - uncond); 1 skips the unconditional pass"
    )
    teacher_inference_steps: int = Field(48, ge=1, description="Euler steps of a path")
    trajectories_per_row: int = Field(1, ge=1, description="paths from each row of the data, each from its own noise")
    trajectory_batch_size: int = Field(8, ge=1, description="paths made at once by a process")
    trajectories_per_file: int = Field(64, ge=1, description="paths per parquet file; a killed run redoes one at most")
    store_all_states: bool = Field(False, description="keep every state of a path, for other lists of timesteps later")

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The levels of `t_list`, from 1 to 0."""
        return (1.0, *(t / 1000 for t in self.t_list[1:]))

    @model_validator(mode="after")
    def _describe_a_path(self) -> "TrajectoryOptions":
        t_list = self.t_list
        if len(t_list) < 2 or not 999 <= t_list[0] <= 1000 or t_list[-1] != 0:
            raise ValueError(f"t_list={list(t_list)} must go from 999 (pure noise) to 0 (the target)")
        if any(a <= b for a, b in pairwise(t_list)):
            raise ValueError(f"t_list={list(t_list)} must fall strictly")
        if self.student_sample_steps not in (None, len(t_list) - 1):
            raise ValueError(
                f"student_sample_steps={self.student_sample_steps} contradicts t_list, which makes {len(t_list) - 1} "
                "steps; leave the former out"
            )
        if self.teacher_inference_steps < len(t_list) - 1:
            raise ValueError(
                f"teacher_inference_steps={self.teacher_inference_steps} must be at least the {len(t_list) - 1} steps "
                "of t_list"
            )
        return self


class KDOptions(TrajectoryOptions):
    """Regression of the end of a teacher's path from its earlier states."""

    kd_loss: Literal["half_mse", "mse"] = Field("half_mse", description="0.5 times the mean squared error on x0, or 1")
    student_sample_type: Literal["sde", "ode"] = Field(
        "ode", description="how the student is sampled: along a path, as it was trained, or with fresh noise each step"
    )


class KDCausalOptions(KDOptions):
    """The same for a causal student, with a state drawn per block of frames."""

    num_frames_per_block: int | None = Field(
        None, ge=1, description="latent frames that share a state; null takes the student's chunk_size"
    )
    teacher_forcing: bool = Field(
        False, description="chunks see the ends of the path before them, as when streaming, not other noisy states"
    )


OPTIONS_BY_TARGET: dict[str, type[MethodOptions]] = {
    "fv_distill.methods.FineTuneMethod": FineTuneOptions,
    "fv_distill.methods.DMD2Method": DMD2Options,
    "fv_distill.methods.DiffusionForcingSFTMethod": DiffusionForcingSFTOptions,
    "fv_distill.methods.KDMethod": KDOptions,
    "fv_distill.methods.KDCausalMethod": KDCausalOptions,
    "fv_distill.methods.SelfForcingMethod": SelfForcingOptions,
}
