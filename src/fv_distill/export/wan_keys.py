"""Names of Wan's weights: the original release's, which Self-Forcing shares, and diffusers'.

The two networks are the same function of the same tensors: nothing is transposed, split or scaled, so a conversion
renames keys and is exact in both directions. Wan 2.1 text-to-video, image-to-video and first-last-frame-to-video and
all of Wan 2.2's transformers have a subset of the keys below.
"""

import re
from collections.abc import Callable, Mapping

from torch import Tensor

# Original -> diffusers, of modules (their `weight` and `bias` follow) and of bare parameters.
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_IMAGE_ATTENTION = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
_BLOCK_MODULES = {
    **{f"self_attn.{original}": f"attn1.{own}" for original, own in _ATTENTION.items()},
    **{f"cross_attn.{original}": f"attn2.{own}" for original, own in (_ATTENTION | _IMAGE_ATTENTION).items()},
    # The original numbers a block's norms by kind, diffusers in the order of their use: before cross-attention
    # comes the original's norm3, before the feed-forward its norm2.
    "norm3": "norm2",
    "norm2": "norm3",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_BLOCK_PARAMETERS = {"modulation": "scale_shift_table"}
_MODULES = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
}
_PARAMETERS = {"head.modulation": "scale_shift_table", "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed"}

_BLOCK_KEY = re.compile(r"(blocks\.\d+\.)(.+)")


def _leaves(modules: Mapping[str, str], parameters: Mapping[str, str]) -> dict[str, str]:
    named = {f"{original}.{leaf}": f"{own}.{leaf}" for original, own in modules.items() for leaf in ("weight", "bias")}
    return named | dict(parameters)


_TO_DIFFUSERS = _leaves(_MODULES, _PARAMETERS)
_BLOCK_TO_DIFFUSERS = _leaves(_BLOCK_MODULES, _BLOCK_PARAMETERS)
_TO_ORIGINAL = {own: original for original, own in _TO_DIFFUSERS.items()}
_BLOCK_TO_ORIGINAL = {own: original for original, own in _BLOCK_TO_DIFFUSERS.items()}
assert len(_TO_ORIGINAL) == len(_TO_DIFFUSERS) and len(_BLOCK_TO_ORIGINAL) == len(_BLOCK_TO_DIFFUSERS)


def convert_state_dict(original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in the original Wan's key names under diffusers' names; the tensors themselves are handed on.

    Args:
        original: without wrappers' prefixes, as `read_original_checkpoint` gives them. It may lack keys.

    Raises:
        ValueError: listing the keys that no original Wan has.
    """
    return renamed_weights(original, to_diffusers_key, layout="original Wan", other=to_original_key)


def convert_state_dict_to_original(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `convert_state_dict`: diffusers' key names to the original Wan's.

    Raises:
        ValueError: listing the keys that diffusers' `WanTransformer3DModel` can't have.
    """
    return renamed_weights(weights, to_original_key, layout="diffusers Wan", other=to_diffusers_key)


def to_diffusers_key(key: str) -> str | None:
    """The diffusers name of an original key; None if the original Wan has no such key."""
    return _rename(key, _TO_DIFFUSERS, _BLOCK_TO_DIFFUSERS)


def to_original_key(key: str) -> str | None:
    """The original name of a diffusers key; None if diffusers' Wan has no such key."""
    return _rename(key, _TO_ORIGINAL, _BLOCK_TO_ORIGINAL)


def _rename(key: str, names: Mapping[str, str], block_names: Mapping[str, str]) -> str | None:
    block = _BLOCK_KEY.fullmatch(key)
    if block is None:
        return names.get(key)
    name = block_names.get(block[2])
    return None if name is None else block[1] + name


def renamed_weights(
    weights: Mapping[str, Tensor],
    rename: Callable[[str], str | None],
    *,
    layout: str,
    other: Callable[[str], str | None],
    shown: int = 8,
) -> dict[str, Tensor]:
    """Weights under the names that `rename` gives them; of another family too, which says what its layouts are called.

    Args:
        weights: by their names in one layout.
        rename: the name in the other layout; None for a key that this one doesn't have.
        layout: what messages call this layout.
        other: the other way, to tell weights that are renamed already.
        shown: how many unknown keys a message lists.

    Raises:
        ValueError: listing unknown keys.
    """
    unknown = [key for key in weights if rename(key) is None]
    if unknown:
        more = f" and {len(unknown) - shown} more" if len(unknown) > shown else ""
        # Some names belong to both layouts; that all do to the other one is no accident.
        swapped = all(other(key) is not None for key in weights)
        hint = "; they are the other layout's names: convert in the other direction, or not at all" if swapped else ""
        raise ValueError(f"not a key of the {layout} layout: {', '.join(unknown[:shown])}{more}{hint}")
    return {name: value for key, value in weights.items() if (name := rename(key)) is not None}
