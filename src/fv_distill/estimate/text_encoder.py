"""The size of a pipeline directory's text encoder, from its config."""

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from fv_distill.models.pretrained import load_component_config


@dataclass(frozen=True)
class TextEncoderSize:
    """A text encoder: the number of its parameters, and the width of its embeddings."""

    parameters: int
    width: int


NO_TEXT_ENCODER = TextEncoderSize(parameters=0, width=1)
"""Of a family without text; what it is handed is one number per token, which nobody reads."""


def measure_text_encoder(directory: Path) -> TextEncoderSize:
    """The encoder that a model's prompts are encoded with.

    Raises:
        FileNotFoundError: if the directory has none.
    """
    (class_name,) = load_component_config(directory, "text_encoder")["architectures"]
    config = transformers.AutoConfig.from_pretrained(directory / "text_encoder")
    with torch.device("meta"):
        encoder = getattr(transformers, class_name)(config)
    return TextEncoderSize(
        sum(parameter.numel() for parameter in encoder.parameters()), int(config.get_text_config().hidden_size)
    )
