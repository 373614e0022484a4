"""Names of Matrix-Game 2's weights: the published ones and this library's, and the same for its config.

The backbone is Wan's and renamed as Wan is; action modules keep their names. In published files all keys begin with
`model.`, which is what the published code's wrapper of the network is called.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .wan_keys import renamed_weights, to_diffusers_key, to_original_key

NETWORK_CLASS = "MatrixGame2Transformer3DModel"
_PREFIX = "model."
_ACTION_KEY = re.compile(r"blocks\.\d+\.action_model\..+")
# Published name -> own, of a config's entries.
_CONFIG = {
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "num_heads": "num_attention_heads",
    "num_layers": "num_layers",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "eps": "eps",
    "action_config": "action_config",
    "local_attn_size": "local_attn_size",
    "sink_size": "sink_size",
}
# Of causal networks only.
_OPTIONAL = ("local_attn_size", "sink_size")


def convert_state_dict(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in the published key names, without the prefix, under own names; the tensors are handed on.

    Raises:
        ValueError: listing the keys that no published Matrix-Game 2 has.
    """
    return renamed_weights(published, to_own_key, layout="published Matrix-Game 2", other=to_published_key)


def convert_state_dict_to_published(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `convert_state_dict`, with the prefix of published files.

    Raises:
        ValueError: listing the keys that this library's network can't have.
    """
    named = renamed_weights(weights, to_published_key, layout="Matrix-Game 2", other=to_own_key)
    return {f"{_PREFIX}{name}": value for name, value in named.items()}


def to_own_key(key: str) -> str | None:
    """The own name of a published key without prefix; None if there is no such key."""
    return key if _ACTION_KEY.fullmatch(key) else to_diffusers_key(key)


def to_published_key(key: str) -> str | None:
    """The published name of an own key, without prefix; None if there is no such key."""
    return key if _ACTION_KEY.fullmatch(key) else to_original_key(key)


def network_config(published: Mapping[str, Any]) -> dict[str, Any]:
    """The config of this library's network from a published `config.json`.

    Raises:
        ValueError: if it is no Matrix-Game 2's.
    """
    missing = [name for name in ("dim", *_CONFIG) if name not in published and name not in _OPTIONAL]
    if missing:
        raise ValueError(f"the config lacks {', '.join(missing)}; a published Matrix-Game 2's config.json has them")
    if published["dim"] % published["num_heads"]:
        raise ValueError(f"the config's dim={published['dim']} does not divide into num_heads={published['num_heads']}")
    own = {own: published[name] for name, own in _CONFIG.items() if name in published}
    return {**own, "attention_head_dim": published["dim"] // published["num_heads"]}
