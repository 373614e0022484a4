"""Python that samples one clip from an export, for its card."""

import json

from .student_info import StudentInfo, public_name

_PROMPT = "a cat walks through snow"
_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
# The low-noise network of a pipeline with two.
_SECOND = "transformer_2"
_ANY = "DiffusionPipeline"


def sampling_snippet(info: StudentInfo, *, name: str) -> str:
    """Code to be run where the export `name` lies, or anywhere if that is a Hub id."""
    if info.causal is not None:
        prepared, shown = _streamed(info)
        return "\n".join(
            [
                "from diffusers.utils import export_to_gif",
                "from fv_distill.generation import VideoStreamer",
                "from PIL import Image",
                *(["import torch"] if prepared else []),
                "",
                f"streamer = VideoStreamer.from_pretrained({_quoted(name)})",
                *prepared,
                f"chunks = streamer.stream({shown}, seed=0)",
                "frames = [Image.fromarray(frame) for chunk in chunks for frame in chunk]",
                'export_to_gif(frames, "sample.gif")',
            ]
        )
    # The base model's scheduler doesn't visit the trained noise levels; a whole export has its own in its place.
    scheduler = [_SCHEDULER] if info.lora_weights is not None and info.sigmas is not None else []
    prompt = {"prompt": _PROMPT} if info.reads_text else {}
    call = {**prompt, **info.pipeline_call}
    image = [_image_line(info)] if info.needs_image else []
    return "\n".join(
        [
            "import torch",
            *_imports(info, scheduler),
            *(["from PIL import Image"] if image else []),
            "",
            'device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)',
            *_loading(info, name, scheduler),
            *image,
            *_action_lines(info),
            "torch.manual_seed(0)",
            "result = pipe(",
            *(["    image=image,"] if image else []),
            *(f"    {name}={name}," for name in info.actions),
            *(f"    {key}={_quoted(value) if isinstance(value, str) else repr(value)}," for key, value in call.items()),
            '    output_type="pil",',
            ")",
            'export_to_gif(result.frames[0], "sample.gif")',
        ]
    )


def _image_line(info: StudentInfo) -> str:
    # A pipeline that takes no size makes clips of the image's shape, in a size of its own.
    size = f"({info.call.get('width', 832)}, {info.call.get('height', 480)})"
    return f'image = Image.new("RGB", {size}, "gray")  # or your own: Image.open("first_frame.png")'


def _action_lines(info: StudentInfo) -> list[str]:
    """Nothing that is done, for each action."""
    return [f"{name} = torch.zeros({', '.join(map(str, shape))})" for name, shape in info.actions.items()]


def _streamed(info: StudentInfo) -> tuple[list[str], str]:
    """What has to be there before a causal student is streamed, and the arguments that say what to show."""
    if info.reads_text:
        return [], _quoted(_PROMPT)
    size = f"3, {info.call['height']}, {info.call['width']}"
    lines = [f"image = torch.full(({size}), 0.5)  # your own first frame, in [0, 1]", *_action_lines(info)]
    return lines, f"image=image, actions={{{', '.join(f'{_quoted(name)}: {name}' for name in info.actions)}}}"


def _imports(info: StudentInfo, scheduler: list[str]) -> list[str]:
    names = scheduler if info.pipeline else [_loader(info), *scheduler]
    own = f"from {info.pipeline.rpartition('.')[0]} import {_loader(info)}" if info.pipeline else ""
    lines = [f"from diffusers import {', '.join(names)}" if names else "", "from diffusers.utils import export_to_gif"]
    return [line for line in (*lines, own) if line]


def _loader(info: StudentInfo) -> str:
    """The class that loads the pipeline; the index of a LoRA's base model may name another than the adapter was for."""
    if info.pipeline is not None:
        return info.pipeline.rpartition(".")[2]
    return str(info.pipeline_config.get("_class_name", _ANY)) if info.lora_weights is not None else _ANY


def _loading(info: StudentInfo, name: str, scheduler: list[str]) -> list[str]:
    if info.lora_weights is None:
        return [f"pipe = {_loader(info)}.from_pretrained({_quoted(name)}, dtype=dtype).to(device)"]
    base = _quoted(public_name(info.base_model))
    second = ", load_into_transformer_2=True" if info.component == _SECOND else ""
    return [
        f"pipe = {_loader(info)}.from_pretrained({base}, dtype=dtype).to(device)",
        f"pipe.load_lora_weights({_quoted(name)}, weight_name={_quoted(info.lora_weights)}{second})",
        *(f'pipe.scheduler = {kind}.from_pretrained({_quoted(name)}, subfolder="scheduler")' for kind in scheduler),
    ]


def _quoted(value: str) -> str:
    # JSON's escapes are Python's too, except those of characters beyond 16 bits.
    return json.dumps(value, ensure_ascii=False)
