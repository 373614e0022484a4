"""The sections of a run's config as typed, described fields. Free of torch: `--help` reads it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

ExportFormat = Literal["diffusers", "lora", "comfyui", "merged", "original"]
Scheduler = Literal["constant", "linear", "cosine", "polynomial"]
Placement = Literal["auto", "replicated", "offloaded"]
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


class LoraConfig(Section):
    """A LoRA adapter that a role trains instead of its network's weights."""

    enable: bool = Field(False, description="train an adapter on the frozen network")
    rank: int = Field(16, ge=1, description="of the adapter's two factors")
    alpha: float | None = Field(None, gt=0, description="their product is scaled by alpha / rank; null is the rank")
    target_modules: str | list[str] = Field(
        "attention", description="a preset of the family (attention, all, linear), or a list of ends of module names"
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) (Kalajdzievski 2023)")
    dora: bool = Field(False, description="train magnitudes apart from directions (Liu et al. 2024)")


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
    placement: Placement = Field(
        "auto",
        description="where a frozen role's weights are: auto, sharded if the launch shards and else whole; replicated, "
        "whole on every process; offloaded, in host memory between calls",
    )
    quantization: Literal["int8", "float8", "nf4"] | None = Field(
        None,
        description="frozen weights of the network's blocks in fewer bits, by torchao: int8, float8 or nf4; for frozen "
        "roles and for the networks under LoRA adapters",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    attention_backend: str | None = Field(None, description="a diffusers attention backend, for instance flash")
    negative_prompt: str = Field("", description="what guidance's unconditional pass reads")
    share_base_with: str | None = Field(
        None, description="the frozen role whose network this role's LoRA adapter works on, instead of a copy"
    )
    lora: LoraConfig = Field(default_factory=LoraConfig)

    @model_validator(mode="after")
    def _placement_is_for_frozen_roles(self) -> "ModelConfig":
        if self.trainable and self.placement != "auto":
            raise ValueError(
                f"placement={self.placement} is for frozen roles, and this one is trainable; remove the key. Trained "
                "networks are where the launch puts them (fsdp_offload_params in accelerate's config offloads them)"
            )
        return self

    @model_validator(mode="after")
    def _quantization_is_for_frozen_weights(self) -> "ModelConfig":
        if self.quantization is None:
            return self
        key = f"quantization={self.quantization}"
        if self.trainable and not self.lora.enable:
            raise ValueError(f"{key}, but this role's weights are trained; train a LoRA (lora.enable: true) instead")
        if self.share_base_with is not None:
            raise ValueError(f"{key} belongs to the role whose network this is: models.{self.share_base_with}")
        if self.placement == "offloaded":
            raise ValueError(
                f"{key} and placement=offloaded don't go together; keep the quantised weights on the device"
            )
        if self.lora.dora:
            raise ValueError(f"{key} and lora.dora don't go together: DoRA needs the norms of the whole weights")
        return self


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
    context_parallel_degree: int = Field(
        1, ge=1, description="processes that share the tokens of each clip, for clips too long for one"
    )
    timeout_minutes: float | None = Field(
        None,
        gt=0,
        description="how long a process waits for the others before it fails; null: 30, with NCCL 10",
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
    log_grad_norms: bool = Field(
        False, description="log the norm of each role's gradients as its losses gave them, before any callback"
    )


class CheckpointConfig(Section):
    """When to save and what to resume from."""

    every_steps: int = Field(500, ge=0, description="save every N steps; 0 saves at the end only")
    keep_last: int = Field(3, ge=1, description="older checkpoints are removed")
    async_save: bool = Field(False, description="copy the state to host memory and write it while the training goes on")
    resume_from_checkpoint: str | None = Field(
        None,
        description="latest, a checkpoint directory, or auto: latest if there is one, else start; for restarts",
    )


class TrackerConfig(Section):
    """Where metrics go beside metrics.jsonl."""

    trackers: list[str] = Field(
        ["tensorboard"], description="accelerate trackers: tensorboard, wandb, trackio, ...; [] for none"
    )
    project_name: str = Field("fv_distill", description="the trackers' project")
    run_name: str | None = Field(None, description="the run's name in wandb and trackio")
    log_every_steps: int = Field(1, ge=1, description="log to trackers every N steps")
    sigma_losses_every_steps: int = Field(
        50, ge=0, description="average losses by noise level over N steps; 0 leaves them out"
    )


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

    @model_validator(mode="after")
    def _a_restart_keeps_its_run(self) -> "TrainingConfig":
        if self.overwrite and self.checkpoint.resume_from_checkpoint == "auto":
            raise ValueError(
                "overwrite removes a run and resume_from_checkpoint=auto goes on with it, and a restart is the same "
                "command again: give one of them"
            )
        return self


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
    export_format: Literal["diffusers", "lora", "merged"] | None = Field(
        None,
        description="a complete directory, an adapter for load_lora_weights, or one merged into a directory; null "
        "is lora for a student trained as one, unless it streams, else diffusers",
    )
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

    @model_validator(mode="before")
    @classmethod
    def _shared_bases_are_named(cls, data: Any) -> Any:
        """A role on another's network comes from where that comes from."""
        models = data.get("models") if isinstance(data, dict) else None
        if not isinstance(models, dict):
            return data
        filled = dict(models)
        for role, model in models.items():
            base = models.get(model.get("share_base_with")) if isinstance(model, dict) else None
            if isinstance(base, dict) and "init_from" in base:
                filled[role] = {"init_from": base["init_from"], **model}
        return {**data, "models": filled}

    @model_validator(mode="after")
    def _adapters_fit_together(self) -> "RunConfig":
        problems = [problem for role in self.models for problem in _adapter_problems(role, self.models)]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    _source_text: str = PrivateAttr("")
    _source_folder: Path | None = PrivateAttr(None)

    @property
    def source_text(self) -> str:
        """The YAML as it was written, before overrides; empty if the config was made in Python."""
        return self._source_text

    @property
    def source_folder(self) -> Path | None:
        """Where the YAML lies, and with it modules that a `_target_` may name; None if it was made in Python."""
        return self._source_folder

    def keep_source(self, text: str, folder: Path) -> None:
        """Remember the YAML that this config was read from, and its folder."""
        self._source_text, self._source_folder = text, folder

    def __eq__(self, other: object) -> bool:
        # pydantic would compare the source too, and then no config equals its resolved copy.
        return isinstance(other, RunConfig) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]


def _adapter_problems(role: str, models: dict[str, ModelConfig]) -> Iterator[str]:
    """What contradicts itself about a role's adapter and the network that it works on."""
    model, where = models[role], f"models.{role}"
    if model.lora.enable and not model.trainable:
        yield f"{where}.lora.enable is true but {where}.trainable is not; an adapter is there to be trained"
    name = model.share_base_with
    if name is None:
        return
    base = models.get(name)
    if base is None or name == role:
        others = ", ".join(other for other in models if other != role) or "no other"
        yield f"{where}.share_base_with: {name!r} is no other role; the config has {others}"
        return
    if base.trainable or base.lora.enable or base.share_base_with is not None:
        yield f"{where}.share_base_with: {name}, which has to be a frozen role with a network of its own"
    if not model.lora.enable:
        yield f"{where}.share_base_with: {name} would train that role's weights; set {where}.lora.enable: true"
    if model.init_from != base.init_from:
        yield f"{where}.init_from={model.init_from!r} contradicts share_base_with: {name}; leave it out"
    own = {"weights": model.weights, "attention_backend": model.attention_backend}
    own |= {"dtype": None if model.dtype == "auto" else model.dtype}
    for key in (key for key, value in own.items() if value is not None):
        yield f"{where}.{key} belongs to the shared network; set models.{name}.{key}"
