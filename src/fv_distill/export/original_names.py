"""A network's weights in the names that its family was published with."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from . import matrixgame2_keys, wan_keys

_BY_CLASS: dict[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {
    "WanTransformer3DModel": wan_keys.convert_state_dict_to_original,
    matrixgame2_keys.NETWORK_CLASS: matrixgame2_keys.convert_state_dict_to_published,
}


def to_original_names(transformer: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network, renamed.

    Raises:
        ValueError: for a family whose published names are not known here.
    """
    name = type(transformer).__name__
    if name not in _BY_CLASS:
        raise ValueError(
            f"--format original knows the names of {', '.join(_BY_CLASS)}, and of no {name}; use diffusers"
        )
    return _BY_CLASS[name](transformer.state_dict())
