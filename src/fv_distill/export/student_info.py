"""What an export says about itself, in `fv_distill.json`. Free of torch: `fv-distill push` reads it."""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

INFO_FILE = "fv_distill.json"


@dataclass(frozen=True)
class StudentInfo:
    """What a user has to know to sample from an export; written to `fv_distill.json`.

    Attributes:
        base_model: the directory or Hub id it was distilled from.
        method: dotted path of the training method.
        sigmas: the trained noise levels without the final 0, or None to sample as the base model is sampled.
        sample_type: "sde" or "ode".
        causal: adapter, chunk size, window, sinks and context noise of a student that streams; None for others.
        step: optimisation steps of the training run.
        averaged: whether these are EMA weights.
        call: further arguments of the pipeline's call: size, frames, text length.
        guidance: its arguments for the student's guidance; None is `guidance_scale=1` for a few-step student.
        versions: of the libraries that trained it.
        hub_model_id: where the export is going to be uploaded; the card's snippet then loads it from there.
        training: what the run was like, in the card's order; see `fv_distill.export.run_record.training_record`.
        lora_weights: the file name of a LoRA that is loaded onto the base model; None for whole weights.
        lora: that adapter's rank, alpha, target modules and kind.
        component: the pipeline's name of the network.
        pipeline_config: what the export's `model_index.json` says otherwise than the base model's.
        needs_image: whether its pipeline is called with the first frame.
        pipeline: dotted path of the pipeline's class if it is this library's; None is diffusers'.
        reads_text: whether clips are made of a prompt.
        actions: what is done in a clip, by the data column and argument: its shape for the training clips, `[F, n]`.
    """

    base_model: str
    method: str
    sigmas: tuple[float, ...] | None = None
    sample_type: str = "sde"
    causal: dict[str, Any] | None = None
    step: int = 0
    averaged: bool = False
    call: dict[str, Any] = field(default_factory=dict)
    guidance: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    hub_model_id: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    lora_weights: str | None = None
    lora: dict[str, Any] | None = None
    component: str = "transformer"
    pipeline_config: dict[str, Any] = field(default_factory=dict)
    needs_image: bool = False
    pipeline: str | None = None
    reads_text: bool = True
    actions: dict[str, list[int]] = field(default_factory=dict)

    @property
    def pipeline_call(self) -> dict[str, Any]:
        """All arguments of the pipeline's call but the prompt; few-step students have a step count and no guidance."""
        few_step = {} if self.sigmas is None else {"num_inference_steps": len(self.sigmas)}
        guidance = self.guidance
        if guidance is None:
            guidance = {} if self.sigmas is None else {"guidance_scale": 1.0}
        return {**self.call, **few_step, **guidance}


def write_info(directory: Path, info: StudentInfo) -> None:
    """Write `fv_distill.json`, with the pipeline's whole call and no more of a local base model than its name."""
    values = asdict(replace(info, base_model=public_name(info.base_model)))
    (directory / INFO_FILE).write_text(json.dumps({**values, "call": info.pipeline_call}, indent=2) + "\n")


def read_info(directory: Path) -> StudentInfo | None:
    """The info of an export, also of one that an older version wrote; None where the directory has none."""
    path = directory / INFO_FILE
    if not path.is_file():
        return None
    known = {item.name for item in fields(StudentInfo)}
    values = {key: value for key, value in json.loads(path.read_text()).items() if key in known}
    values["sigmas"] = None if values.get("sigmas") is None else tuple(values["sigmas"])
    return StudentInfo(**values)


def public_name(model: str) -> str:
    """A Hub id as it is; of a local path the last part, since the rest tells strangers about somebody's disk."""
    return model if is_hub_id(model) else Path(model).expanduser().resolve().name


def is_hub_id(model: str) -> bool:
    """Whether a name has the form owner/name and is no local path."""
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and not Path(model).exists()
