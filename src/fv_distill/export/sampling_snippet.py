"""Python that samples one clip from an export, for its card."""

import json

from .student_info import StudentInfo, public_name

_PROMPT = "a cat walks through snow"
_PIPELINE = "DiffusionPipeline"
_SCHEDULER = "FlowMatchEulerDiscreteScheduler"


def sampling_snippet(info: StudentInfo, *, name: str) -> str:
    """Code to be run where the export `name` lies, or anywhere if that is a Hub id."""
    if info.causal is not None:
        return "\n".join(
            [
                "from diffusers.utils import export_to_gif",
                "from fv_distill.generation import VideoStreamer",
                "from PIL import Image",
                *([] if "prompt" in info.inputs else ["import torch"]),
                "",
                f"streamer = VideoStreamer.from_pretrained({_quoted(name)})",
                *_prepared(info),
                f"chunks = streamer.stream({_streamed(info)}, seed=0)",
                "frames = [Image.fromarray(frame) for chunk in chunks for frame in chunk]",
                'export_to_gif(frames, "sample.gif")',
            ]
        )
    # The base model's scheduler doesn't visit the trained noise levels; a whole export has its own in its place.
    scheduler = [_SCHEDULER] if info.lora_weights is not None and info.sigmas is not None else []
    prompt = {"prompt": _PROMPT} if "prompt" in info.inputs else {}
    call = {**prompt, **info.pipeline_call}
    return "\n".join(
        [
            "import torch",
            *_imports(info, scheduler),
            "",
            'device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)',
            *_loading(info, name, scheduler),
            *_prepared(info),
            "torch.manual_seed(0)",
            "result = pipe(",
            *(f"    {name}={name}," for name in info.inputs if name not in prompt),
            *(f"    {key}={_quoted(value) if isinstance(value, str) else repr(value)}," for key, value in call.items()),
            '    output_type="pil",',
            ")",
            'export_to_gif(result.frames[0], "sample.gif")',
        ]
    )


def _streamed(info: StudentInfo) -> str:
    if "prompt" in info.inputs:
        return _quoted(_PROMPT)
    actions = ", ".join(f"{_quoted(name)}: {name}" for name in info.inputs if name != "image")
    return f"image=image, actions={{{actions}}}"


def _prepared(info: StudentInfo) -> list[str]:
    """Where there is no prompt: a grey first frame, and nothing that is done."""
    if "prompt" in info.inputs:
        return []
    size = f"3, {info.call['height']}, {info.call['width']}"
    actions = [
        f"{name} = torch.zeros({', '.join(map(str, shape))})" for name, shape in info.inputs.items() if name != "image"
    ]
    return [f"image = torch.full(({size}), 0.5)  # a first frame, in [0, 1]", *actions]


def _imports(info: StudentInfo, scheduler: list[str]) -> list[str]:
    names = scheduler if info.pipeline else [_PIPELINE, *scheduler]
    own = f"from {info.pipeline.rpartition('.')[0]} import {_pipeline_name(info)}" if info.pipeline else ""
    lines = [f"from diffusers import {', '.join(names)}" if names else "", "from diffusers.utils import export_to_gif"]
    return [line for line in (*lines, own) if line]


def _pipeline_name(info: StudentInfo) -> str:
    return info.pipeline.rpartition(".")[2] if info.pipeline else _PIPELINE


def _loading(info: StudentInfo, name: str, scheduler: list[str]) -> list[str]:
    pipeline = _pipeline_name(info)
    if info.lora_weights is None:
        return [f"pipe = {pipeline}.from_pretrained({_quoted(name)}, dtype=dtype).to(device)"]
    return [
        f"pipe = {pipeline}.from_pretrained({_quoted(public_name(info.base_model))}, dtype=dtype).to(device)",
        f"pipe.load_lora_weights({_quoted(name)}, weight_name={_quoted(info.lora_weights)})",
        *(f'pipe.scheduler = {kind}.from_pretrained({_quoted(name)}, subfolder="scheduler")' for kind in scheduler),
    ]


def _quoted(value: str) -> str:
    # JSON's escapes are Python's too, except those of characters beyond 16 bits.
    return json.dumps(value, ensure_ascii=False)
