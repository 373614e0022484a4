"""Networks cut to a few of their equal blocks: what is linear in their number is measured on few of them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

SHALLOW, DEEPER = 2, 4
"""The two depths that a line is drawn through."""


def find_blocks(network: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The one list of equal blocks in a network and its attribute; None where there is none, or several."""
    lists = _block_lists(network)
    return lists[0] if len(lists) == 1 else None


def all_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of all such lists; some networks have two, of blocks of two kinds."""
    return [block for _, blocks in _block_lists(network) for block in blocks]


def _block_lists(network: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    names = split_classes(network)
    return [
        (name, child)
        for name, child in network.named_children()
        if isinstance(child, nn.ModuleList) and len(child) and all(type(block).__name__ in names for block in child)
    ]


def split_classes(network: Any) -> set[str]:
    """Names of the block classes that sharding and checkpointing work with, as a diffusers network states them."""
    return set(network._no_split_modules or ())


def can_be_cut(networks: Iterable[nn.Module]) -> bool:
    """Whether all networks have more blocks than are measured anyway."""
    found = [find_blocks(network) for network in networks]
    return all(blocks is not None and len(blocks[1]) > DEEPER + SHALLOW for blocks in found)


@contextmanager
def cut_to(networks: Iterable[nn.Module], depth: int) -> Iterator[None]:
    """Run the block with the first `depth` blocks of each network."""
    whole = []
    for network in networks:
        found = find_blocks(network)
        assert found is not None, "checked by can_be_cut"
        name, blocks = found
        whole.append((network, name, blocks))
        setattr(network, name, nn.ModuleList(list(blocks)[:depth]))
    try:
        yield
    finally:
        for network, name, blocks in whole:
            setattr(network, name, blocks)


def extrapolate(shallow: float, deeper: float, depth: int) -> int:
    """The value at `depth` of the line through those at `SHALLOW` and `DEEPER` blocks."""
    return round(shallow + (deeper - shallow) * (depth - SHALLOW) / (DEEPER - SHALLOW))
