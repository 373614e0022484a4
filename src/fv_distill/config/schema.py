"""The sections of a run's config as typed, described fields. Free of torch: `--help` reads it."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

Scheduler = Literal["constant", "linear", "cosine", "polynomial"]
HubStrategy = Literal["end", "every_save", "checkpoint"]


class ConfigError(ValueError):
    """Something in a config is wrong; the message names the dotted key, the value and what is allowed."""


class Section(BaseModel):
    """A section with fixed keys."""

    # Numbers become strings where a string is due: `--training.tracker.run_name 7` is YAML and arrives as a number.
    model_config = ConfigDict(extra="forbid", populate_by_name=True, coerce_numbers_to_str=True)


class OpenSection(BaseModel):
    """A section that hands its other keys to the class that `_target_` names; its signature decides what is allowed."""

    model_config = ConfigDict(extra="allow", populate_by_name=True, coerce_numbers_to_str=True)


class ModelConfig(OpenSection):
    """One role."""

    target: str = Field("fv_distill.models.WanModel", alias="_target_", description="the adapter class")
    init_from: str = Field(description="a diffusers pipeline directory or a Hub id, owner/name")
    trainable: bool = Field(False, description="whether an optimizer updates this role")
    weights: str | None = Field(
        None, description="a safetensors file, or a directory of them, that replaces the transformer's weights"
    )
    flow_shift: float | None = Field(
        None, gt=0, description="shift of the noise schedule; null reads it from the directory's scheduler"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the weights; auto is float32 for trainable roles and the compute type for frozen ones"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    attention_backend: str | None = Field(None, description="a diffusers attention backend, for instance flash")
    negative_prompt: str = Field("", description="what guidance's unconditional pass reads")


class MethodConfig(OpenSection):
    """The method; every other key is an option of its class."""

    target: str = Field(alias="_target_", description="the method class, for instance fv_distill.methods.DMD2Method")

    @property
    def options(self) -> dict[str, Any]:
        """The keys beside `_target_`."""
        return dict(self.model_extra or {})


class DistributedConfig(Section):
    """How processes compute; everything else about them is accelerate's own config."""

    mixed_precision: Literal["no", "bf16"] | None = Field(
        None, description="no or bf16; null takes what `accelerate launch` says"
    )


class DataOptions(Section):
    """The training rows."""

    data_path: Annotated[
        str | dict[str, Annotated[int, Field(ge=1)]], Field(description="a directory, or directory: repeat count pairs")
    ]
    train_batch_size: int = Field(1, ge=1, description="rows per process and micro-batch")
    text_length: int = Field(512, ge=1, description="tokens that text embeddings are padded to")
    caption_dropout: float = Field(0.0, ge=0, le=1, description="share of samples trained on the empty prompt")
    latent_shape: tuple[int, int, int, int] | None = Field(
        None, description="[C, T, H, W] that a student generates where the rows hold text only"
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="stop at a corrupt row, or replace and count it")
    num_workers: int = Field(0, ge=0, description="loader processes")
    cache_dir: str | None = Field(None, description="where datasets keeps its Arrow files; null is its own default")


class OptimizerConfig(OpenSection):
    """The optimizer of every trainable role; other keys go to its class."""

    target: str = Field("torch.optim.AdamW", alias="_target_", description="the optimizer class")
    learning_rate: float = Field(1e-5, gt=0, description="after warm-up")
    betas: tuple[float, float] | None = Field((0.9, 0.999), description="Adam betas; null for optimizers without")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay")
    eps: float | None = Field(1e-8, gt=0, description="Adam epsilon; null for optimizers without")
    lr_scheduler: Scheduler = Field("constant", description="constant, linear, cosine or polynomial")
    lr_warmup_steps: int = Field(0, ge=0, description="updates of linear warm-up")
    lr_min_ratio: float = Field(0.0, ge=0, le=1, description="final rate over learning_rate")
    lr_power: float = Field(1.0, gt=0, description="power of the polynomial scheduler")

    def as_kwargs(self) -> dict[str, Any]:
        """All keys, those for the class and those of the schedule, without the nulls."""
        return {key: value for key, value in self.model_dump().items() if value is not None}


class LoopConfig(Section):
    """How long."""

    max_train_steps: int = Field(ge=1, description="optimisation steps of the run")
    gradient_accumulation_steps: int = Field(1, ge=1, description="micro-batches per step")
    max_nonfinite_steps: int = Field(
        3, ge=1, description="stop after so many steps in a row with a loss that isn't finite"
    )


class CheckpointConfig(Section):
    """When to save and what to resume from."""

    every_steps: int = Field(500, ge=0, description="save every N steps; 0 saves at the end only")
    keep_last: int = Field(3, ge=1, description="older checkpoints are removed")
    resume_from_checkpoint: str | None = Field(None, description="latest, or a checkpoint directory")


class TrackerConfig(Section):
    """Where metrics go beside metrics.jsonl."""

    trackers: list[str] = Field(["tensorboard"], description="accelerate trackers: tensorboard, wandb, ...")
    project_name: str = Field("fv_distill", description="the trackers' project")
    run_name: str | None = Field(None, description="the run's name in wandb")
    log_every_steps: int = Field(1, ge=1, description="log to trackers every N steps")


class ModelDefaults(Section):
    """Defaults for all roles."""

    gradient_checkpointing: bool = Field(False, description="recompute activations in every trainable role")
    attention_backend: str | None = Field(None, description="attention backend of every role")


class TrainingConfig(Section):
    """How the method is trained."""

    seed: int = Field(0, ge=0, description="every random number of the run follows from it")
    output_dir: str = Field(description="where the run writes")
    overwrite: bool = Field(False, description="replace another run in output_dir")
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    data: DataOptions
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    loop: LoopConfig
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    tracker: TrackerConfig = Field(default_factory=TrackerConfig)
    model: ModelDefaults = Field(default_factory=ModelDefaults)


class CallbackConfig(OpenSection):
    """One callback; other keys go to its class."""

    target: str | None = Field(None, alias="_target_", description="the class; built-in names (ema, ...) need none")

    def as_kwargs(self) -> dict[str, Any]:
        """The keys as `CallbackDict` takes them."""
        target = {} if self.target is None else {"_target_": self.target}
        return {**target, **(self.model_extra or {})}


class PipelineConfig(Section):
    """The diffusers directory that is made of the student."""

    export_dir: str | None = Field(None, description="export the student here after training; null does not export")
    ema: bool = Field(True, description="export the averaged weights where there are any")
    push_to_hub: bool = Field(False, description="upload the export to the Hub")
    hub_model_id: str | None = Field(None, description="owner/name on the Hub")
    hub_private: bool = Field(False, description="make the Hub repository private")
    hub_strategy: HubStrategy = Field(
        "end",
        description="end pushes the export at the end; every_save one of each checkpoint too; checkpoint pushes the "
        "newest checkpoint besides, as last-checkpoint",
    )

    @field_validator("hub_model_id")
    @classmethod
    def _owner_and_name(cls, value: str | None) -> str | None:
        # As huggingface_hub checks it, but before training; importing that for a pattern would slow --help down.
        if value is not None and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", value, re.ASCII):
            raise ValueError(
                "must be owner/name, as in the address of the repository, with letters, digits, _, - and ."
            )
        return value

    @model_validator(mode="after")
    def _push_needs_an_export(self) -> "PipelineConfig":
        if self.push_to_hub and (self.export_dir is None or self.hub_model_id is None):
            raise ValueError("push_to_hub needs export_dir and hub_model_id (owner/name)")
        return self


class RunConfig(Section):
    """A whole run."""

    models: dict[str, ModelConfig] = Field(description="the roles, by name")
    method: MethodConfig
    training: TrainingConfig
    callbacks: dict[str, CallbackConfig] = Field(default_factory=dict, description="hooks, by name, in order")
    pipeline: PipelineConfig = Field(default_factory=PipelineConfig)
    allow_unknown_keys: bool = Field(False, description="warn of unknown keys instead of stopping")

    _source_text: str = PrivateAttr("")

    @property
    def source_text(self) -> str:
        """The YAML as it was written, before overrides; empty if the config was made in Python."""
        return self._source_text

    def keep_source(self, text: str) -> None:
        """Remember the YAML that this config was read from."""
        self._source_text = text

    def __eq__(self, other: object) -> bool:
        # pydantic would compare the source too, and then no config equals its resolved copy.
        return isinstance(other, RunConfig) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]
