"""Adapters: how a network is called."""

from fv_distill._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "base": ["ModelBase"],
        "conditioning": ["Conditioning", "PreparedBatch", "UncondPolicy", "unconditional"],
        "wan": ["WanModel"],
    },
)
