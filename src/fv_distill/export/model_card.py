"""The README.md of an export: what it is, and a snippet that runs as it stands."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .diffusers_dir import StudentInfo

_CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-video
{hub_base}tags: [diffusers, text-to-video, distillation, fv_distill]
---

# {name}

{summary}

- base model: `{base_model}`
- method: `{method}`, {step} steps{averaged}
{sampling}
## Use it

```python
{snippet}
```
{note}"""

_SDE_NOTE = """
Between two steps the sample is noised afresh, and the pipeline draws that noise from torch's global generator:
`torch.manual_seed` fixes it, the pipeline's `generator` argument only fixes the start.
"""


_CAUSAL_NOTE = """
The network is block-causal: it generates chunk by chunk over a key-value cache, which needs `pip install fv_distill`.
Stock diffusers loads the weights, but its pipeline lets every frame see every other, which they were not trained for.
"""


def write_model_card(path: Path, info: "StudentInfo", *, name: str) -> None:
    """Write the card of the export called `name` to `path`."""
    steps = None if info.sigmas is None else len(info.sigmas)
    summary = "A fine-tuned video model." if steps is None else f"A video model that samples in {steps} network calls."
    sampling = ""
    if info.sigmas is not None:
        levels = ", ".join(f"{sigma:.6g}" for sigma in info.sigmas)
        sampling = f"- noise levels: {levels}; guidance 1 (none); sampling: {info.sample_type}\n"
    path.write_text(
        _CARD.format(
            name=name,
            summary=summary,
            # The Hub links a card to its base model by id; a directory is no id.
            hub_base="" if Path(info.base_model).is_dir() else f"base_model: {info.base_model}\n",
            base_model=info.base_model,
            method=info.method,
            step=info.step,
            averaged=", averaged weights" if info.averaged else "",
            sampling=sampling,
            snippet=sampling_snippet(info, name=name),
            note=_note(info),
        )
    )


def _note(info: "StudentInfo") -> str:
    if info.causal is not None:
        return _CAUSAL_NOTE
    return _SDE_NOTE if info.sigmas is not None and info.sample_type == "sde" else ""


def sampling_snippet(info: "StudentInfo", *, name: str) -> str:
    """Python that samples one clip, to be run where the export lies."""
    if info.causal is not None:
        return "\n".join(
            [
                "from diffusers.utils import export_to_gif",
                "from fv_distill.generation import VideoStreamer",
                "",
                f'streamer = VideoStreamer.from_pretrained("{name}")',
                'chunks = streamer.stream("a cat walks through snow", seed=0)',
                "frames = [frame / 255 for chunk in chunks for frame in chunk]",
                'export_to_gif(frames, "sample.gif")',
            ]
        )
    call = {"prompt": "a cat walks through snow", **info.pipeline_call}
    lines = [f"    {key}={value!r}," for key, value in call.items()]
    loading = [f'pipe = DiffusionPipeline.from_pretrained("{name}", dtype=dtype).to(device)']
    if info.lora is not None:
        loading = [
            f'pipe = DiffusionPipeline.from_pretrained("{info.base_model}", dtype=dtype).to(device)',
            f'pipe.load_lora_weights("{name}")',
        ]
        if info.sigmas is not None:
            scheduler = f'FlowMatchEulerDiscreteScheduler.from_pretrained("{name}", subfolder="scheduler")'
            loading = [
                "from diffusers import FlowMatchEulerDiscreteScheduler",
                *loading,
                f"pipe.scheduler = {scheduler}",
            ]
    return "\n".join(
        [
            "import torch",
            "from diffusers import DiffusionPipeline",
            "from diffusers.utils import export_to_gif",
            "",
            'device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)',
            *loading,
            "torch.manual_seed(0)",
            "result = pipe(",
            *lines,
            '    output_type="pil",',
            ")",
            'export_to_gif(result.frames[0], "sample.gif")',
        ]
    )
