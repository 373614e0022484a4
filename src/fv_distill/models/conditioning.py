"""What a network is conditioned on, and what its unconditional pass sees instead."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

TEXT_COLUMNS = ("pooled_text_embedding", "text_embedding_2", "text_mask_2")
"""What a family with several text encoders makes of a caption besides `text`; it goes where the text goes."""
IMAGE_COLUMNS = ("clip_feature", "first_frame_latent", "pil_image")
ACTION_COLUMNS = ("mouse_cond", "keyboard_cond")
CHANNEL_COLUMNS = {"image": IMAGE_COLUMNS, "action": ACTION_COLUMNS}


@dataclass(frozen=True)
class Conditioning:
    """The conditions of one batch.

    Attributes:
        text: embeddings `[B, L, D]`, zero at padding; None when the text was dropped.
        text_mask: True at real tokens, `[B, L]`.
        extras: tensors of further channels under their data column's name, first dimension B.
    """

    text: Tensor | None
    text_mask: Tensor | None
    extras: dict[str, Tensor] = field(default_factory=dict)

    def row(self, index: int) -> "Conditioning":
        """The conditions of one sample, batch size 1."""
        rows = slice(index, index + 1)
        return Conditioning(
            None if self.text is None else self.text[rows],
            None if self.text_mask is None else self.text_mask[rows],
            {name: value[rows] for name, value in self.extras.items()},
        )


@dataclass(frozen=True)
class UncondPolicy:
    """How each channel of the unconditional pass is made; see `CfgUncondOptions` for the values."""

    text: Literal["negative_prompt", "keep", "zero", "drop"] = "negative_prompt"
    image: Literal["keep", "zero", "drop"] = "keep"
    action: Literal["keep", "zero", "drop"] = "keep"


@dataclass(frozen=True)
class PreparedBatch:
    """A batch as a network takes it: normalised latents `[B, C, T, H, W]` and their conditioning."""

    latents: Tensor
    conditioning: Conditioning


def check_condition_shapes(
    found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], *, owner: str
) -> None:
    """Compare the shapes of data columns, without the batch's dimension, with those that a network needs.

    Raises:
        ValueError: naming the column, what is there and what `owner` needs.
    """
    for column, shape in expected.items():
        if column not in found:
            raise ValueError(
                f"the rows of training.data.data_path have no {column}, which {owner} is conditioned on "
                f"(shape {tuple(shape)}); preprocess them with this model"
            )
        if tuple(found[column]) != tuple(shape):
            raise ValueError(
                f"{column} has the shape {tuple(found[column])}, but {owner} needs {tuple(shape)}; preprocess the rows "
                "with this model"
            )


def unconditional(conditioning: Conditioning, policy: UncondPolicy, negative: Conditioning | None) -> Conditioning:
    """The conditioning of guidance's unconditional pass.

    Args:
        conditioning: the conditional pass's.
        policy: per channel: keep it, zero it, drop it or (text) take the negative prompt.
        negative: the negative prompt's text, batch size 1 or B; only needed by the policy `negative_prompt`.
    """
    text, mask = conditioning.text, conditioning.text_mask
    extras = dict(conditioning.extras)
    if policy.text == "negative_prompt":
        assert negative is not None and negative.text is not None, "the negative prompt must be encoded first"
        text, mask = _expand(negative.text, conditioning), _expand(negative.text_mask, conditioning)
        extras |= {
            name: expanded
            for name, value in negative.extras.items()
            if (expanded := _expand(value, conditioning)) is not None
        }
    elif policy.text == "zero" and text is not None:
        text = torch.zeros_like(text)
        extras |= {
            name: torch.zeros_like(extras[name]) for name in TEXT_COLUMNS if name in extras and "mask" not in name
        }
    elif policy.text == "drop":
        text, mask = None, None
        extras = {name: value for name, value in extras.items() if name not in TEXT_COLUMNS}
    for channel, columns in CHANNEL_COLUMNS.items():
        for column in columns:
            if column in extras:
                extras = _apply(extras, column, getattr(policy, channel))
    return replace(conditioning, text=text, text_mask=mask, extras=extras)


def _apply(extras: dict[str, Tensor], column: str, policy: str) -> dict[str, Tensor]:
    if policy == "keep":
        return extras
    if policy == "zero":
        return {**extras, column: torch.zeros_like(extras[column])}
    return {name: value for name, value in extras.items() if name != column}


def _expand(value: Tensor | None, like: Conditioning) -> Tensor | None:
    if value is None or like.text is None:
        return value
    return value.expand(like.text.shape[0], *value.shape[1:])
